"""Other engines, given our files, find our numbers: repeng, steering-vectors, lm-eval and llama.cpp.

They need an older transformers, so they live in an environment of their own, and are skipped without it. The variable
`CAA_LENS_OTHERS_PYTHON` names its interpreter; `.venv-bench` beside the Makefile is looked at otherwise.
"""

import json
import os
import subprocess
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import as_lens, tiny_llama
from transformers import AutoModelForCausalLM

import caa_lens as caa
from caa_lens.models.checkpoints import load_checkpoint
from caa_lens.steering import generate_ids

HERE = Path(__file__).parent
OTHERS = Path(os.environ.get("CAA_LENS_OTHERS_PYTHON", HERE.parent / ".venv-bench" / "bin" / "python"))
QUESTIONS = ["Decline.", "Where did you go to yesterday?", "Who?"]


MODULES = {"llama_cpp": ("xllamacpp", "llama_cpp_py_sync")}
"""What an engine of another name than its module's needs."""


def require(engine: str) -> None:
    if not OTHERS.exists():
        pytest.skip(f"no environment of other libraries at {OTHERS}: `make engines` builds it")
    for module in MODULES.get(engine, (engine,)):
        found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if subprocess.run([OTHERS, "-c", found], check=False).returncode:
            pytest.skip(f"{module} is not in the environment of {OTHERS}: `make engines` installs it")


def find(engine: str, checkpoint: Path, vectors: Path | str, **job):
    """What the engine finds, run in its own environment."""
    require(engine)
    command = [OTHERS, HERE / "other_engines.py", engine, checkpoint, vectors, json.dumps(job)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(checkpoint.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["found"]


def write(vectors: caa.VectorSet, path: Path) -> Path:
    """Our vectors in the file format that the end of the name says; what it has no room for is no concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", caa.CaaLensWarning)
        vectors.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """A tiny Llama as a Hugging Face directory that transformers 4 reads too."""
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    tiny_llama(len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tokens = {"bos_token": "<|bos|>", "pad_token": "<|pad|>", "eos_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tiny(byte_tokenizer):
    return as_lens("bridge", tiny_llama(len(byte_tokenizer)), byte_tokenizer)


@pytest.fixture(scope="module")
def two_layers(tiny, pairs):
    vectors = caa.extract(tiny, pairs, progress=False)
    return caa.VectorSet([vectors[1], 0.5 * vectors[2]])


@pytest.mark.parametrize(("library", "file"), [("repeng", "v.gguf"), ("steering_vectors", "v.safetensors")])
def test_steering_libraries_find_our_logits(tiny, two_layers, folder, tmp_path, library, file):
    ids = [caa.ChatTemplate().encode(tiny.tokenizer, QUESTIONS[1]).ids]
    found = find(library, folder, write(two_layers, tmp_path / file), ids=ids, multiplier=-1.5)
    with torch.no_grad(), caa.steer(tiny, -1.5 * two_layers, positions="all"):
        expected = tiny(torch.tensor(ids))
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, tiny(torch.tensor(ids)), atol=0.1)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "<|bos|>{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_finds_our_log_likelihoods(tiny, two_layers, folder, tmp_path):
    items = [(question, " By all means, sir.", " Nah, mate.") for question in QUESTIONS]
    data = tmp_path / "items.jsonl"
    rows = [{"prompt": prompt, "choices": choices} for prompt, *choices in items]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    vectors = write(caa.VectorSet([two_layers[1]]), tmp_path / "v.pt")
    found = find("lm_eval", folder, vectors, task="tiny_choice", tasks=str(tmp_path), batch_size=2)
    ours = caa.score(
        tiny,
        caa.load_pairs(items),
        two_layers[1],
        metric="logprob",
        multipliers=(0, 1),
        positions="all",
        template=caa.Plain(),
        progress=False,
    ).items
    columns = ["positive", "negative"]
    steered, plain = (ours[ours["multiplier"] == m].sort_values("item")[columns].to_numpy(float) for m in (1, 0))
    lengths = np.array([[len(choice) for choice in choices] for _, *choices in items])  # one token a byte
    np.testing.assert_allclose(np.array(found) / lengths, steered, atol=1e-4)
    assert np.abs(np.array(found) / lengths - plain).max() > 0.1


def to_gguf(folder: Path, path: Path) -> Path:
    """A Llama checkpoint as fp32 GGUF, by gguf's own names of tensors; without a vocabulary, as token ids are given."""
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = hf_model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in hf_model.state_dict().items():
        array = tensor.numpy()
        for part, n in ((".q_proj.weight", heads), (".k_proj.weight", kv_heads)):
            if name.endswith(part):  # llama.cpp rotates neighbours, transformers the two halves of a head
                array = array.reshape(n, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def compare_with_llama_cpp(model, vectors, folder: Path, tmp_path: Path, *, max_new_tokens: int, tolerance: float):
    """A GGUF control vector, and an exported checkpoint without one, are our steering at all positions."""
    ids = caa.ChatTemplate().encode(model.tokenizer, QUESTIONS[1]).ids
    with caa.steer(model, vectors, positions="all"), torch.no_grad():
        answer = generate_ids(model, [ids], max_new_tokens=max_new_tokens, stop_ids=frozenset())[0]
        expected = model(torch.tensor([ids]))[0]
    baked = to_gguf(caa.export_checkpoint(folder, vectors, tmp_path / "baked"), tmp_path / "baked.gguf")
    plain, control = to_gguf(folder, tmp_path / "plain.gguf"), write(vectors, tmp_path / "v.gguf")
    job = {"ids": ids, "max_new_tokens": max_new_tokens, "keep": 8}
    for found in (find("llama_cpp", plain, control, **job), find("llama_cpp", baked, "", **job)):
        logits = torch.tensor(found["logits"])
        torch.testing.assert_close(logits, expected[-8:], atol=tolerance, rtol=tolerance)
        assert found["answer"] == answer
    unsteered = torch.tensor(find("llama_cpp", plain, "", **job | {"max_new_tokens": 0})["logits"])
    assert (unsteered - expected[-8:]).abs().max() > 100 * tolerance


def test_llama_cpp_finds_our_logits(tiny, two_layers, folder, tmp_path):
    compare_with_llama_cpp(tiny, two_layers, folder, tmp_path, max_new_tokens=12, tolerance=1e-3)


@pytest.mark.slow
def test_llama_cpp_continues_as_the_embedded_model(embedded, tmp_path):
    require("llama_cpp")
    vectors = caa.extract(embedded, caa.load_pairs("formality")[:4], layers=[14], progress=False)
    checkpoint = load_checkpoint("smollm2-135m-instruct", dtype=None, device=torch.device("cpu"))
    folder = tmp_path / checkpoint.name
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    compare_with_llama_cpp(embedded, vectors, folder, tmp_path, max_new_tokens=24, tolerance=1e-2)
