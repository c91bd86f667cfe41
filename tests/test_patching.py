"""Patched runs equal plain forward passes with hooks; all of the source gives the source, nothing gives the target."""

import numpy as np
import pytest
import torch
from test_models import processed_gpt2

import caa_lens as caa
from caa_lens.chunks import Chunks

SOURCE, TARGET = "Is the sky blue?", "Is the sea grey?"
ANSWERS = ("Yes", "No")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def ids_of(model, text, completion=None):
    return caa.ChatTemplate().encode(model.tokenizer, text, completion).ids


def logits_of(model, ids, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([ids]))[0, -1]


def difference(model, logits, answers=ANSWERS):
    first, second = (model.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in answers)
    return float(logits[first] - logits[second])


def streams(model, ids):
    found = {}

    def watch(layer):
        return (f"blocks.{layer}.hook_resid_post", lambda x, hook: found.update({layer: x[0].clone()}))

    logits_of(model, ids, [watch(layer) for layer in range(3)])
    return found


def put(layer, position, new, *, add=False):
    def put_hook(x, hook):
        x = x.clone()
        x[0, position] = x[0, position] + new if add else new
        return x

    return (f"blocks.{layer}.hook_resid_post", put_hook)


def test_all_of_the_source_is_the_source_and_nothing_is_the_target(model):
    options = {"answers": ANSWERS, "positions": slice(None), "progress": False}
    for answers in (
        ANSWERS,
        ("a", "b"),
        ("No", "7"),
    ):  # the logits themselves, up to the constant that no difference sees
        source, target = (difference(model, logits_of(model, ids_of(model, t)), answers) for t in (SOURCE, TARGET))
        for window in (1, 2, 3):
            result = caa.patch(model, SOURCE, TARGET, window=window, **{**options, "answers": answers})
            torch.testing.assert_close(result.patched, torch.full((1, 3, 1), source), **CLOSE)
            torch.testing.assert_close(result.target, torch.tensor([target]), **CLOSE)
            torch.testing.assert_close(result.normalized, torch.ones(3, 1), **CLOSE)
    nothing = caa.patch(model, TARGET, TARGET, **options)
    assert torch.equal(nothing.patched, nothing.target.expand(1, 3, 1).contiguous())
    with pytest.raises(caa.InputError, match="the same logit difference"):
        nothing.to_pandas()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_each_layer_and_position_equals_a_run_with_hooks(model, mode, window):
    result = caa.patch(model, SOURCE, TARGET, answers=ANSWERS, mode=mode, window=window, progress=False)
    ids, new = ids_of(model, TARGET), streams(model, ids_of(model, SOURCE))
    assert result.positions == tuple(range(len(ids)))
    assert "".join(result.tokens) == model.tokenizer.decode(list(ids))
    expected = [
        [
            difference(
                model,
                logits_of(
                    model,
                    ids,
                    [put(m, pos, new[m][pos], add=mode == "add") for m in range(layer, min(layer + window, 3))],
                ),
            )
            for pos in range(len(ids))
        ]
        for layer in range(3)
    ]
    torch.testing.assert_close(result.patched[0], torch.tensor(expected), **CLOSE)
    assert result.effect[-1, :-1].abs().max() < 1e-5  # nothing attends to the last block's output
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_transformerlens_own_patching_gives_the_same_effects(model):
    """`get_act_patch_resid_pre` of layer l + 1 patches the output of block l."""
    from transformer_lens import patching as lens

    result = caa.patch(model, SOURCE, TARGET, answers=ANSWERS, progress=False)
    source, target = (torch.tensor([ids_of(model, text)]) for text in (SOURCE, TARGET))
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        theirs = lens.get_act_patch_resid_pre(model, target, cache, lambda x: torch.tensor(difference(model, x[0, -1])))
    torch.testing.assert_close(result.patched[0, :2], theirs[1:], **CLOSE)


