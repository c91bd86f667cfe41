"""Identities of the tensor mathematics."""

import pytest
import torch

import caa_lens as caa
from caa_lens import directions
from caa_lens.directions import Moments


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def v():
    return torch.randn(16, generator=torch.Generator().manual_seed(1)) * 3


def test_add_is_a_translation(x, v):
    assert torch.equal(caa.add(x, v, 2.0), x + 2 * v)
    torch.testing.assert_close(caa.add(caa.add(x, v), -v), x)


def test_ablate_leaves_no_component_and_is_idempotent(x, v):
    once = caa.ablate(x, v)
    torch.testing.assert_close(directions.component(once, v), torch.zeros(2, 5, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(caa.ablate(once, v), once)
    torch.testing.assert_close(caa.ablate(x, 100 * v), once)


def test_clamp_sets_the_component_and_nothing_else(x, v):
    clamped = caa.clamp(x, v, 2.0)
    torch.testing.assert_close(directions.component(clamped, v), torch.full((2, 5, 1), 2 * float(v.norm())))
    torch.testing.assert_close(caa.ablate(clamped, v), caa.ablate(x, v))


def test_gate_acts_only_past_the_threshold(x, v):
    size = directions.component(x, v)
    threshold = float(size.median())
    gated = caa.gate(caa.add, threshold)(x, v)
    passes = (size > threshold).squeeze(-1)
    assert torch.equal(gated[passes], (x + v)[passes])
    assert torch.equal(gated[~passes], x[~passes])
    assert torch.equal(caa.gate(caa.add, threshold, below=True)(x, v)[passes], x[passes])


@pytest.mark.parametrize("operator", [caa.add, caa.ablate, caa.clamp, caa.gate(caa.add, -1e9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_directions_change_nothing_and_dtype_stays(x, v, operator, dtype):
    x = x.to(dtype)
    assert torch.equal(operator(x, 0 * v, 1.0), x)
    assert operator(x, v, 1.0).dtype == dtype


def test_one_strength_a_row(x, v):
    strength = torch.tensor([0.0, 2.0]).reshape(2, 1, 1)
    assert torch.equal(caa.add(x, v, strength), torch.stack([x[0], x[1] + 2 * v]))


def test_planted_direction_is_recovered():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(3, 64, generator=generator)
    noise = torch.randn(2, 200, 3, 64, generator=generator)
    moments = Moments.zeros(3, 64)
    moments.update(noise[0] + planted, noise[1])
    assert directions.cosine(moments.mean_difference, planted).min() > 0.99


def test_moments_of_parts_are_those_of_the_whole():
    a, b = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0))
    signs = directions.shuffled_signs(10, 2)
    whole = Moments.zeros(3, 8, 2)
    whole.update(a, b, signs)
    parts = [Moments.zeros(3, 8, 2) for _ in range(2)]
    parts[0].update(a[:4], b[:4], signs[:, :4])
    parts[1].update(a[4:], b[4:], signs[:, 4:])
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.mean_difference, whole.mean_difference)
    torch.testing.assert_close(merged.mean_controls, whole.mean_controls)
    torch.testing.assert_close(merged.mean_residual_norm, whole.mean_residual_norm)
    torch.testing.assert_close(whole.mean_difference, (a - b).mean(0))


def test_letter_controls_separate_letter_and_behaviour():
    generator = torch.Generator().manual_seed(0)
    letter, behaviour = torch.randn(2, 32, generator=generator)
    keys = ["A", "B", "A", "A", "A", "B"]
    differences = torch.stack([behaviour + (letter if key == "A" else -letter) for key in keys])
    weights = directions.control_weights(keys)
    torch.testing.assert_close((weights["letter"][:, None] * differences).mean(0), letter)
    torch.testing.assert_close((weights["letter-balanced"][:, None] * differences).mean(0), behaviour)
    assert set(directions.control_weights([None, "A"])) == {"shuffled-0", "shuffled-1", "shuffled-2"}
    assert directions.control_weights(["A"]) == {}  # one pair's labels cannot be shuffled


def test_a_gate_takes_a_tensor(unchecked):
    with pytest.raises(caa.InputError, match=r"take v\.tensor"):
        caa.gate(caa.add, 1.0, along="v")


def test_random_control_has_the_norm_and_is_seeded(v):
    a, b = (directions.random_like(v, seed=0) for _ in range(2))
    assert torch.equal(a, b)
    torch.testing.assert_close(a.norm(), v.norm())
    assert not torch.equal(a, directions.random_like(v, seed=1))
