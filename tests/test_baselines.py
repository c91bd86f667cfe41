"""Prompting baselines: examples as they are scored, drawn fairly, and interactions known in closed form."""

import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import as_lens, tiny_llama
from matplotlib.figure import Figure
from test_systems import plain_value

import caa_lens as caa
from caa_lens import prefixes
from caa_lens.experiments import grid
from caa_lens.experiments.scoring import METRICS

LETTERS, TEXTS = caa.load_pairs("ab/refusal"), caa.load_pairs("formality")


@pytest.fixture(scope="module")
def roomy(byte_tokenizer):
    """A tiny model with room for many examples."""
    return as_lens("bridge", tiny_llama(len(byte_tokenizer), context=8192), byte_tokenizer)


def test_worked_examples_in_a_sweep_are_the_plain_runs_of_the_written_text(model, vectors, pairs, held_out):
    shots = caa.few_shot(model, pairs, side="negative", k=2, longest=held_out)
    said = "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in shots.turns
    )
    assert (
        shots.encode(model.tokenizer, "Hi!").text == f"{said}<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    )
    systems = {"shots": shots, "stiff": "Be stiff."}
    written = {"shots": caa.ChatTemplate(turns=shots.turns), "stiff": caa.ChatTemplate(system_prompt="Be stiff.")}
    result = caa.sweep(
        model, vectors[1], held_out[:2], multipliers=(0, 1.5), systems=systems, batch_size=2, progress=False
    )
    assert len(result.items) == 2 * 2 * 2
    for row in result.items.itertuples():
        pair, vector = held_out[row.item], vectors[row.layer]
        assert row.value == pytest.approx(
            plain_value(model, written[row.system], pair, vector, row.multiplier), abs=1e-4
        )
    json.dumps(result.provenance)
    assert repr(shots.turns[0]) in result.provenance["systems"]["shots"]


def test_the_examples_are_run_once_for_all_items(model, vectors, pairs, held_out, monkeypatch):
    shots, n_tokens, run = caa.few_shot(model, pairs, side="positive", k=3, longest=held_out), [0], prefixes.run

    def counting(model, tokens, mask, **options):
        n_tokens[0] += int(mask.sum())
        return run(model, tokens, mask, **options)

    monkeypatch.setattr(prefixes, "run", counting)
    systems = {"none": None, "shots": shots}
    caa.sweep(model, vectors[1], held_out, multipliers=(1,), systems=systems, batch_size=3, progress=False)
    bare = [len(caa.ChatTemplate().encode(model.tokenizer, pair.prompt).ids) for pair in held_out]
    examples = len(shots.encode(model.tokenizer, "?").ids)
    assert examples > 180
    assert n_tokens[0] < examples + 2 * 2 * sum(bare)  # a prompt may be run in two batches


@pytest.mark.parametrize("template", [caa.Llama2Chat(), caa.Llama2Base(), caa.ChatTemplate(), caa.Plain()], ids=repr)
def test_examples_are_written_as_the_scored_item_is(template, byte_tokenizer):
    shots = replace(template, turns=(("first question", "(A)"), ("second question", "(B)")))
    text = shots.encode(byte_tokenizer, "third question", "(A)").text
    for question, answer in shots.turns:
        assert template.encode(byte_tokenizer, question, answer).text in text


def test_drawn_examples(roomy):
    train, held_out = LETTERS.split(held_out=10, seed=0)
    orders = set()
    for seed in range(6):
        seen = {}
        for k in (1, 4, 7):
            ways = {
                side: caa.few_shot(roomy, LETTERS, side=side, k=k, longest=held_out, seed=seed)
                for side in ("positive", "negative")
            }
            assert ways["positive"] == caa.few_shot(roomy, LETTERS, side="positive", k=k, longest=held_out, seed=seed)
            prompts = {side: [question for question, _ in way.turns] for side, way in ways.items()}
            assert prompts["positive"] == prompts["negative"]
            assert len(set(prompts["positive"])) == k
            assert set(prompts["positive"]).isdisjoint(pair.prompt for pair in held_out)
            assert set(seen) <= set(prompts["positive"])
            seen = prompts["positive"]
            for way in ways.values():
                counts = Counter(answer for _, answer in way.turns)
                assert abs(counts["(A)"] - counts["(B)"]) <= 1
        answers = {pair.prompt: pair.positive for pair in train}
        assert all(answers[question] == answer for question, answer in ways["positive"].turns)
        orders.add(tuple(answer for _, answer in ways["positive"].turns))
    assert len(orders) > 3  # no fixed pattern of letters


def test_scarce_letters_last_as_long_as_they_do(roomy):
    uneven = caa.PairSet(tuple(p for p in LETTERS if p.key == "A")[:9] + tuple(p for p in LETTERS if p.key == "B")[:2])
    shots = caa.few_shot(roomy, uneven, side="positive", k=8)
    assert Counter(answer for _, answer in shots.turns) == {"(A)": 6, "(B)": 2}


def test_as_many_examples_as_the_context_holds(model, roomy, held_out):
    wordy = caa.load_pairs(
        [(f"Say {word} {'and again ' * 6}.", "Yes.", "No.") for word in ["one", "two", "three", "four", "five"]]
    )
    shots = caa.few_shot(model, wordy, side="positive", longest=held_out)
    k, context = len(shots.turns), model.cfg.n_ctx

    def longest(way):
        sides = [(pair.prompt, text) for pair in held_out for text in (pair.positive, pair.negative)]
        return max(len(way.encode(model.tokenizer, *side).ids) for side in sides)

    assert 1 <= k < 5
    assert longest(shots) <= context
    with pytest.raises(caa.InputError, match=rf"the context of tiny holds {context}; at most {k} examples fit"):
        caa.few_shot(model, wordy, side="positive", k=k + 1, longest=held_out)
    assert len(caa.few_shot(roomy, TEXTS, side="positive").turns) == 8
    assert len(caa.few_shot(roomy, TEXTS, side="positive", at_most=3).turns) == 3


def test_all_baselines_of_a_set(roomy, pairs, held_out):
    train, test = TEXTS.split(held_out=20, seed=0)
    systems = caa.prompting(roomy, train, test, k=2, template=caa.ChatTemplate(system_prompt="Replaced."))
    assert list(systems) == ["none", "positive", "negative", "few-shot positive", "few-shot negative"]
    assert systems["none"] is None
    assert systems["positive"] == train.system_prompts["positive"]
    formal, casual = systems["few-shot positive"], systems["few-shot negative"]
    assert formal.system_prompt is None
    assert [question for question, _ in formal.turns] == [question for question, _ in casual.turns]
    assert list(caa.prompting(roomy, pairs, held_out)) == ["none", "few-shot positive", "few-shot negative"]


def test_both_sides_show_as_many_examples_as_fit_on_the_longer(model, held_out):
    lopsided = caa.load_pairs([(f"Say {word}.", "yes", "no, " * 30) for word in ("one", "two", "three", "four")])
    systems = caa.prompting(model, lopsided, held_out)
    assert len(caa.few_shot(model, lopsided, side="positive", longest=held_out).turns) == 4
    assert len(systems["few-shot positive"].turns) == len(systems["few-shot negative"].turns) < 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: caa.few_shot(m, p, side="both"), "allowed are 'positive' and 'negative'"),
        (lambda m, p: caa.few_shot(m, p, side="positive", k=0), "k=0: 'tone' has 5 distinct prompts"),
        (lambda m, p: caa.few_shot(m, p, side="positive", k=6), "k=6: 'tone' has 5 distinct prompts"),
        (lambda m, p: caa.few_shot(m, p, side="positive", longest=p), "k=None: 'tone' has 0 distinct prompts"),
        (
            lambda m, p: caa.few_shot(m, p, side="positive", template=caa.ChatTemplate(turns=(("a", "b"),))),
            "has 1 turns of its own",
        ),
        (
            lambda m, p: caa.few_shot(m, p, side="positive", longest=caa.load_pairs([("a " * 240, "yes", "no")])),
            "at most 0 examples fit",
        ),
    ],
)
def test_examples_that_cannot_be_had(model, pairs, call, message, unchecked):
    with pytest.raises(caa.InputError, match=message):
        call(model, pairs)


