"""Open answers: each is the plain steered generation, whatever it was batched with; measured, kept and read back."""

import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

import caa_lens as caa
from caa_lens.experiments import answers as answers_module
from caa_lens.experiments.answer_set import DIAGNOSTICS, repeated_share
from caa_lens.experiments.published import parse_result_name, read_published_answers, read_published_judged
from caa_lens.steering import generate

QUESTIONS = ["Hi?", "What is the meaning of all this, if any?", "Where did you go?"]
SYSTEMS = {"none": None, "stiff": "Be as stiff as you can."}


def plain(model, vectors, row, system=None, **options):
    """One answer, generated alone."""
    template = caa.ChatTemplate(system_prompt=SYSTEMS.get(system))
    steered = (
        caa.steer(model, row.multiplier * vectors[row.layer], template=template) if row.multiplier else nullcontext()
    )
    with steered:
        return generate(model, [row.prompt], template=template, draws=[row.item], **options)[0]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0, "seed": 0}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"]
)
def test_every_answer_is_the_plain_one_whatever_the_batch(model, vectors, sampling):
    options, questions = {"max_new_tokens": 4, **sampling}, QUESTIONS[:2]
    found = [
        caa.answers(
            model,
            vectors,
            questions,
            layers=[0, -1],
            multipliers=(-1, 0, 2.5),
            systems=SYSTEMS,
            template=caa.ChatTemplate(system_prompt="Replaced."),
            batch_size=batch_size,
            progress=False,
            **options,
        )
        for batch_size in (3, 16)
    ]
    pd.testing.assert_frame_equal(found[0].items, found[1].items, atol=1e-4)
    items = found[1].items
    assert len(items) == len(questions) * len(SYSTEMS) * 2 * 3
    for row in items.itertuples():
        assert row.answer == plain(model, vectors, row, row.system, **options)
    assert items.groupby("multiplier")["answer"].nunique().min() > 1
    assert items["answer"].nunique() > len(questions) * len(SYSTEMS)  # steering does something


def test_one_layer_controls_and_the_unsteered_once(model, vectors, monkeypatch):
    written = []

    def counted(model, prompts, **options):
        written.extend(prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr(answers_module, "generate", counted)
    found = caa.answers(model, vectors, QUESTIONS[:2], layers=1, controls=1, max_new_tokens=3, progress=False)
    names = ["vector", "random-0", "shuffled-0", "shuffled-1", "shuffled-2"]
    assert list(dict.fromkeys(found.items["vector"])) == names
    assert set(found.items["layer"]) == {1}
    assert len(written) == 2 * (len(names) * 2 + 1)
    unsteered = found.items[found.items["multiplier"] == 0]
    assert (unsteered.groupby("item")["answer"].nunique() == 1).all()
    assert len(unsteered) == 2 * len(names)


def test_the_diagnostics_are_those_of_the_unsteered_model(model, vectors):
    found = caa.answers(model, vectors, QUESTIONS, layers=1, max_new_tokens=7, progress=False)
    for row in found.items.itertuples():
        prompt = caa.ChatTemplate().encode(model.tokenizer, row.prompt, row.answer)
        span = prompt.spans["completion"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt.ids])).log_softmax(-1)[0]
        expected = torch.stack([logprobs[i - 1, prompt.ids[i]] for i in span]).mean()
        assert row.logprob == pytest.approx(float(expected), abs=1e-4)
        assert row.n_tokens == len(span)
        assert row.repeated == repeated_share([prompt.ids[i] for i in span])
    table = found.to_pandas()
    assert table["n"].tolist() == [3, 3, 3]
    for name in DIAGNOSTICS:
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()


def test_repeated_share():
    assert repeated_share([]) == 0
    assert repeated_share(range(50)) == 0
    assert repeated_share([1] * 50) == pytest.approx(1 - 1 / 48)
    assert repeated_share([1, 2, 3, 4] * 10) == pytest.approx(1 - 4 / 38)


