"""Readers, validation, splits and hashes; the built-in sets are what they claim to be."""

import json
import re
from collections import Counter
from itertools import combinations
from statistics import mean

import pytest
from conftest import fixture_path
from hypothesis import given
from hypothesis import strategies as st

import caa_lens as caa

FREE_TEXT = ("formality", "sentiment", "refusal")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_own_lines_keep_extra_fields(tmp_path):
    line = json.dumps({"prompt": "p", "positive": "yes", "negative": "no", "topic": "x"})
    loaded = caa.load_pairs(write(tmp_path / "own.jsonl", line + "\n\n"))
    assert loaded[0].extra == {"topic": "x"}
    assert loaded.name == "own"


def test_caa_list_and_anthropic_lines_read_alike(tmp_path):
    record = {
        "question": "Q\n (A) x\n (B) y\n (C) z",
        "answer_matching_behavior": " (C)",
        "answer_not_matching_behavior": [" (A)", " (B)"],
    }
    as_list = caa.load_pairs(write(tmp_path / "a.json", json.dumps([record])))
    as_lines = caa.load_pairs(write(tmp_path / "b.jsonl", json.dumps(record)))
    assert tuple(as_list) == tuple(as_lines)
    pair = as_list[0]
    assert (pair.positive, pair.negative, pair.key, pair.options) == ("(C)", "(A)", "C", ("A", "B", "C"))


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Which?\n(A) x\n(B) y\n(C) z", ("A", "B", "C")),
        ("Steps:\n(1) wash\n(2) dry\n(3) fold\nWhich?\n(A) x\n (B) y", ("A", "B")),
        ("Steps:\n(1) wash\n(2) dry\nWhich?\n(1) x\n(2) y\n(3) z", ("1", "2", "3")),
        ("Which?\n(9) x\n(10) y", ("9", "10")),
        ("Which (A) or (B)?", ()),
    ],
)
def test_options_are_the_last_marks_that_follow_each_other(prompt, options):
    assert caa.ContrastPair(prompt, "(A)", "(B)").options == options


def test_the_authors_files_load_with_all_letters():
    sizes = {"survival-instinct": 903, "refusal": 408, "corrigible-neutral-HHH": 290}
    for name, size in sizes.items():
        loaded = caa.load_pairs(fixture_path(f"caa/datasets/generate/{name}/generate_dataset.json"))
        assert (len(loaded), loaded.name) == (size, name)
    assert {"A", "B", "C"} <= {
        p.key for p in caa.load_pairs(fixture_path("caa/datasets/generate/survival-instinct/generate_dataset.json"))
    }


def test_the_authors_two_choice_questions():
    for file, size, n_categories in (("mmlu/mmlu.json", 570, 57), ("truthfulqa/truthful_qa.json", 817, 32)):
        loaded = caa.load_pairs(fixture_path(f"caa/datasets/test/{file}"))
        assert len(loaded) == size
        assert len({pair.extra["category"] for pair in loaded}) == n_categories
        for pair in loaded:
            assert {pair.positive, pair.negative} == {"(A)", "(B)"}
            assert f"{pair.positive} {pair.extra['correct_full_text']}" in pair.prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "correct": "(A)"}', r"line 1: key 'incorrect' is missing"),
        ('{"prompt": "p", "positive": "a"}', r"line 1: key 'negative' is missing"),
        ('{"prompt": "p", "positive": "a", "negative": " "}', r"line 1: 'negative' is empty"),
        ('{"prompt": "p", "positive": "a", "negative": 3}', r"line 1: 'negative' is int"),
        ('{"prompt": "p", "positive": "a", "negative": "a"}', r"identical"),
        (
            '{"prompt": "p", "positive": "a", "negative": "b"}\n{"prompt": "p", "pos',
            r"line 2: not valid JSON .* cut short",
        ),
        ('["x"]', r"item 0: a pair is a mapping"),
        ("", r"holds no pairs"),
    ],
)
def test_bad_files_name_file_line_key_and_remedy(tmp_path, text, message):
    with pytest.raises(caa.InputError, match=message) as error:
        caa.load_pairs(write(tmp_path / "bad.jsonl", text))
    assert "bad" in str(error.value)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    record = {"prompt": f"a{mark}b", "positive": "x", "negative": "y"}
    line = json.dumps(record, ensure_ascii=False) if mark > "\x1f" else json.dumps(record)
    loaded = caa.load_pairs(write(tmp_path / "u.jsonl", f"{line}\r\n\n{line}\n"))
    assert [pair.prompt for pair in loaded] == [f"a{mark}b"] * 2


def test_unknown_name_lists_the_built_in_ones():
    with pytest.raises(caa.MissingError, match="formality"):
        caa.load_pairs("formalty")


def test_unreadable_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(caa.InputError, match="cannot be read as UTF-8"):
        caa.load_pairs(path)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=30), st.integers(1, 29), st.integers(0, 5))
def test_split_never_shares_a_prompt_and_loses_nothing(prompts, held_out, seed):
    loaded = caa.load_pairs([(p, f"yes {i}", f"no {i}") for i, p in enumerate(prompts)])
    try:
        train, test = loaded.split(held_out=held_out, seed=seed)
    except caa.InputError:
        return
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert Counter(train.pairs + test.pairs) == Counter(loaded.pairs)
    assert len(test) <= held_out
    assert loaded.split(held_out=held_out, seed=seed) == (train, test)
    test.require_disjoint(train)


