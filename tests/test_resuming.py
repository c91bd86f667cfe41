"""What a store gives back is of these very settings: the weights, the functions and what they hold, the hooks on the model."""

import functools

import pytest
import torch
from conftest import as_lens, tiny_llama

import caa_lens as caa
from caa_lens.callables import described
from caa_lens.models import model_state

THRESHOLD = 3


class Beyond:
    """A choice of positions that is an object."""

    def __init__(self, first):
        self.first = first

    def __call__(self, ids):
        return torch.arange(len(ids)) >= self.first


def beyond(first):
    def positions(ids):
        return torch.arange(len(ids)) >= first

    return positions


def below(ids, *, stop):
    return torch.arange(len(ids)) < stop


def beyond_threshold(ids):
    return torch.arange(len(ids)) > THRESHOLD


ALIKE = {
    "lambda": [lambda n=n: lambda ids: ids > 3 for n in range(2)],
    "closure": [lambda: beyond(2)] * 2,
    "partial": [lambda: functools.partial(below, stop=2)] * 2,
    "object": [lambda: Beyond(2)] * 2,
    "gate": [lambda: caa.gate(caa.add, 0.5, along=torch.arange(3.0))] * 2,
}
UNLIKE = {
    "lambda": [lambda ids: ids > 3, lambda ids: ids > 4],
    "operation": [lambda ids: ids > 3, lambda ids: ids < 3],
    "nested": [lambda ids: [i > 3 for i in ids], lambda ids: [i > 4 for i in ids]],
    "closure": [beyond(2), beyond(3)],
    "defaults": [lambda ids, n=3: ids > n, lambda ids, n=4: ids > n],
    "partial": [functools.partial(below, stop=2), functools.partial(below, stop=3)],
    "object": [Beyond(2), Beyond(3)],
    "method": [Beyond(2).__call__, Beyond(3).__call__],
    "gate": [caa.gate(caa.add, 0.0), caa.gate(caa.add, 1e9)],
    "gated": [caa.gate(caa.add, 0.0), caa.gate(caa.ablate, 0.0)],
    "along": [caa.gate(caa.add, 0.0, along=torch.ones(3)), caa.gate(caa.add, 0.0, along=torch.zeros(3))],
    "named": [caa.add, caa.clamp],
}


@pytest.mark.parametrize("makers", ALIKE.values(), ids=ALIKE)
def test_functions_that_do_the_same_are_described_alike(makers):
    first, second = (described(make()) for make in makers)
    assert first == second
    assert "0x" not in repr(first)  # an address would be another in the next process


def test_what_an_object_has_from_its_class_counts():
    def made(first, step):
        class Above:
            lowest = first

            @property
            def least(self):
                return self.lowest + step

            def __call__(self, ids):
                return torch.arange(len(ids)) >= self.least

        return Above()

    assert described(made(2, 1)) == described(made(2, 1))
    assert len({repr(described(made(*of))) for of in ((2, 1), (3, 1), (2, 2))}) == 3


def test_a_vector_that_a_function_holds_counts(vectors):
    one, other = vectors[1], 2 * vectors[1]
    found = [
        described(lambda ids, v=v: ids + v.layer) for v in (one, one.retarget("other"), other, vectors[0], vectors)
    ]
    assert found[0] == found[1]
    assert len({repr(each) for each in found}) == 4


@pytest.mark.parametrize("both", UNLIKE.values(), ids=UNLIKE)
def test_functions_that_do_otherwise_are_told_apart(both):
    first, second = map(described, both)
    assert first != second


def test_a_global_that_a_function_reads_counts(monkeypatch):
    before = described(beyond_threshold)
    monkeypatch.setitem(globals(), "THRESHOLD", 4)
    assert described(beyond_threshold) != before


def test_a_function_that_calls_itself_can_be_described():
    def count(ids):
        return count(ids[1:]) if len(ids) else 0

    assert described(count) == described(count)


def test_a_store_is_refused_for_another_function(model, vectors, held_out, tmp_path):
    def scored(**options):
        return caa.score(model, held_out, vectors[1], store=tmp_path / "s", progress=False, **options).items

    gated = scored(operator=caa.gate(caa.add, 0.0), positions=beyond(2))
    assert gated.equals(scored(operator=caa.gate(caa.add, 0.0), positions=beyond(2)))
    for changed in ({"operator": caa.gate(caa.add, 1e9)}, {"positions": beyond(3)}):
        with pytest.raises(caa.InputError, match="holds another sweep"):
            scored(**{"operator": caa.gate(caa.add, 0.0), "positions": beyond(2), **changed})
    caa.score(model, held_out, vectors[1], positions=lambda ids: ids > model.cfg.n_ctx, progress=False)
    with pytest.raises(caa.InputError, match="content cannot be told"):
        scored(positions=lambda ids: ids > model.cfg.n_ctx)


def test_the_state_of_a_model(kind, byte_tokenizer, vectors):
    def made(seed=0, dtype=torch.float32):
        return as_lens(kind, tiny_llama(len(byte_tokenizer), seed=seed).to(dtype), byte_tokenizer)

    plain = made()
    hooked = caa.steering_hooks(plain, vectors[1], positions="all")
    states = [
        model_state(plain),
        model_state(made(seed=1)),
        model_state(made(dtype=torch.bfloat16)),
        model_state(caa.bake(plain, vectors[1])),
        model_state(caa.bake(plain, -vectors[1])),
        model_state(caa.bake(plain, vectors[1].at_layer(2))),
    ]
    with plain.hooks(fwd_hooks=hooked):
        states.append(model_state(plain))
    assert len(set(states)) == len(states)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert model_state(made()) == states[0]
    finally:
        torch.set_num_threads(threads)


def test_one_wrong_weight_is_noticed(model):
    before, weight = model_state(model), next(model.blocks[1].parameters()).data
    kept = weight.flatten()[0].item()
    try:
        weight.view(-1)[0] = -kept
        assert model_state(model) != before
    finally:
        weight.view(-1)[0] = kept
    assert model_state(model) == before


def test_both_classes_have_one_state(byte_tokenizer):
    pytest.importorskip("transformer_lens.HookedTransformer", reason="TransformerLens 4 has no HookedTransformer")
    both = {
        model_state(as_lens(kind, tiny_llama(len(byte_tokenizer)), byte_tokenizer)) for kind in ("hooked", "bridge")
    }
    assert len(both) == 1


@pytest.mark.parametrize("what", ["score", "answers", "extract"])
def test_a_store_is_refused_for_other_weights_of_the_same_name(model, vectors, pairs, held_out, tmp_path, what):
    def run(of):
        options = {"store": tmp_path / what, "progress": False}
        if what == "score":
            return caa.score(of, held_out, **options)
        if what == "answers":
            return caa.answers(of, None, ["Hi?"], max_new_tokens=2, **options)
        return caa.extract(of, pairs, **options)

    run(model)
    run(model)
    with pytest.raises(caa.InputError, match="holds another"):
        run(caa.bake(model, 3 * vectors[1]))


def test_activations_under_steering_are_other_ones(model, vectors, pairs, tmp_path):
    caa.extract(model, pairs, store=tmp_path / "s", progress=False)
    with caa.steer(model, vectors[0], positions="all"), pytest.raises(caa.InputError, match="holds another extraction"):
        caa.extract(model, pairs, store=tmp_path / "s", progress=False)
