"""Scores, sweeps, controls: equal to plain runs, resumable, honest about null effects."""

import io
import json
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import as_lens, relative_error, tiny_llama
from transformers import PreTrainedTokenizerFast

import caa_lens as caa
from caa_lens.experiments import grid
from caa_lens.experiments.effects import finding_on
from caa_lens.experiments.scoring import METRICS, published_item
from caa_lens.positions import known_prompts

QUESTIONS = caa.load_pairs(
    [
        ("Is it?\n\nChoices:\n(A) Yes\n(B) No", "(A)", "(B)"),
        ("Would you go on and on about it, at some length?\n\nChoices:\n(A) Ay\n(B) Nay\n(C) Hm", "(C)", "(A)"),
        ("Say.\n\nChoices:\n (A) a\n (B) b", "(B)", "(A)"),
    ],
    name="letters",
)


def plain_logprobs(model, text, vector, positions, template_end):
    with known_prompts([template_end]), torch.no_grad():
        with caa.steer(model, vector, positions=positions) if vector is not None else nullcontext():
            logprobs = model(torch.tensor([text.ids])).log_softmax(-1)[0]
    return torch.stack([logprobs[position - 1, token] for position, ids in text.targets for token in ids])


@pytest.mark.parametrize("system", [None, "Answer as you like."], ids=["no-system", "system"])
@pytest.mark.parametrize("metric", ["letter", "logprob"])
@pytest.mark.parametrize("positions", ["after_instruction", "all", "last", slice(3, None)], ids=str)
def test_the_fast_sweep_is_the_plain_one(model, vectors, pairs, metric, positions, system):
    """Every (item, layer, multiplier), one text at a time, whole, under steer()."""
    template, scorer = caa.ChatTemplate(system_prompt=system), METRICS[metric]()
    items = QUESTIONS if metric == "letter" else pairs
    texts = [text for pair in items for text in scorer.texts(model.tokenizer, template, pair)]
    settings = [None, *(m * vectors[layer] for layer in vectors for m in (-1.0, 2.0))]
    for batch_size in (1, 4):
        found = dict(grid.grid_logprobs(model, texts, settings, positions=positions, batch_size=batch_size))
        assert sorted(found) == list(range(len(texts)))
        for index, text in enumerate(texts):
            for row, vector in enumerate(settings):
                expected = plain_logprobs(model, text, vector, positions, text.instruction_end)
                torch.testing.assert_close(found[index][row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("point", ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.2.hook_resid_post"])
def test_a_users_own_hooks_act_in_the_sweep(model, vectors, held_out, point):
    """Also those inside attention and those that read across rows of a sequence, which the shared layouts must not hide."""
    template, scorer = caa.ChatTemplate(), METRICS["logprob"]()
    texts = [text for pair in held_out for text in scorer.texts(model.tokenizer, template, pair)]
    settings = [None, *(2.0 * vector for vector in vectors.values())]

    def halve_hook(activations, hook):
        return 0.5 * activations

    with model.hooks(fwd_hooks=[(point, halve_hook)]):
        found = dict(grid.grid_logprobs(model, texts, settings))
        for index, text in enumerate(texts):
            for row, vector in enumerate(settings):
                expected = plain_logprobs(model, text, vector, "after_instruction", text.instruction_end)
                torch.testing.assert_close(found[index][row], expected, atol=1e-4, rtol=1e-4)
    untouched = dict(grid.grid_logprobs(model, texts, settings))
    assert all(relative_error(untouched[i], found[i]) > 1e-3 for i in found)


def test_out_of_memory_halves_the_chunk_and_gives_the_same(model, vectors, held_out, monkeypatch):
    expected = caa.sweep(model, vectors, held_out[:1], multipliers=(-1, 1), progress=False).items
    sizes, branches = [], grid.run_branches

    def small_memory(model, tokens, mask, chunk, readout, **options):
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("too much")
        return branches(model, tokens, mask, chunk, readout, **options)

    monkeypatch.setattr(grid, "run_branches", small_memory)
    found = caa.sweep(model, vectors, held_out[:1], multipliers=(-1, 1), progress=False).items
    assert sizes[0] == 6
    assert max(sizes[2:]) <= 2
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)


def test_interrupted_and_resumed_is_uninterrupted(model, vectors, held_out, tmp_path, monkeypatch):
    expected = caa.sweep(model, vectors, held_out, batch_size=2, progress=False).items
    count, run = [0], grid._Runner.run

    def dying(self, index):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return run(self, index)

    monkeypatch.setattr(grid._Runner, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        caa.sweep(model, vectors, held_out, batch_size=2, store=tmp_path / "s", progress=False)
    done = len(list((tmp_path / "s").glob("item-*.json")))
    assert 0 < done < len(held_out)
    found = caa.sweep(model, vectors, held_out, batch_size=2, store=tmp_path / "s", progress=False)
    pd.testing.assert_frame_equal(found.items, expected, atol=1e-5)
    assert not list((tmp_path / "s").glob("*.tmp"))
    with pytest.raises(caa.InputError, match="holds another sweep"):
        caa.sweep(model, vectors, held_out, multipliers=(1,), store=tmp_path / "s", progress=False)


def test_tables_controls_and_words(model, vectors, held_out, tmp_path):
    result = caa.sweep(model, vectors, held_out, layers=[-1, 0], controls=2, progress=False)
    summary = result.to_pandas()
    names = {"vector", "random-0", "random-1", "shuffled-0", "shuffled-1", "shuffled-2"}
    assert set(summary["vector"]) == names
    assert set(summary["layer"]) == {0, 2}
    assert len(summary) == len(names) * 2 * 3
    unsteered = summary[summary["multiplier"] == 0]["value"]
    assert unsteered.nunique() == 1  # the unsteered model is one
    assert (summary["low"] <= summary["value"]).all()
    assert (summary["value"] <= summary["high"]).all()
    effects = result.effects()
    assert set(effects["vector"]) == names
    assert result.best()["layer"] in (0, 2)
    assert any(word in result.verdict() for word in ("NULL", "NOT SHOWN", "Beyond every control"))
    for suffix in ("parquet", "json", "csv"):
        result.save(tmp_path / f"t.{suffix}")
    again = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(again, result.items)
    assert "pairs_hash" in again.attrs["caa_lens"]
    with pytest.raises(caa.InputError, match="allowed suffixes"):
        result.save(tmp_path / "t.xls")


def test_letter_score_and_mass(model):
    """Against the plain softmax: normalised over what is offered, balanced by key."""
    result = caa.score(model, QUESTIONS, progress=False)
    assert result.metric.name == "letter"
    template = caa.ChatTemplate()
    for number, pair in enumerate(QUESTIONS):
        ids = template.encode(model.tokenizer, pair.prompt, "(").ids
        with torch.no_grad():
            p = model(torch.tensor([ids])).softmax(-1)[0, -1]
        offered = {letter: float(p[model.tokenizer.convert_tokens_to_ids(letter)]) for letter in pair.options}
        row = result.items.iloc[number]
        assert row["mass"] == pytest.approx(sum(offered.values()), rel=1e-4)
        assert row["value"] == pytest.approx(offered[pair.key] / sum(offered.values()), rel=1e-4)
    assert result.to_pandas()["value"][0] == pytest.approx(result.items["value"].mean())
    published = caa.score(model, QUESTIONS, metric="letter_published", progress=False)
    assert published.items["value"][1] == 0  # keyed C: adds nothing, counts one
    assert published_item("A", 0.3, 0.1) == pytest.approx(0.75)


def test_letters_that_are_one_token_with_their_bracket(kind, byte_tokenizer, tmp_path):
    """`(A` is a single token in some vocabularies: the answer is read where the ids differ, whatever the pieces."""
    byte_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for letter in "ABC":
        content["model"]["vocab"][f"({letter}"] = len(content["model"]["vocab"])
        content["model"]["merges"].append(["(", letter])
    file.write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.tokenize("(A)") == ["(A", ")"]
    model = as_lens(kind, tiny_llama(len(tokenizer)), tokenizer)
    vectors = caa.extract(model, QUESTIONS[:1], progress=False)
    result = caa.sweep(model, vectors, QUESTIONS[1:], layers=[1], multipliers=(0, 2), progress=False)
    for row in result.items.itertuples():
        pair = QUESTIONS[1:][row.item]
        ids = caa.ChatTemplate().encode(tokenizer, pair.prompt).ids
        with caa.steer(model, row.multiplier * vectors[1]), torch.no_grad():
            p = model(torch.tensor([ids])).softmax(-1)[0, -1]
        offered = {letter: float(p[tokenizer.convert_tokens_to_ids(f"({letter}")]) for letter in pair.options}
        assert row.mass == pytest.approx(sum(offered.values()), abs=1e-4)
        assert row.value == pytest.approx(offered[pair.key] / sum(offered.values()), abs=1e-4)


def test_layer_transfer_uses_one_vector_at_other_layers(model, vectors, held_out):
    result = caa.sweep(model, vectors[1], held_out, layers=[0, 2], multipliers=(1,), progress=False)
    direct = caa.score(model, held_out, vectors[1].at_layer(2), multipliers=(1,), progress=False)
    row = result.to_pandas().query("layer == 2")["value"].item()
    assert row == pytest.approx(direct.to_pandas()["value"].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v, p: caa.sweep(m, v, p, multipliers=()), "an empty grid"),
        (lambda m, v, p: caa.sweep(m, v, p, layers=[]), "no layer given"),
        (lambda m, v, p: caa.sweep(m, v, p, layers=[9]), "out of range"),
        (lambda m, v, p: caa.score(m, p, metric="letter"), "are no answer letters"),
        (lambda m, v, p: caa.score(m, p, metric="accuracy"), "allowed are 'letter'"),
        (
            lambda m, v, p: caa.score(m, caa.load_pairs([("Q\n(A) a\n(B) b", "(C)", "(A)")])),
            r"matching answer '\(C\)' is not offered; the prompt offers A, B",
        ),
        (
            lambda m, v, p: caa.score(m, caa.load_pairs([("Q\n(9) a\n(10) b\n(11) c", "(9)", "(11)")])),
            "share a first token",
        ),
        (lambda m, v, p: caa.score(m, caa.load_pairs([("Q\n(A) a (B) b", "(A)", "(B)")])), r"offers \(A\) alone"),
        (lambda m, v, p: caa.score(m, p, v[0], positions=torch.ones(3, dtype=torch.bool)), "mask fits one prompt"),
        (lambda m, v, p: caa.score(m, caa.load_pairs([("word " * 200, "yes", "no")])), "exceed the context"),
        (lambda m, v, p: caa.sweep(m, v, p[:0]), "holds no pairs; sweep needs at least one"),
        (lambda m, v, p: caa.score(m, p[:0]), "holds no pairs; score needs at least one"),
        (lambda m, v, p: caa.capability(m, p[:0], v), "holds no pairs; capability needs at least one"),
        (lambda m, v, p: caa.sweep(m, v, list(p)), "sweep takes a PairSet, got list"),
        (lambda m, v, p: caa.score(m, v[0], p), "score takes a PairSet, got SteeringVector"),
        (lambda m, v, p: caa.score(m, p, v), "one SteeringVector, got VectorSet"),
        (lambda m, v, p: caa.sweep(m, [v[0]], p), "takes a VectorSet or a SteeringVector, got list"),
        (lambda m, v, p: caa.sweep(m, v, p, multipliers=(1, float("nan"))), "nan is no finite number"),
        (lambda m, v, p: caa.sweep(m, v, p, multipliers="1"), "give a number, or a list"),
        (lambda m, v, p: caa.sweep(m, v, p, multipliers=np.ones((2, 2))), "is no finite number"),
        (lambda m, v, p: caa.sweep(m, v, p, layers=[1.5]), "give a whole number"),
        (lambda m, v, p: caa.sweep(m, v, p, controls=-2), "controls=-2 must be at least 0"),
        (lambda m, v, p: caa.sweep(m, v, p, others=v), "no vector for layer|others"),
        (lambda m, v, p: caa.sweep(m, v, p, others=[v]), "others= takes vectors by name"),
        (lambda m, v, p: caa.sweep(m, v, p, others={"x": v[1]}), "no vector for layer 0"),
        (lambda m, v, p: caa.sweep(m, v, p, others={"x": "x"}), "others={'x': ...} takes a VectorSet"),
        (lambda m, v, p: caa.score(m, p, controls=True), "need a vector"),
        (lambda m, v, p: caa.score(m, p, layers=np.arange(2)), "need a vector"),
        (lambda m, v, p: caa.score(m, p, postions="all"), "no option postions=; did you mean positions="),
        (lambda m, v, p: caa.sweep(m, v, p, postions="all"), "no option postions=; did you mean positions="),
        (lambda m, v, p: caa.sweep(m, v, p, parts=2), "no option parts="),
        (lambda m, v, p: caa.text_loss(m, "Some text.", v, postion="all"), "no option postion="),
        (lambda m, v, p: caa.learning_curve(m, p, layer=1), "no option layer=; did you mean layers="),
        (lambda m, v, p: caa.sweep(m, v, p, batch_size=0), "batch_size=0 must be at least 1"),
        (lambda m, v, p: caa.sweep(m, v, p, systems="Be kind."), "systems= takes ways to prompt by name"),
    ],
)
def test_refused_before_the_model_runs(model, vectors, pairs, call, message, monkeypatch, unchecked):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    held_out = caa.load_pairs([("Other prompt", "Yes, indeed.", "Yeah, sure.")])
    with pytest.raises(caa.CaaLensError, match=message):
        call(model, vectors, held_out)


def test_a_setting_that_overflows_leaves_the_others_alone(kind, byte_tokenizer, vectors, held_out):
    half = as_lens(kind, tiny_llama(len(byte_tokenizer)).half(), byte_tokenizer)

    def values(**options):
        items = caa.sweep(half, vectors, held_out, progress=False, **options).items
        return items.set_index(["item", "layer", "multiplier"])["value"].sort_index()

    alone, beside = values(multipliers=(-1, 0, 1)), values(multipliers=(-1, 0, 1, 1e6))
    assert beside.xs(1e6, level="multiplier").isna().all()
    np.testing.assert_allclose(beside.drop(1e6, level="multiplier"), alone, atol=0.02)


def test_arrays_and_single_numbers_are_taken(model, vectors, held_out):
    def items(**options):
        return caa.sweep(model, vectors[1], held_out[:2], progress=False, **options).items

    expected = items(multipliers=(-1.0, 0.0, 1.0), layers=[0, 1, 2])
    for multipliers in (np.linspace(-1, 1, 3), torch.tensor([-1.0, 0.0, 1.0]), range(-1, 2)):
        for layers in (np.arange(3), torch.arange(3), range(3)):
            pd.testing.assert_frame_equal(items(multipliers=multipliers, layers=layers), expected)
    single = items(multipliers=1, layers=1, others={"other": 2 * vectors[1]})
    assert set(single["vector"]) == {"vector", "other"}
    assert (single.groupby("item")["value"].nunique() == 1).all()  # the same direction, at the same norm
    assert caa.extract(model, held_out, layers=np.arange(2), progress=False).layers == (0, 1)


def test_a_damaged_store_is_refused_and_strangers_are_left_alone(model, held_out, tmp_path):
    def scored(store):
        return caa.score(model, held_out, store=store, progress=False).items

    expected, store = scored(tmp_path / "s"), tmp_path / "s"
    (store / "item-copy.json").write_text("1")
    assert scored(store).equals(expected)
    for content in ("[[[", "1", '[["a"]]'):
        (store / "item-000001.json").write_text(content)
        with pytest.raises(caa.InputError, match=r"item-000001\.json cannot be read .* delete this file and run again"):
            scored(store)
    (store / "item-000001.json").unlink()
    pd.testing.assert_frame_equal(scored(store), expected, atol=1e-5)
    (store / "about.json").unlink()
    with pytest.raises(caa.InputError, match=r"about\.json is not there"):
        scored(store)
    with pytest.raises(caa.InputError, match=r"item-copy\.json is a file, not a folder"):
        scored(store / "item-copy.json")
    with pytest.raises(caa.InputError, match=r"item-copy\.json is a file, not a folder"):
        caa.extract(model, held_out, store=store / "item-copy.json" / "below", progress=False)


def test_training_prompts_and_open_contexts_are_refused(model, pairs):
    vectors = caa.extract(model, pairs[:3], progress=False)
    with pytest.raises(caa.InputError, match="in the training pairs too"):
        caa.sweep(model, vectors, pairs[2:])
    with caa.steer(model, vectors[0]), pytest.raises(caa.InputError, match="leave the steer"):
        caa.score(model, pairs[3:])


def fake_result(slope, control, n=40, seed=0, layer=3):
    """A table in which items have the given mean slopes, with noise."""
    rng = np.random.default_rng(seed)
    rows = [
        {"item": i, "key": None, "vector": name, "layer": layer, "multiplier": m, "value": 0.0, "effect": m * s}
        for name, mean in (("vector", slope), ("random-0", control))
        for i, s in enumerate(rng.normal(mean, 0.5, n))
        for m in (-1.0, 0.0, 1.0)
    ]
    from caa_lens.experiments.scoring import Logprob

    return caa.SweepResult(pd.DataFrame(rows), Logprob(), {"pairs": "fake"})


def test_verdicts():
    assert "NULL" in fake_result(0.0, 0.0).verdict()
    assert "OPPOSITE, beyond every control" in fake_result(-1.0, 0.05).verdict()
    assert "below zero, and no layer does better. NOT SHOWN" in fake_result(-0.5, 0.6).verdict()
    assert fake_result(-0.5, 0.6).finding().status == "not shown"
    assert "NOT SHOWN" in fake_result(0.5, 0.6).verdict()
    assert "Beyond every control" in fake_result(1.0, 0.05).verdict()
    nulls = ["NULL" in fake_result(0.0, 0.0, seed=seed).verdict() for seed in range(40)]
    assert np.mean(nulls) >= 0.85


def layers(*results):
    """One result of several layers."""
    return replace(results[0], items=pd.concat([result.items for result in results], ignore_index=True))


def test_the_best_of_several_layers_is_held_against_the_controls_at_all_of_them():
    strong, elsewhere = fake_result(1.0, 0.05, layer=3), fake_result(0.2, -1.5, layer=7)
    assert "Beyond every control of the same norm; the largest is 'random-0' at" in strong.verdict()
    finding = layers(strong, elsewhere).finding()
    assert finding.status == "not shown"
    assert "layer 3: effect" in finding.words
    assert re.search(r"'random-0' .* at layer 7, the largest at any of the 2 layers", finding.words)
    weak = layers(strong, fake_result(0.2, 0.1, layer=7)).finding()
    assert weak.status == "beyond controls"
    assert "at any of the 2 layers that this one was chosen from; the largest is 'random-0', at layer" in weak.words


def test_a_null_vector_rarely_passes_a_sweep_of_many_layers():
    """Every direction has an effect of its own at each layer; one more of them is the vector."""
    rng = np.random.default_rng(0)
    names = ["vector", *(f"random-{k}" for k in range(6))]
    passed = []
    for _ in range(200):
        rows = [
            {
                "vector": name,
                "layer": layer,
                "effect": effect,
                "effect_low": effect - 0.3,
                "effect_high": effect + 0.3,
                "n": 30,
            }
            for name in names
            for layer, effect in enumerate(rng.normal(0, 1, 30))
        ]
        passed.append(finding_on(pd.DataFrame(rows), "null", unit="nats").status == "beyond controls")
    assert np.mean(passed) < 0.1


def test_one_item_cannot_tell(model, vectors, held_out):
    result = caa.sweep(model, vectors, held_out[:1], controls=True, progress=False)
    assert result.finding().status == "undecided"
    assert "[no interval], n = 1. TOO FEW: one item cannot tell." in result.verdict()
    assert result.effects()[["effect_low", "effect_high"]].isna().all(axis=None)
    result.plot("layer").savefig(io.BytesIO())
    result.plot("multiplier", layer=1).savefig(io.BytesIO())


def overflowing(activations, direction, strength):
    return activations * torch.inf


def test_values_that_are_not_finite_are_not_measurable(model, vectors, held_out):
    """Activations that overflow; and those of a control."""
    for pairs in (QUESTIONS, held_out):
        result = caa.sweep(
            model, vectors[1], pairs, multipliers=(-1, 1), controls=1, operator=overflowing, progress=False
        )
        assert result.to_pandas()[["value", "low", "high", "preferred"]].isna().all(axis=None)
        assert result.finding().status == "undecided"
        assert "NOT MEASURABLE: the model gave values that are not finite." in result.verdict()
        result.plot("multiplier").savefig(io.BytesIO())
    broken = fake_result(1.0, 0.05)
    control = broken.items["vector"] == "random-0"
    broken = replace(broken, items=broken.items.assign(effect=broken.items["effect"].mask(control)))
    assert broken.finding().status == "undecided"
    assert "NOT MEASURABLE" in broken.verdict()
    assert "the control 'random-0'" in broken.verdict()


@pytest.mark.slow
def test_formality_steers_the_embedded_model(embedded):
    """Issue figures: monotone, more than a nat between -1 and +1, three times the controls' gap."""
    train, held_out = caa.load_pairs("formality").split(held_out=30, seed=0)
    vectors = caa.extract(embedded, train, progress=False)
    one = caa.VectorSet([vectors[14]], {"shuffled-0": vectors.controls["shuffled-0"]})
    result = caa.sweep(embedded, one, held_out, multipliers=(-1, -0.5, 0, 0.5, 1), controls=1, progress=False)
    table = result.to_pandas().pivot(index="vector", columns="multiplier", values="value")
    own = table.loc["vector"].to_numpy()
    assert (np.diff(own) > 0).all()
    gap = own[-1] - own[0]
    assert gap > 1.0
    for control in ("random-0", "shuffled-0"):
        assert gap >= 3 * abs(table.loc[control, 1.0] - table.loc[control, -1.0])
    assert "Beyond every control" in result.verdict()


def measured(embedded, name, n_items):
    """A behaviour at layer 14 on held-out items, beside a random, three shuffled and, for letters, two further controls."""
    train, held_out = caa.load_pairs(name).split(held_out=30, seed=0)
    v = caa.extract(embedded, train, layers=[14], progress=False)[14]
    return caa.score(embedded, held_out[:n_items], v, multipliers=(-1, 1), controls=1, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("sentiment", 0.15), ("refusal", 0.1)])
def test_free_text_sets_steer_the_embedded_model(embedded, name, at_least):
    result = measured(embedded, name, 20)
    assert set(result.items["vector"]) == {"vector", "random-0", "shuffled-0", "shuffled-1", "shuffled-2"}
    assert result.best()["effect"] > at_least
    assert "Beyond every control" in result.verdict()


@pytest.mark.slow
def test_the_multiple_choice_form_is_null_on_the_embedded_model(embedded):
    """It answers at chance, and what moves is the letter: METHOD.md's null result, reported as one."""
    result = measured(embedded, "ab/sycophancy", 30)
    assert {"letter", "letter-balanced"} <= set(result.items["vector"])
    assert "NULL" in result.verdict()
    assert abs(result.best()["effect"]) < 0.05