@given(st.lists(st.sampled_from("AAABBC"), min_size=4, max_size=60), st.floats(0.1, 0.9), st.integers(0, 5))
def test_split_gives_every_key_its_share_of_both_sides_and_their_beginnings(keys, share, seed):
    loaded = caa.load_pairs([(str(i), f"({key})", "(D)") for i, key in enumerate(keys)])
    held_out = min(max(round(share * len(keys)), 1), len(keys) - 1)
    train, test = loaded.split(held_out=held_out, seed=seed)
    assert len(test) == held_out
    for side in (train, test, test[: len(test) // 2]):
        for key, count in Counter(keys).items():
            assert abs(sum(pair.key == key for pair in side) - count * len(side) / len(keys)) < 2


@pytest.mark.parametrize("seed", range(5))
def test_split_of_even_keys_is_even(seed):
    loaded = caa.load_pairs([(str(i), *(("(A)", "(B)") if i % 2 else ("(B)", "(A)"))) for i in range(100)])
    for side in loaded.split(held_out=30, seed=seed):
        assert Counter(pair.key for pair in side) == {"A": len(side) / 2, "B": len(side) / 2}


def test_split_of_keyed_pairs_keeps_a_prompt_on_one_side():
    loaded = caa.load_pairs([(str(i // 2), f"({'AB'[i % 2]})", "(C)") for i in range(40)])
    train, test = loaded.split(held_out=10, seed=0)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in test}
    assert Counter(pair.key for pair in test) == {"A": 5, "B": 5}


def test_split_without_keys_is_the_shuffle_alone():
    loaded = caa.load_pairs([(f"p{i}", "yes", "no") for i in range(12)])
    assert [pair.prompt for pair in loaded.split(held_out=5, seed=3)[1]] == ["p1", "p7", "p10", "p0", "p6"]


def test_split_without_room_and_prompts_on_both_sides():
    loaded = caa.load_pairs([("p", "a", "b"), ("p", "c", "d")])
    with pytest.raises(caa.InputError, match="leaves 2 training and 0 held-out"):
        loaded.split(held_out=1)
    with pytest.raises(caa.InputError, match="in the training pairs too"):
        loaded[:1].require_disjoint(loaded[1:])


def test_hash_is_stable_and_ignores_order():
    a = caa.load_pairs([("p", "a", "b"), ("q", "c", "d")])
    assert a.hash == a[::-1].hash == "ffdb60697f6037e2c119436750e5ead34ed2e2a76f1dd8720c96d67601642592"
    assert a.hash != a[:1].hash
    assert isinstance(a[:1], caa.PairSet)


@pytest.mark.parametrize("name", FREE_TEXT)
def test_free_text_sets_match_their_sides(name):
    loaded = caa.load_pairs(name)
    train, test = loaded.split(held_out=30, seed=0)
    assert len(train) >= 60
    assert len(test) == 30
    assert len({p.prompt.lower() for p in loaded}) == len(loaded)
    assert len(loaded.open_prompts) == 12
    assert not {p.prompt for p in loaded} & set(loaded.open_prompts)

    def capitals(text):
        return sum(word[0].isupper() for word in text.split())

    for pair in loaded:
        for mark in ".?!,;:-()'\"":
            assert pair.positive.count(mark) == pair.negative.count(mark), pair
        assert capitals(pair.positive) == capitals(pair.negative), pair
    assert abs(mean(len(p.positive) - len(p.negative) for p in loaded)) < 3


MULTIPLE_CHOICE = [name for name in caa.behaviours() if name.startswith("ab/")]


@pytest.mark.parametrize("name", MULTIPLE_CHOICE)
def test_multiple_choice_sets_are_balanced(name):
    loaded = caa.load_pairs(name)
    keys = Counter(pair.key for pair in loaded)
    assert keys == {"A": len(loaded) / 2, "B": len(loaded) / 2}
    assert len(loaded) >= 90
    assert len(loaded.open_prompts) >= 20
    differences = []
    for pair in loaded:
        assert pair.options == ("A", "B")
        a, b = re.search(r"\n\(A\) (.*)\n\(B\) (.*)$", pair.prompt).groups()
        differences.append((len(a) - len(b)) * (1 if pair.key == "A" else -1))
    assert abs(mean(differences)) < 6
    assert loaded.about["rubric"]


def test_multiple_choice_sets_have_key_orders_of_their_own():
    """Sets that share one would share what a split of it, or a control made of half of it, has of the letter."""
    orders = ["".join(pair.key for pair in caa.load_pairs(name)) for name in MULTIPLE_CHOICE]
    for one, other in combinations(orders, 2):
        assert 35 <= sum(a == b for a, b in zip(one, other, strict=False)) <= 65


def test_system_prompts_of_the_built_in_sets():
    for name in caa.behaviours():
        prompts = caa.load_pairs(name).system_prompts
        assert list(prompts) == ["none", "positive", "negative"]
        assert prompts["none"] is None
        assert len(set(prompts.values())) == 3
    with pytest.raises(caa.InputError, match="'unnamed' brings no system prompts"):
        caa.load_pairs([("p", "a", "b")]).system_prompts  # noqa: B018
