"""The direct effect of a vector is the change it makes behind the last block; the lens at the last layer is the model."""

import warnings

import pytest
import torch
from conftest import as_lens, relative_error, tiny_llama
from test_models import processed_gpt2

import caa_lens as caa

TEXT = "What is the time?"


@pytest.fixture(params=["rms", "layer norm", "layer norm, processed"])
def any_norm(request, kind, byte_tokenizer):
    """RMS with a gain that is not one, LayerNorm with gain and bias, and LayerNorm folded and centred."""
    if request.param == "rms":
        hf_model = tiny_llama(len(byte_tokenizer))
        with torch.no_grad():
            hf_model.model.norm.weight.copy_(torch.rand(48) + 0.5)
        return as_lens(kind, hf_model, byte_tokenizer)
    return processed_gpt2(byte_tokenizer, kind, processed=request.param.endswith("processed"), gain=True)


def vector_for(model, seed=0, size=1.0):
    tensor = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    if caa.models.weight_basis(model) == "centred":
        tensor = tensor - tensor.mean()
    name = caa.models.describe(model).name
    return size * caa.SteeringVector(tensor, 2, caa.Provenance(name, n_layers=3, d_model=48))


def last_logits(model, hooks=()):
    ids = caa.ChatTemplate().encode(model.tokenizer, TEXT).ids
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([ids]))[0, -1]


def adding(v):
    return ("blocks.2.hook_resid_post", lambda x, hook: x + v.tensor)


def test_exact_is_the_change_in_logits_behind_the_last_block(any_norm):
    v = vector_for(any_norm)
    change = last_logits(any_norm, [adding(v)]) - last_logits(any_norm)
    found = caa.logit_attribution(any_norm, v, TEXT, norm="exact").effect
    torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-4)


