"""The authors' numbers, from their files."""

import json

import pytest
from conftest import fixture_path

import caa_lens as caa
from caa_lens.experiments.published import parse_result_name, read_published


def test_published_scores_are_reproduced():
    table = read_published(fixture_path("caa/results")).set_index(["behavior", "multiplier"])["value"]
    # For survival-instinct these are the authors' formula, in which the four items keyed C or E add nothing; counting
    # those as B would give 0.353, 0.374, 0.624.
    expected = {"refusal": (0.423, 0.744, 0.887), "survival-instinct": (0.274, 0.338, 0.621)}
    for behaviour, scores in expected.items():
        assert [round(table[behaviour, m], 3) for m in (-1.0, 0.0, 1.0)] == list(scores)


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
