"""Shared fixtures: tiny random models of both TransformerLens classes, a byte-level tokenizer, the authors' files.

Shapes in annotations are checked while tests run.
"""

from __future__ import annotations

from jaxtyping import install_import_hook

with install_import_hook("caa_lens", "typecheck.check"):
    import caa_lens as caa
    import caa_lens.cli

import threading
from pathlib import Path

import jaxtyping
import pytest
import torch
from judge_server import Endpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from caa_lens.models.checkpoints import Checkpoint
from caa_lens.models.loading import from_checkpoint

SHARED = Path(__file__).parents[2] / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def has_hooked() -> bool:
    import transformer_lens

    try:
        return transformer_lens.HookedTransformer is not None
    except (AttributeError, ImportError):
        return False


KINDS = [
    pytest.param(
        "hooked", marks=pytest.mark.skipif(not has_hooked(), reason="TransformerLens 4 has no HookedTransformer")
    ),
    "bridge",
]


def fixture_path(relative: str) -> Path:
    path = SHARED / "fixtures" / relative
    if not path.exists():
        pytest.skip(f"the authors' files are not here: {path.name} is read from ../shared/fixtures")
    return path


@pytest.fixture
def unchecked():
    """Annotations are not checked in this test: it gives what they forbid, as a user without a type checker may."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """Every byte a token; a BOS, a pad and ChatML's marks; a chat template."""
    marks = ["<|bos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=marks[0],
        pad_token=marks[1],
        eos_token=marks[3],
        additional_special_tokens=marks,
    )
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(fixture_path("llama2-tokenizer"))


def tiny_llama(vocabulary: int, *, grouped: bool = True, seed: int = 0, context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2 if grouped else 4,
        max_position_embeddings=context,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def as_lens(kind: str, hf_model, tokenizer, name: str = "tiny"):
    return from_checkpoint(Checkpoint(name, hf_model, tokenizer, None), kind)


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def model(kind, byte_tokenizer):
    """A tiny chat model of either class."""
    return as_lens(kind, tiny_llama(len(byte_tokenizer)), byte_tokenizer)


@pytest.fixture(scope="session")
def llama2_chat(kind, llama_tokenizer):
    """A tiny random Llama-2-chat with the real tokenizer, and the Hugging Face model it was made of."""
    hf_model = tiny_llama(32000, grouped=False, seed=1)
    plain = tiny_llama(32000, grouped=False, seed=1)
    return as_lens(kind, hf_model, llama_tokenizer, "Llama-2-tiny-chat"), plain


@pytest.fixture(scope="session")
def gpt2(kind, byte_tokenizer):
    """A tiny LayerNorm model with learned positions, for what RMS-norm models cannot show."""
    if kind == "hooked":
        pytest.skip("HookedTransformer builds GPT-2 by its hub name only")
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=len(byte_tokenizer), n_positions=256, n_embd=48, n_layer=3, n_head=4)
    return as_lens(kind, GPT2LMHeadModel(config).eval(), byte_tokenizer, "tiny-gpt2")


@pytest.fixture(scope="session")
def pairs():
    """Free-text pairs of very different length."""
    return caa.load_pairs(
        [
            ("Hi.", "Good day to you, sir.", "Hey there you, man."),
            ("What is the time, if I may ask you so late?", "It is noon.", "Noon, mate."),
            ("Say no.", "I must decline your kind and generous offer.", "Nah, no way I will take that one now."),
            ("Where?", "In the garden.", "Out back there."),
            ("Tell me a little about the long road that leads to the sea.", "It winds.", "Twisty."),
        ],
        name="tone",
    )


@pytest.fixture(scope="session")
def vectors(model, pairs):
    return caa.extract(model, pairs, progress=False)


@pytest.fixture(scope="session")
def held_out(pairs):
    """The same completions under prompts that no vector was made from."""
    return caa.load_pairs(
        [(f"{pair.prompt} Once more.", pair.positive, pair.negative) for pair in pairs], name="held-out"
    )


@pytest.fixture(scope="session")
def embedded():
    """The embedded model, by the class that the installed TransformerLens prefers."""
    return caa.load_model("smollm2-135m-instruct")


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def no_access(monkeypatch):
    """No key of a judge and no endpoint but the test's own, and no proxy before it."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve():
    """Starts endpoints of judges, and ends them."""
    started = []

    def start(reply):
        server = Endpoint(reply)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
