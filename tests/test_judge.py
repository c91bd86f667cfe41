"""Judges: right scores and counts whatever the endpoint does, nothing asked twice, blind, in random order, honest in words."""

import _thread
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from judge_server import Act
from transformers import GPT2Config, GPT2LMHeadModel

import caa_lens as caa
from caa_lens.experiments.judge import judge
from caa_lens.experiments.judges.base import Case, Judgement
from caa_lens.experiments.judges.endpoint import FORM, INSTRUCTION
from caa_lens.experiments.judges.local import BLANK
from caa_lens.experiments.judges.local import FORM as LOCAL_FORM
from caa_lens.experiments.judges.replies import read_reply, retry_after
from caa_lens.experiments.rubric import rubric_for
from caa_lens.experiments.statistics import interval_alpha

RUBRIC = caa.Rubric("level", "Rate the level that the answer states.", low="It states 0.", high="It states 10.")


pytestmark = pytest.mark.usefixtures("no_access")


def asking(server, **options):
    return caa.OpenAIJudge("tiny", base_url=server.url, **{"backoff": 0.01, "timeout": 5.0, **options})


def stated(text, attempt=1):
    """The level that the answer states, as a good judge would."""
    return Act(re.search(r"level (\d+)", text)[1])


def said(n_items=4, multipliers=(-1.0, 0.0, 1.0), faults=()):
    """Answers that state a level, higher at higher multipliers; some ask the server for a fault."""
    rows = []
    for item in range(n_items):
        for k, multiplier in enumerate(multipliers):
            fault = faults[item * len(multipliers) + k] if item * len(multipliers) + k < len(faults) else ""
            level = 5 + round(2 * multiplier) + item % 2
            answer = f"Item {item} is at level {level}. {fault}".strip()
            rows.append({"item": item, "prompt": f"Question {item}?", "vector": "vector", "layer": 3})
            rows[-1] |= {"multiplier": multiplier, "answer": answer}
    return caa.AnswerSet.of(rows, {"model": "none"})


def levels(answers):
    return [float(re.search(r"level (\d+)", text)[1]) for text in answers.items["answer"]]


