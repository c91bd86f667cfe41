"""What a section says follows from its numbers: constructed effects, and the word and the sentence for each."""

from typing import get_args

import pandas as pd
import pytest

from caa_lens.experiments.effects import Finding
from caa_lens.experiments.report.claim_answers import conclude
from caa_lens.experiments.report.claim_baselines import by_way, on_all_tuned, on_tuned
from caa_lens.experiments.report.claim_capability import on_capability
from caa_lens.experiments.report.claim_effects import by_depth, by_system, steps
from caa_lens.experiments.report.claim_generalisation import on_forms
from caa_lens.experiments.report.claim_geometry import elsewhere
from caa_lens.experiments.report.status import MEANINGS, Status, capped, of_interval, reservation, together
from caa_lens.experiments.result import SweepResult
from caa_lens.experiments.scoring import METRICS

UP, DOWN, NONE = (0.2, 0.4), (-0.4, -0.2), (-0.1, 0.2)
"""Intervals of an effect above zero, of one below, and of none."""

BEYOND = Finding("beyond controls", "Effect. Beyond every control of the same norm.")
ACCURACY = {"held_out_accuracy_before": 0.5, "held_out_accuracy_after": 0.7}
LETTER = Finding("not shown", "Effect. NOT SHOWN: the control 'letter' of the same norm has an effect of +0.300.")


def effect(ends, **rest):
    return {"effect": sum(ends) / 2, "effect_low": ends[0], "effect_high": ends[1], "n": 20, **rest}


def effects(**by_name):
    return pd.DataFrame([effect(ends, system=name) for name, ends in by_name.items()])


def test_an_interval_says_one_word():
    assert of_interval(*UP) == of_interval(*UP, -0.1) == "holds"
    assert of_interval(*UP, 0.2) == of_interval(*UP, -0.3) == "not shown"
    assert of_interval(*DOWN) == of_interval(*DOWN, 0.9) == "opposite"
    assert of_interval(*NONE) == of_interval(0.0, 0.1) == "null"
    assert of_interval(float("nan"), float("nan")) == "not shown"


def test_parts_taken_together():
    assert together(["holds", "holds"]) == "holds"
    assert together(["holds", "null"]) == together(["holds", "opposite"]) == together(["null", "opposite"]) == "mixed"
    assert together(["null", "not shown", "null"]) == "not shown"
    assert set(MEANINGS) == set(get_args(Status))


@pytest.mark.parametrize(
    ("none", "few_shot", "status", "said"),
    [
        (UP, UP, "holds", "few_shot: +0.300 [+0.200, +0.400], above zero"),
        (UP, NONE, "mixed", "few_shot: +0.050 [-0.100, +0.200], not told from zero"),
        (NONE, NONE, "null", "none: +0.050 [-0.100, +0.200], not told from zero"),
        (DOWN, DOWN, "opposite", "none: -0.300 [-0.400, -0.200], below zero"),
        (UP, DOWN, "mixed", "few_shot: -0.300 [-0.400, -0.200], below zero"),
    ],
)
def test_under_every_way_of_prompting(none, few_shot, status, said):
    found, words = by_way(effects(none=none, few_shot=few_shot), BEYOND)
    assert found == status
    assert said in words


@pytest.mark.parametrize(
    ("side", "change", "on_top", "status", "said"),
    [
        (
            "positive",
            UP,
            UP,
            "holds",
            "score moves its way, by +0.300 [+0.200, +0.400] (that side is the likelier one in 50% of pairs before, 70%",
        ),
        ("negative", DOWN, UP, "holds", "score moves its way, by -0.300"),
        ("positive", DOWN, DOWN, "opposite", "score moves the other way, by -0.300"),
        ("negative", UP, UP, "mixed", "score moves the other way, by +0.300"),
        ("positive", UP, NONE, "null", "nats per unit of multiplier, not told from zero."),
        ("negative", NONE, NONE, "null", "score is not shown to move, by +0.050"),
        ("positive", UP, DOWN, "opposite", "nats per unit of multiplier, below zero."),
    ],
)
def test_fine_tuning_and_the_vector_on_top(side, change, on_top, status, said):
    row = effect(on_top, behaviour="b", side=side, method="lora", trainable=10, parameters=1000, **ACCURACY)
    found, words = on_tuned(
        row | {"change": sum(change) / 2, "change_low": change[0], "change_high": change[1]}, BEYOND
    )
    assert found == status
    assert said in words


