"""Projections equal plain dot products however the tokens are run."""

import pytest
import torch
from test_plots import heights

import caa_lens as caa
from caa_lens.models import watch_inputs

QUESTIONS = ["Hi?", "What is the meaning of all this?", "Where did you go to yesterday?"]
TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "So <b>it</b> is."},
]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def residuals(model, ids, layers, **options):
    """resid_post of a plain `run_with_cache`, `[layer, token, d_model]`."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([list(ids)]), **options)
    return torch.stack([cache[name][0] for name in names])


def test_a_plain_pass_is_the_dot_product_with_the_cache(model, vectors):
    v = vectors[1]
    ids = caa.ChatTemplate().encode(model.tokenizer, QUESTIONS[1]).ids
    x = residuals(model, ids, range(3))
    expected = {
        "dot": x[1] @ v.tensor,
        "cosine": torch.cosine_similarity(x[1], v.tensor, dim=-1),
        "component": x[1] @ v.tensor / v.norm**2,
    }
    for measure, values in expected.items():
        found = caa.project(model, v, QUESTIONS[1], measure=measure)
        assert found.token_ids == ids
        assert found.layers == (1,)
        torch.testing.assert_close(found.values, values, **CLOSE)
    several = caa.project(model, vectors, QUESTIONS[1])
    torch.testing.assert_close(several.values, torch.einsum("ltd,ld->lt", x, vectors.stack()), **CLOSE)
    torch.testing.assert_close(several.at_layer(1).values, expected["dot"], **CLOSE)
    one_everywhere = caa.project(model, v, QUESTIONS[1], layers=[-1, 0])
    assert one_everywhere.layers == (0, 2)
    torch.testing.assert_close(one_everywhere.values, x[[0, 2]] @ v.tensor, **CLOSE)
    torch.testing.assert_close(
        caa.project(model, vectors, QUESTIONS[1], layers=[2]).values, several.values[2:], **CLOSE
    )


@pytest.mark.parametrize("steering", [None, 3.0], ids=["unsteered", "steered"])
@pytest.mark.parametrize("texts", [QUESTIONS, QUESTIONS[1:2], TURNS], ids=["batch", "one", "conversation"])
def test_captured_while_generating_is_one_pass_over_the_same_tokens(model, vectors, texts, steering):
    on = None if steering is None else steering * vectors[1]
    options = {"steering": on, "measure": "component"}
    found = caa.project(model, vectors, texts, max_new_tokens=12, **options)
    found = found if isinstance(found, list) else [found]
    for projection in found:
        assert len(projection.token_ids) > projection.instruction_end + 1
        again = caa.project(model, vectors, projection, **options)
        assert again.token_ids == projection.token_ids
        torch.testing.assert_close(projection.values, again.values, **CLOSE)
        if on is None:
            x = residuals(model, projection.token_ids, range(3))
        else:  # by hand: the vector is added from the end of the instruction on
            add = caa.steering_hooks(
                model, on, positions=slice(projection.instruction_end, None), tokens=ids(projection)
            )
            with model.hooks(fwd_hooks=add):
                x = residuals(model, projection.token_ids, range(3))
        by_hand = torch.einsum("ltd,ld->lt", x, vectors.stack()) / vectors.stack().norm(dim=-1, keepdim=True) ** 2
        torch.testing.assert_close(projection.values, by_hand, **CLOSE)


def ids(projection):
    return torch.tensor([projection.token_ids])


def test_generated_tokens_are_those_of_generate(model, vectors):
    on = 3 * vectors[1]
    with caa.steer(model, on):
        answers = caa.generate(model, QUESTIONS, max_new_tokens=9)
        inside = caa.project(model, vectors[2], QUESTIONS, max_new_tokens=9)
    steered = caa.project(model, vectors[2], QUESTIONS, max_new_tokens=9, steering=on)
    for answer, by_context, by_option in zip(answers, inside, steered, strict=True):
        new = by_option.token_ids[by_option.instruction_end + 1 :]
        assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == answer
        assert by_context.token_ids == by_option.token_ids
        torch.testing.assert_close(by_context.values, by_option.values, **CLOSE)
        assert by_context.steering == "by a surrounding steer()"
        assert by_option.steering == "3 * tone at layer 1, after_instruction"


def test_an_answer_ends_before_its_stop_token(model, vectors, monkeypatch):
    """Rows that stop early keep exactly their own tokens while others go on."""
    free = caa.project(model, vectors[1], QUESTIONS, max_new_tokens=10)
    stop = free[0].token_ids[free[0].instruction_end + 3]
    monkeypatch.setattr(caa.ChatTemplate, "stop_ids", lambda self, tokenizer: frozenset({stop}))
    stopped = caa.project(model, vectors[1], QUESTIONS, max_new_tokens=10)
    for whole, cut in zip(free, stopped, strict=True):
        answer = list(whole.token_ids[whole.instruction_end + 1 :])
        length = whole.instruction_end + 1 + (answer.index(stop) if stop in answer else len(answer))
        assert cut.token_ids == whole.token_ids[:length]
        torch.testing.assert_close(cut.values, whole.values[:length], **CLOSE)
    assert len(stopped[0].tokens) < len(free[0].tokens)


def test_the_difference_is_what_steering_added(model, vectors):
    """At the steered layer: 2 units of the vector from the instruction's end on, nothing before."""
    v = vectors[1]
    steered = caa.project(model, v, QUESTIONS[0], max_new_tokens=6, steering=2 * v, measure="component")
    change = steered - caa.project(model, v, steered, measure="component")
    expected = (torch.arange(len(change.tokens)) >= change.instruction_end).float() * 2
    torch.testing.assert_close(change.values, expected, **CLOSE)
    assert change.steering == "2 * tone at layer 1, after_instruction minus none"
    assert float((steered - steered).values.abs().max()) == 0
    for other in (
        caa.project(model, v, QUESTIONS[1], measure="component"),
        caa.project(model, v, steered),
        caa.project(model, 2 * v, steered, measure="component"),
        caa.project(model, v, steered, layers=[1, 2], measure="component"),
    ):
        with pytest.raises(caa.InputError, match="cannot be subtracted"):
            _ = steered - other