def test_prompts_of_different_length_are_matched_from_the_end(model):
    short = "Grey?"
    ids, others = ids_of(model, short), ids_of(model, SOURCE)
    new = streams(model, others)
    with pytest.raises(
        caa.InputError, match=r"tokens, so they cannot be matched token by token; give positions counted"
    ):
        caa.patch(model, SOURCE, short, answers=ANSWERS)
    result = caa.patch(model, SOURCE, short, [1], answers=ANSWERS, positions=[-6, -1, slice(-4, None)], progress=False)
    spans = [slice(-6, -5), slice(-1, None), slice(-4, None)]
    expected = [difference(model, logits_of(model, ids, [put(1, s, new[1][s])])) for s in spans]
    torch.testing.assert_close(result.patched[0, 0], torch.tensor(expected), **CLOSE)
    assert result.tokens == ("s", "\n", "-4:")
    with pytest.raises(caa.InputError, match=r"'prefix' is \d+ tokens in the source and \d+ in the target"):
        caa.patch(model, SOURCE, short, answers=ANSWERS, positions="prefix")


def test_vectors_equal_steering_at_that_position(model, vectors):
    ids = ids_of(model, TARGET)
    result = caa.patch(model, 2 * vectors, TARGET, answers=ANSWERS, positions=[5, -1], progress=False)
    for row, layer in enumerate(vectors):
        for column, position in enumerate((5, len(ids) - 1)):
            mask = torch.arange(len(ids)) == position
            with caa.steer(model, 2 * vectors[layer], positions=mask):
                expected = difference(model, logits_of(model, ids))
            assert float(result.patched[0, row, column]) == pytest.approx(expected, abs=1e-5)
    put_there = caa.patch(
        model, vectors[1], TARGET, [0, 2], answers=ANSWERS, positions=-1, mode="replace", progress=False
    )
    for row, layer in enumerate((0, 2)):  # one direction, at the layers asked for
        expected = difference(model, logits_of(model, ids, [put(layer, -1, vectors[1].tensor)]))
        assert float(put_there.patched[0, row, 0]) == pytest.approx(expected, abs=1e-5)
    zero = caa.patch(model, 0 * vectors, TARGET, answers=ANSWERS, progress=False)
    assert zero.effect.abs().max() < 1e-5
    with pytest.raises(caa.InputError, match="a vector has no run of its own"):
        _ = zero.normalized
    assert "normalized" not in zero.to_pandas()