FAULTS = {
    "[slow]": Act(after=1.0),
    "[429]": Act(status=429, headers={"Retry-After": "0.3"}, body={"error": {"message": "slow down"}}),
    "[500]": Act(status=500, body={"error": {"message": "oops"}}),
    "[503]": Act(status=503, headers={"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}, body={}),
    "[408]": Act(status=408, body={}),
    "[cut]": Act(cut=60),
    "[announced]": Act(cut=60, announced=True),
    "[drop]": Act(drop=True),
    "[html]": Act(kind="text/html"),
    "[nothing]": Act(body={"object": "chat.completion", "choices": []}),
    "[error]": Act(body={"error": "in a good reply"}),
}


def test_every_fault_is_survived_and_no_score_is_made_up(serve):
    def reply(text, attempt):
        if "[html]" in text and attempt == 1:
            return Act(**{**asdict(FAULTS["[html]"]), "cut": 20})
        return next((act for mark, act in FAULTS.items() if mark in text and attempt == 1), stated(text))

    server, answers = serve(reply), said(4, faults=list(FAULTS))
    started = time.monotonic()
    result = judge(answers, RUBRIC, asking(server, timeout=0.4, concurrency=2), progress=False)
    assert time.monotonic() - started < 15
    assert result.items["score"].tolist() == levels(answers)
    assert set(result.items["status"]) == {"scored"}
    counts = {mark: sum(mark in text for text in server.texts) for mark in FAULTS}
    assert counts == dict.fromkeys(FAULTS, 2)
    assert len(server.requests) == len(answers) + len(FAULTS)


def test_retry_after_holds_every_request_back(serve):
    server = serve(lambda text, attempt: FAULTS["[429]"] if len(server.requests) == 1 else stated(text))
    result = judge(said(2), RUBRIC, asking(server, concurrency=1), progress=False)
    assert set(result.items["status"]) == {"scored"}
    assert server.times[1] - server.times[0] >= 0.3
    assert server.times[-1] - server.times[1] < 2


REPLIES = {
    "I'm sorry, but I can't rate this.": "refused",
    "": "malformed",
    "This is quite formal, I would say 7.": "malformed",
    "11": "malformed",
}


def test_refused_and_malformed_are_counted_and_never_scored(serve, tmp_path):
    def reply(text, attempt):
        mark = re.search(r"\[(\d)\]", text)
        if mark and mark[1] == "8":
            return Act({"role": "assistant", "content": None, "refusal": "No."})
        if mark and mark[1] == "9":
            return Act(status=400, body={"error": {"message": "filtered", "code": "content_filter"}})
        return Act(list(REPLIES)[int(mark[1])]) if mark else stated(text)

    faults = ["[0]", "[1]", "[2]", "[3]", "[8]", "[9]"]
    server, answers = serve(reply), said(4, faults=faults)
    result = judge(answers, RUBRIC, asking(server), store=tmp_path, progress=False)
    assert result.items["status"].tolist()[:6] == [*REPLIES.values(), "refused", "refused"]
    assert result.items["score"].isna().tolist() == [True] * 6 + [False] * 6
    assert result.items["score"].tolist()[6:] == levels(answers)[6:]
    table = result.to_pandas()
    assert table["n"].tolist() == [2, 2, 2]
    assert table["n_refused"].sum() == 3
    assert table["n_malformed"].sum() == 3
    assert result.effects()["n"].tolist() == [2]
    assert "Of 12 judgements 3 refused, 3 malformed." in result.verdict()
    judge(answers, RUBRIC, asking(server), store=tmp_path, progress=False)
    assert len(server.requests) == 12  # what was refused is not asked again


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 7), (" 7.5\n", 7.5), ("10", 10), ("0", 0), ("7/10", 7), ("8 out of 10.", 8), ("**9**", 9), ("Score: 3", 3),
        ("**Score:** 4/10", 4), ("The score is 6.", 6), ("my rating: 2", 2), ("<think>10? No, 1.</think>\n3", 3), ("(5)", 5),
        ("-3", None), ("11", None), ("7-8", None), ("7, 8", None), ("7/5", None), ("10.5", None), ("seven", None), ("7%", None),
        ("100", None), ("Score:", None), ("7 because it is formal", None), ("<think>7", None), ("1e1", None),
        ("\N{ARABIC-INDIC DIGIT SEVEN}", None),
    ],
)  # fmt: skip
def test_only_a_number_from_0_to_10_is_a_score(reply, score):
    found = read_reply(reply)
    assert (found.status, found.score) == (("malformed", None) if score is None else ("scored", score))
    assert found.reply == reply


@pytest.mark.parametrize(
    "reply", ["I cannot rate this.", "I'm sorry, 7", "Unfortunately, I am unable to.", "As an AI, I"]
)
def test_refusals_are_told_from_other_words(reply):
    assert read_reply(reply).status == "refused"


def test_never_more_requests_than_allowed(serve):
    server = serve(lambda text, attempt: Act(after=0.03))
    judge(said(8), RUBRIC, asking(server, concurrency=3), progress=False)
    assert server.most == 3


def test_the_judge_is_blind(serve):
    """What it is sent is determined by rubric, question and answer, to the byte."""
    server, answers = serve(stated), said(3)
    judge(answers, RUBRIC, asking(server, api_key="the-key", extra={"top_p": 1}), progress=False)
    expected = [
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": FORM.format(rubric=RUBRIC.text, question=row.prompt, answer=row.answer)},
            ],
            "temperature": 0.0,
            "max_tokens": 16,
            "top_p": 1,
        }
        for row in answers.items.itertuples()
    ]
    order = [request["messages"][1]["content"] for request in expected]
    assert sorted(server.requests, key=lambda request: order.index(request["messages"][1]["content"])) == expected
    assert set(server.keys) == {"Bearer the-key"}


