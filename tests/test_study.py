"""Studies at work: what a setting, a service or a package that is missing does, and what a resumed study runs again."""

import re
import sys
import time
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
from conftest import fixture_path, tiny_llama
from judge_server import Act

import caa_lens as caa
from caa_lens.cli import main
from caa_lens.experiments.report import (
    Study,
    claim_answers,
    claim_cost,
    estimate,
    load_study,
    memory,
    published_numbers,
    reproduce,
    write_page,
)
from caa_lens.experiments.report import lab as labs
from caa_lens.experiments.report.latex import latex
from caa_lens.experiments.report.section import read_section

pytestmark = pytest.mark.usefixtures("no_access")
estimating = import_module("caa_lens.experiments.report.estimate")  # the package has a function of this name


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


REFUSED = {
    "judge": ("banana", "openai:", "local: "),
    "method": ("qlora",),
    "quantization": ("3bit",),
    "kind": ("tuned-lens",),
    "dtype": ("float31",),
    "controls": (-1,),
    "train": (0,),
    "questions": (-1,),
    "examples": (0,),
    "layer": (-1,),
    "seed": (-1,),
    "capability": (0,),
    "shuffles": (0, 4),
    "multipliers": ((-1.0, 0.0, 1.0, float("nan")), (-1.0, 0.0, 1.0, float("inf"))),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_settings_that_no_study_can_run_with(small, name, value):
    with pytest.raises(caa.InputError, match=r"allowed are|must be|give ") as caught:
        replace(small, **{name: value})
    given = list(value) if isinstance(value, tuple) else value
    assert name in str(caught.value)
    assert str(given) in str(caught.value)


def test_a_file_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_bytes("model: m\n# für später".encode("latin-1"))
    with pytest.raises(caa.InputError, match=re.escape(f"{file} is not UTF-8 text")):
        load_study(file)


def test_a_layer_beyond_the_model_is_refused_before_any_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(labs, "extract", None)
    for run in (lambda s: reproduce(s, tmp_path), lambda s: estimate(s, tmp_path, caa.load_model(s.model))):
        with pytest.raises(caa.InputError, match="layer=3: the model's layers are 0 to 2"):
            run(replace(small, layer=3))


def test_published_numbers_that_are_not_there_are_noticed_before_any_work(small, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(caa.InputError, match="holds no result files"):
        replace(small, published=str(tmp_path / "empty"))


def test_a_judge_without_a_key_is_noticed_before_answers_are_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(claim_answers, "answers", None)
    _, found = quietly(replace(small, claims=(3,), judge="openai:m"), tmp_path)
    assert "no key for the judge" in found["03-formality"].words


def test_claims_that_need_a_prompt_have_one_without_open_questions(small, tmp_path, monkeypatch):
    monkeypatch.setattr(claim_cost, "NEW_TOKENS", 2)
    study = replace(small, questions=0, claims=(3, 8, 9))
    _, found = quietly(study, tmp_path)
    assert {name: section.status for name, section in found.items()} == {"08-all": "holds", "09-formality": "described"}
    lab = labs.Lab(study, tmp_path)
    monkeypatch.setattr(labs.Lab, "open_questions", lambda lab, behaviour: [])
    assert lab.prompts("formality", 3) == [pair.prompt for pair in lab.pairs("formality").report[:3]]


def test_sections_of_all_behaviours_are_made_again_when_one_is_added(small, tmp_path):
    two = replace(small, behaviours=("formality", "sentiment"), claims=(6, 10))
    quietly(two, tmp_path)
    said, found = quietly(replace(two, behaviours=("formality", "sentiment", "refusal")), tmp_path)
    assert [line for line in said if "all behaviours" in line] == [
        "claim 6, Geometry: all behaviours",
        "claim 10, Generalisation: all behaviours",
    ]
    assert set(found["06-all"].tables["cosines"]["behaviour"]) == {"formality", "sentiment", "refusal"}
    assert set(found["10-all"].tables["transfer"]["source"]) == {"formality", "sentiment", "refusal"}
    assert found["10-all"].made_from == ("formality", "sentiment", "refusal")
    # Fewer than a section was made from need nothing; others that it cannot be made from leave it.
    assert quietly(two, tmp_path)[0] == []
    other, kept = quietly(replace(two, behaviours=("ab/refusal",), claims=(10,)), tmp_path)
    assert len(other) == 1
    assert kept["10-all"].made_from == found["10-all"].made_from
    assert kept["10-all"].status == found["10-all"].status != "not run"


def test_a_narrower_run_hides_nothing(small, tmp_path):
    quietly(replace(small, claims=(7, 9)), tmp_path)
    quietly(replace(small, behaviours=("sentiment",), claims=(9,)), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'<section id="s-(.*?)">', page)
    assert shown == ["7-formality", "9-formality", "9-sentiment"]
    assert re.findall(r'<h2 id="claim-(\d+)"', page) == ["7", "9"]
    assert "<dt>behaviours</dt><dd>formality, sentiment</dd>" in page
    assert "<dt>claims</dt><dd>7, 9</dd>" in page
    (tmp_path / "sections" / "09-sentiment" / "section.json").unlink()
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "<th>sentiment</th>" not in page


def test_what_makes_a_study_another_one(small, tmp_path, monkeypatch):
    more = ("formality", "sentiment")
    assert replace(small, behaviours=more).signature == small.signature
    assert replace(small, finetune=("formality",)).signature == small.signature
    normed = replace(small, normalize=True)
    assert replace(normed, behaviours=more).signature != normed.signature
    folder = fixture_path("caa/datasets")
    spelled = [replace(small, data=name, behaviours=("all",)) for name in (str(folder), f"{folder}/../datasets")]
    monkeypatch.chdir(folder)
    spelled.append(replace(small, data=".", behaviours=("all",)))
    assert len({study.signature for study in spelled}) == 1


def test_judgements_that_failed_are_asked_for_again(small, serve, tmp_path, monkeypatch):
    broken = []

    def reply(text, attempt):
        broken[:] = broken or [text]
        return Act(status=500, body={}) if [text] == broken else Act("7")

    server = serve(reply)
    asked = caa.OpenAIJudge("m", base_url=server.url, retries=0, backoff=0, concurrency=1)
    monkeypatch.setattr(claim_answers, "judge_from", lambda spec: asked)
    study = replace(small, claims=(3,), judge="openai:m")
    with pytest.warns(caa.CaaLensWarning, match="could not be judged"):
        _, found = quietly(study, tmp_path)
    first = found["03-formality"]
    assert first.status != "not run"
    assert (first.tables["judged_items"]["status"] == "failed").sum() > 0
    assert any("judgements failed" in note for note in first.notes)
    before, broken[:] = len(server.requests), ["nothing"]
    said, found = quietly(study, tmp_path)
    assert len(said) == 1
    assert len(server.requests) == before + 1
    assert set(found["03-formality"].tables["judged_items"]["status"]) == {"scored"}
    assert not any("failed" in note for note in found["03-formality"].notes)
    assert quietly(study, tmp_path)[0] == []


def test_quantisation_is_a_setting_of_every_model_that_a_study_loads(small, tmp_path, monkeypatch):
    asked, load = [], labs.load_model

    def loading(name, *, quantization, **options):
        asked.append((str(name), quantization))
        return load(name, **options)

    monkeypatch.setattr(labs, "load_model", loading)
    study = replace(small, quantization="4bit", base=small.model + "/../tiny", claims=(4, 6), finetune=("formality",))
    study = replace(study, behaviours=("formality", "sentiment"), method="full")
    assert study.signature != replace(study, quantization=None).signature
    quietly(study, tmp_path)
    assert [quantization for _, quantization in asked] == ["4bit"] * 4
    assert len({name for name, _ in asked}) == 4  # the model, its base, and one tuned in either direction
    assert "<dt>quantization</dt><dd>4bit</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_command_loads_what_the_study_says(small, tmp_path, monkeypatch):
    given, load = [], caa.load_model

    def loading(name, *, quantization, **options):
        given.append(quantization)
        return load(name, **options)

    monkeypatch.setattr(caa, "load_model", loading)
    file = tmp_path / "own.yaml"
    file.write_text(f"model: {small.model}\nkind: bridge\nquantization: 8bit\nbehaviours: [formality]")
    command = ["reproduce", "--study", str(file), "--claims", "9", "--out", str(tmp_path / "s"), "--estimate"]
    assert main(command) == main([*command, "--quantization", "4bit"]) == 0
    assert given == ["8bit", "4bit"]


def minutes_and_tokens(study, folder, model):
    table = estimate(study, folder, model).set_index("claim")
    return table["minutes"], table["thousand_tokens"] * 1e3


def test_what_claims_share_is_counted_once_whichever_run(small, tmp_path):
    model = caa.load_model(small.model, kind="bridge")
    study = replace(small, layer=None, held_out=8, behaviours=("formality", "sentiment"), claims=(1, 2, 7, 8, 9, 10))
    _, together = minutes_and_tokens(study, tmp_path, model)
    _, less = minutes_and_tokens(replace(study, claims=(2, 7, 8, 9, 10)), tmp_path, model)
    assert less[2] == pytest.approx(together[1] + together[2])  # whoever comes first bears it
    assert less[[7, 8, 9, 10]].tolist() == together[[7, 8, 9, 10]].tolist()
    for claim in (7, 8, 9, 10):
        _, alone = minutes_and_tokens(replace(study, claims=(claim,)), tmp_path, model)
        assert alone[claim] > together[claim] + 1000  # the vector, and the sweep that chooses its layer
    _, given = minutes_and_tokens(replace(study, claims=(9,), layer=1), tmp_path, model)
    assert given[9] < minutes_and_tokens(replace(study, claims=(9,)), tmp_path, model)[1][9]


def test_tuning_is_counted_by_its_passes(small, tmp_path):
    model = caa.load_model(small.model, kind="bridge")
    study = replace(small, claims=(4,), finetune=("formality",))
    train = caa.load_pairs("formality").split(held_out=study.held_out, seed=0)[0][: study.train]
    texts = [model.tokenizer(pair.prompt + pair.positive)["input_ids"] for pair in train]
    tokens = sum(map(len, texts))
    cost = {}
    for name, changes in {
        "none": {"finetune": ()},
        "one": {},
        "two": {"epochs": 2},
        "full": {"method": "full"},
    }.items():
        cost[name] = minutes_and_tokens(replace(study, **changes), tmp_path, model)[1][4]
    assert cost["two"] - cost["one"] > 2 * 3 * tokens  # either direction, forward and back
    assert cost["one"] - cost["none"] > 2 * (3 + 4) * tokens  # and both sides of every pair, before and after
    assert cost["full"] > cost["one"]


def test_memory_knows_what_training_takes(small):
    model = caa.load_model(small.model, kind="bridge")
    parameters = sum(p.numel() for p in model.parameters())
    study = replace(small, claims=(4,), finetune=("formality",))
    bare, lora = memory(replace(study, finetune=()), model), memory(study, model)
    full = memory(replace(study, method="full"), model)
    assert full - lora == pytest.approx(12 * parameters)  # beside the weights: gradients and two moments, float32
    assert lora >= bare + 4 * parameters
    assert memory(replace(study, claims=(1,), method="full"), model) == bare


def test_the_speed_waits_for_the_device(small, monkeypatch):
    class Late:
        def __getitem__(self, place):
            time.sleep(0.05)
            return 0.0

    model = caa.load_model(small.model, kind="bridge")
    monkeypatch.setattr(estimating, "run", lambda *given, **options: (Late(), None))
    assert estimating.tokens_per_second(model) < 8 * 96 / 0.05


def test_published_numbers_are_kept_with_the_study(small, tmp_path):
    """Whole, where the page shows a part; and further calls need the authors' folder no more."""
    results = fixture_path("caa/results")
    quietly(replace(small, published=str(results)), tmp_path)
    for name, table in published_numbers(results).items():
        stem = name.replace(", ", "_").replace(" ", "_")
        assert len(pd.read_csv(tmp_path / "published" / f"published_{stem}.csv")) == len(table)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "published numbers" in page
    assert "<code>published/</code>" in page
    quietly(small, tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_published_files_that_cannot_be_read_are_noticed_before_any_work(small, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "results_layer=1_multiplier=1.0_behavior=x_type=ab.json").write_text("[")
    study = replace(small, model="no/such", published=str(tmp_path / "r"))
    with pytest.raises(caa.InputError, match=r"type=ab\.json"):
        reproduce(study, tmp_path / "s", progress=False)


def test_no_cell_is_read_as_an_argument_or_ends_a_table():
    cells = ["[", "*", "  [0]", "a\n\nb", "\n", "\x00x", "c\r\nd", "a & b_c", "\u2028"]
    text = latex(pd.DataFrame({"[token": cells, "value": [1.0] * 8 + [None]}))
    lines = text.splitlines()
    assert len(lines) == len(cells) + 6
    assert lines[2].startswith("{[}token &")
    rows = lines[4:-2]
    assert [row.split(" & ")[0].strip() for row in rows] == [
        "{[}",
        "{*}",
        "{[}0]",
        "a b",
        "",
        "x",
        "c d",
        r"a \& b\_c",
        "",
    ]
    assert not any(line.lstrip().startswith(("[", "*")) for line in lines)
    assert not any(ord(sign) < 32 for line in lines for sign in line)
    plain = pd.DataFrame({"a": [1.0, 2.5], "b": ["x", None], "c": [True, False]})
    assert latex(plain) == plain.to_latex(index=False, float_format="%.3f", escape=True)
