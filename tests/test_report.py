"""Studies: settings, resuming, tables and a page that needs nothing else; published numbers without a model."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
from conftest import KINDS, fixture_path, tiny_llama
from markupsafe import escape

import caa_lens as caa
from caa_lens.cli import main
from caa_lens.experiments.judges.base import Judgement
from caa_lens.experiments.report import (
    Study,
    claim_answers,
    claim_cost,
    estimate,
    load_study,
    presets,
    published_numbers,
    reproduce,
    study_of,
)
from caa_lens.experiments.report import run as running
from caa_lens.experiments.report.claims import CLAIMS
from caa_lens.experiments.report.section import NotRun, Section, read_section, save_section

TIMED = ("08-", "training_time")  # seconds differ from run to run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, byte_tokenizer):
    """A model directory, whose name must not break the page."""
    folder = tmp_path_factory.mktemp("models") / "tiny <b>model"
    tiny_llama(len(byte_tokenizer), context=4096).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def study(request, tiny):
    return Study(
        model=str(tiny),
        kind=request.param,
        behaviours=("formality", "ab/refusal"),
        train=6,
        held_out=6,
        multipliers=(-1, 0, 1),
        controls=1,
        questions=2,
        max_new_tokens=3,
        examples=1,
        finetune=("formality",),
        capability=3,
    )


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    page = reproduce(study, folder, progress=False, say=lambda line: None)
    return folder, page.read_text(encoding="utf-8")


def sections(folder):
    return {place.name: read_section(place) for place in sorted((folder / "sections").iterdir())}


def files(folder):
    chosen = [*folder.glob("sections/*/*"), *folder.glob("vectors/*")]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in chosen
        if not any(part in str(file) for part in TIMED)
    }


def test_every_claim_is_examined(finished, study):
    found = sections(finished[0])
    expected = {f"{n:02d}-{b}" for n in (1, 2, 3, 4, 5, 6, 7, 9) for b in ("formality", "ab-refusal")}
    assert set(found) == expected | {"04-all", "06-all", "08-all", "10-all"}
    for name, section in found.items():
        assert section.status != "not run", f"{name}: {section.words}"
        assert section.tables or section.figures, name
        assert len(section.words) > 20
    for folder in (finished[0] / "sections").iterdir():
        for table in folder.glob("*.parquet"):
            assert len(pd.read_csv(table.with_suffix(".csv"))) == len(pd.read_parquet(table)) > 0
            assert "tabular" in table.with_suffix(".tex").read_text()
        for figure in folder.glob("*.png"):
            assert figure.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_fine_tuning_is_reported_with_accuracy_and_time(finished):
    tables = sections(finished[0])["04-all"].tables
    shares = tables["fine_tuning"].filter(like="accuracy").to_numpy()
    assert shares.shape == (2, 4)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert tables["training_time"]["side"].tolist() == ["positive", "negative"]
    assert (tables["training_time"]["seconds"] > 0).all()


def test_numbers_are_those_of_the_library(finished, study):
    """The layer sweep of the report is the sweep that a user would make."""
    folder, _ = finished
    train, held_out = caa.load_pairs("formality").split(held_out=study.held_out, seed=0)
    model = caa.load_model(study.model, kind=study.kind)
    vectors = caa.extract(model, train[: study.train], progress=False)
    result = caa.sweep(model, vectors, held_out[:3], multipliers=(-1, 1), controls=1, progress=False)
    table = sections(folder)["01-formality"].tables["effects_by_layer"]
    pd.testing.assert_frame_equal(table, result.effects(), atol=1e-5, rtol=1e-3)


def test_the_page_needs_nothing_else(finished):
    folder, page = finished
    assert "tiny &lt;b&gt;model" in page
    assert "<b>model" not in page
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page)
    assert outside == ["https://arxiv.org/abs/2312.06681"]
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page
    for claim in CLAIMS:
        assert claim.title in page
        assert not claim.holds or f"Holds where {escape(claim.holds)}" in page
    assert page.count("<img") == sum(len(section.figures) for section in sections(folder).values())
    for section in sections(folder).values():
        assert f">{section.status}</a>" in page


def test_killed_and_resumed_gives_the_same_files(finished, study, tmp_path, monkeypatch):
    folder, _ = finished
    examine, calls = running._examine, []

    def dying(lab, claim, behaviour):
        calls.append(claim.number)
        if len(calls) in (2, 9):
            raise KeyboardInterrupt
        return examine(lab, claim, behaviour)

    monkeypatch.setattr(running, "_examine", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            reproduce(study, tmp_path / "s", progress=False, say=lambda line: None)
    reproduce(study, tmp_path / "s", progress=False, say=lambda line: None)
    assert len(calls) == len(sections(folder)) + 2  # what was finished was not run again
    assert files(tmp_path / "s") == files(folder)
    assert not list((tmp_path / "s").rglob("*.tmp"))
    with pytest.raises(caa.InputError, match="holds another study"):
        reproduce(replace(study, seed=1), tmp_path / "s")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_baked_vector_counts_as_equal_to_rounding_and_no_further(study, dtype, tmp_path, monkeypatch):
    small = replace(study, behaviours=("formality",), claims=(8,), layer=1, finetune=(), dtype=dtype)
    monkeypatch.setattr(claim_cost, "NEW_TOKENS", 2)
    reproduce(small, tmp_path / "right", progress=False, say=lambda line: None)
    assert sections(tmp_path / "right")["08-all"].status == "holds"
    monkeypatch.setattr(claim_cost, "bake", lambda model, v: caa.bake(model, 1.5 * v))
    reproduce(small, tmp_path / "wrong", progress=False, say=lambda line: None)
    assert sections(tmp_path / "wrong")["08-all"].status == "opposite"


def test_a_model_in_half_precision_is_examined_whole(study, tmp_path, monkeypatch):
    """As every Llama preset runs; the smallest study that there is, for half precision is slow on a processor."""
    monkeypatch.setattr(claim_cost, "NEW_TOKENS", 1)
    small = {"train": 4, "held_out": 4, "layer": 1, "questions": 1, "max_new_tokens": 1, "shuffles": 1, "capability": 2}
    half = replace(study, dtype="bfloat16", finetune=(), **small)
    reproduce(half, tmp_path, progress=False, say=lambda line: None)
    assert {name[:2] for name in sections(tmp_path)} == {f"{claim.number:02d}" for claim in CLAIMS}
    assert [name for name, section in sections(tmp_path).items() if section.status == "not run"] == ["04-all"]


class Wavering:
    """A judge that scores every text, and one point lower when it is asked again."""

    name, varies = "wavering", True

    def about(self, rubric):
        return {"judge": self.name}

    def judge(self, rubric, cases, record):
        for index, case in enumerate(cases):
            record(index, Judgement("scored", float(len(case.answer) % 5 + 2 - case.repeat), ""))


def test_a_judge_that_varies_is_asked_twice_of_the_known_sides(study, tmp_path, monkeypatch):
    monkeypatch.setattr(claim_answers, "_judge", lambda lab: Wavering())
    small = replace(study, behaviours=("formality",), claims=(3,), layer=1, finetune=())
    reproduce(small, tmp_path, progress=False, say=lambda line: None)
    section = sections(tmp_path)["03-formality"]
    assert (
        "of each of 12 known sides, the judge gives scores 1.00 points apart on average, and the same one for 0%"
        in section.words
    )
    assert section.tables["judged_items"]["repeat"].unique().tolist() == [0]


def test_what_is_missing_does_not_stop_the_others(study, tmp_path):
    alone = replace(study, behaviours=("formality",), claims=(1, 4, 10), finetune=())
    said = []
    page = reproduce(alone, tmp_path, progress=False, say=said.append).read_text(encoding="utf-8")
    found = sections(tmp_path)
    assert found["10-all"].status == "not run"
    assert "generalisation needs 2 behaviours, the study has 1" in page
    assert found["04-all"].status == "not run"
    assert found["01-formality"].status != "not run"
    assert len(said) == 4
    more = replace(alone, behaviours=("formality", "ab/refusal"), claims=(10,))
    reproduce(more, tmp_path, progress=False, say=said.append)
    assert sections(tmp_path)["10-all"].status != "not run"


def test_the_first_layer_has_no_neighbour_below(study, tmp_path):
    first = replace(study, behaviours=("formality",), claims=(6,), layer=0, finetune=())
    reproduce(first, tmp_path, progress=False, say=lambda line: None)
    words = sections(tmp_path)["06-formality"].words
    assert "its cosine is" in words
    assert "to layer 1.\n" in words
    assert "to layer -1" not in words


def test_sections_are_kept_exactly(tmp_path):
    table = pd.DataFrame({"layer": [1, 2], "what_&_how": ["a_b", None], "value": [0.5, 1.5]})
    section = Section("null", "Nothing <here>.", {"t": table}, {}, {"caption": "<p>x</p>"}, ("note",))
    save_section(tmp_path / "s", section)
    again = read_section(tmp_path / "s")
    pd.testing.assert_frame_equal(again.tables["t"], table)
    assert (again.status, again.words, again.html, again.notes) == (
        section.status,
        section.words,
        section.html,
        section.notes,
    )
    assert r"a\_b" in (tmp_path / "s" / "t.tex").read_text()
    assert issubclass(NotRun, caa.CaaLensError)


def test_presets_and_files(tmp_path):
    assert presets() == ("embedded", "llama-2-13b", "llama-2-13b-chat", "llama-2-7b", "llama-2-7b-chat")
    chat = load_study("llama-2-7b-chat")
    assert (chat.layer, chat.normalize, len(chat.behaviours)) == (13, True, 7)
    assert study_of(None, "meta-llama/Llama-2-7b-chat-hf") == chat
    assert study_of(None, None).model == "smollm2-135m-instruct"
    assert study_of(None, "some/model").behaviours == caa.behaviours()
    file = tmp_path / "own.yaml"
    file.write_text("model: some/model\nbehaviours: [formality]\nclaims: [1, 2]\n")
    assert load_study(file, layer=5, judge=None) == Study("some/model", ("formality",), (1, 2), layer=5)
    same = load_study(file, claims=(3,))
    assert same.signature == load_study(file).signature != load_study(file, seed=4).signature


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nlayrs: 3", "unknown key 'layrs'; allowed are model, behaviours"),
        ("behaviours: [formality]", "a mapping with the key 'model'"),
        ("[1, 2", "not valid YAML"),
        ("model: m\nbehaviours: [nothing]", "no behaviour 'nothing'; there are ab/"),
        ("model: m\nclaims: [0]", "allowed are numbers from 1 to 10"),
        ("model: m\nheld_out: 2", "held_out=2 must be at least 4"),
        ("model: m\nmultipliers: [1, 2]", "must hold -1, 0 and 1"),
        ("model: m\nlayer: high", "'high' is not int"),
        ("model: m\nbatch_size: 0", "must be at least 1"),
        ("model: m\ndata: /nowhere", "is no folder"),
        ("model: m\nbehaviours: [formality]\nfinetune: [sentiment]", "not among the study's behaviours"),
    ],
)
def test_studies_that_are_refused(text, message, tmp_path, unchecked):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(caa.CaaLensError, match=re.escape(message)):
        load_study(file)
    with pytest.raises(caa.MissingError, match="neither a file nor one of embedded"):
        load_study("nothing")


def test_the_authors_data_in_place_of_the_built_in(tiny, tmp_path):
    data = fixture_path("caa/datasets")
    study = Study(
        model=str(tiny),
        behaviours=("ab/refusal", "ab/corrigible-neutral-hhh"),
        data=str(data),
        claims=(2,),
        train=4,
        layer=1,
        multipliers=(-1, 0, 1),
        controls=1,
        normalize=True,
        published_score=True,
    )
    assert len(Study(model="m", data=str(data)).behaviours) == 7
    reproduce(study, tmp_path, progress=False, say=lambda line: None)
    found = sections(tmp_path)["02-ab-refusal"]
    assert found.tables["scores_by_multiplier"]["n"].unique().tolist() == [50]
    assert "published_score" in found.tables
    sets = [caa.load_vectors(file) for file in (tmp_path / "vectors").iterdir()]
    assert all(vectors.provenance.n_pairs == 4 for vectors in sets)


def test_published_tables_without_a_model(tmp_path, capsys):
    results = fixture_path("caa/results")
    table = published_numbers(results)["multiple choice"].set_index("behavior")
    assert table.loc["refusal", ["-1", "+0", "+1"]].round(3).tolist() == [0.423, 0.744, 0.887]
    assert main(["report", "--published", str(results), "--out", str(tmp_path)]) == 0
    written = pd.read_csv(tmp_path / "published_multiple_choice.csv")
    assert set(written["behavior"]) == {"refusal", "survival-instinct"}
    assert "tabular" in (tmp_path / "published_multiple_choice_detail.tex").read_text()
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "holds no study" in capsys.readouterr().err


def test_published_judgements_beside_the_letters(tmp_path):
    """In the authors' layout: settings in the names, judged answers in a folder of their own."""
    for multiplier, scores in ((-1.0, (1, 2)), (1.0, (8, 9))):
        name = f"results_layer=13_multiplier={multiplier}_behavior=refusal_type=open_ended_use_base_model=False_model_size=7b.json"
        items = [{"question": f"Q{i}?", "model_output": "Yes.", "score": s} for i, s in enumerate(scores)]
        place = tmp_path / "open_ended_scores" / "refusal" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(items))
    table = published_numbers(tmp_path)
    assert set(table) == {"open-ended", "open-ended, detail"}
    assert table["open-ended"].loc[0, ["-1", "+1"]].tolist() == [1.5, 8.5]
    for file in fixture_path("caa/results/refusal").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    both = published_numbers(tmp_path)
    assert both["multiple choice"].loc[0, ["-1", "+0", "+1"]].round(3).tolist() == [0.423, 0.744, 0.887]
    assert both["open-ended"].equals(table["open-ended"])
    with pytest.raises(caa.InputError, match="holds no files"):
        published_numbers(tmp_path / "open_ended_scores" / "nothing")


def test_an_estimate_before_it_starts(study, tmp_path, capsys):
    model = caa.load_model(study.model, kind=study.kind)
    costs = estimate(study, tmp_path, model)
    assert costs["claim"].tolist() == list(study.claims)
    assert (costs["minutes"] > 0).all()
    double = estimate(replace(study, held_out=12), tmp_path, model)
    assert double["thousand_tokens"].sum() > costs["thousand_tokens"].sum()
    options = ["--model", study.model, "--kind", study.kind, "--behaviours", "formality", "--claims", "1", "9"]
    assert main(["reproduce", *options, "--out", str(tmp_path / "s"), "--estimate"]) == 0
    assert "minutes" in capsys.readouterr().out
    assert not (tmp_path / "s" / "study.json").exists()


def test_the_command(study, tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({"model": study.model, "held_out": 4, "train": 4, "behaviours": ["formality"]}))
    arguments = ["reproduce", "--study", str(file), "--kind", study.kind, "--claims", "9", "--out", str(tmp_path / "s")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "claim 9, Logit lens: formality" in out
    page = tmp_path / "s" / "report.html"
    page.unlink()
    assert main(["report", "--out", str(tmp_path / "s")]) == 0
    assert page.exists()