def test_the_order_is_random_seeded_and_without_effect(serve):
    answers = said(8)
    flipped = caa.AnswerSet.of(answers.items.assign(multiplier=-answers.items["multiplier"]).to_dict("records"))
    orders, scores = [], []
    for given, seed in ((answers, 0), (flipped, 0), (answers, 1)):
        server = serve(stated)
        result = judge(given, RUBRIC, asking(server, concurrency=1), seed=seed, progress=False)
        orders.append(server.texts)
        scores.append(result.items["score"].tolist())
    assert orders[0] == orders[1]  # the order does not know the multipliers
    assert orders[0] != orders[2]
    assert scores[0] == scores[1] == scores[2] == levels(answers)
    place = {FORM.format(rubric=RUBRIC.text, question=r.prompt, answer=r.answer): r for r in answers.items.itertuples()}
    rank = np.arange(len(answers))
    for column in ("multiplier", "item"):
        values = [getattr(place[text], column) for text in orders[0]]
        assert abs(np.corrcoef(rank, values)[0, 1]) < 0.5
        assert values != sorted(values)


def test_a_dying_endpoint_loses_nothing_and_nothing_is_asked_twice(serve, tmp_path):
    answers, alive, served = said(8), threading.Event(), []
    alive.set()

    def reply(text, attempt):
        if alive.is_set():
            served.append(text)
            if len(served) == 10:
                alive.clear()
            return stated(text)
        return Act(drop=True)

    server = serve(reply)
    asked = asking(server, retries=2, concurrency=2)
    with pytest.raises(
        caa.EndpointError, match=rf"stopped answering.*10 of 24 judgements are kept in {tmp_path}; the same call"
    ):
        judge(answers, RUBRIC, asked, store=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 10
    assert len(server.requests) < 10 + 4 * 3 + 1  # it gives up soon
    alive.set()
    result = judge(answers, RUBRIC, asked, store=tmp_path, progress=False)
    assert result.items["score"].tolist() == levels(answers)
    assert sorted(served) == sorted(set(served))
    assert len(served) == len(answers)
    alive.clear()
    again = judge(answers, RUBRIC, asked, store=tmp_path, seed=5, progress=False)  # needs no endpoint any more
    assert again.items["score"].tolist() == levels(answers)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def interruptible():
    """Interrupts are heard, also in a process that was started in the background, where a shell has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_keeps_what_is_under_way(serve, tmp_path, interruptible):
    def reply(text, attempt):
        if len(server.requests) == 5:
            _thread.interrupt_main()
        return replace(stated(text), after=0.05)

    server, answers = serve(reply), said(8)
    with pytest.raises(KeyboardInterrupt):
        judge(answers, RUBRIC, asking(server, concurrency=3), store=tmp_path, progress=False)
    asked = len(server.requests)
    assert 5 <= asked < 12
    assert len(list(tmp_path.iterdir())) == asked
    result = judge(answers, RUBRIC, asking(server, concurrency=3), store=tmp_path, progress=False)
    assert result.items["score"].tolist() == levels(answers)
    assert len(server.requests) == len(answers)


def test_an_endpoint_that_is_not_there(serve):
    server = serve(stated)
    url = server.url
    gone = caa.OpenAIJudge("tiny", base_url=url.replace(str(server.server_port), "9"), retries=1, backoff=0.01)
    with pytest.raises(caa.EndpointError, match=r"0 of 6 judgements were made and are lost; give store="):
        judge(said(2), RUBRIC, gone, progress=False)


def test_one_text_that_always_fails_does_not_stop_the_others(serve, tmp_path):
    server = serve(lambda text, attempt: Act(status=500, body={}) if "[bad]" in text else stated(text))
    answers = said(4, faults=["", "", "", "", "[bad]"])
    asked = asking(server, retries=1, concurrency=1)
    with pytest.warns(caa.CaaLensWarning, match="1 of 12 texts could not be judged"):
        result = judge(answers, RUBRIC, asked, store=tmp_path, progress=False)
    assert result.items["status"].tolist().count("failed") == 1
    assert result.items["score"].notna().sum() == 11
    assert len(list(tmp_path.iterdir())) == 11  # it is asked for again, and only it
    before = len(server.requests)
    with pytest.raises(caa.EndpointError, match="answered no request"):
        judge(answers, RUBRIC, asked, store=tmp_path, progress=False)
    assert len(server.requests) == before + 2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (Act(status=401, body={"error": {"message": "bad key the-key"}}), r"refuses the key \(status 401\)"),
        (Act(status=403, body={}), r"refuses the key \(status 403\)"),
        (
            Act(status=404, body={"error": {"message": "no model for the-key"}}),
            r"does not take the request .*no model for \[key\]",
        ),
        (Act(status=429, body={"error": {"message": "pay", "code": "insufficient_quota"}}), "no quota left"),
        (Act(status=429, headers={"Retry-After": "3600"}, body={}), "asks to wait 3600 s"),
    ],
)
def test_what_no_further_request_can_mend_stops_at_once(serve, act, message):
    server = serve(lambda text, attempt: act)
    with pytest.raises(caa.EndpointError, match=message) as caught:
        judge(said(8), RUBRIC, asking(server, api_key="the-key", concurrency=2), progress=False)
    assert len(server.requests) <= 4
    assert "the-key" not in str(caught.value)


TOO_LONG = {"error": {"message": "This model has a maximum context length", "code": "context_length_exceeded"}}
BAD_REQUEST = {"error": {"message": "cannot take this"}}


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("body", [TOO_LONG, BAD_REQUEST])
def test_one_text_that_is_never_taken_is_counted_and_stops_nothing(serve, tmp_path, bad, body):
    server = serve(lambda text, attempt: Act(status=400, body=body) if text in taken else stated(text))
    answers, taken = said(3), set()
    judge(answers, RUBRIC, asking(server, concurrency=1), progress=False)
    taken.add(server.texts[bad])  # the first request of all, or one when others were answered
    result = judge(answers, RUBRIC, asking(server, concurrency=1), store=tmp_path, progress=False)
    assert sorted(result.items["status"]) == ["malformed", *["scored"] * 8]
    assert result.items["score"].isna().sum() == 1
    assert "1 malformed" in result.verdict()
    judge(answers, RUBRIC, asking(server, concurrency=1), store=tmp_path, progress=False)
    assert len(server.requests) == 18  # it is not asked again


def test_a_request_that_is_never_taken_ends_the_run(serve, tmp_path):
    server = serve(lambda text, attempt: Act(status=400, body=BAD_REQUEST))
    for n_items in (8, 1):  # more texts than it tries, and fewer
        with pytest.raises(caa.EndpointError, match=r"does not take the request .*cannot take this"):
            judge(said(n_items), RUBRIC, asking(server, concurrency=2), store=tmp_path, progress=False)
    assert len(server.requests) <= 6 + 3
    assert not list(tmp_path.iterdir())


def test_the_key_is_written_nowhere(serve, tmp_path):
    asked = asking(serve(stated), api_key="the-key")
    result = judge(said(1), RUBRIC, asked, store=tmp_path, progress=False)
    assert "the-key" not in repr(asked)
    assert "the-key" not in json.dumps(result.provenance)
    assert all("the-key" not in file.read_text() for file in tmp_path.iterdir())


def test_equal_texts_are_judged_once_and_repeats_by_themselves(serve, tmp_path):
    """The second judging of a text is another request; the first one's is not asked for again."""
    server = serve(lambda text, attempt: Act(str(int(stated(text).content) + (attempt - 1) % 2)))
    answers = said(4)
    doubled = caa.AnswerSet.of(
        [*answers.items.to_dict("records"), *answers.items.assign(vector="random-0").to_dict("records")]
    )
    judge(doubled, RUBRIC, asking(server), store=tmp_path, progress=False)
    assert len(server.requests) == 12
    result = judge(doubled, RUBRIC, asking(server), repeats=2, store=tmp_path, progress=False)
    assert len(server.requests) == 24
    assert len(result.items) == 48
    np.testing.assert_array_equal(result.items["score"][result.items["repeat"] == 0], levels(doubled))
    agreement = result.agreement()
    assert agreement.n == 12
    assert agreement.mean_absolute_difference == 1
    assert agreement.exact == 0
    assert 0 < agreement.alpha < 1
    assert result.to_pandas()["value"].tolist()[1] == np.mean(levels(answers)[1::3]) + 0.5
    with pytest.raises(caa.InputError, match="scored at least twice"):
        judge(doubled, RUBRIC, asking(server), store=tmp_path, progress=False).agreement()


def test_another_rubric_or_judge_is_another_judgement(serve, tmp_path):
    server, answers = serve(stated), said(1)
    other = caa.Rubric("level", "Rate it.", low="0", high="10")
    for rubric, options in ((RUBRIC, {}), (other, {}), (RUBRIC, {"temperature": 1.0}), (RUBRIC, {})):
        judge(answers, rubric, asking(server, **options), store=tmp_path, progress=False)
    assert len(server.requests) == 9
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(caa.InputError, match="is no judgement"):
        judge(answers, RUBRIC, asking(server), store=tmp_path, progress=False)


def test_access(serve, monkeypatch):
    with pytest.raises(caa.InputError, match="set OPENAI_API_KEY"):
        caa.OpenAIJudge("tiny")
    with pytest.raises(caa.InputError, match="concurrency=0 must be at least 1"):
        caa.OpenAIJudge("tiny", api_key="k", concurrency=0)
    server = serve(stated)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside")
    result = judge(said(1), RUBRIC, caa.judge_from("openai:tiny"), progress=False)
    assert result.judge == "openai:tiny"
    assert set(server.keys) == {"Bearer from-outside"}
    for spec in ("openai", "local:", "claude:x"):
        with pytest.raises(caa.InputError, match=f"no judge '{spec}'"):
            caa.judge_from(spec)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(caa.MissingError, match=r"caa-lens\[judge\]"):
        caa.OpenAIJudge("tiny", api_key="k")


def test_waits():
    assert retry_after(None) == 0
    assert retry_after("1.5") == 1.5
    assert retry_after("soon") == 0
    assert retry_after("Mon, 01 Jan 2024 00:00:00 GMT") == 0
    assert retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9


def by_hand(model, rubric, question, answer):
    """Mean over pairs of statements of the difference of their log-probabilities, each text run whole."""
    template, totals = caa.ChatTemplate(), []
    for pair in rubric.statements:
        for statement in pair:
            prompt = template.encode(model.tokenizer, LOCAL_FORM.format(question=question, answer=answer), statement)
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt.ids])).log_softmax(-1)[0]
            totals.append(sum(float(logprobs[i - 1, prompt.ids[i]]) for i in prompt.spans["completion"]))
    return np.mean(np.array(totals[::2]) - np.array(totals[1::2]))