def test_a_scored_prompt_is_no_worked_example(model, vectors, held_out, monkeypatch):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    leak = caa.ChatTemplate(turns=((held_out[0].prompt, held_out[0].positive),))
    for options in ({"systems": {"leak": leak}}, {"template": leak}):
        with pytest.raises(caa.InputError, match="in the training pairs too"):
            caa.sweep(model, vectors, held_out, **options)


def test_templates_that_write_no_turns_and_other_examples_in_a_store(model, vectors, held_out, monkeypatch, tmp_path):
    ways = [caa.ChatTemplate(turns=(("What is it?", answer),)) for answer in ("A bird.", "A fish.")]
    options = {"layers": [1], "multipliers": (1,), "store": tmp_path, "progress": False}
    caa.sweep(model, vectors, held_out[:1], systems={"s": ways[0]}, **options)
    with pytest.raises(caa.InputError, match="holds another sweep"):
        caa.sweep(model, vectors, held_out[:1], systems={"s": ways[1]}, **options)
    monkeypatch.setattr(model.tokenizer, "chat_template", "{{ messages[-1]['content'] }}:")
    with pytest.raises(caa.InputError, match="does not write the turn 'What is it\\?' of 's'"):
        caa.sweep(model, vectors, held_out, systems={"s": ways[0]})


