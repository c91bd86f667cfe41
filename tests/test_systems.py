"""System prompts as an axis of the sweep: each is the plain run with that system prompt in the template."""

from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch

import caa_lens as caa
from caa_lens.experiments import grid
from caa_lens.positions import known_prompts

SYSTEMS = {"none": None, "positive": "Be as stiff as you can.", "negative": "Relax, and keep it short. Really."}


def plain_value(model, template, pair, vector, multiplier):
    """Mean log-probability per token of positive minus negative, each text run whole and alone under `steer`."""
    means = []
    for completion in (pair.positive, pair.negative):
        prompt = template.encode(model.tokenizer, pair.prompt, completion)
        context = caa.steer(model, multiplier * vector) if multiplier else nullcontext()
        with known_prompts([prompt.instruction_end]), torch.no_grad(), context:
            logprobs = model(torch.tensor([prompt.ids])).log_softmax(-1)[0]
        span = prompt.spans["completion"]
        means.append(float(torch.stack([logprobs[i - 1, prompt.ids[i]] for i in span]).mean()))
    return means[0] - means[1]


def check_against_plain_runs(model, template, vectors, pairs):
    result = caa.sweep(
        model, vectors, pairs, multipliers=(0, 1.5), systems=SYSTEMS, template=template, batch_size=3, progress=False
    )
    assert set(result.items["system"]) == set(SYSTEMS)
    assert len(result.items) == len(pairs) * len(SYSTEMS) * len(vectors) * 2
    for row in result.items.itertuples():
        written = replace(template, system_prompt=SYSTEMS[row.system])
        expected = plain_value(model, written, pairs[row.item], vectors[row.layer], row.multiplier)
        assert row.value == pytest.approx(expected, abs=1e-4)


def test_every_system_prompt_is_the_plain_run(model, vectors, held_out):
    check_against_plain_runs(model, caa.ChatTemplate(system_prompt="Replaced."), vectors, held_out[:3])


@pytest.mark.parametrize("system", ["paper", "meta"])
def test_llama2_puts_it_before_or_inside(llama2_chat, pairs, held_out, system):
    model = llama2_chat[0]
    template = caa.Llama2Chat(system=system)
    vectors = caa.extract(model, pairs, template=template, layers=[1], progress=False)
    check_against_plain_runs(model, template, vectors, held_out[:2])


def test_effects_verdicts_and_parts_of_each_system(model, vectors, held_out):
    result = caa.sweep(model, vectors, held_out, layers=[1, 2], controls=1, systems=SYSTEMS, progress=False)
    effects, parts = result.effects(), result.by_system()
    assert list(parts) == list(SYSTEMS)
    for name, prompt in SYSTEMS.items():
        template = caa.ChatTemplate(system_prompt=prompt)
        alone = caa.sweep(model, vectors, held_out, layers=[1, 2], controls=1, template=template, progress=False)
        for part in (parts[name].effects(), effects[effects["system"] == name].drop(columns="system")):
            pd.testing.assert_frame_equal(part.reset_index(drop=True), alone.effects(), atol=1e-5)
        pd.testing.assert_frame_equal(parts[name].to_pandas(), alone.to_pandas(), atol=1e-5)
    own = effects[effects["vector"] == "vector"]
    assert result.best()["effect"] == own["effect"].max()
    assert result.best()["system"] == own.loc[own["effect"].idxmax(), "system"]
    lines = result.verdict().splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"system {name!r}" for name in SYSTEMS]
    assert not caa.score(model, held_out, vectors[1], progress=False).by_system()


def test_resumed_is_uninterrupted(model, vectors, held_out, tmp_path):
    options = {"layers": [1], "systems": SYSTEMS, "store": tmp_path / "s", "progress": False}
    expected = caa.sweep(model, vectors, held_out, **options).items
    (tmp_path / "s" / "item-000001.json").unlink()
    pd.testing.assert_frame_equal(caa.sweep(model, vectors, held_out, **options).items, expected, atol=1e-5)
    with pytest.raises(caa.InputError, match="holds another sweep"):
        caa.sweep(model, vectors, held_out, **{**options, "systems": {"none": None}})


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({}, "systems={} is an empty grid"),
        ({"positive": " "}, "the system prompt 'positive' is empty"),
    ],
)
def test_unusable_system_prompts(model, vectors, held_out, systems, message, monkeypatch):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(caa.InputError, match=message):
        caa.sweep(model, vectors, held_out, systems=systems)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}Answer:",
            "does not write the system prompt 'Be as stiff as you can.' of 'positive' into the text",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{{ messages[-1]['content'] }}:",
            "refuses this conversation .*no system role",
        ),
    ],
    ids=["ignores", "raises"],
)
def test_templates_that_know_no_system_prompt(model, vectors, held_out, chat_template, message, monkeypatch):
    monkeypatch.setattr(grid, "run_branches", lambda *a, **k: pytest.fail("the model was run"))
    monkeypatch.setattr(model.tokenizer, "chat_template", chat_template)
    with pytest.raises(caa.InputError, match=message):
        caa.sweep(model, vectors, held_out, systems=SYSTEMS)
