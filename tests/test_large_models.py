"""Half precision, quantised weights, several devices, and the shapes of Llama-2 13B and 70B, all in tiny."""

import importlib.util
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import as_lens, relative_error, tiny_llama
from pretend_devices import device, pretend_devices
from test_extraction import MULTIPLE_CHOICE, paper_vectors
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import caa_lens as caa
from caa_lens.directions import Moments
from caa_lens.models import hooked
from caa_lens.models.checkpoints import load_checkpoint
from caa_lens.templates import default_template

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=HALF, ids=str)
def half(request, kind, byte_tokenizer):
    """The tiny model with its weights rounded to half precision, and in it."""
    return as_lens(kind, tiny_llama(len(byte_tokenizer)).to(request.param), byte_tokenizer), request.param


def test_vectors_of_half_precision_weights_are_close_and_full_precision(half, vectors, pairs):
    model, dtype = half
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = caa.extract(model, pairs, progress=False)
    for layer, vector in found.items():
        assert vector.tensor.dtype == torch.float32
        # 8 or 11 bits of mantissa, in a difference of two activations.
        assert relative_error(vector.tensor, vectors[layer].tensor) < (0.05 if dtype == torch.bfloat16 else 0.01)
        assert vector.residual_norm == pytest.approx(vectors[layer].residual_norm, rel=0.02)


def test_what_is_summed_may_exceed_half_precision(half, pairs):
    """Activations of 3e4 have a norm, and a sum over pairs, beyond the largest fp16 number of 65504."""
    model, _ = half

    def far_out_hook(activations, hook):
        return activations + 3e4

    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", far_out_hook)]):
        found = caa.extract(model, pairs, layers=[2], progress=False)
    assert found[2].residual_norm == pytest.approx(3e4 * 48**0.5, rel=0.01)
    assert torch.isfinite(found[2].tensor).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_moments_neither_overflow_nor_stall(dtype):
    ones = torch.ones(1, 1, 4, dtype=dtype)
    moments, naive = Moments.zeros(1, 4), torch.zeros(1, 4, dtype=dtype)
    for _ in range(700):
        moments.update(100 * ones, ones)
        naive += 100 * ones[0]
    assert torch.equal(moments.mean_difference, torch.full((1, 4), 99.0))
    assert not torch.isclose(naive / 700, torch.tensor(100.0, dtype=dtype), rtol=0.1).any()


@pytest.mark.parametrize(
    "operator", [caa.add, caa.ablate, caa.clamp, caa.gate(caa.add, 0.0)], ids=["add", "ablate", "clamp", "gate"]
)
def test_steering_keeps_the_dtype(half, vectors, operator):
    model, dtype = half
    tokens = torch.tensor([[5, 9, 40, 77], [6, 8, 41, 78]])
    seen = []
    with caa.steer(model, vectors, positions="all", operator=operator, strength=torch.tensor([1.0, -2.0])):
        with model.hooks(fwd_hooks=[(v.hook_name, lambda x, hook: seen.append(x.dtype)) for v in vectors.values()]):
            with torch.no_grad():
                logits = model(tokens)
    assert seen == [dtype] * 3
    assert logits.dtype == dtype
    plain = caa.generate(model, "Hi?", max_new_tokens=3)
    with caa.steer(model, 0 * vectors[1]):
        assert caa.generate(model, "Hi?", max_new_tokens=3) == plain


LLAMA2 = {"13b": (8, 8), "70b": (16, 2)}
"""Query and key heads: 13B has 40 of each, 70B has 64 and 8, eight queries to a key."""


def llama2(size):
    torch.manual_seed(4)
    heads, key_heads = LLAMA2[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=LLAMA2)
def llama2_large(request, kind, llama_tokenizer):
    """(lens model under its hub name, plain Hugging Face model)."""
    name = f"meta-llama/Llama-2-{request.param}-chat-hf"
    return as_lens(kind, llama2(request.param), llama_tokenizer, name), llama2(request.param)