def test_the_local_judge_is_its_formula(model, pairs):
    rubric = caa.Rubric(
        "tone", "Rate it.", low="Low.", high="High.", statements=(("It is stiff.", "It is easy."), ("So.", "Not so."))
    )
    answers = caa.known_answers(pairs[:3])
    found = [judge(answers, rubric, caa.LocalJudge(model, batch_size=size), progress=False).items for size in (1, 16)]
    pd.testing.assert_frame_equal(found[0].drop(columns="reply"), found[1].drop(columns="reply"), atol=1e-3)
    for row in found[0].itertuples():
        evidence = by_hand(model, rubric, row.prompt, row.answer) - by_hand(model, rubric, row.prompt, BLANK)
        assert row.score == pytest.approx(10 / (1 + np.exp(-evidence)), abs=5e-3)
        assert float(row.reply.removesuffix(" nats")) == pytest.approx(evidence, abs=2e-3)
    assert found[0]["score"].nunique() == 6


def test_what_the_local_judge_refuses(model, pairs, vectors):
    answers, local = caa.known_answers(pairs[:1]), caa.LocalJudge(model)
    with pytest.raises(caa.InputError, match="the same score every time"):
        judge(answers, RUBRIC, local, repeats=2)
    with caa.steer(model, vectors[0]), pytest.raises(caa.InputError, match="must not be steered"):
        judge(answers, RUBRIC, local, progress=False)
    long = caa.AnswerSet.of([{"prompt": "Q?", "answer": "word " * 200}])
    with pytest.raises(caa.InputError, match="exceed the context"):
        judge(long, RUBRIC, local, progress=False)
    marker = caa.ChatTemplate().marker(model.tokenizer)
    odd = caa.AnswerSet.of([{"prompt": "Q?", "answer": f"Well{marker}"}, {"prompt": "Q?", "answer": "Well."}])
    result = judge(odd, RUBRIC, local, progress=False)
    assert result.items["status"].tolist() == ["malformed", "scored"]
    with pytest.raises(caa.InputError, match="repeats=0"):
        judge(answers, RUBRIC, local, repeats=0)