def test_frozen_is_exact_where_the_norms_scale_is_frozen(any_norm):
    v = vector_for(any_norm)
    scale = []
    before = last_logits(any_norm, [("ln_final.hook_scale", lambda s, hook: scale.append(s))])
    freeze = ("ln_final.hook_scale", lambda s, hook: scale[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A forward hook edited hook_scale")
        after = last_logits(any_norm, [adding(v), freeze])
    found = caa.logit_attribution(any_norm, v, TEXT)
    torch.testing.assert_close(found.effect, after - before, atol=1e-5, rtol=1e-4)
    assert found.scale == pytest.approx(float(scale[0].flatten()[-1]))
    tripled = caa.logit_attribution(any_norm, 3 * v, TEXT).effect
    torch.testing.assert_close(tripled, 3 * found.effect, atol=1e-5, rtol=1e-4)


def test_first_order_error_shrinks_with_the_multiplier(any_norm):
    """The relative error is proportional to the multiplier; frozen keeps an error, the scale's own change."""
    errors = {"first_order": [], "frozen": []}
    scale = caa.logit_attribution(any_norm, vector_for(any_norm), TEXT).scale
    for share in (0.1, 0.05, 0.025):
        v = vector_for(any_norm, size=share * scale)
        change = last_logits(any_norm, [adding(v)]) - last_logits(any_norm)
        for norm, found in errors.items():
            found.append(relative_error(caa.logit_attribution(any_norm, v, TEXT, norm=norm).effect, change))
    for large, small in zip(errors["first_order"], errors["first_order"][1:], strict=False):
        assert small == pytest.approx(large / 2, rel=0.3)
    assert errors["first_order"][-1] < errors["frozen"][-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_the_same_to_rounding(kind, dtype, byte_tokenizer):
    plain, half = (as_lens(kind, tiny_llama(len(byte_tokenizer)).to(d), byte_tokenizer) for d in (torch.float32, dtype))
    assert next(half.unembed.parameters()).dtype == dtype
    v = vector_for(plain, size=2.0)
    for norm in ("frozen", "first_order", "exact"):
        found = caa.logit_attribution(half, v, TEXT, norm=norm).effect
        assert relative_error(found, caa.logit_attribution(plain, v, TEXT, norm=norm).effect) < 0.05
    assert relative_error(caa.logit_attribution(half, v).effect, caa.logit_attribution(plain, v).effect) < 0.05
    top = [caa.logit_lens(model, TEXT).top_probabilities[-1] for model in (plain, half)]
    torch.testing.assert_close(*top, atol=0.05, rtol=0.1)


def test_without_a_text_the_order_is_the_same(any_norm):
    v = vector_for(any_norm)
    alone, there = (caa.logit_attribution(any_norm, v, text).effect for text in (None, TEXT))
    assert float(torch.corrcoef(torch.stack([alone, there]))[0, 1]) == pytest.approx(1, abs=1e-5)
    table = caa.logit_attribution(any_norm, v).top_tokens(3)
    assert list(table["id"][:3]) == alone.topk(3).indices.tolist()
    assert list(table["id"][3:]) == alone.topk(3, largest=False).indices.flip(0).tolist()


def test_transformerlens_agrees_where_it_folds_the_gain(kind, byte_tokenizer):
    """`logit_attrs` leaves the final norm's gain out, so it is right for folded weights and ours for all."""
    processed, raw = (processed_gpt2(byte_tokenizer, kind, processed=p, gain=True) for p in (True, False))
    v = vector_for(processed)
    tokens = torch.tensor([caa.ChatTemplate().encode(byte_tokenizer, TEXT).ids])
    with torch.no_grad():
        _, cache = processed.run_with_cache(tokens)
    wanted = torch.arange(20)
    stack = v.tensor.expand(1, 1, 1, -1)
    theirs = torch.stack(
        [cache.logit_attrs(stack, tokens=torch.tensor([[t]]), pos_slice=-1).flatten()[0] for t in wanted.tolist()]
    )
    ours = caa.logit_attribution(processed, v, TEXT).effect
    torch.testing.assert_close(ours[wanted], theirs, atol=1e-5, rtol=1e-4)
    unprocessed = caa.logit_attribution(raw, v, TEXT).effect
    torch.testing.assert_close(unprocessed - unprocessed.mean(), ours - ours.mean(), atol=1e-4, rtol=1e-3)


def test_the_lens_at_the_last_layer_is_the_model(any_norm):
    lens = caa.logit_lens(any_norm, TEXT, positions=slice(None), top=3, watch=["Yes", "No"])
    ids = caa.ChatTemplate().encode(any_norm.tokenizer, TEXT).ids
    with torch.no_grad():
        expected = any_norm(torch.tensor([ids]))[0].softmax(-1)
    torch.testing.assert_close(lens.top_probabilities[-1], expected.topk(3).values, atol=1e-5, rtol=1e-4)
    watched = [any_norm.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "YN"]
    torch.testing.assert_close(lens.probabilities[-1], expected[:, watched], atol=1e-5, rtol=1e-4)
    assert "".join(lens.tokens) == any_norm.tokenizer.decode(list(ids))
    table = lens.to_pandas()
    assert len(table) == 3 * len(ids) * (3 + 2)
    assert set(table[table["rank"] == 0]["predicted"]) == {"Yes", "No"}
    assert lens.top_tokens(2) == list(
        table.query(f"layer == 2 and position == {len(ids) - 1} and rank > 0")["predicted"]
    )


def test_the_lens_is_transformerlens_accumulated_stream(model):
    """Norm and unembedding of `accumulated_resid`, layer by layer."""
    ids = caa.ChatTemplate().encode(model.tokenizer, TEXT).ids
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
        streams = cache.accumulated_resid(layer=3, incl_mid=False)
        expected = model.unembed(model.ln_final(streams[1:, 0])).softmax(-1)
    lens = caa.logit_lens(model, TEXT, positions=slice(None), top=1)
    torch.testing.assert_close(lens.top_probabilities, expected.topk(1).values, atol=1e-5, rtol=1e-4)


def test_the_lens_reads_steered_streams_inside_steer(model, vectors):
    plain = caa.logit_lens(model, TEXT, watch=["Yes"])
    with caa.steer(model, 3 * vectors[1]):
        steered = caa.logit_lens(model, TEXT, watch=["Yes"])
        expected = last_logits(model).softmax(-1)
    assert torch.equal(steered.probabilities[0], plain.probabilities[0])  # below the steered layer
    assert not torch.equal(steered.probabilities[1], plain.probabilities[1])
    torch.testing.assert_close(steered.top_probabilities[2, 0], expected.topk(5).values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "linear"}, "'frozen', 'first_order', 'exact'"),
        ({"norm": "exact"}, "give the text= it belongs to"),
    ],
)
def test_bad_attributions_are_refused(model, vectors, options, message, unchecked):
    with pytest.raises(caa.InputError, match=message):
        caa.logit_attribution(model, vectors[1], **options)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT, {"positions": slice(500, None)}, "holds none of the text's"),
        (TEXT, {"top": 0}, "allowed are 1 to"),
        (TEXT, {"watch": [""]}, "at least one token"),
        (TEXT, {"layers": [3]}, "layer 3 is out of range"),
        ("x" * 600, {}, "a context of 512"),
    ],
)
def test_bad_lenses_are_refused(model, text, options, message):
    with pytest.raises(caa.CaaLensError, match=message):
        caa.logit_lens(model, text, **options)