def test_no_more_than_the_vector_beside_its_controls():
    """A letter's effect is above zero under every way of prompting and at every layer, and is not the behaviour's."""
    said = f"Beside controls, without a system prompt: {LETTER.words}"
    assert reservation(BEYOND) == f"Beside controls, without a system prompt: {BEYOND.words}"
    assert reservation(LETTER) == f"{said} So an effect above zero here is not shown to be this vector's own doing."
    for status in ("null", "opposite", "not shown"):
        assert capped(status, LETTER) == status
    for word in ("not shown", "null", "opposite", "no controls"):
        assert capped("holds", Finding(word, "e.")) == "not shown"
    for ends, others in ((UP, "not shown"), (NONE, "not shown"), (DOWN, "mixed")):
        status, words = by_way(effects(none=UP, few_shot=ends), LETTER)
        assert status == others
        assert words.endswith(reservation(LETTER))
        rows = [effect(ends, layer=0, own=False), effect(UP, layer=9, own=True)]
        status, words = elsewhere(pd.DataFrame(rows), LETTER)
        assert status == "not shown"
        assert words.endswith(reservation(LETTER))


def test_all_fine_tunings_together():
    def row(behaviour, side):
        change = {"change": 0.3, "change_low": 0.2, "change_high": 0.4} if side == "positive" else {
            "change": -0.3, "change_low": -0.4, "change_high": -0.2}  # fmt: skip
        return effect(UP, behaviour=behaviour, side=side, method="lora", trainable=1, parameters=9, **ACCURACY) | change

    rows = [row(name, side) for name in "ab" for side in ("positive", "negative")]
    assert on_all_tuned(rows, {"a": BEYOND, "b": BEYOND})[0] == "holds"
    assert on_all_tuned(rows, {"a": LETTER, "b": LETTER})[0] == "not shown"
    status, words = on_all_tuned(rows, {"a": BEYOND, "b": LETTER})
    assert status == "mixed"
    assert words.split("\n")[2].endswith(BEYOND.words)
    assert words.split("\n")[5].endswith("not shown to be this vector's own doing.")


@pytest.mark.parametrize(
    ("home", "others", "status", "said"),
    [
        (UP, [UP, UP, NONE], "holds", "at the 3 other layers tried, above zero at 2 (0, 1), below zero at 0."),
        (UP, [UP, NONE, DOWN], "mixed", "above zero at 1 (0), below zero at 1 (2)."),
        (UP, [NONE, NONE], "null", "above zero at 0, below zero at 0."),
        (UP, [DOWN, DOWN], "opposite", "below zero at 2 (0, 1)."),
        (
            NONE,
            [NONE, NONE],
            "null",
            "effect is +0.050 [-0.100, +0.200] nats per unit of multiplier, not told from zero",
        ),
        (DOWN, [DOWN, DOWN], "opposite", "multiplier, below zero; used"),
        (NONE, [UP, UP], "null", "multiplier, not told from zero; used"),
        (UP, [], "not shown", "at the 0 other layers tried"),
    ],
)
def test_a_vector_at_other_layers(home, others, status, said):
    rows = [effect(ends, layer=layer, own=False) for layer, ends in enumerate(others)]
    found, words = elsewhere(pd.DataFrame([*rows, effect(home, layer=9, own=True)]), BEYOND)
    assert found == status
    assert said in words


def test_a_judge_that_reads_nothing_cannot_tell():
    finding = Finding("opposite", "Below. OPPOSITE: the interval lies below zero.")
    assert conclude(finding, effect(UP, n=5))[0] == "opposite"
    assert conclude(Finding("beyond controls", "Yes."), effect(UP, n=5)) == (
        "holds",
        "Yes.\nOn 5 held-out pairs' own completions, positive minus negative, the judge gives +0.60 points [+0.40, +0.80]: it "
        "tells them apart.",
    )
    for ends, said in ((NONE, "it does not tell them apart"), (DOWN, "it takes them the wrong way round")):
        status, words = conclude(finding, effect(ends, n=5))
        assert status == "cannot tell"
        assert words.split("\n")[0].endswith(f"{said}. What it says of the answers decides nothing.")
        assert words.split("\n")[1] == f"It says: {finding.words}"