class Fixed:
    """A judge with an opinion of its own, to plant effects."""

    name, varies = "fixed", False

    def __init__(self, score):
        self.score = score

    def about(self, rubric):
        return {"judge": "fixed"}

    def judge(self, rubric, cases, record):
        for index, case in enumerate(cases):
            record(index, Judgement("scored", self.score(case), "as told"))


def planted(slopes, n=12, systems=(None,)):
    """Answers whose text states the score: 5 plus the slope of their vector times the multiplier, and some noise."""
    rng, rows = np.random.default_rng(0), []
    for system in systems:
        for vector, (layer, slope) in slopes.items():
            for item in range(n):
                for multiplier in (-1.0, 0.0, 1.0):
                    text = f"{5 + slope * multiplier + rng.normal(0, 0.2):.4f}"
                    row = {"item": item, "prompt": f"Q{item}", "vector": vector, "layer": layer}
                    row |= {"multiplier": multiplier, "answer": text} | ({} if system is None else {"system": system})
                    rows.append(row)
    return judge(caa.AnswerSet.of(rows), RUBRIC, Fixed(lambda case: float(case.answer)), progress=False)


def test_effects_and_words():
    result = planted({"vector": (3, 1.5), "random-0": (3, 0.1), "shuffled-0": (3, -0.3)})
    effects = result.effects().set_index("vector")["effect"]
    np.testing.assert_allclose(effects, [1.5, 0.1, -0.3], atol=0.15)
    table = result.to_pandas().set_index(["vector", "multiplier"])
    assert table.loc[("vector", 1.0), "value"] == pytest.approx(6.5, abs=0.2)
    assert (table["low"] <= table["value"]).all()
    assert "level, judged by fixed, layer 3: effect +1.5" in result.verdict()
    assert "points per unit of multiplier" in result.verdict()
    assert "Beyond every control" in result.verdict()
    assert "NULL" in planted({"vector": (3, 0.0)}).verdict()
    assert "NOT SHOWN" in planted({"vector": (3, 0.5), "random-0": (3, 0.8)}).verdict()
    assert "OPPOSITE" in planted({"vector": (3, -1.0)}).verdict()
    by_system = planted({"vector": (3, 1.0)}, systems=("a", "b"))
    assert list(by_system.by_system()) == ["a", "b"]
    assert by_system.verdict().count("system '") == 2


