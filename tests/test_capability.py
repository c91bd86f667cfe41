"""Capability under steering: equal to plain runs, paired against the unsteered model, honest about null changes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import caa_lens as caa
from caa_lens.experiments import grid
from caa_lens.experiments.statistics import paired_change

TEXT = "It was a bright cold day in spring, and the clocks were striking. " * 5


@pytest.fixture(scope="module")
def questions():
    records = [
        {
            "prompt": f"What is {k} and one?\n\nChoices:\n(A) {k + 1}\n(B) {k + 2}",
            "correct": "(A)" if k % 3 else "(B)",
            "incorrect": "(B)" if k % 3 else "(A)",
            "category": ("sums", "more sums")[k % 2],
        }
        for k in range(12)
    ]
    return caa.load_pairs(records, name="sums")


def letter_probabilities(model, pair, vector):
    ids = caa.ChatTemplate().encode(model.tokenizer, pair.prompt, "(").ids
    with caa.steer(model, vector), torch.no_grad():
        p = model(torch.tensor([ids])).softmax(-1)[0, -1]
    right, wrong = (float(p[model.tokenizer.convert_tokens_to_ids(side[1])]) for side in (pair.positive, pair.negative))
    return right, wrong


def test_questions_are_those_of_the_plain_run(model, vectors, questions):
    result = caa.capability(model, questions, vectors, layers=[1], multipliers=(-2, 2), progress=False)
    assert set(result.items["multiplier"]) == {-2, 0, 2}
    for row in result.items.itertuples():
        right, wrong = letter_probabilities(model, questions[row.item], row.multiplier * vectors[1])
        assert row.p_correct == pytest.approx(right / (right + wrong), abs=1e-4)
        assert row.mass == pytest.approx(right + wrong, abs=1e-4)
        assert row.accuracy == (right > wrong)
    table = result.to_pandas().set_index(["multiplier", "measure"])
    for measure in ("accuracy", "p_correct", "mass"):
        items = result.items.pivot(index="item", columns="multiplier", values=measure)
        assert table.loc[(2, measure), "value"] == pytest.approx(items[2].mean())
        assert table.loc[(2, measure), "change"] == pytest.approx((items[2] - items[0]).mean())
        assert tuple(table.loc[(0, measure), ["change", "change_low", "change_high", "p_value"]]) == (0, 0, 0, 1)


def test_categories_are_the_parts_of_the_whole(model, vectors, questions):
    result = caa.capability(model, questions, vectors[1], multipliers=(1,), controls=1, progress=False)
    parts, whole = result.to_pandas(by="category"), result.to_pandas()
    assert set(parts["category"]) == {"sums", "more sums"}
    axes = ["vector", "layer", "multiplier", "measure"]
    for column in ("value", "change"):
        pooled = parts.groupby(axes)[column].mean()  # both have six questions
        pd.testing.assert_series_equal(pooled, whole.set_index(axes)[column].sort_index(), check_names=False)
    assert set(parts["n"]) == {6}
    plain = caa.load_pairs([(pair.prompt, pair.positive, pair.negative) for pair in questions])
    with pytest.raises(caa.InputError, match="no such column"):
        caa.capability(model, plain, vectors[1], multipliers=(1,), progress=False).to_pandas(by="category")


@pytest.mark.parametrize("positions", ["all", slice(5, None), slice(-4, None)], ids=str)
def test_loss_is_that_of_the_plain_run(model, vectors, positions):
    result = caa.text_loss(
        model, TEXT, vectors, layers=[0, 2], multipliers=(1.5,), window=64, positions=positions, progress=False
    )
    tokenizer = model.tokenizer
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    n_windows = result.items["item"].nunique()
    assert n_windows == -(-len(ids) // 63)
    length = len(ids) // n_windows
    for row in result.items.itertuples():
        tokens = [tokenizer.bos_token_id, *ids[row.item * length : (row.item + 1) * length]]
        with caa.steer(model, row.multiplier * vectors[row.layer], positions=positions), torch.no_grad():
            logprobs = model(torch.tensor([tokens])).log_softmax(-1)[0]
        expected = -np.mean([float(logprobs[i - 1, token]) for i, token in enumerate(tokens) if i])
        assert row.loss == pytest.approx(expected, abs=1e-4)


def test_loss_of_a_file_in_any_window_and_batch(model, vectors, tmp_path):
    file = tmp_path / "spring.txt"
    file.write_text(TEXT)
    options = {"multipliers": (1,), "window": 64, "progress": False}
    whole = caa.text_loss(model, TEXT, vectors[1], **options)
    batched = caa.text_loss(model, file, vectors[1], batch_size=4, **options)
    pd.testing.assert_frame_equal(batched.items, whole.items, atol=1e-5)
    assert (whole.provenance["measured_on"], batched.provenance["measured_on"]) == ("text", "spring.txt")
    one = caa.text_loss(model, TEXT, vectors[1], multipliers=(1,), window=512, progress=False)
    assert len(one.items) == 2  # one window, which fits the context
    assert one.provenance["window"] == len(TEXT) + 1
    stored = caa.text_loss(model, TEXT, vectors[1], store=tmp_path / "s", **options)
    (tmp_path / "s" / "item-000002.json").unlink()
    again = caa.text_loss(model, TEXT, vectors[1], store=tmp_path / "s", **options)
    pd.testing.assert_frame_equal(again.items, stored.items, atol=1e-5)


def test_controls_stand_beside(model, vectors):
    """A control's rows are those of running it as the vector."""
    options = {"multipliers": (-1, 3), "window": 64, "progress": False}
    items = caa.text_loss(model, TEXT, vectors[1], controls=2, **options).items
    assert set(items["vector"]) == {"vector", "random-0", "random-1", *(f"shuffled-{k}" for k in range(3))}
    shuffled = vectors[1].controls["shuffled-2"].with_norm(vectors[1].norm)
    for name, vector in (("random-0", vectors[1].random_control(seed=1)), ("shuffled-2", shuffled)):
        alone = caa.text_loss(model, TEXT, vector, **options).items
        found = items[items["vector"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(found.drop(columns="vector"), alone.drop(columns="vector"), atol=1e-4)


def made(change, control, n=60, seed=0, noise=0.05):
    """A result with the given true changes of the vector and of a control at multiplier 1."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.3, 0.7, n)
    rows = [
        {"item": i, "vector": name, "layer": 3, "multiplier": m, "accuracy": base[i] + m * shift[i]}
        for name, mean in (("vector", change), ("random-0", control), ("letter-balanced", change))
        if mean is not None
        for shift in [rng.normal(mean, noise, n)]
        for i in range(n)
        for m in (0.0, 1.0)
    ]
    return caa.CapabilityResult(pd.DataFrame(rows), ("accuracy",), {"measured_on": "made"})


def test_verdicts():
    assert "NO CHANGE SHOWN" in made(0.0, 0.0).verdict()
    assert "CHANGED, but not beyond the controls: 'random-0'" in made(-0.1, 0.12).verdict()
    few = made(-0.1, 0.0, n=4).verdict()  # the interval excludes zero, but sixteen sign patterns give no p below 0.05
    assert "NO CHANGE SHOWN: p is not below 0.05" in few
    beyond = made(-0.1, 0.0).verdict()
    assert "CHANGED, beyond every control" in beyond
    assert "change -0." in beyond
    assert "no controls were run" in replace(made(-0.1, None), measures=("accuracy",)).verdict()
    nulls = ["NO CHANGE SHOWN" in made(0.0, 0.0, seed=seed).verdict() for seed in range(40)]
    assert np.mean(nulls) >= 0.85
    with pytest.raises(caa.InputError, match="measure='loss': allowed are 'accuracy'"):
        made(0, 0).verdict("loss")


def test_one_item_and_values_that_are_not_finite_decide_nothing(model, vectors):
    assert "NOT" not in (one := made(-0.1, 0.0, n=1).verdict())
    assert "[no interval], p = 1, n = 1. TOO FEW: one item cannot tell." in one
    options = {"operator": lambda activations, *_: activations * torch.inf, "window": 64, "progress": False}
    lost = caa.text_loss(model, TEXT, vectors[1], **options)
    steered = lost.to_pandas().query("multiplier != 0")
    assert steered[["value", "change", "change_low", "p_value"]].isna().all(axis=None)
    assert "NOT MEASURABLE: the model gave values that are not finite." in lost.verdict()
    broken = made(-0.1, 0.0)
    control = (broken.items["vector"] == "random-0") & (broken.items["multiplier"] != 0)
    broken = replace(broken, items=broken.items.assign(accuracy=broken.items["accuracy"].mask(control)))
    assert "NOT MEASURABLE" in broken.verdict()
    assert "the control 'random-0'" in broken.verdict()


@pytest.mark.parametrize("discrete", [False, True], ids=["normal", "accuracy"])
def test_paired_change_covers_and_has_its_size(discrete):
    """On synthetic data without a change: the interval covers zero about 95% of the time, and p < 0.05 about 5% (never
    much more, for differences of -1, 0 and 1 rather less)."""
    rng = np.random.default_rng(0)
    covered, rejected = [], []
    for seed in range(300):
        if discrete:
            before, after = (rng.random((2, 80)) < 0.6).astype(float)
        else:
            common = rng.normal(0, 3, 40)  # items differ widely; pairing removes it
            before, after = common + rng.normal(0, 1, (2, 40))
        change = paired_change(before, after, seed=seed)
        covered.append(change.low <= 0 <= change.high)
        rejected.append(change.p_value < 0.05)
    assert 0.91 <= np.mean(covered) <= 0.985
    assert 0.01 <= np.mean(rejected) <= 0.08


def test_paired_change_finds_a_change_and_knows_its_least_p():
    rng = np.random.default_rng(1)
    before = rng.normal(0, 3, 50)
    change = paired_change(before, before - 0.5 + rng.normal(0, 0.3, 50))
    assert change.high < 0
    assert change.p_value == pytest.approx(1 / 2001)
    same = paired_change(before, before)
    assert (same.value, same.low, same.high, same.p_value, same.n) == (0, 0, 0, 1, 50)
    few = paired_change(np.zeros(3), np.ones(3))
    assert few.p_value == pytest.approx(0.25, abs=0.04)  # two of eight sign patterns are as large


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v, q: caa.capability(m, q, v, multipliers=()), "an empty grid"),
        (lambda m, v, q: caa.capability(m, q, v, multipliers=(0,)), "give a multiplier other than 0"),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, multipliers=0), "give a multiplier other than 0"),
        (lambda m, v, q: caa.text_loss(m, __file__, v), "is the name of a file; give Path"),
        (lambda m, v, q: caa.learning_curve(m, q, sizes=[]), "sizes=.* is empty"),
        (
            lambda m, v, q: caa.capability(m, caa.load_pairs([("p", "Yes, sir.", "No, sir.")]), v),
            "are no answer letters",
        ),
        (lambda m, v, q: caa.capability(m, q, v, systems={"none": None}), "takes no systems="),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, multipliers=()), "an empty grid"),
        (lambda m, v, q: caa.text_loss(m, "", v), "at least two tokens"),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, window=1), "window=1: allowed are 2 to 512"),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, window=513), "window=513: allowed are 2 to 512"),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, positions="after_instruction"), "has no instruction"),
        (lambda m, v, q: caa.text_loss(m, TEXT, v, positions="everywhere"), "allowed are 'after_instruction'"),
        (lambda m, v, q: caa.text_loss(m, fixture_missing(), v), "cannot be read as UTF-8 text"),
    ],
)
def test_refused_before_the_model_runs(model, vectors, questions, call, message, monkeypatch, unchecked):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(caa.CaaLensError, match=message):
        call(model, vectors, questions)


def fixture_missing():
    from pathlib import Path

    return Path("no-such-file.txt")


@pytest.mark.slow
def test_what_steering_costs_the_embedded_model(embedded):
    """At a usable strength the loss of plain prose rises a little, at three times that strength much more, and by a random
    direction of that norm too."""
    train, _ = caa.load_pairs("formality").split(held_out=30, seed=0)
    v = caa.extract(embedded, train[:20], layers=[14], progress=False)[14]
    prose = " ".join(pair.negative for pair in caa.load_pairs("sentiment")[:20])
    result = caa.text_loss(embedded, prose, v, multipliers=(1, 3), window=64, controls=1, progress=False)
    table = result.to_pandas()
    loss = table.set_index(["vector", "multiplier"])["change"]
    assert 0 < loss["vector", 1.0] < 0.5
    assert loss["vector", 3.0] > 2 * loss["vector", 1.0]
    assert loss["random-0", 3.0] > 0.5
    assert table[table["multiplier"] == 0]["value"].max() < 5
    assert result.verdict().count("CHANGED, ") == 2