def test_other_forms_beside_their_controls():
    def of(*ends):
        return on_forms(pd.DataFrame([effect(e, control_effect=0.15) for e in ends]))

    assert (of(UP, UP), of(DOWN), of(NONE), of(UP, DOWN)) == ("holds", "opposite", "null", "mixed")
    assert of((0.1, 0.2), (0.1, 0.2)) == of((0.1, 0.2), NONE) == "not shown"


def measured(measure, changes, controls=(), p_value=0.01):
    """A table of `CapabilityResult`: the vector's (low, high) at -1 and +1, the controls' changes at +1."""
    rows = [("vector", m, *ends) for m, ends in zip((-1.0, 1.0), changes, strict=True)]
    rows += [("vector", 0.0, 0.0, 0.0), *((f"random-{k}", 1.0, c, c) for k, c in enumerate(controls))]
    return pd.DataFrame(
        [
            {
                "vector": vector,
                "layer": 3,
                "multiplier": m,
                "measure": measure,
                "value": 0.7,
                "change": (low + high) / 2,
            }
            | {"change_low": low, "change_high": high, "p_value": p_value, "n": 40}
            for vector, m, low, high in rows
        ]
    )


def test_no_harm_names_the_harm_that_is_compatible():
    status, words = on_capability("mmlu", measured("accuracy", [(-0.05, 0.03), (0.01, 0.04)], [-0.2]))
    assert status == "holds"
    assert words.split("\n") == [
        "mmlu, layer 3, multiplier -1: accuracy 0.710 -> 0.700, change -0.010 [-0.050, +0.030], p = 0.01, n = 40. "
        "No harm shown; one of up to 0.050 is compatible, within the limit of 0.05.",
        "mmlu, layer 3, multiplier +1: accuracy 0.675 -> 0.700, change +0.025 [+0.010, +0.040], p = 0.01, n = 40. "
        "No harm shown; one of up to 0.000 is compatible, within the limit of 0.05.",
    ]
    assert on_capability("prose", measured("loss", [(-0.05, 0.1), (-0.3, -0.2)]))[0] == "holds"


@pytest.mark.parametrize(
    ("measure", "worse"), [("accuracy", (-0.09, -0.03)), ("loss", (0.05, 0.15))], ids=["accuracy", "loss"]
)
def test_harm_is_compared_with_the_harm_of_controls(measure, worse):
    sign, fine = (1 if measure == "loss" else -1), (-0.02, 0.02)
    for controls in ([0.01 * sign], [-0.5 * sign], [-0.5 * sign, 0.02 * sign], []):
        status, words = on_capability("x", measured(measure, [fine, worse], controls))
        assert status == "opposite"
        assert "HARM, beyond every control" in words.split("\n")[1]
    status, words = on_capability("x", measured(measure, [fine, worse], [-0.5 * sign, 0.05 * sign]))
    assert status == "mixed"
    assert f"a control of the same norm does as much: 'random-1' at +1, with a change of {0.05 * sign:+.3f}." in words
    assert on_capability("x", measured(measure, [fine, worse], p_value=0.2))[0] == "not shown"
    status, words = on_capability("x", measured(measure, [fine, (0.01 * sign, 0.01 * sign)], [0.5 * sign]))
    assert status == "holds"
    assert "A slight harm, of up to 0.010, within the limit of 0." in words


def test_a_wide_interval_shows_nothing():
    for measure, limit in (("accuracy", "0.05"), ("loss", "0.1")):
        status, words = on_capability("x", measured(measure, [(-0.3, 0.3), (-0.02, 0.02)]))
        assert status == "not shown"
        assert f"No harm shown, but one of up to 0.300 is compatible, above the limit of {limit}." in words