def synthetic(
    a, b, c, *, base=0.0, noise=0.0, metric="logprob", systems=("none", "shots"), multipliers=(-1, 0, 1), seed=0
):
    """A sweep of items whose effects of prompting, vector and interaction are given: arrays, one number an item."""
    rng, n, rows = np.random.default_rng(seed), len(a), []
    for vector, strength in (("vector", 1.0), ("random-0", 0.0)):
        for k, system in enumerate(systems):
            for m in multipliers:
                y = base + k * a + m * strength * b + k * m * strength * c + noise * rng.normal(size=n)
                for item, effect in enumerate(y):
                    value = effect if metric == "logprob" else 1 / (1 + np.exp(-effect))
                    rows.append((item, "AAB"[item % 3], system, vector, 5, float(m), value, effect))
    names = ["item", "key", "system", "vector", "layer", "multiplier", "value", "effect"]
    return caa.SweepResult(pd.DataFrame(rows, columns=names), METRICS[metric](), {"pairs": "planted"})


def test_interactions_known_in_closed_form():
    rng = np.random.default_rng(1)
    a, b, c, base = (rng.normal(mean, 1.0, 30) for mean in (1.0, 2.0, -0.5, 0.3))
    found = caa.additivity(synthetic(a, b, c, base=base))
    table = found.to_pandas().set_index(["vector", "multiplier"])
    assert set(table["measure"]) == {"value"}
    for m in (-1, 1):
        row = table.loc["vector", m]
        expected = {
            "prompting": a,
            "steering": m * b,
            "both": a + m * b + m * c,
            "expected": a + m * b,
            "interaction": m * c,
        }
        for term, values in expected.items():
            assert row[term] == pytest.approx(values.mean(), abs=1e-9)
            assert row[f"{term}_low"] < row[term] < row[f"{term}_high"]
        assert row["n"] == 30
        assert table.loc["random-0", m]["steering"] == pytest.approx(0, abs=1e-9)
    balanced = caa.additivity(synthetic(a, b, c, metric="letter")).to_pandas().query("vector == 'vector'")
    assert set(balanced["measure"]) == {"value", "effect"}
    keys = np.array(["AAB"[i % 3] for i in range(30)])
    log_odds = balanced.query("measure == 'effect' and multiplier == 1").iloc[0]
    assert log_odds["interaction"] == pytest.approx((c[keys == "A"].mean() + c[keys == "B"].mean()) / 2)


def test_intervals_of_additive_data_cover_zero_as_often_as_they_say():
    rng, covered = np.random.default_rng(2), []
    for seed in range(60):
        a, b = rng.normal(1.0, 1.0, 40), rng.normal(2.0, 1.0, 40)
        result = synthetic(a, b, np.zeros(40), noise=0.5, multipliers=(0, 1), seed=seed)
        row = caa.additivity(result).to_pandas().query("vector == 'vector'").iloc[0]
        covered.append(row["interaction_low"] <= 0 <= row["interaction_high"])
    assert 0.87 <= np.mean(covered) < 1


@pytest.mark.parametrize(
    ("a", "c", "words"),
    [
        (1.0, 0.0, {1: "ADDITIVE within", -1: "ADDITIVE within"}),
        (1.0, 0.5, {1: "MORE THAN ADDITIVE", -1: "BELOW THE SUM"}),
        (1.0, -0.5, {1: "LESS THAN ADDITIVE", -1: "ABOVE THE SUM"}),
        (-1.0, 0.5, {1: "ABOVE THE SUM", -1: "MORE THAN ADDITIVE"}),
    ],
)
def test_verdicts(a, c, words):
    n = np.linspace(-0.1, 0.1, 24)
    result = synthetic(a + n, 2.0 + n, c + n, noise=0.0)
    lines = caa.additivity(result).verdict().splitlines()
    assert len(lines) == 2
    for line, m in zip(lines, (-1, 1), strict=True):
        assert words[m] in line
        assert f"'shots' with multiplier {m:+d}, in nats per token: prompting {a:+.3f}" in line