def test_batches_of_any_size_and_kind_equal_each_text_alone(model, vectors):
    texts = [*QUESTIONS, TURNS, list(range(10, 30)), torch.arange(40, 45)]
    alone = [caa.project(model, vectors, text, steering=vectors[0], positions="all") for text in texts]
    for batch_size in (1, 2, 8):
        together = caa.project(
            model, vectors, texts, steering=vectors[0], positions="all", batch_size=batch_size, progress=False
        )
        for one, other in zip(alone, together, strict=True):
            assert one.token_ids == other.token_ids
            torch.testing.assert_close(one.values, other.values, **CLOSE)


def test_each_text_gets_its_own_strength(model, vectors):
    """The longest first: what groups texts by length must not swap the rows of a surrounding context."""
    texts, v = [QUESTIONS[0] + " And why, after all, is that so?", QUESTIONS[0]], vectors[1]
    with caa.steer(model, v, strength=torch.tensor([2.0, 0.0])):
        together = caa.project(model, v, texts, measure="component")
    alone = [caa.project(model, v, texts[0], measure="component", steering=2 * v)]
    alone.append(caa.project(model, v, texts[1], measure="component"))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.values, other.values, **CLOSE)


def test_long_texts_in_pieces_equal_whole_ones(model, vectors, monkeypatch):
    texts = [QUESTIONS[1], "x", QUESTIONS[1] * 3]
    whole = caa.project(model, vectors, texts)
    monkeypatch.setattr("caa_lens.projection.PIECE", 7)
    lengths = []
    with watch_inputs(model, lambda inputs: lengths.append(inputs.shape[1])):
        pieces = caa.project(model, vectors, texts)
        assert max(lengths) == 7
        lengths.clear()
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: None)]):
            hooked = caa.project(model, vectors, texts)
        assert lengths == sorted(len(p.tokens) for p in whole)  # the user's own hooks see each text at once
    for one, other, third in zip(whole, pieces, hooked, strict=True):
        torch.testing.assert_close(one.values, other.values, **CLOSE)
        torch.testing.assert_close(one.values, third.values, **CLOSE)


def test_token_ids_are_steered_where_their_marker_ends(model, vectors):
    text = caa.project(model, vectors, QUESTIONS[1], steering=vectors[0])
    plain_ids = caa.project(model, vectors, text.token_ids, steering=vectors[0])
    assert plain_ids.instruction_end is None
    torch.testing.assert_close(plain_ids.values, text.values, **CLOSE)
    with pytest.raises(caa.InputError, match="occurs 0 times in the tokens"):
        caa.project(model, vectors, [5, 6, 7], steering=vectors[0])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_hooks_before_are_seen_and_nothing_is_left(model, vectors):
    zero = (vectors[1].hook_name, lambda x, hook: 0 * x)
    with model.hooks(fwd_hooks=[zero]):
        assert not caa.project(model, vectors[1], "Hi?").values.any()
        assert not caa.project(model, vectors[1], "Hi?", measure="cosine").values.any()
    assert caa.project(model, vectors[1], "Hi?").values.any()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_plot_draws_a_bar_a_token_or_a_cell_a_layer_and_token(model, vectors):
    one, several = caa.project(model, vectors[1], "Hi?"), caa.project(model, vectors, "Hi?")
    assert heights(one.plot().axes[0]) == pytest.approx(one.values.tolist(), rel=1e-5)
    cells = several.plot().axes[0].images[0].get_array()
    assert cells.flatten().tolist() == pytest.approx(several.values.flatten().tolist(), rel=1e-5)