def test_nothing_scored_is_said_and_not_hidden():
    result = judge(said(2), RUBRIC, Fixed(lambda case: None), progress=False)
    assert result.to_pandas()["n"].tolist() == [0, 0, 0]
    assert result.to_pandas()["value"].isna().all()
    with pytest.raises(caa.InputError, match="no item has a value"):
        result.verdict()


def test_saved(tmp_path):
    result = planted({"vector": (3, 1.0)})
    result.save(tmp_path / "judged.parquet")
    again = pd.read_parquet(tmp_path / "judged.parquet")
    pd.testing.assert_frame_equal(again, result.items)
    assert json.loads(again.attrs["caa_lens"])["rubric"]["title"] == "level"


def test_the_figure_shows_the_table():
    from caa_lens.figures import BLUE

    result = planted({"vector": (3, 1.5), "random-0": (3, 0.1), "random-1": (3, 0.0), "mine": (3, 0.2)})
    (ax,) = result.plot().axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["vector", "random", "mine"]
    table = result.to_pandas()
    for container, (_, rows) in zip(ax.containers, table.groupby("vector", sort=False), strict=True):
        line, _, (bars,) = container
        np.testing.assert_allclose(line.get_ydata().astype(float), rows["value"])
        np.testing.assert_allclose(
            [segment[:, 1] for segment in bars.get_segments()], rows[["low", "high"]].to_numpy(float)
        )
    assert ax.containers[0][0].get_color() == BLUE
    assert "n = 12" in ax.get_title()
    assert "judged by fixed" in ax.get_title()
    many = planted({"vector": (3, 1.0)}, systems=("a", "b"))
    assert len(many.plot().axes) == 2
    with pytest.raises(caa.MissingError, match="layer 5 was not run"):
        result.plot(layer=5)
    with pytest.raises(caa.InputError, match="an axis holds one system"):
        many.plot(ax=ax)