def steered_logits(hf_model, ids, first, layer, direction):
    """Plain Hugging Face: the direction added behind a decoder layer, from one position on."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, first:] += direction

    handle = hf_model.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return hf_model(torch.tensor([ids])).logits[0]
    finally:
        handle.remove()


def test_llama2_13b_and_70b_shapes_are_the_papers(llama2_large, llama_tokenizer):
    """Extraction, steering, generation and the sweep against plain hooks on the Hugging Face model."""
    model, hf_model = llama2_large
    pairs = caa.load_pairs(MULTIPLE_CHOICE)
    vectors = caa.extract(model, pairs, progress=False)
    reference = paper_vectors(hf_model, llama_tokenizer, MULTIPLE_CHOICE, lambda q, a: f"[INST] {q} [/INST] {a}")
    for layer, expected in enumerate(reference):
        assert relative_error(vectors[layer].tensor, expected) < 1e-5

    v = 4 * vectors[1]
    ids = llama_tokenizer.encode("[INST] What now? [/INST]")
    first = len(ids) - 1  # the final "]"
    with caa.steer(model, v), torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids]))[0],
            steered_logits(hf_model, ids, first, 1, v.tensor),
            atol=1e-4,
            rtol=1e-4,
        )
        answer = caa.generate(model, "What now?", max_new_tokens=5)
    for _ in range(5):
        ids.append(int(steered_logits(hf_model, ids, first, 1, v.tensor)[-1].argmax()))
    assert answer == llama_tokenizer.decode(ids[first + 1 :], skip_special_tokens=True).strip()

    question = "Would you?\n\nChoices:\n(A) I would\n(B) I would not"
    held_out = caa.load_pairs([(question, "(A)", "(B)")])
    result = caa.sweep(model, vectors, held_out, multipliers=(-4, 0, 4), progress=False)
    ids = llama_tokenizer.encode(f"[INST] {question} [/INST] (")
    first = len(llama_tokenizer.encode(f"[INST] {question} [/INST]")) - 1
    letters = llama_tokenizer.convert_tokens_to_ids(["A", "B"])
    for row in result.items.itertuples():
        logits = steered_logits(hf_model, ids, first, row.layer, row.multiplier * vectors[row.layer].tensor)
        p = logits[-1].softmax(-1)[letters]
        assert row.value == pytest.approx(float(p[0] / p.sum()), abs=1e-5)
        assert row.mass == pytest.approx(float(p.sum()), rel=1e-3)


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_default_templates_of_llama2(size, byte_tokenizer):
    """Also where the tokenizer brings a chat template: the paper's form is the default."""
    assert default_template(f"meta-llama/Llama-2-{size}-chat-hf", byte_tokenizer) == caa.Llama2Chat()
    assert default_template(f"meta-llama/Llama-2-{size}-hf", byte_tokenizer) == caa.Llama2Base()


def on_two_devices(kind, tokenizer):
    """The tiny model with its embedding and first layer on one pretended device and the rest on the next; the bridge's unembedding
    is back on the first, as a device map may have it."""
    hf_model = tiny_llama(len(tokenizer))
    if kind == "hooked":
        model = as_lens(kind, hf_model, tokenizer)
        hooked.spread(model, device(0), 2)
        return model
    inner = hf_model.model
    places = {inner.embed_tokens: device(0), inner.rotary_emb: device(0), inner.norm: device(1)}
    places |= {layer: device(int(number >= 2)) for number, layer in enumerate(inner.layers)}
    places[hf_model.lm_head] = device(0)
    for module, place in places.items():
        module.to(place)
        # What accelerate's hooks do where a device map is given.
        module.register_forward_pre_hook(
            lambda m, args, kwargs, place=place: tree_map(
                lambda x: x.to(place) if isinstance(x, torch.Tensor) else x, (args, kwargs)
            ),
            with_kwargs=True,
        )
    return as_lens(kind, hf_model, tokenizer)


def everything(model, pairs, held_out):
    """What runs the model, one of each."""
    vectors = caa.extract(model, pairs, batch_size=2, progress=False)
    v = 3 * vectors[1]
    with caa.steer(model, v, strength=torch.tensor([1.0, -1.0])):
        answers = caa.generate(model, ["Hi?", "What now, then?"], max_new_tokens=3)
    with caa.steer(model, v, operator=caa.gate(caa.clamp, 0.0, along=vectors[0].tensor)):
        gated = caa.extract(model, pairs, progress=False)
    return {
        "vectors": vectors.stack(),
        "gated": gated.stack(),
        "answers": answers,
        "sweep": caa.sweep(model, vectors, held_out, progress=False).items,
        "loss": caa.text_loss(model, "It was a bright day. " * 3, v, window=32, progress=False).items,
        "projection": caa.project(model, vectors, "How are you?", steering=v, max_new_tokens=2, progress=False).values,
        "patch": caa.patch(model, vectors, held_out, layers=[0, 2], positions=[-2, -1], progress=False).to_pandas(),
        "swapped": caa.patch(model, "positive", held_out[0], positions=-1, progress=False).to_pandas(),
        "lens": caa.logit_lens(model, "How are you?").to_pandas(),
        "attribution": [caa.logit_attribution(model, v, "Hi?", norm=norm).effect for norm in ("frozen", "exact")],
    }