def test_to_pandas_is_one_row_a_layer_and_token(model, vectors):
    projection = caa.project(model, vectors, "Hi?")
    table = projection.to_pandas()
    pivot = table.pivot(index="layer", columns="position", values="value").to_numpy()
    torch.testing.assert_close(torch.tensor(pivot, dtype=torch.float32), projection.values)
    assert "".join(table[table["layer"] == 2]["token"]) == "".join(projection.tokens)


@pytest.mark.parametrize(
    ("vector", "text", "options", "message"),
    [
        (lambda v: v.stack(), "x", {}, "takes a SteeringVector or a VectorSet; got Tensor"),
        (lambda v: v[1].retarget("other"), "x", {}, r"made on other, this is tiny.*retarget\('tiny'\)"),
        (
            lambda v: caa.SteeringVector(torch.ones(8), 0, caa.Provenance("tiny", n_layers=3, d_model=8)),
            "x",
            {},
            "width 8, tiny has d_model 48",
        ),
        (
            lambda v: caa.SteeringVector(torch.ones(48), 7, caa.Provenance("tiny", n_layers=9, d_model=48)),
            "x",
            {},
            "layer 7 is out of range",
        ),
        (lambda v: v[1], "x", {"layers": [5]}, "layer 5 is out of range"),
        (lambda v: caa.VectorSet([v[1]]), "x", {"layers": [0]}, "no vector for layer 0"),
        (lambda v: v[1], "x", {"measure": "angle"}, "allowed are 'dot', 'cosine', 'component'"),
        (lambda v: 0 * v[1], "x", {"measure": "component"}, "which has no direction"),
        (lambda v: v[1], "", {}, "without tokens"),
        (lambda v: v[1], [], {}, "no text to project"),
        (lambda v: v[1], torch.tensor([], dtype=torch.long), {}, "without tokens"),
        (lambda v: v[1], [5, 9999], {}, "token id 9999 is outside"),
        (lambda v: v[1], "x" * 600, {}, "exceed the context of 512"),
        (lambda v: v[1], "x" * 400, {"max_new_tokens": 100}, "exceed the context of 512"),
        (lambda v: v[1], "x", {"max_new_tokens": -1}, "not negative"),
        (lambda v: v[1], "x", {"batch_size": 0}, "at least 1"),
        (lambda v: v[1], "x", {"steering": [], "positions": "all"}, "no vector to steer with"),
        (lambda v: v[1], [{"role": "assistant", "content": "x"}], {}, "got the roles none"),
        (lambda v: v[1], [["x"]], {}, "list of {'role', 'content'} mappings"),
        (lambda v: v[1], 5, {}, "got int"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(model, vectors, vector, text, options, message, unchecked):
    ran = ("blocks.0.hook_resid_post", lambda x, hook: pytest.fail("the model ran"))
    with model.hooks(fwd_hooks=[ran]), pytest.raises(caa.CaaLensError, match=message):
        caa.project(model, vector(vectors), text, **options)


def test_a_vector_of_centred_weights_is_told_from_raw_ones(model, vectors):
    v = vectors[1]
    provenance = caa.Provenance(**{**vars(v.provenance), "basis": "centred"})
    centred = caa.SteeringVector(v.tensor, 1, provenance)
    with pytest.warns(caa.CaaLensWarning, match="made with centred weights, this model's are raw"):
        caa.project(model, centred, "Hi?")


def test_models_with_learned_positions_and_padding(gpt2, pairs):
    vectors = caa.extract(gpt2, pairs, progress=False)
    together = caa.project(gpt2, vectors, QUESTIONS, max_new_tokens=5, steering=vectors[1])
    for one, question in zip(together, QUESTIONS, strict=True):
        alone = caa.project(gpt2, vectors, question, max_new_tokens=5, steering=vectors[1])
        assert alone.token_ids == one.token_ids
        torch.testing.assert_close(alone.values, one.values, **CLOSE)
        torch.testing.assert_close(caa.project(gpt2, vectors, one, steering=vectors[1]).values, one.values, **CLOSE)