def test_values_that_are_not_finite_show_nothing():
    nothing = float("nan"), float("nan")
    status, words = on_capability("x", measured("loss", [nothing, (0.0, 0.01)], p_value=float("nan")))
    assert status == "not shown"
    assert "NOT MEASURABLE" in words


def test_a_few_unchanged_answers_show_little():
    table = measured("accuracy", [(0.0, 0.0), (0.0, 0.0)], p_value=1.0)
    assert on_capability("x", table.assign(n=100))[0] == "holds"
    status, words = on_capability("x", table.assign(n=3))
    assert status == "not shown"
    assert "one of up to 0.632 is compatible" in words


@pytest.mark.parametrize(
    ("best", "status", "said"),
    [
        (4, "holds", "largest effect is at layer 4, +0.700 [+0.600, +0.800], inside the middle half of the model."),
        (0, "mixed", "largest effect is at layer 0, +0.700 [+0.600, +0.800], outside the middle half of the model."),
        (9, "mixed", "largest effect is at layer 9, +0.700 [+0.600, +0.800], outside the middle half of the model."),
    ],
)
def test_where_a_vector_works_most(best, status, said):
    ends = {0: UP, 4: UP, 7: NONE, 9: UP} | {best: (0.6, 0.8)}
    rows = [effect(e, layer=layer, vector="vector") for layer, e in ends.items()]
    table = pd.DataFrame([*rows, effect((2.0, 3.0), layer=4, vector="random-0")])
    found, words = by_depth(table, 10)
    assert found == status
    assert words.endswith(said)
    assert words.startswith("The interval lies above zero at 3 of 4 layers swept;")
    alone = by_depth(table[table["layer"] == best], 10)
    assert alone[0] == "mixed"
    assert alone[1].endswith("One layer does not tell where the effect is largest.")


def test_under_every_system_prompt_and_with_every_step():
    null = Finding("null", "NULL: the interval includes zero.")

    def of(*findings, steps=(UP, NONE)):
        rises = pd.DataFrame([{"change": 0.0, "change_low": low, "change_high": high} for low, high in steps])
        return by_system(dict(zip(("none", "positive"), findings, strict=True)), rises)

    assert of(BEYOND, BEYOND) == (
        "holds",
        f"System prompt 'none': {BEYOND.words}\nSystem prompt 'positive': {BEYOND.words}\n"
        "Of 2 steps from one multiplier to the next, without a system prompt, the change of the mean score is above zero at 1, "
        "not told from zero at 1.",
    )
    assert of(BEYOND, null)[0] == of(null, BEYOND)[0] == "mixed"
    assert of(null, LETTER)[0] == of(LETTER, LETTER)[0] == "not shown"
    assert of(null, null, steps=(DOWN, UP))[0] == "null"
    status, words = of(BEYOND, BEYOND, steps=(UP, DOWN))
    assert status == "mixed"
    assert words.endswith("below zero at 1.")


def test_steps_are_of_items_against_themselves():
    """Answer keys weigh equally where the metric is balanced; other vectors do not count."""
    keys, values = (
        "A" * 10 + "B" * 5,
        {-1.0: {"A": 0.0, "B": 0.0}, 0.0: {"A": 0.1, "B": 0.7}, 2.0: {"A": 0.0, "B": 0.6}},
    )
    rows = [
        {"item": item, "key": key, "vector": vector, "layer": 1, "multiplier": m, "value": by_key[key] * factor}
        for vector, factor in (("random-0", 9), ("vector", 1))
        for m, by_key in values.items()
        for item, key in enumerate(keys)
    ]
    table = steps(SweepResult(pd.DataFrame(rows), METRICS["letter"](), {}))
    assert table[["start", "end"]].to_numpy().tolist() == [[-1, 0], [0, 2]]
    assert table["change"].to_numpy() == pytest.approx([0.4, -0.1])
    assert steps(SweepResult(pd.DataFrame(rows), METRICS["logprob"](), {}))["change"][0] == pytest.approx(0.3)
    assert (table["change_high"] - table["change_low"]).to_numpy() == pytest.approx(0)