def test_the_pair_difference_is_the_stored_difference(model, tmp_path):
    """Positive activations put at the answer of the negative text = the stored difference added there."""
    pairs = caa.load_pairs([("Is it?\n(A) Yes\n(B) No", "(A)", "(B)"), ("Go?\n(A) no\n(B) yes", "(B)", "(A)")])
    caa.extract(model, pairs, store=tmp_path, progress=False)

    def again(pair):
        return f" So {pair.positive}", f" So {pair.negative}"

    for number, pair in enumerate(pairs):
        both = caa.ChatTemplate().encode_pair(model.tokenizer, pair)
        result = caa.patch(model, "positive", pair, answers=again, positions=both.answer, progress=False)
        ids = ids_of(model, pair.prompt, pair.negative + " So (")
        for layer in range(3):
            positive, negative = (side[number] for side in caa.load_activations(tmp_path, layer))
            v = caa.SteeringVector(positive - negative, layer, caa.Provenance("tiny", n_layers=3, d_model=48))
            with caa.steer(model, v, positions=torch.arange(len(ids)) == both.answer):
                expected = difference(model, logits_of(model, ids), (pair.positive[1], pair.negative[1]))
            assert float(result.patched[0, layer, 0]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(caa.InputError, match=r"both completions go on alike.*give answers="):
        caa.patch(model, "positive", pairs)


def test_many_pairs_are_the_mean_of_each(model, pairs):
    """Pairs of very different length, one of which is patched from its first token on."""
    first = min(len(ids_of(model, pair.prompt)) for pair in pairs)
    cases = {
        "side": ("positive", [slice(-2, None), -1, "prefix"]),
        "vector": (caa.extract(model, pairs, progress=False), [-first, -3, "instruction_end"]),
    }
    for source, positions in cases.values():
        together = caa.patch(model, source, pairs, positions=positions, progress=False)
        alone = [caa.patch(model, source, pair, positions=positions, progress=False) for pair in pairs]
        torch.testing.assert_close(together.patched, torch.cat([one.patched for one in alone]), **CLOSE)
        torch.testing.assert_close(together.effect, torch.stack([one.effect for one in alone]).mean(0), **CLOSE)
        small = caa.patch(model, source, pairs, positions=positions, batch_size=2, progress=False)
        torch.testing.assert_close(small.patched, together.patched, **CLOSE)
        effects = together.patched - together.target[:, None, None]
        table = together.to_pandas()
        assert list(table["layer"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        np.testing.assert_allclose(table["se"], (effects.std(0) / len(pairs) ** 0.5).flatten(), rtol=1e-5)


def test_what_both_sides_share_carries_no_difference(model, pairs):
    result = caa.patch(model, "negative", pairs[0], progress=False)
    both = caa.ChatTemplate().encode_pair(model.tokenizer, pairs[0])
    assert not result.effect[:, : both.answer].any()
    assert result.effect[:, both.answer :].abs().min(1).values[0] > 0
    other = caa.patch(model, "positive", pairs[0], progress=False)
    torch.testing.assert_close(result.target, other.source, **CLOSE)


@pytest.mark.parametrize("processed", [False, True])
def test_models_with_learned_positions_and_layer_norm(kind, byte_tokenizer, pairs, processed):
    model = processed_gpt2(byte_tokenizer, kind, processed=processed)
    result = caa.patch(model, "positive", pairs, positions=[-1, "prefix"], progress=False)
    alone = [caa.patch(model, "positive", pair, positions=[-1, "prefix"], progress=False).patched for pair in pairs]
    torch.testing.assert_close(result.patched, torch.cat(alone), **CLOSE)
    whole = caa.patch(model, SOURCE, TARGET, answers=ANSWERS, positions=slice(None), progress=False)
    torch.testing.assert_close(whole.normalized, torch.ones(3, 1), atol=1e-4, rtol=0)


def test_work_is_halved_until_it_fits():
    chunks, sizes = Chunks(budget=80), []

    def run(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return [item * item for item in items]

    assert chunks.map(run, range(8), size=10) == [i * i for i in range(8)]
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert chunks.map(run, range(2), size=10) == [0, 1]
    with pytest.raises(torch.OutOfMemoryError):
        chunks.map(lambda items: run([0] * 4), [0], size=10)


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (SOURCE, TARGET, {}, r"needs answers=\(positive, negative\)"),
        (SOURCE, TARGET, {"answers": ("Yes", "Yes")}, "no token tells the answers"),
        (SOURCE, TARGET, {"answers": ANSWERS, "mode": "swap"}, "'replace' and 'add'"),
        (SOURCE, TARGET, {"answers": ANSWERS, "window": 0}, "must be at least 1"),
        (SOURCE, TARGET, {"answers": ANSWERS, "layers": [3]}, "layer 3 is out of range"),
        (SOURCE, TARGET, {"answers": ANSWERS, "positions": 500}, "lies outside the"),
        (SOURCE, TARGET, {"answers": ANSWERS, "positions": []}, "no position to patch"),
        (SOURCE, TARGET, {"answers": ANSWERS, "positions": "completion"}, "no span 'completion'.*'prefix'"),
        (SOURCE, TARGET, {"answers": ANSWERS, "positions": slice(0, 8, 2)}, "a slice of step 1"),
        ("x" * 600, "y" * 600, {"answers": ANSWERS, "positions": -1}, "exceed the context of 512"),
        (SOURCE, None, {}, "the side 'positive' or 'negative'"),
    ],
)
def test_bad_patches_are_refused(model, pairs, source, target, options, message, unchecked):
    with pytest.raises(caa.CaaLensError, match=message):
        caa.patch(model, source, pairs if target is None else target, **options)


def test_patching_inside_steer_is_refused(model, vectors):
    with caa.steer(model, vectors[1]), pytest.raises(caa.InputError, match="leave the steer"):
        caa.patch(model, SOURCE, TARGET, answers=ANSWERS)