def test_the_ends_of_a_probability_are_told_from_interaction():
    """Effects that add up exactly on the log-odds are less than additive on a probability near 1."""
    base = np.linspace(0.5, 1.5, 24)
    found = caa.additivity(synthetic(np.full(24, 2.0), np.full(24, 2.0), np.zeros(24), base=base, metric="letter"))
    lines = [line for line in found.verdict().splitlines() if "multiplier +1" in line]
    assert "in probability" in lines[0]
    assert "LESS THAN ADDITIVE" in lines[0]
    assert "in nats of log-odds" in lines[1]
    assert "ADDITIVE within" in lines[1]


def test_on_a_model_the_terms_are_differences_of_its_scores(model, vectors, pairs, held_out):
    systems = caa.prompting(model, pairs, held_out, k=1)
    options = {"layers": [0, 2], "multipliers": (0, 1), "others": {"turned": -1 * vectors}, "progress": False}
    result = caa.sweep(model, vectors, held_out[:3], systems=systems, **options)
    found = caa.additivity(result)
    assert found.layer == result.by_system()["none"].best()["layer"]
    scores = result.to_pandas().query("vector == 'vector' and layer == @found.layer")
    scores = scores.set_index(["system", "multiplier"])["value"]
    for row in found.to_pandas().query("vector == 'vector'").itertuples():
        start = scores["none", 0.0]
        assert row.prompting == pytest.approx(scores[row.system, 0.0] - start, abs=1e-6)
        assert row.steering == pytest.approx(scores["none", row.multiplier] - start, abs=1e-6)
        assert row.both == pytest.approx(scores[row.system, row.multiplier] - start, abs=1e-6)
        assert row.interaction == pytest.approx(row.both - row.prompting - row.steering, abs=1e-6)
    assert set(found.to_pandas()["vector"]) == {"vector", "turned"}
    assert caa.additivity(result, layer=0, baseline="few-shot positive").layer == 0


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"systems": ("none",)}, {}, "only 'none' was swept"),
        ({"multipliers": (-1, 1)}, {}, "needs multiplier 0 and another"),
        ({"multipliers": (0,)}, {}, "needs multiplier 0 and another"),
        ({}, {"baseline": "bare"}, "baseline='bare' was not swept; there are 'none', 'shots'"),
        ({}, {"layer": 3}, "layer 3 was not swept; there are 5"),
    ],
)
def test_sweeps_that_show_no_additivity(options, call, message):
    with pytest.raises(caa.CaaLensError, match=message):
        caa.additivity(synthetic(np.ones(6), np.ones(6), np.ones(6), **options), **call)


def test_a_sweep_without_systems_shows_no_additivity():
    result = synthetic(np.ones(6), np.ones(6), np.ones(6))
    with pytest.raises(caa.InputError, match="sweep with systems=prompting"):
        caa.additivity(result.by_system()["none"])


def test_the_figure_holds_the_table():
    rng = np.random.default_rng(3)
    result = synthetic(*(rng.normal(1, 1, 20) for _ in range(3)), metric="letter", systems=("none", "x", "y"))
    found = caa.additivity(result)
    for measure in ("value", "effect"):
        table = found.to_pandas().query("vector == 'vector' and measure == @measure")
        figure = found.plot(measure)
        figure.canvas.draw()
        assert [ax.get_title() for ax in figure.axes] == ["multiplier -1", "multiplier +1"]
        assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["x", "y"]
        for ax, m in zip(figure.axes, (-1, 1), strict=True):
            rows = table[table["multiplier"] == m]
            for bars, term in zip(ax.containers, ("prompting", "steering", "both", "expected"), strict=True):
                np.testing.assert_allclose(bars.lines[0].get_ydata(), rows[term])
                ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
                np.testing.assert_allclose(ends, rows[[f"{term}_low", f"{term}_high"]])
    with pytest.raises(caa.InputError, match="an axis holds one multiplier, and 2 were swept"):
        found.plot(ax=Figure().subplots())
    one = caa.additivity(synthetic(np.ones(6), np.ones(6), np.ones(6), multipliers=(0, 1)))
    ax = Figure().subplots()
    assert one.plot(ax=ax) is ax.figure
    assert "planted, layer 5, n = 6" in ax.get_title()
    with pytest.raises(caa.InputError, match="measure='effect': there are 'value'"):
        one.plot("effect")


def test_additivity_of_one_item_is_undecided(model, vectors, held_out):
    systems = {"none": None, "kind": "Be kind."}
    result = caa.additivity(caa.sweep(model, vectors[1], held_out[:1], systems=systems, progress=False))
    assert result.verdict().count("[no interval], n = 1. TOO FEW: one item cannot tell.") == 2
    result.plot().savefig(io.BytesIO())
