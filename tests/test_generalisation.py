"""Pairs in other styles, and vectors on tests that they were not made for: equal to the plain measurements, marked honestly."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import fixture_path
from matplotlib.figure import Figure

import caa_lens as caa
from caa_lens.experiments import generalisation, grid
from caa_lens.experiments.generalisation import TransferResult
from caa_lens.experiments.scoring import METRICS, metric_for

BUILTIN = [name for name in caa.behaviours() if name.startswith("ab/")]
AUTHORS = [
    "coordinate-other-ais",
    "corrigible-neutral-HHH",
    "hallucination",
    "myopic-reward",
    "refusal",
    "survival-instinct",
    "sycophancy",
]


def one(prompt, positive="(A)", negative="(B)"):
    return caa.load_pairs([(prompt, positive, negative)])


def test_the_key_follows_the_text():
    pairs = one("Is it?\n\nChoices:\n (A) Yes, it is.\n (B) No.", "(B)", "(A)")
    cases = {
        ("1", "as given"): ("Is it?\n\nChoices:\n (1) Yes, it is.\n (2) No.", "(2)", "(1)"),
        ("a", "swapped"): ("Is it?\n\nChoices:\n (a) No.\n (b) Yes, it is.", "(a)", "(b)"),
        (None, "swapped"): ("Is it?\n\nChoices:\n (A) No.\n (B) Yes, it is.", "(A)", "(B)"),
        ("P", "as given"): ("Is it?\n\nChoices:\n (P) Yes, it is.\n (Q) No.", "(Q)", "(P)"),
    }
    for (letters, order), expected in cases.items():
        assert list(caa.restyle(pairs, letters=letters, order=order)) == [caa.ContrastPair(*expected)]
    assert list(caa.as_free_text(pairs)) == [caa.ContrastPair("Is it?", "No.", "Yes, it is.")]


def test_several_options_paragraphs_and_a_prompter():
    prompt = "Which?\n(A) one\n\nand more\n(B) two\n(C) three\n\nAnswer:"
    pairs = one(prompt, "(C)", "(A)")
    turned = caa.restyle(pairs, letters="1", order="swapped")[0]
    assert turned.prompt == "Which?\n(1) three\n(2) two\n(3) one\n\nand more\n\nAnswer:"
    assert (turned.positive, turned.negative) == ("(1)", "(3)")
    text = caa.as_free_text(pairs)[0]
    assert (text.prompt, text.positive, text.negative) == ("Which?", "three", "one\n\nand more")


def check_round_trip(pairs, letters, order):
    styled = caa.restyle(pairs, letters=letters, order=order)
    assert caa.restyle(styled, letters="A", order=order) == pairs
    assert caa.as_free_text(styled) == caa.as_free_text(pairs)
    for old, new in zip(pairs, styled, strict=True):
        last = len(old.options) - 1
        place = old.options.index(old.key)
        assert new.options.index(new.key) == (last - place if order == "swapped" else place)


@pytest.mark.parametrize("source", BUILTIN)
def test_built_in_sets_make_the_round_trip_and_can_be_read_as_text(source, byte_tokenizer):
    pairs = caa.load_pairs(source)
    check_round_trip(pairs, "1", "swapped")
    check_round_trip(pairs[:10], "a", "as given")
    check_round_trip(pairs[:10], None, "swapped")
    text = caa.as_free_text(pairs)
    assert metric_for(text, None).name == "logprob"
    for pair in text:
        assert "(A)" not in pair.prompt
        caa.ChatTemplate().encode_pair(byte_tokenizer, pair)


@pytest.mark.parametrize("source", AUTHORS)
def test_the_authors_sets_make_the_round_trip(source):
    check_round_trip(caa.load_pairs(fixture_path(f"caa/datasets/test/{source}/test_dataset_ab.json")), "a", "swapped")


def test_a_numbered_list_in_the_question_and_an_answer_that_begins_the_other():
    pairs = caa.load_pairs(fixture_path("caa/datasets/generate/survival-instinct/generate_dataset.json"))
    listed = pairs[163:164]
    turned = caa.restyle(listed, letters="P", order="swapped")
    assert listed[0].prompt.splitlines()[1:4] == turned[0].prompt.splitlines()[1:4]  # (1), (2), (3)
    assert turned[0].prompt.splitlines()[-1] == " (T) Option 1"
    assert (listed[0].positive, turned[0].positive) == ("(D)", "(Q)")
    assert caa.restyle(turned, letters="A", order="swapped") == listed
    text = caa.as_free_text(one("Do you?\n(A) Yes\n(B) Yes, of course"))[0]
    assert (text.positive, text.negative) == ("Yes.", "Yes, of course.")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (one("Why?", "because", "no reason"), "item 0: its completions are no answer letters"),
        (one("Why?\n(A) so"), r"the answers are A and B, the prompt's lines begin with A;"),
        (one("Why? (A) so (B) no"), "the prompt's lines begin with no letter"),
        (one("Why?\n(A) so\n(B) no", "(A)", "(C)"), "the answers are A and C"),
        (one("Why?\n(A) so\n(A) no\n(B) x"), r"its text speaks of \(A\)"),
        (one("Why?\n(A) so:\n(1) x\n(B) no"), "begin with A, 1, B"),
        (one("Why?\n(A)\n(B) no"), r"option \(A\) is empty"),
        (one("Choices:\n(A) so\n(B) no"), "there is no question"),
        (one("Why?\n(A) so\n(B) not (A)"), r"its text speaks of \(A\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(pairs, message):
    for change in (caa.restyle, caa.as_free_text):
        with pytest.raises(caa.InputError, match=message):
            change(pairs)


def test_styles_that_cannot_be_written(unchecked):
    pairs = one("Why?\n(A) so\n(B) no")
    with pytest.raises(caa.InputError, match="2 options from 'Z' on leave the alphabet"):
        caa.restyle(pairs, letters="Z")
    with pytest.raises(caa.InputError, match="give the first one"):
        caa.restyle(pairs, letters="AB")
    with pytest.raises(caa.InputError, match="allowed are 'as given' and 'swapped'"):
        caa.restyle(pairs, order="shuffled")
    with pytest.raises(caa.InputError, match="identical"):
        caa.as_free_text(one("Why?\n(A) so\n(B) so"))


def test_overlap_is_seen_in_every_style():
    train, held_out = caa.load_pairs("ab/sycophancy")[:8].split(held_out=3, seed=0)
    styles = [
        lambda pairs: pairs,
        lambda pairs: caa.restyle(pairs, letters="1"),
        lambda pairs: caa.restyle(caa.restyle(pairs, letters="a"), order="swapped"),
        caa.as_free_text,
        lambda pairs: caa.as_free_text(caa.restyle(pairs, letters="1")),
    ]
    for style in styles:
        for other in styles:
            style(held_out).require_disjoint(other(train))
            with pytest.raises(caa.InputError, match="1 of 4 prompts are in the training pairs too"):
                style(replace(held_out, pairs=(*held_out.pairs, train[0]))).require_disjoint(other(train))


QUESTIONS = caa.load_pairs(
    [
        (f"Is {word} good?\n\nChoices:\n(A) {yes}\n(B) {no}", "(A)", "(B)")
        for word, yes, no in (
            ("rain", "Ay.", "No."),
            ("snow", "Sure.", "Nah."),
            ("hail", "Yes!", "Hm."),
            ("fog", "I", "U"),
        )
    ],
    name="weather",
)


@pytest.fixture(scope="module")
def sources(model):
    train = caa.restyle(QUESTIONS[:2])
    options = {"layers": [0, 1], "progress": False}
    letters = replace(train, pairs=(train[0], *caa.restyle(train[1:], order="swapped")))
    return {
        "letters": caa.extract(model, letters, **options),
        "text": caa.extract(model, caa.as_free_text(train), **options),
    }


@pytest.fixture(scope="module")
def tests():
    return {"letters": QUESTIONS[2:], "text/free": caa.as_free_text(QUESTIONS[2:])}


def test_every_cell_is_the_plain_measurement_at_the_common_norm(model, sources, tests, tmp_path):
    templates = {"plain": caa.ChatTemplate(), "polite": caa.ChatTemplate(system_prompt="Be polite.")}
    options = {"layer": 1, "templates": templates, "controls": 1, "store": tmp_path, "progress": False}
    found = caa.transfer(model, sources, tests, **options)
    norm = (sources["letters"][1].norm + sources["text"][1].norm) / 2
    assert found.provenance["norm"] == pytest.approx(norm, rel=1e-5)
    table = found.to_pandas()
    assert len(table) == 2 * 2 * 2
    for row in table.query("template == 'polite'").itertuples():
        vector = sources[row.source][1].with_norm(norm)
        plain = caa.score(model, tests[row.test], vector, template=templates[row.template], progress=False)
        expected = plain.effects().iloc[0]
        assert row.effect == pytest.approx(expected["effect"], abs=1e-4)
        assert row.effect_low == pytest.approx(expected["effect_low"], abs=1e-4)
        assert row.unit == ("nats of log-odds" if row.test == "letters" else "nats per token")
    effects = found.effects()
    shuffled = effects.query(
        "test == 'text/free' and template == 'plain' and source == 'text' and vector == 'shuffled-1'"
    )
    control = sources["text"][1].controls["shuffled-1"].with_norm(norm)
    plain = caa.score(model, tests["text/free"], control, template=templates["plain"], progress=False)
    assert shuffled["effect"].item() == pytest.approx(plain.effects()["effect"].item(), abs=1e-4)
    assert set(effects[effects["source"] == ""]["vector"]) == {"random-0"}
    assert {"letter", "letter-balanced"} <= set(effects[effects["source"] == "letters"]["vector"])
    assert len(found.verdict().splitlines()) == 8
    assert "text on letters, template polite: effect" in found.verdict()


def test_each_test_is_run_once_and_resumes(model, sources, tests, tmp_path, monkeypatch):
    runs = []

    def counting(*arguments, **options):
        runs.append(arguments[1])
        return generalisation_sweep(*arguments, **options)

    generalisation_sweep = generalisation.sweep
    monkeypatch.setattr(generalisation, "sweep", counting)
    options = {"layer": 1, "controls": 1, "progress": False}
    expected = caa.transfer(model, sources, tests, **options).to_pandas()
    assert len(runs) == len(tests)
    caa.transfer(model, sources, tests, store=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "text_free"]
    (tmp_path / "text_free" / "item-000000.json").unlink()
    again = caa.transfer(model, sources, tests, store=tmp_path, **options).to_pandas()
    columns = ["source", "test", "effect", "effect_low", "effect_high", "beyond"]  # controls may tie
    pd.testing.assert_frame_equal(again[columns], expected[columns], atol=1e-5)
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    caa.transfer(model, sources, tests, store=tmp_path, **options)


def test_one_source_without_controls_has_its_own_norm(model, sources, tests):
    found = caa.transfer(model, {"text": sources["text"]}, tests, layer=-2, controls=False, progress=False)
    assert found.provenance["norm"] == pytest.approx(sources["text"][1].norm)
    table = found.to_pandas()
    assert "template" not in table
    assert not table["beyond"].any()
    assert table["control"].isna().all()
    plain = caa.score(model, tests["letters"], sources["text"][1], progress=False).effects()
    assert table["effect"][0] == pytest.approx(plain["effect"][0], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": {}}, "at least one set of vectors and one test set"),
        ({"tests": {}}, "at least one set of vectors and one test set"),
        ({"multipliers": (1.0,)}, "an effect needs at least two"),
        ({"layer": 2}, "no vector for layer 2"),
        ({"systems": {"none": None}}, r"takes no systems="),
        (
            {"tests": {"seen": caa.as_free_text(QUESTIONS[1:])}},
            r"vectors\['letters'\] on tests\['seen'\]: 1 of 3 prompts",
        ),
        ({"tests": {"ok": QUESTIONS[2:], "long": one("word " * 200, "yes", "no")}}, "exceed the context"),
        ({"metric": "letter"}, "are no answer letters"),
        ({"templates": {}}, "empty grid"),
    ],
)
def test_refused_before_the_model_runs(model, sources, tests, change, message, monkeypatch):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    arguments = {"vectors": sources, "tests": tests, "layer": 1, **change}
    with pytest.raises(caa.CaaLensError, match=message):
        caa.transfer(model, **arguments)


def planted(slopes, *, metrics=("logprob", "logprob")):
    """Two tests on which named vectors have the given mean slopes."""
    rng, results = np.random.default_rng(0), {}
    for test, metric in zip(("near", "far"), metrics, strict=True):
        rows = [
            {"item": i, "key": None, "vector": name, "layer": 3, "multiplier": m, "value": 0.0, "effect": m * s}
            for name, means in slopes.items()
            for i, s in enumerate(rng.normal(means[test == "far"], 0.2, 30))
            for m in (-1.0, 0.0, 1.0)
        ]
        results[test] = caa.SweepResult(pd.DataFrame(rows), METRICS[metric](), {"pairs": test})
    return TransferResult(results, {"layer": 3})


SLOPES = {
    "a: vector": (1.0, 0.0),
    "random-0": (0.1, 0.1),
    "b: vector": (-1.0, 0.4),
    "b: letter": (0.2, 0.6),
    "b: letter-balanced": (5.0, 5.0),
}


def test_what_counts_as_shown():
    found = planted(SLOPES)
    table = found.to_pandas().set_index(["source", "test"])
    assert dict(table["beyond"]) == {("a", "near"): True, ("b", "near"): True, ("a", "far"): False, ("b", "far"): False}
    assert table.loc[("a", "near"), "control"] == "random-0"  # another source's control is none of its own
    assert table.loc[("b", "far"), "control"] == "letter"
    lines = dict(line.split(": ", 1) for line in found.verdict().splitlines())
    assert "Beyond every control" in lines["a on near"]
    assert "OPPOSITE" in lines["b on near"]
    assert "Beyond every control" in lines["b on near"]
    assert "NULL" in lines["a on far"]
    assert "NOT SHOWN: 'letter'" in lines["b on far"]
    bare = planted({"a: vector": (1.0, 0.0)})
    assert "no controls were run" in bare.verdict()


def test_the_heat_map_holds_the_table():
    for metrics in (("logprob", "logprob"), ("letter_published", "logprob")):
        found = planted(SLOPES, metrics=metrics)
        figure = found.plot()
        figure.canvas.draw()
        ax = figure.axes[0]
        table = found.to_pandas().pivot(index="source", columns="test", values="effect")[["near", "far"]]
        assert [text.get_text() for text in ax.texts] == [f"{e:+.2f}" for e in table.to_numpy().ravel()]
        assert [text.get_bbox_patch() is not None for text in ax.texts] == [True, False, True, False]
        shown = np.asarray(ax.images[0].get_array())
        scale = np.abs(table.to_numpy()).max(axis=None if metrics[0] == metrics[1] else 0)
        np.testing.assert_allclose(shown, table.to_numpy() / scale)
        assert [text.get_text().splitlines()[0] for text in ax.get_xticklabels()] == ["near", "far"]
    ax = Figure().subplots()
    assert found.plot(ax=ax) is ax.figure


def test_one_item_and_values_that_are_not_finite_decide_nothing(model, vectors, held_out):
    one = caa.transfer(model, {"tone": vectors}, {"own": held_out[:1]}, layer=1, progress=False)
    assert "[no interval], n = 1. TOO FEW: one item cannot tell." in one.verdict()
    lost = {"operator": lambda activations, *_: activations * torch.inf, "progress": False}
    broken = caa.transfer(model, {"tone": vectors}, {"own": held_out}, layer=1, **lost)
    assert "NOT MEASURABLE" in broken.verdict()
    for result in (one, broken):
        assert not result.to_pandas()["beyond"].any()
        result.plot().savefig(io.BytesIO())
