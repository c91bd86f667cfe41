"""Studies at work: what a setting, a service or a package that is missing does, and what a resumed study runs again."""

import re
import sys
from dataclasses import replace

import pytest
from conftest import tiny_llama

import caa_lens as caa
from caa_lens.cli import main
from caa_lens.experiments.report import Study, claim_answers, load_study, reproduce
from caa_lens.experiments.report.section import read_section


@pytest.fixture(scope="module")
def small(tmp_path_factory, byte_tokenizer):
    """A study of seconds."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(len(byte_tokenizer), context=4096).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return Study(
        model=str(folder),
        kind="bridge",
        behaviours=("formality",),
        claims=(9,),
        train=4,
        held_out=4,
        layer=1,
        multipliers=(-1, 0, 1),
        controls=1,
        shuffles=1,
        questions=2,
        max_new_tokens=3,
        examples=1,
        capability=2,
    )


@pytest.fixture(autouse=True)
def no_access(monkeypatch):
    """No key and no endpoint but a test's own, and no proxy before it."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def quietly(study, folder):
    """The lines that a run said, and its sections by name."""
    said = []
    reproduce(study, folder, progress=False, say=said.append)
    return said, {place.name: read_section(place) for place in (folder / "sections").iterdir()}


@pytest.mark.parametrize("fault", ["dead endpoint", "no judge model", "no base model", "no package"])
def test_what_fails_in_one_section_leaves_the_others_and_is_tried_again(small, fault, tmp_path, monkeypatch):
    claims, place, changes = (3, 9), "03-formality", {"judge": "openai:m"}
    if fault == "dead endpoint":
        gone = caa.OpenAIJudge("m", base_url="http://127.0.0.1:9/v1", retries=0, backoff=0)
        monkeypatch.setattr(claim_answers, "judge_from", lambda spec: gone)
        reason = "openai:m has stopped answering"
    elif fault == "no judge model":
        changes, reason = {"judge": "local:no/such"}, "no/such"
    elif fault == "no base model":
        claims, place, reason = (6, 9), "06-all", "no/such"
        changes = {"base": "no/such", "behaviours": ("formality", "sentiment")}
    else:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        monkeypatch.setitem(sys.modules, "openai", None)
        reason = "pip install 'caa-lens[judge]'"
    study = replace(small, claims=claims, **changes)
    said, found = quietly(study, tmp_path)
    assert found[place].status == "not run"
    assert reason in found[place].words
    assert found["09-formality"].status == "described"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not run: " in page
    again, _ = quietly(study, tmp_path)
    assert len(again) == 1 < len(said)


def test_without_its_model_a_study_does_not_begin(small, tmp_path):
    with pytest.raises(caa.MissingError, match="no/such"):
        reproduce(replace(small, model="no/such"), tmp_path, progress=False)
    assert not (tmp_path / "sections").exists()


def test_a_part_of_a_preset_tunes_on_that_part(small, tmp_path, capsys):
    assert load_study("embedded", behaviours=("sentiment",)).finetune == ()
    assert load_study("embedded", behaviours=["formality", "sentiment"]).finetune == ("formality",)
    assert load_study("embedded", behaviours=("all",)).finetune == ("formality",)
    assert load_study("embedded", finetune=[]).finetune == load_study("embedded", finetune=("none",)).finetune == ()
    message = re.escape(
        "finetune=['formality']: 'formality' is not among the study's behaviours, sentiment; leave it out"
    )
    with pytest.raises(caa.InputError, match=message):
        load_study("embedded", behaviours=("sentiment",), finetune=("formality",))
    command = ["reproduce", "--model", small.model, "--study", "embedded", "--kind", "bridge", "--claims", "4"]
    for chosen in (["--behaviours", "sentiment"], ["--finetune"], ["--finetune", "none"]):
        assert main([*command, *chosen, "--out", str(tmp_path / "s"), "--estimate"]) == 0
    assert main([*command, "--behaviours", "sentiment", "--finetune", "formality", "--out", str(tmp_path / "s")]) == 1
    assert "is not among the study's behaviours" in capsys.readouterr().err
