"""A vector baked into a bias is the vector added by hooks at all positions, in memory and in plain transformers."""

import json
import os

import pytest
import torch
from conftest import as_lens, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import caa_lens as caa
from caa_lens.models import device_of, pad, run

QUESTIONS = ["Hi?", "What is the meaning of all this?", "Where did you go to yesterday?"]
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def vector(layer: int, *, model: str = "tiny", norm: float = 3.0, seed: int = 0) -> caa.SteeringVector:
    tensor = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    return caa.SteeringVector(tensor, layer, caa.Provenance(model=model, n_layers=3, d_model=48)).with_norm(norm)


def padded(model):
    rows = [caa.ChatTemplate().encode(model.tokenizer, question, "Fine, thanks.").ids for question in QUESTIONS]
    return pad(rows, side="left", device=device_of(model))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of all real tokens of a left-padded batch."""
    tokens, mask = padded(model)
    found, _ = run(model, tokens, mask, logits=tokens.shape[1])
    return found[mask.bool()]


def assert_baked_is_steered(model, vectors, tolerance: float = 1e-4) -> None:
    plain = logits(model)
    with caa.steer(model, vectors, positions="all"):
        steered = logits(model)
    baked = caa.bake(model, vectors)
    assert type(baked) is type(model)
    assert not torch.allclose(steered, plain, atol=0.1)
    torch.testing.assert_close(logits(baked), steered, atol=tolerance, rtol=tolerance)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1, 2), (1, 1)], ids=str)
def test_baked_is_steered_at_all_positions(model, layers):
    assert_baked_is_steered(model, [vector(layer, seed=seed) for seed, layer in enumerate(layers)])


def test_generation_is_that_of_steering(model):
    vectors = caa.VectorSet([vector(layer, seed=layer) for layer in range(3)])
    with caa.steer(model, vectors, positions="all"):
        steered = caa.generate(model, QUESTIONS, max_new_tokens=12)
    assert caa.generate(caa.bake(model, vectors), QUESTIONS, max_new_tokens=12) == steered
    assert caa.generate(model, QUESTIONS, max_new_tokens=12) != steered


def test_layer_norm_models_bake_too(gpt2):
    assert_baked_is_steered(gpt2, vector(1, model="tiny-gpt2"))


def test_the_model_is_not_touched_and_its_weights_are_shared(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = dict(vars(model.cfg))
    logits(model)  # the first pass makes TransformerLens' own hooks
    baked = caa.bake(model, vector(1))
    theirs = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    shared = [parameter for parameter in baked.parameters() if parameter.data_ptr() in theirs]
    assert len(shared) >= len(before) - 1
    assert not any(parameter is theirs[parameter.data_ptr()] for parameter in shared)
    assert not any(parameter.requires_grad for parameter in baked.parameters())
    assert not any(point.fwd_hooks for point in baked.hook_dict.values())
    assert caa.models.describe(baked) == caa.models.describe(model)
    baked.to(torch.float64)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert dict(vars(model.cfg)) == config


def test_baked_models_are_models(model, pairs):
    """Hooks of the copy are its own, it is steered further, baked again, and extracted from."""
    baked = caa.bake(model, vector(1))
    seen = []
    hook = ("blocks.1.hook_resid_post", lambda x, hook: seen.append(1))
    with model.hooks(fwd_hooks=[hook]):
        logits(baked)
    assert not seen
    with caa.steer(model, [vector(1), 2 * vector(2, seed=1)], positions="all"):
        expected = logits(model)
        vectors = caa.extract(model, pairs, progress=False)
    with caa.steer(baked, 2 * vector(2, seed=1), positions="all"):
        torch.testing.assert_close(logits(baked), expected, atol=1e-4, rtol=1e-4)
    twice = caa.bake(baked, 2 * vector(2, seed=1))
    torch.testing.assert_close(logits(twice), expected, atol=1e-4, rtol=1e-4)
    found = caa.extract(twice, pairs, progress=False)
    torch.testing.assert_close(found.stack(), vectors.stack(), atol=1e-4, rtol=1e-4)


def test_zero_vectors_bake_exactly_nothing(model):
    assert torch.equal(logits(caa.bake(model, 0 * vector(1))), logits(model))


def test_half_precision(kind, byte_tokenizer):
    model = as_lens(kind, tiny_llama(len(byte_tokenizer)).to(torch.bfloat16), byte_tokenizer)
    with caa.steer(model, vector(1), positions="all"):
        steered = logits(model)
    baked = caa.bake(model, vector(1))
    assert {parameter.dtype for parameter in baked.parameters()} == {torch.bfloat16}
    error = (logits(baked) - steered).abs().mean()
    assert error < 0.1 * (logits(model) - steered).abs().mean()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compatibility_mode(architecture, byte_tokenizer):
    if architecture == "llama":
        hf_model, name = tiny_llama(len(byte_tokenizer)), "tiny"
    else:
        config = GPT2Config(vocab_size=len(byte_tokenizer), n_positions=256, n_embd=48, n_layer=3, n_head=4)
        hf_model, name = GPT2LMHeadModel(config).eval(), "tiny-gpt2"
    model = as_lens("bridge", hf_model, byte_tokenizer, name)
    model.enable_compatibility_mode(disable_warnings=True)
    assert_baked_is_steered(model, [vector(0, model=name), vector(2, model=name, seed=1)])


@pytest.mark.parametrize("parallel", [True, False])
def test_attention_beside_the_mlp_is_fine(byte_tokenizer, parallel):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    config = GPTNeoXConfig(vocab_size=len(byte_tokenizer), use_parallel_residual=parallel, **sizes)
    assert_baked_is_steered(as_lens("bridge", GPTNeoXForCausalLM(config).eval(), byte_tokenizer), vector(1))


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (Gemma2Config(vocab_size=260, head_dim=12, **SIZES), Gemma2ForCausalLM, "does not reach resid_post"),
        (GraniteConfig(vocab_size=260, residual_multiplier=0.5, **SIZES), GraniteForCausalLM, "does not reach"),
        (MixtralConfig(vocab_size=260, num_local_experts=2, **SIZES), MixtralForCausalLM, "no MLP with one output"),
    ],
    ids=["norm behind", "factor behind", "experts"],
)
def test_outputs_that_do_not_arrive_are_refused(byte_tokenizer, config, architecture, message):
    torch.manual_seed(0)
    config.architectures = [architecture.__name__]
    model = as_lens("bridge", architecture(config).eval(), byte_tokenizer)
    plain = logits(model)
    with pytest.raises(caa.InputError, match=message):
        caa.bake(model, vector(1))
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_mlp": 96, "act_fn": "gelu", "use_normalization_before_and_after": True}, "does not reach resid_post"),
        ({"attn_only": True}, "no MLP with one output"),
        ({"d_mlp": 96, "act_fn": "gelu", "num_experts": 2, "experts_per_token": 1}, "no MLP with one output"),
    ],
    ids=["norm behind", "attention only", "experts"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hooked_blocks_whose_output_does_not_arrive_are_refused(kind, settings, message):
    if kind != "hooked":
        pytest.skip("shapes of a HookedTransformer")
    import transformer_lens

    config = transformer_lens.HookedTransformerConfig(
        n_layers=3,
        d_model=48,
        d_head=12,
        n_heads=4,
        n_ctx=64,
        d_vocab=260,
        normalization_type="RMS",
        seed=0,
        **settings,
    )
    model = transformer_lens.HookedTransformer(config)
    with pytest.raises(caa.InputError, match=message):
        caa.bake(model, vector(1, model=config.model_name))


def test_what_is_no_bias_is_refused(model):
    for operator in (caa.ablate, caa.clamp, caa.gate(caa.add, 0.0)):
        with pytest.raises(caa.InputError, match=r"only caa_lens\.add can be baked"):
            caa.bake(model, vector(1), operator=operator)
    with caa.steer(model, vector(1)), pytest.raises(caa.InputError, match="has hooks on it"):
        caa.bake(model, vector(1))
    with pytest.raises(caa.InputError, match="was made on other"):
        caa.bake(model, vector(1, model="other"))


@pytest.fixture
def checkpoint(tmp_path, byte_tokenizer):
    """A tiny Llama as a Hugging Face directory."""
    return saved(tiny_llama(len(byte_tokenizer)), byte_tokenizer, tmp_path / "tiny")


def saved(hf_model, tokenizer, folder):
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_logits(folder, model) -> torch.Tensor:
    """Those of `logits`, in transformers alone."""
    tokens, mask = padded(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hf_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return hf_model(tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()]


def test_exported_checkpoints_run_steered_in_plain_transformers(kind, checkpoint, tmp_path):
    vectors = [vector(0), -2 * vector(2, seed=1)]
    model = caa.load_model(str(checkpoint), kind=kind)
    with caa.steer(model, vectors, positions="all"):
        steered = logits(model)
        answers = caa.generate(model, QUESTIONS, max_new_tokens=12)
    folder = caa.export_checkpoint(checkpoint, vectors, tmp_path / "steered")
    torch.testing.assert_close(plain_logits(folder, model), steered, atol=1e-4, rtol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = [caa.ChatTemplate().encode(tokenizer, question).text for question in QUESTIONS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    ids = hf_model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12, do_sample=False
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == answers


def test_an_exported_checkpoint_is_the_original_with_biases(checkpoint, tmp_path):
    folder = caa.export_checkpoint(checkpoint, 2 * vector(1), tmp_path / "new" / "steered")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint, folder))
    weights = after.state_dict()
    assert all(torch.equal(tensor, weights.pop(name)) for name, tensor in before.state_dict().items())
    torch.testing.assert_close(weights.pop("model.layers.1.mlp.down_proj.bias"), 2 * vector(1).tensor)
    assert len(weights) == 8
    assert not any(bias.any() for bias in weights.values())
    old, new = (json.loads((path / "config.json").read_text()) for path in (checkpoint, folder))
    record = {"vector": "2 * 3.0 * vector", "layer": 1, "norm": 6.0, "pairs_hash": None}
    found = new.pop("caa_lens")
    assert [{**entry, "vector": ..., "norm": round(entry["norm"], 4)} for entry in found] == [{**record, "vector": ...}]
    assert found[0]["vector"].startswith("2 * ")
    assert new == {**old, "mlp_bias": True}
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (folder / file).read_bytes() == (checkpoint / file).read_bytes()
    # It loads as a bridge again, and can be steered and exported once more.
    again = caa.export_checkpoint(folder, -2 * vector(1).retarget("steered"), tmp_path / "back")
    bias = AutoModelForCausalLM.from_pretrained(again).state_dict()["model.layers.1.mlp.down_proj.bias"]
    torch.testing.assert_close(bias, torch.zeros(48), atol=1e-6, rtol=0)


def test_export_of_gpt2_uses_the_bias_that_it_has(byte_tokenizer, tmp_path):
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=len(byte_tokenizer), n_positions=256, n_embd=48, n_layer=3, n_head=4)
    source = saved(GPT2LMHeadModel(config).eval(), byte_tokenizer, tmp_path / "tiny")
    model = caa.load_model(str(source), kind="bridge")
    with caa.steer(model, vector(1), positions="all"):
        steered = logits(model)
    folder = caa.export_checkpoint(source, vector(1), tmp_path / "steered")
    torch.testing.assert_close(plain_logits(folder, model), steered, atol=1e-4, rtol=1e-4)


def test_export_in_another_dtype(checkpoint, tmp_path):
    folder = caa.export_checkpoint(checkpoint, vector(1), tmp_path / "half", dtype="bfloat16")
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    expected = vector(1).tensor.to(torch.bfloat16)
    assert torch.equal(weights["model.layers.1.mlp.down_proj.bias"], expected)


def test_export_refuses_before_it_writes(checkpoint, byte_tokenizer, tmp_path, monkeypatch):
    with pytest.raises(caa.InputError, match="exists already"):
        caa.export_checkpoint("no-such-model", vector(1), checkpoint)
    with pytest.raises(caa.InputError, match="was made on tiny"):
        caa.export_checkpoint(saved(tiny_llama(260), byte_tokenizer, tmp_path / "other"), vector(1), tmp_path / "out")
    mistral = MistralForCausalLM(MistralConfig(vocab_size=260, **SIZES))
    source = saved(mistral, byte_tokenizer, tmp_path / "mistral")
    with pytest.raises(caa.InputError, match=r"MistralForCausalLM .* without a bias"):
        caa.export_checkpoint(source, vector(1, model="mistral"), tmp_path / "out")

    def disk_full(self, folder, **options):
        os.makedirs(folder)
        raise OSError("no space left")

    monkeypatch.setattr(type(tiny_llama(260)), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="no space"):
        caa.export_checkpoint(checkpoint, vector(1), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "other", "mistral"}


@pytest.mark.slow
def test_the_embedded_model_bakes_and_exports(embedded, tmp_path):
    name = caa.models.describe(embedded).name
    info = caa.Provenance(model=name, n_layers=30, d_model=576)
    v = caa.SteeringVector(torch.randn(576, generator=torch.Generator().manual_seed(0)), 14, info).with_norm(40.0)
    tokens = torch.tensor([caa.ChatTemplate().encode(embedded.tokenizer, QUESTIONS[2], "Home.").ids])
    with torch.no_grad(), caa.steer(embedded, v, positions="all"):
        steered, _ = run(embedded, tokens, torch.ones_like(tokens), logits=tokens.shape[1])
    baked = caa.bake(embedded, v)
    with torch.no_grad():
        found, _ = run(baked, tokens, torch.ones_like(tokens), logits=tokens.shape[1])
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)
    folder = caa.export_checkpoint("smollm2-135m-instruct", v, tmp_path / "steered")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)