def test_a_model_on_two_devices_is_the_same_model(kind, byte_tokenizer, pairs, held_out):
    """Vectors, masks, cached prefixes and readouts follow each layer; nothing of two devices meets."""
    few = pairs[:3], held_out[:2]
    expected = everything(as_lens(kind, tiny_llama(len(byte_tokenizer)), byte_tokenizer), *few)
    with pretend_devices():
        model = on_two_devices(kind, byte_tokenizer)
        assert {p.device for p in model.parameters()} == {device(0), device(1)}
        found = everything(model, *few)
    for name, value in expected.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found[name], value, atol=1e-5)
        elif name == "answers":
            assert found[name] == value
        else:
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "2bit"}, "quantization='2bit': allowed are '4bit', '8bit'"),
        ({"quantization": "4bit", "kind": "hooked"}, "kind='bridge'"),
        ({"quantization": "8bit", "dtype": "float64"}, "computed in float32, bfloat16 or float16"),
        ({"quantization": "8bit"}, r"needs bitsandbytes: pip install 'caa-lens\[quantized\]'"),
        ({"n_devices": 0}, "must be at least 1"),
        ({"n_devices": 2, "device": "cpu"}, "give one of the two"),
        ({"n_devices": 2}, r"needs 2 GPUs \(n_devices=2\), there are 0"),
    ],
)
def test_options_that_cannot_be_met_are_refused_at_once(options, message, monkeypatch, unchecked):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(caa.InputError, match=message):
        caa.load_model("nowhere", **options)


class Asked(Exception):
    """Carries what `transformers` was asked for."""


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs and bitsandbytes, as far as asking goes; this is the second of its processes."""

    def ask(location, **options):
        raise Asked(options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ask)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (1000 + place.index, 2000))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("LOCAL_RANK", "1")


def asked_for(directory, **options):
    with pytest.raises(Asked) as asked:
        caa.load_model(directory, **options)
    return asked.value.args[0]


def test_a_process_takes_its_share_of_the_devices(directory, four_gpus):
    options = asked_for(directory, kind="bridge", n_devices=2)
    assert (options["device_map"], options["max_memory"]) == ("balanced", {2: 1002, 3: 1003})
    assert options["dtype"] == "auto"
    options = asked_for(directory, kind="bridge", quantization="8bit", device="cuda")
    assert options["device_map"] == {"": "cuda:1"}
    with pytest.raises(caa.InputError, match="process 1 of this machine needs 6 GPUs"):
        caa.load_model(directory, kind="bridge", n_devices=3)


def test_what_a_quantised_model_is_asked_for(directory, four_gpus):
    options = asked_for(directory, quantization="4bit")
    config = options["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert options["device_map"] == {"": "cuda:1"}
    options = asked_for(directory, quantization="8bit", dtype="float16", device="cpu")
    assert (options["quantization_config"].load_in_8bit, options["dtype"]) == (True, torch.float16)
    assert options["device_map"] == {"": "cpu"}
    both = asked_for(directory, quantization="4bit", n_devices=2)
    assert (both["device_map"], both["quantization_config"].load_in_4bit) == ("balanced", True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_weights_extract_and_steer(quantization, byte_tokenizer, pairs, held_out, tmp_path):
    """On the CPU, against the same weights as plain matrices, and sweeps against plain steered passes."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    model = caa.load_model(str(tmp_path), quantization=quantization, device="cpu")
    assert {p.dtype for p in model.parameters()} & {torch.uint8, torch.int8}
    found = caa.extract(model, pairs, progress=False)
    hf_model = load_checkpoint(
        tmp_path, dtype=None, device=torch.device("cpu"), quantization=quantization
    ).model.dequantize()
    plain = caa.extract(as_lens("bridge", hf_model.float(), byte_tokenizer), pairs, progress=False)
    # bitsandbytes' 8-bit products round the activations too.
    assert relative_error(found.stack(), plain.stack()) < (1e-4 if quantization == "4bit" else 0.1)
    result = caa.sweep(model, found, held_out, layers=[1], progress=False).items
    prompt = caa.ChatTemplate().encode_pair(model.tokenizer, held_out[0]).positive
    for row in result.query("item == 0").itertuples():
        with caa.steer(model, row.multiplier * found[1]), torch.no_grad():
            logprobs = model(torch.tensor([prompt.ids]))[0].float().log_softmax(-1)
        answer = range(prompt.completion_start, len(prompt.ids))
        mean = sum(float(logprobs[i - 1, prompt.ids[i]]) for i in answer) / len(answer)
        assert row.positive == pytest.approx(mean, abs=1e-4 if quantization == "4bit" else 0.05)
