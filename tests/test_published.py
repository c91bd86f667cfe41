"""The authors' numbers, from their files."""

import json
import re
from pathlib import Path

import pytest
from conftest import fixture_path

import caa_lens as caa
from caa_lens.experiments.published import parse_result_name, read_published
from caa_lens.experiments.report import published_numbers
from caa_lens.experiments.scoring import published_item


def test_published_scores_are_reproduced():
    table = read_published(fixture_path("caa/results")).set_index(["behavior", "multiplier"])["value"]
    expected = {"refusal": (0.423, 0.744, 0.887), "survival-instinct": (0.274, 0.338, 0.621)}
    for behaviour, scores in expected.items():
        assert [round(table[behaviour, m], 3) for m in (-1.0, 0.0, 1.0)] == list(scores)


def test_items_keyed_beyond_b_add_nothing():
    """As in the authors' code, which asks for an A and then for a B in the key; counted as B they would give other numbers."""
    files = fixture_path("caa/results/survival-instinct").glob("*.json")
    found = {parse_result_name(file.name)["multiplier"]: json.loads(file.read_text()) for file in files}

    def mean(multiplier, others):
        items = found[multiplier]
        keys = [key if (key := item["answer_matching_behavior"].strip(" ()")) in "AB" else others for item in items]
        return sum(published_item(k, i["a_prob"], i["b_prob"]) for k, i in zip(keys, items, strict=True)) / len(items)

    assert [round(mean(m, "C"), 3) for m in (-1.0, 0.0, 1.0)] == [0.274, 0.338, 0.621]
    assert [round(mean(m, "B"), 3) for m in (-1.0, 0.0, 1.0)] == [0.353, 0.374, 0.624]


def test_the_faults_of_the_formula_are_shown():
    table = read_published(fixture_path("caa/results")).set_index(["behavior", "multiplier"])
    assert table.loc[("survival-instinct", 0.0), "other_keys"] == 4
    assert table.loc[("refusal", 0.0), "other_keys"] == 0
    assert (table["mass"] < 1).all()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("results_layer=13_multiplier=1.0_behavior=refusal_type=ab_use_base_model=False_model_size=7b.json", {}),
        (
            "results_layer=13_multiplier=1.0_behavior=refusal_type=ab_system_prompt=pos_use_base_model=False_model_size=7b.json",
            {"system_prompt": "pos"},
        ),
        (
            "results_layer=13_multiplier=1.0_behavior=refusal_type=ab_override_vector=15_use_base_model=True_model_size=13b.json",
            {"override_vector": "15", "use_base_model": True, "model_size": "13b"},
        ),
        (
            "results_layer=13_multiplier=1.0_behavior=refusal_type=ab_override_vector_model=Llama-2-7b-hf_use_base_model=False_"
            "model_size=7b_override_weights=a_b_c.pt.json",
            {"override_vector_model": "Llama-2-7b-hf", "override_weights": "a_b_c.pt"},
        ),
    ],
)
def test_all_their_file_names(name, changed):
    plain = {
        "layer": 13, "multiplier": 1.0, "behavior": "refusal", "type": "ab", "system_prompt": None, "override_vector": None,
        "override_vector_model": None, "use_base_model": False, "model_size": "7b", "override_weights": None,
    }  # fmt: skip
    assert parse_result_name(name) == {**plain, **changed}


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(caa.InputError, match="not a result file"):
        parse_result_name("results_x=1.json")
    with pytest.raises(caa.InputError, match="holds no files"):
        read_published(tmp_path)
    item = {
        "question": "Q\n(A) a\n(B) b",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
        "a_prob": 0.5,
    }
    file = tmp_path / "results_layer=1_multiplier=1.0_behavior=x_type=ab.json"
    file.write_text(json.dumps([item]))
    with pytest.raises(caa.InputError, match="a_prob and b_prob"):
        read_published(tmp_path)


def two_choice(folder, kind, multiplier, items):
    file = (
        folder
        / f"results_layer=13_multiplier={multiplier}_behavior=refusal_type={kind}_use_base_model=False_model_size=7b.json"
    )
    rows = [
        {"question": "Q?\n(A) a\n(B) b", "correct": c, "incorrect": "(B)", "a_prob": a, "b_prob": b, "category": k}
        for c, a, b, k in items
    ]
    file.write_text(json.dumps(rows))


def test_mmlu_and_truthful_qa_files(tmp_path):
    """By the authors' formula, over items; their tables' average is over categories."""
    for kind in ("mmlu", "truthful_qa"):
        for multiplier, a in ((-1.0, 0.2), (0.0, 0.5), (1.0, 0.6)):
            items = [("(A)", a, 0.1, "x"), ("A", a, 0.3, "x"), ("(B)", a, 0.4, "y")]
            two_choice(tmp_path, kind, multiplier, items)
    row = read_published(tmp_path, "mmlu").set_index("multiplier").loc[0.0]
    scores = [0.5 / 0.6, 0.5 / 0.8, 0.4 / 0.9]
    assert row["value"] == pytest.approx(sum(scores) / 3)
    assert row["by_category"] == pytest.approx(((scores[0] + scores[1]) / 2 + scores[2]) / 2)
    assert row["n"] == 3
    assert row["mass"] == pytest.approx((0.6 + 0.8 + 0.9) / 3)
    tables = published_numbers(tmp_path)
    assert set(tables) == {"MMLU", "MMLU, detail", "TruthfulQA", "TruthfulQA, detail"}
    assert tables["TruthfulQA"].loc[0, "+0"] == pytest.approx(sum(scores) / 3)
    assert tables["MMLU, detail"]["by_category"].notna().all()
    file = next(tmp_path.glob("*type=mmlu*"))
    for broken in ('[{"question": "Q"}]', "[]", "{"):
        file.write_text(broken)
        with pytest.raises(caa.InputError, match=re.escape(str(file))):
            published_numbers(tmp_path)


def test_the_folder_is_looked_through_once(monkeypatch):
    looked, look = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: looked.append(folder) or look(folder, pattern))
    published_numbers(fixture_path("caa/results"))
    assert len(looked) == 1
