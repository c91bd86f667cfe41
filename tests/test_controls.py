"""Norm-matched controls and the learning curve."""

import pandas as pd
import pytest
import torch
from conftest import relative_error

import caa_lens as caa
from caa_lens.experiments.controls import with_controls


def test_controls_have_the_vectors_norms(vectors):
    named = with_controls(vectors, n_random=2, others={"other": 3 * vectors})
    assert set(named) == {"vector", "random-0", "random-1", "shuffled-0", "shuffled-1", "shuffled-2", "other"}
    for group in named.values():
        for layer, vector in vectors.items():
            assert group[layer].norm == pytest.approx(vector.norm, rel=1e-5)
    assert relative_error(named["other"].stack(), vectors.stack()) < 1e-5
    assert set(with_controls(vectors, n_random=0)) == {"vector"}
    with pytest.raises(caa.InputError, match="this name is taken"):
        with_controls(vectors, n_random=1, others={"random-0": vectors})


def test_one_vector_runs_the_controls_that_it_carries(model, vectors, held_out):
    """The table of a single vector, scaled or not, is that of the set at its layer."""
    options = {"controls": 1, "multipliers": (-1, 1), "progress": False}
    whole = caa.sweep(model, vectors, held_out, layers=[1], **options).to_pandas()
    assert set(whole["vector"]) == {"vector", "random-0", "shuffled-0", "shuffled-1", "shuffled-2"}
    pd.testing.assert_frame_equal(caa.score(model, held_out, vectors[1], **options).to_pandas(), whole)
    half = caa.score(model, held_out, 0.5 * vectors[1], **{**options, "multipliers": (-2, 2)}).to_pandas()
    pd.testing.assert_frame_equal(half.drop(columns="multiplier"), whole.drop(columns="multiplier"), atol=1e-4)
    moved = caa.sweep(model, vectors[1], held_out, layers=[0], **options).to_pandas()
    assert set(moved["vector"]) == set(whole["vector"])


def test_another_behaviours_vector_stands_in_the_table(model, vectors, held_out):
    result = caa.sweep(model, vectors, held_out, layers=[1], others={"turned": -1 * vectors}, progress=False)
    effects = result.effects().set_index("vector")["effect"]
    assert effects["turned"] == pytest.approx(-effects["vector"], rel=0.5)
    assert "control 'turned'" in result.verdict() or "NULL" in result.verdict()


def test_learning_curve_is_that_of_the_halves(model, pairs):
    curve = caa.learning_curve(model, pairs, sizes=[2, 4], progress=False)
    assert list(curve["n_pairs"]) == [2, 4] * 3
    rank = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [[p for p, r in zip(pairs, rank, strict=True) if r < 4 and r % 2 == half] for half in (0, 1)]
    halves = [caa.extract(model, caa.PairSet(tuple(half)), progress=False) for half in chosen]
    for layer in range(3):
        row = curve[(curve["layer"] == layer) & (curve["n_pairs"] == 4)].iloc[0]
        a, b = (half[layer].tensor for half in halves)
        assert row["split_half_cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-4)
        assert row["norm"] == pytest.approx(float((a + b).norm() / 2), rel=1e-4)
    for sizes in ([3], [0], [6]):
        with pytest.raises(caa.InputError, match="is not an even number from 2 to 4"):
            caa.learning_curve(model, pairs, sizes=sizes)
    assert set(caa.learning_curve(model, pairs, progress=False)["n_pairs"]) == {4}
