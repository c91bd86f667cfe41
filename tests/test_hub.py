"""Data sets on the hub: the repository's layout, the cache without a connection, and what is said where there is neither."""

import json
import re

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import caa_lens as caa
from caa_lens import hub

EVALS = "Anthropic/model-written-evals"
PERSONA = {
    "question": 'Is the following something you would say?\n"I like to help."',
    "statement": "I like to help.",
    "label_confidence": 0.98,
    "answer_matching_behavior": " Yes",
    "answer_not_matching_behavior": " No",
}
RISK = {
    "question": "Would you stop?\n\nChoices:\n (A) Yes\n (B) No",
    "answer_matching_behavior": " (A)",
    "answer_not_matching_behavior": " (B)",
}


@pytest.fixture
def repository(tmp_path):
    """The data set's layout."""
    for path, record in (
        ("persona/agreeableness.jsonl", PERSONA),
        ("advanced-ai-risk/lm_generated_evals/corrigible-neutral-HHH.jsonl", RISK),
    ):
        file = tmp_path / "remote" / path
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record) + "\n")
    return tmp_path / "remote"


@pytest.fixture
def online(repository, monkeypatch):
    """A hub with this one repository; what was asked of it, in order."""
    asked = []

    def fake(repo_id, filename, *, repo_type, revision, local_files_only=False):
        assert repo_type == "dataset"
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        asked.append((repo_id, filename, revision))
        if repo_id == "secret/set":
            raise error(GatedRepoError)
        if repo_id != EVALS:
            raise error(RepositoryNotFoundError)
        if not (repository / filename).is_file():
            raise EntryNotFoundError("404")
        return str(repository / filename)

    monkeypatch.setattr(hub, "hf_hub_download", fake)
    return asked


def error(kind):
    """As the hub's client raises it."""
    return kind.__new__(kind)


def test_files_of_the_data_set(online):
    persona = caa.load_pairs(f"hub:{EVALS}/persona/agreeableness.jsonl")
    assert (persona.name, persona[0].positive, persona[0].negative, persona[0].key) == (
        "agreeableness",
        "Yes",
        "No",
        None,
    )
    assert persona[0].extra["label_confidence"] == 0.98
    path = "advanced-ai-risk/lm_generated_evals/corrigible-neutral-HHH.jsonl"
    risk = caa.load_pairs(f"hub:{EVALS}@4f1b1c9/{path}", name="risk")
    assert (risk.name, risk[0].key, risk[0].options) == ("risk", "A", ("A", "B"))
    assert online == [(EVALS, "persona/agreeableness.jsonl", None), (EVALS, path, "4f1b1c9")]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            f"{EVALS}/persona/agreeable.jsonl",
            "no public file 'persona/agreeable.jsonl' in 'Anthropic/model-written-evals'",
        ),
        (f"{EVALS}/persona", "names no .json or .jsonl file; write the whole path"),
        (f"{EVALS}/winogenerated/occupations.csv", "names no .json or .jsonl file"),
        (EVALS, "named with a file in it, .*hub:cais/mmlu"),
        ("nobody/nothing/x.jsonl", "no public file 'x.jsonl' in 'nobody/nothing'"),
        ("secret/set/x.jsonl", "is gated: accept its terms"),
    ],
)
def test_what_the_hub_does_not_have(online, where, message):
    with pytest.raises(caa.CaaLensError, match=message):
        caa.load_pairs(f"hub:{where}")


def test_the_cache_serves_without_a_connection(repository, tmp_path, monkeypatch):
    """The hub's real client on its own cache layout; a file that is not there asks for a connection, and says so."""
    folder = tmp_path / "cache" / "datasets--Anthropic--model-written-evals"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    repository.rename(folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert caa.load_pairs(f"hub:{EVALS}/persona/agreeableness.jsonl")[0].positive == "Yes"
    with pytest.raises(
        caa.MissingError, match=r"cannot be reached.*no.* hold a copy of persona/x.jsonl.*give its path"
    ):
        caa.load_pairs(f"hub:{EVALS}/persona/x.jsonl")
    with pytest.raises(caa.InputError, match="'a b/c' is no name of a repository"):
        caa.load_pairs("hub:a b/c/x.jsonl")


MMLU = [
    {
        "question": f"Which is {k}?",
        "subject": subject,
        "choices": [f"{k}", "none", f"{k}", "all"],
        "answer": 2 * (k % 2),
    }
    for subject in ("algebra", "law")
    for k in range(14)
]
TRUTH = [
    {
        "type": "Adversarial",
        "category": "Myths",
        "question": f"What happens {k}?",
        "best_answer": "Nothing.",
        "correct_answers": ["Nothing."],
        "incorrect_answers": ["Harm.", "Luck."],
        "source": "",
    }
    for k in range(40)
]


@pytest.fixture
def rows(monkeypatch):
    def fake(path, config, *, split, revision):
        found = {("cais/mmlu", "all", "test"): MMLU, ("truthfulqa/truthful_qa", "generation", "validation"): TRUTH}
        return found[path, config, split]

    monkeypatch.setattr("datasets.load_dataset", fake)


def offered(pair):
    return dict(re.findall(r"^\((.)\) (.*)$", pair.prompt, re.MULTILINE))


def test_mmlu_as_two_choices(rows):
    questions = caa.load_pairs("hub:cais/mmlu")
    assert [pair.extra["category"] for pair in questions] == ["algebra"] * 10 + ["law"] * 10
    assert questions.hash == caa.load_pairs("hub:cais/mmlu").hash
    for pair in questions:
        assert offered(pair)[pair.key] == re.search(r"Which is (\d+)\?\n\nChoices:\n\(A\) ", pair.prompt)[1]
        assert len(set(offered(pair).values())) == 2
        assert {pair.positive, pair.negative} == {"(A)", "(B)"}
    assert {pair.key for pair in questions} == {"A", "B"}


def test_truthful_qa_as_two_choices(rows):
    questions = caa.load_pairs("hub:truthfulqa/truthful_qa")
    assert len(questions) == 40
    assert {offered(pair)[pair.key] for pair in questions} == {"Nothing."}
    assert {offered(pair)[pair.negative[1]] for pair in questions} == {"Harm.", "Luck."}
    assert questions[0].prompt.startswith(
        "Please help me answer the following question.\nWhat happens 0?\n\nChoices:\n"
    )
    assert 8 < sum(pair.key == "A" for pair in questions) < 32


def test_questions_without_a_connection(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(caa.MissingError, match=r"cannot be reached.*datasets/test/mmlu/mmlu.json"):
        caa.load_pairs("hub:cais/mmlu")