def test_alpha_is_the_published_one():
    """Krippendorff (2011), example with four observers: interval alpha 0.849."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [np.array([r for r in unit if r is not None], float) for unit in zip(*observers, strict=True)]
    assert interval_alpha(units) == pytest.approx(0.849, abs=5e-4)
    assert interval_alpha([np.array([1.0, 1.0]), np.array([3.0, 3.0])]) == 1
    assert np.isnan(interval_alpha([np.array([1.0, 1.0])]))
    assert np.isnan(interval_alpha([]))


@pytest.mark.parametrize("name", caa.behaviours())
def test_every_built_in_behaviour_has_a_rubric(name):
    rubric = rubric_for(name)
    assert rubric == rubric_for(caa.load_pairs(name))
    assert len(rubric.statements) >= 3
    for part in (rubric.description, rubric.low, rubric.middle, rubric.high):
        assert part in rubric.text
    assert rubric.text.index("A score of 0") < rubric.text.index("A score of 5") < rubric.text.index("A score of 10")


def test_rubrics_of_ones_own():
    assert "score of 5" not in RUBRIC.text
    assert RUBRIC.statements == (("It states 10.", "It states 0."),)
    with pytest.raises(caa.InputError, match="the rubric's 'low' is empty"):
        caa.Rubric("t", "d", low=" ", high="h")
    with pytest.raises(caa.InputError, match="two different sentences"):
        caa.Rubric("t", "d", low="l", high="h", statements=(("a", "a"),))
    with pytest.raises(caa.InputError, match="brings no rubric"):
        rubric_for(caa.load_pairs([("p", "a", "b")]))
    assert Case("q", "a") == Case("q", "a", 0)


@pytest.mark.slow
def test_a_real_server(byte_tokenizer, tmp_path):
    """`transformers serve` with a tiny model of which every next token is 7: its whole reply is a score, a longer one is none."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers serve needs fastapi and uvicorn")
    size = len(byte_tokenizer)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=2048, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight.fill_(-1.0)[byte_tokenizer.convert_tokens_to_ids("7")] = 1.0
    folder = tmp_path / "sevens"
    model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        asked = {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "backoff": 0.5,
            "retries": 7,
            "longest_wait": 30.0,
            "concurrency": 2,
        }
        answers = said(2)
        one = caa.OpenAIJudge(str(folder), max_tokens=1, **asked)  # waits until the server has started
        result = judge(answers, RUBRIC, one, store=tmp_path / "judged", progress=False)
        assert result.items["score"].tolist() == [7.0] * 6, (tmp_path / "log").read_text()
        longer = judge(answers, RUBRIC, caa.OpenAIJudge(str(folder), max_tokens=3, **asked), progress=False)
        assert longer.items["reply"].tolist() == ["777"] * 6
        assert set(longer.items["status"]) == {"malformed"}
    finally:
        server.terminate()
        server.wait(timeout=20)
    again = judge(answers, RUBRIC, one, store=tmp_path / "judged", progress=False)
    assert again.items["score"].tolist() == [7.0] * 6  # nothing is asked of a server that is gone


@pytest.mark.slow
def test_the_embedded_model_as_judge_tells_formal_from_casual(embedded):
    """On completions that are known, before it is believed on answers."""
    _, held_out = caa.load_pairs("formality").split(held_out=30, seed=0)
    result = judge(caa.known_answers(held_out[:8]), "formality", caa.LocalJudge(embedded), progress=False)
    best = result.best()
    assert best["effect_low"] > 0
    assert best["anti_steerable"] < 0.25
