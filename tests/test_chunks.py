"""Out of memory: less is run together, and the result is the same."""

import importlib
from functools import partial

import pandas as pd
import pytest
import torch

import caa_lens as caa
from caa_lens import patched_runs, prefixes
from caa_lens.chunks import Chunks
from caa_lens.experiments import grid


def cpu_out_of_memory():
    torch.empty(1 << 60)  # what PyTorch's allocator on the CPU raises is a plain RuntimeError


def gpu_out_of_memory():
    raise torch.OutOfMemoryError("too much")


ERRORS = [cpu_out_of_memory, gpu_out_of_memory]


def limit(monkeypatch, where, name, rows, fail):
    """Makes a pass over more than so many rows fail; collects the rows of all passes."""
    run, seen = getattr(where, name), []

    def limited(model, tokens, mask, *args, **options):
        seen.append(len(tokens))
        if len(tokens) > rows:
            fail()
        return run(model, tokens, mask, *args, **options)

    monkeypatch.setattr(where, name, limited)
    return seen


def test_other_errors_are_raised_at_once():
    tries = []

    def broken(items):
        tries.append(len(items))
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Chunks().map(broken, range(8), size=1)
    assert tries == [8]


@pytest.mark.parametrize("fail", ERRORS)
@pytest.mark.parametrize(("where", "name"), [(grid, "run_branches"), (prefixes, "run")], ids=["branches", "prefix"])
def test_texts_of_a_sweep_are_halved_too(model, vectors, held_out, monkeypatch, where, name, fail):
    sweep = partial(caa.sweep, model, vectors, held_out, progress=False)
    expected = sweep().items
    seen = limit(monkeypatch, where, name, 2, fail)
    pd.testing.assert_frame_equal(sweep().items, expected, atol=1e-5)
    assert max(seen) > 2
    assert seen[-1] <= 2


def test_a_sweep_whose_single_text_does_not_fit_says_so(model, vectors, held_out, monkeypatch):
    limit(monkeypatch, grid, "run_branches", 0, gpu_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        caa.sweep(model, vectors, held_out, progress=False)


@pytest.mark.parametrize("fail", ERRORS)
@pytest.mark.parametrize("where", ["caa_lens.extraction", "caa_lens.prefixes"])
def test_pairs_of_an_extraction_are_halved(model, pairs, vectors, monkeypatch, where, fail):
    seen = limit(monkeypatch, importlib.import_module(where), "run", 3, fail)
    found = caa.extract(model, pairs, progress=False)
    torch.testing.assert_close(found.stack(), vectors.stack(), atol=1e-5, rtol=1e-5)
    assert max(seen) > 3
    assert seen[-1] <= 3


@pytest.mark.parametrize("name", ["run", "run_branches"])
def test_cases_of_a_patch_are_halved(model, pairs, monkeypatch, name):
    patch = partial(caa.patch, model, "positive", pairs, positions=[-1, "prefix"], progress=False)
    expected = patch().patched
    seen = limit(monkeypatch, patched_runs, name, 2, cpu_out_of_memory)
    torch.testing.assert_close(patch().patched, expected, atol=1e-4, rtol=1e-4)
    assert max(seen) > 2
    assert seen[-1] <= 2