def test_an_empty_answer_has_no_fluency(model, monkeypatch):
    monkeypatch.setattr(answers_module, "generate", lambda model, prompts, **options: ["" for _ in prompts])
    found = caa.answers(model, None, QUESTIONS, progress=False)
    assert found.items["n_tokens"].tolist() == [0, 0, 0]
    assert found.items["logprob"].isna().all()
    row = found.to_pandas().iloc[0]
    assert row["empty"] == 3
    assert np.isnan(row["logprob"])


def test_open_prompts_of_a_behaviour_without_a_vector(model):
    pairs = caa.load_pairs("sentiment")
    found = caa.answers(model, None, pairs, max_new_tokens=2, progress=False)
    assert found.items["prompt"].tolist() == list(pairs.open_prompts)
    assert set(found.items["vector"]) == {"none"}
    assert found.provenance["prompts"] == "sentiment"


def test_interrupted_and_resumed_is_uninterrupted(model, vectors, tmp_path, monkeypatch):
    options = {"layers": 1, "max_new_tokens": 4, "batch_size": 2, "progress": False}
    expected = caa.answers(model, vectors, QUESTIONS, **options)
    asked, store = [], tmp_path / "store"

    def dying(model, prompts, **options):
        if QUESTIONS[1] in prompts:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr(answers_module, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        caa.answers(model, vectors, QUESTIONS, store=store, **options)
    assert [file.name for file in sorted(store.iterdir())] == ["about.json", "item-000000.json"]
    asked.clear()
    monkeypatch.setattr(
        answers_module, "generate", lambda m, prompts, **o: asked.extend(prompts) or generate(m, prompts, **o)
    )
    found = caa.answers(model, vectors, QUESTIONS, store=store, **options)
    assert QUESTIONS[0] not in asked
    assert set(asked) == set(QUESTIONS[1:])
    pd.testing.assert_frame_equal(found.items, expected.items, atol=1e-5)
    asked.clear()
    again = caa.answers(model, vectors, QUESTIONS, store=store, **options)
    assert not asked
    pd.testing.assert_frame_equal(again.items, found.items)
    with pytest.raises(caa.InputError, match="holds another set of answers"):
        caa.answers(model, vectors, QUESTIONS, store=store, **{**options, "max_new_tokens": 5})


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_saved_and_loaded(model, vectors, tmp_path, suffix):
    found = caa.answers(model, vectors, QUESTIONS, layers=1, max_new_tokens=4, systems=SYSTEMS, seed=7, progress=False)
    path = tmp_path / f"answers.{suffix}"
    found.save(path)
    again = caa.AnswerSet.load(path)
    pd.testing.assert_frame_equal(again.items, found.items, atol=1e-6)
    assert again.provenance == json.loads(json.dumps(found.provenance))
    assert again.seed == 7
    with pytest.raises(caa.InputError, match="allowed suffixes"):
        found.save(tmp_path / "answers.txt")


def test_answers_from_elsewhere(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "A?", "answer": "a"},
        {"prompt": "B?", "answer": "b", "by": "me"},
        {"prompt": "A?", "answer": "c"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    items = caa.AnswerSet.load(path).items
    assert items["item"].tolist() == [0, 1, 0]
    assert set(items["vector"]) == {"none"}
    assert set(items["multiplier"]) == {0.0}
    assert items["by"].tolist()[1] == "me"
    path.write_text('{"prompt": "A?"}\n')
    with pytest.raises(caa.InputError, match="answer 0: it needs the texts"):
        caa.AnswerSet.load(path)
    path.write_text('{"prompt": "A?", "ans')
    with pytest.raises(caa.InputError, match="cannot be read as answers"):
        caa.AnswerSet.load(path)
    with pytest.raises(caa.InputError, match="no answers"):
        caa.AnswerSet.of([])


def test_known_answers(pairs):
    items = caa.known_answers(pairs[:2]).items
    assert items["answer"].tolist() == [text for p in pairs[:2] for text in (p.negative, p.positive)]
    assert items["multiplier"].tolist() == [-1, 1, -1, 1]
    with pytest.raises(caa.InputError, match="are answer letters"):
        caa.known_answers(caa.load_pairs("ab/refusal"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v, p: caa.answers(m, v, []), "holds no question"),
        (lambda m, v, p: caa.answers(m, v, ["Hi?", " "]), "or an empty one"),
        (lambda m, v, p: caa.answers(m, v, p), "brings no open prompts"),
        (lambda m, v, p: caa.answers(m, v, ["New?", p[0].prompt]), "1 of 2 questions were used in training"),
        (lambda m, v, p: caa.answers(m, v, QUESTIONS, layers=9), "out of range"),
        (lambda m, v, p: caa.answers(m, v, QUESTIONS, multipliers=()), "an empty grid"),
        (lambda m, v, p: caa.answers(m, v, QUESTIONS, systems={}), "an empty grid"),
        (lambda m, v, p: caa.answers(m, v, QUESTIONS, batch_size=0), "at least 1"),
        (lambda m, v, p: caa.answers(m, v, ["word " * 100], max_new_tokens=64), "exceed the context"),
        (lambda m, v, p: caa.answers(m, v, QUESTIONS, positions=torch.ones(3, dtype=torch.bool)), "fits one prompt"),
    ],
)
def test_refused_before_the_model_runs(model, vectors, pairs, call, message, monkeypatch):
    monkeypatch.setattr(answers_module, "generate", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(caa.CaaLensError, match=message):
        call(model, vectors, pairs)


def test_an_open_context_is_refused(model, vectors):
    with caa.steer(model, vectors[0]), pytest.raises(caa.InputError, match="leave the steer"):
        caa.answers(model, vectors, QUESTIONS)


def test_numbers_of_draws_must_fit(model):
    with pytest.raises(caa.InputError, match="draws has 1 numbers for 3 prompts"):
        generate(model, QUESTIONS, draws=[1])


NAME = "results_layer=13_multiplier={}_behavior=refusal_type=open_ended_use_base_model=False_model_size=7b{}.json"


def test_the_authors_open_ended_files(tmp_path):
    """Their layout: unjudged beside the multiple-choice results, judged in a folder of its own; a judge's failure has no score."""
    plain_folder, judged = tmp_path / "refusal", tmp_path / "open_ended_scores" / "refusal"
    plain_folder.mkdir()
    judged.mkdir(parents=True)
    texts = [{"question": f"Q{i}?", "model_output": f"Answer {i}.</s>", "raw_model_output": "..."} for i in range(3)]
    for multiplier, scores in (("-1.0", [1, 2, 3]), ("1.0", [8, None, 9])):
        (plain_folder / NAME.format(multiplier, "")).write_text(json.dumps(texts))
        rows = [{**text, "score": float(s)} if s else text for text, s in zip(texts, scores, strict=True)]
        (judged / NAME.format(multiplier, "")).write_text(json.dumps(rows))
    tuned = NAME.format("1.0", "_override_model_weights_path=finetuned-pos.pt")
    (plain_folder / tuned).write_text(json.dumps(texts))
    table = read_published_answers(tmp_path)
    assert len(table) == 9
    assert table["answer"].tolist()[:3] == ["Answer 0.", "Answer 1.", "Answer 2."]
    summary = read_published_judged(tmp_path)
    assert summary["multiplier"].tolist() == [-1.0, 1.0, 1.0]
    assert summary["override_weights"].isna().tolist() == [True, True, False]
    assert summary["value"].tolist()[:2] == [2.0, 8.5]
    assert summary[["n", "unscored"]].to_numpy().tolist() == [[3, 0], [2, 1], [0, 3]]
    assert parse_result_name(tuned)["model_size"] == "7b"
    again = caa.AnswerSet.of(table[table["override_weights"].isna()].to_dict("records"))
    assert sorted(set(again.items["multiplier"])) == [-1.0, 1.0]
    (judged / NAME.format("1.0", "")).write_text('[{"question": "Q?"}]')
    with pytest.raises(caa.InputError, match="needs the texts question and model_output"):
        read_published_answers(tmp_path)
    with pytest.raises(caa.InputError, match="holds no files"):
        read_published_answers(plain_folder / "nothing")
