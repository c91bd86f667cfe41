"""Runs another library on a checkpoint with one of our vectors, in an environment of its own; `test_engines.py` starts it.

python other_engines.py LIBRARY CHECKPOINT VECTOR_FILE JOB    prints what the library finds, as one line of JSON
"""

import json
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def repeng(folder, path, job):
    """Logits under a GGUF control vector."""
    from repeng import ControlModel, ControlVector

    control = ControlVector.import_gguf(path)
    model = ControlModel(load(folder), list(control.directions))
    model.set_control(control, job["multiplier"])
    return model(torch.tensor(job["ids"])).logits.tolist()


def steering_vectors(folder, path, job):
    """Logits under the vectors of our own file, which any reader of safetensors can read."""
    from safetensors.torch import load_file
    from steering_vectors import SteeringVector

    layers = {int(name.rpartition(".")[2]): v for name, v in load_file(path).items() if name.startswith("layer.")}
    model = load(folder)
    with SteeringVector(layers).apply(model, multiplier=job["multiplier"]):
        return model(torch.tensor(job["ids"])).logits.tolist()


def lm_eval(folder, path, job):
    """Log-likelihoods of the choices of a local task, under a `.pt` file of the model class `steered`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="steered",
        model_args={"pretrained": folder, "steer_path": path, "device": "cpu", "dtype": "float32"},
        tasks=[job["task"]],
        task_manager=TaskManager(include_path=job["tasks"], include_defaults=False),
        batch_size=job["batch_size"],
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][job["task"]], key=lambda sample: sample["doc_id"])
    return [[loglikelihood for loglikelihood, _ in sample["filtered_resps"]] for sample in samples]


def llama_cpp(model_path, path, job):
    """Logits of llama.cpp at a prompt's tokens, and the tokens that it continues it with, greedily; in fp32 throughout.

    One package brings a library that runs on most Linux systems, the other the declarations of that version's C API.
    """
    import xllamacpp.xllamacpp
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    ffi = get_ffi()
    lib = ffi.dlopen(xllamacpp.xllamacpp.__file__)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(model_path.encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(model, settings)
    size, layers = lib.llama_model_n_embd(model), lib.llama_model_n_layer(model)
    if path:
        # As llama.cpp's own loader lays a file out: direction.k at row k - 1, and rows applied to blocks 1, 2, ...
        rows = np.zeros((layers, size), dtype=np.float32)
        for tensor in gguf.GGUFReader(path).tensors:
            rows[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        data = ffi.cast("float *", ffi.from_buffer(rows))
        if lib.llama_set_adapter_cvec(context, data, rows.size, size, 1, layers):
            raise SystemExit("llama.cpp refuses the control vector")
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens, past):
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, past + place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if lib.llama_decode(context, batch):
            raise SystemExit("llama.cpp cannot run the tokens")
        logits = [ffi.unpack(lib.llama_get_logits_ith(context, place), width) for place in range(len(tokens))]
        lib.llama_batch_free(batch)
        return logits

    logits, answer = decode(job["ids"], 0), []
    last = logits[-1]
    while len(answer) < job["max_new_tokens"]:
        answer.append(int(np.argmax(last)))
        last = decode(answer[-1:], len(job["ids"]) + len(answer) - 1)[-1]
    return {"logits": logits[-job["keep"] :], "answer": answer}


if __name__ == "__main__":
    library, folder, path, job = sys.argv[1:]
    with torch.no_grad():
        print(json.dumps({"found": globals()[library](folder, path, json.loads(job))}))
