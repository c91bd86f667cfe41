"""A user's hooks that depend on positions act in every measurement as in a pass of the user's own: one text, whole, no other."""

import pytest
import torch
from conftest import relative_error

import caa_lens as caa

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def first_hook(x, hook):
    x = x.clone()
    x[:, 0] = 0
    return x


def last_hook(x, hook):
    x = x.clone()
    x[0, -1] *= 3
    return x


def mean_hook(x, hook):
    return x - x.mean(1, keepdim=True)


@pytest.fixture(params=[first_hook, last_hook, mean_hook], ids=lambda hook: hook.__name__)
def hooked_model(request, model):
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", request.param)]):
        yield model


def ids_of(model, prompt, completion=None):
    return caa.ChatTemplate().encode(model.tokenizer, prompt, completion).ids


def stream(model, ids, layer):
    _, cache = model.run_with_cache(torch.tensor([ids]))
    return cache[f"blocks.{layer}.hook_resid_post"].reshape(len(ids), -1)


@pytest.mark.parametrize("read", ["completion_mean", "answer"])
def test_extraction(hooked_model, pairs, read):
    model, expected = hooked_model, 0
    for pair in pairs:
        both = caa.ChatTemplate().encode_pair(model.tokenizer, pair)
        for sign, side in ((1, both.positive), (-1, both.negative)):
            span = (
                slice(side.completion_start, None) if read == "completion_mean" else slice(both.answer, both.answer + 1)
            )
            expected = expected + sign * stream(model, side.ids, 1)[span].mean(0) / len(pairs)
    found = caa.extract(model, pairs, read=read, progress=False)
    assert relative_error(found[1].tensor, expected) < 1e-5


def test_scores(hooked_model, pairs, held_out):
    model = hooked_model
    vectors = caa.extract(model, pairs, progress=False)
    result = caa.sweep(model, vectors, held_out, layers=[0, 1], multipliers=(0, 1), metric="logprob", progress=False)

    def mean_logprob(prompt, completion):
        encoded = caa.ChatTemplate().encode(model.tokenizer, prompt, completion)
        logprobs = model(torch.tensor([encoded.ids]))[0].log_softmax(-1)
        read = range(encoded.completion_start, len(encoded.ids))
        return float(torch.stack([logprobs[i - 1, encoded.ids[i]] for i in read]).mean())

    for (layer, multiplier), items in result.items.groupby(["layer", "multiplier"]):
        with caa.steer(model, multiplier * vectors[layer]):
            plain = [mean_logprob(p.prompt, p.positive) - mean_logprob(p.prompt, p.negative) for p in held_out]
        assert items.sort_values("item")["value"].to_list() == pytest.approx(plain, abs=1e-4)


def test_patches(hooked_model):
    model = hooked_model
    texts, answers = ["Is the sky blue?", "Is the sea grey?"], ("Yes", "No")
    result = caa.patch(model, *texts, layers=[0, 1], positions=[3, -1], answers=answers, progress=False)
    source, target = (ids_of(model, text) for text in texts)
    first, second = (model.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in answers)
    for row, layer in enumerate((0, 1)):
        new = stream(model, source, layer)
        for column, position in enumerate((3, -1)):

            def put_hook(x, hook, new=new, position=position):
                x = x.clone()
                x[0, position] = new[position]
                return x

            with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", put_hook)]):
                logits = model(torch.tensor([target]))[0, -1]
            assert float(result.patched[0, row, column]) == pytest.approx(
                float(logits[first] - logits[second]), abs=1e-4
            )


def test_projections(hooked_model, vectors):
    model, texts = hooked_model, ["Hi.", "Is the sky blue, or is it not?"]
    for text, found in zip(texts, caa.project(model, vectors[1], texts, progress=False), strict=True):
        torch.testing.assert_close(found.values, stream(model, ids_of(model, text), 1) @ vectors[1].tensor, **CLOSE)
