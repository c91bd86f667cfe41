"""Algebra, validation, files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fixture_path, relative_error
from safetensors.torch import save_file

import caa_lens as caa

MADE = caa.Provenance(
    model="org/Tiny", n_layers=4, d_model=8, expression="tone", prompt_digests=("a",), versions={"torch": "2"}
)


def vector(layer=1, seed=0, **changes):
    made = caa.Provenance(**{**vars(MADE), **changes})
    tensor = torch.randn(made.d_model, generator=torch.Generator().manual_seed(seed))
    return caa.SteeringVector(tensor, layer, made, residual_norm=10.0, raw_norm=float(tensor.norm()))


def test_algebra():
    v, w = vector(), vector(seed=1)
    assert torch.equal((2 * v).tensor, 2 * v.tensor)
    assert torch.equal((v * 2).tensor, (v / 0.5).tensor)
    assert torch.equal((-v).tensor, -v.tensor)
    assert torch.equal((v - v).tensor, torch.zeros(8))
    assert torch.equal((v + w).tensor, v.tensor + w.tensor)
    assert (1.5 * v + w).provenance.expression == "(1.5 * tone + tone)"
    assert (2 * v).relative_norm == pytest.approx(2 * v.norm / 10)
    assert v.with_norm(3).norm == pytest.approx(3)
    assert v.hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    "factor", [np.float64(1.5), np.float32(1.5), torch.tensor(1.5), 1.5], ids=lambda f: type(f).__name__
)
def test_factors_of_any_kind_from_either_side(factor, unchecked):
    for v in (vector(), caa.VectorSet([vector(0), vector(2)])):
        for scaled in (factor * v, v * factor):
            assert type(scaled) is type(v)
    assert torch.equal((factor * caa.VectorSet([vector(2)]))[2].tensor, 1.5 * vector(2).tensor)


def test_a_vector_keeps_its_numbers():
    tensor = torch.ones(8)
    v = caa.SteeringVector(tensor, 1, MADE)
    tensor.zero_()
    assert torch.equal(v.tensor, torch.ones(8))


def test_names_of_one_model_combine():
    other = vector(model="tiny")
    assert torch.equal((vector() + other).tensor, 2 * other.tensor)
    caa.normalize_across({"a": caa.VectorSet([vector()]), "b": caa.VectorSet([other])})


@pytest.mark.parametrize("layer", [slice(0, 2), "1", (0, 1), 1.0, 3, -4])
def test_a_set_is_indexed_by_a_layer(layer, unchecked):
    vectors = caa.VectorSet([vector(2), vector(1)])
    with pytest.raises(caa.MissingError, match="indexed by one number of the layers 1-2"):
        vectors[layer]
    assert vectors[np.int64(2)] is vectors[-2]


def test_sets_are_mappings_with_the_same_algebra():
    vectors = caa.VectorSet([vector(2), vector(0)])
    assert list(vectors) == [0, 2]
    assert vectors[-2].layer == 2
    assert torch.equal((2 * vectors - vectors).stack(), vectors.stack())
    assert list(vectors.to_pandas().columns) == ["layer", "norm", "residual_norm", "relative_norm"]
    with pytest.raises(caa.MissingError, match=r"no vector for layer 1; .* 0, 2"):
        vectors[1]


def controlled(layer=1, seed=0, names=("shuffled-0", "letter")):
    return replace(vector(layer, seed), controls={name: vector(layer, seed + 10 + i) for i, name in enumerate(names)})


def test_controls_follow_the_algebra():
    """What is done to a vector is done to its controls: those of 2v are 2c, those of v + w the sums that both have."""
    v, w = controlled(), controlled(seed=1, names=("shuffled-0",))
    for changed, expected in (
        (2 * v, 2 * v.controls["letter"]),
        (-v / 4, -v.controls["letter"] / 4),
        (v.at_layer(3), v.controls["letter"].at_layer(3)),
        (v.retarget("other"), v.controls["letter"].retarget("other")),
        (v.to_basis("centred"), v.controls["letter"].to_basis("centred")),
    ):
        found = changed.controls["letter"]
        assert torch.equal(found.tensor, expected.tensor)
        assert (found.layer, found.provenance) == (expected.layer, expected.provenance)
    assert set((v + w).controls) == {"shuffled-0"}
    expected = v.controls["shuffled-0"].tensor - w.controls["shuffled-0"].tensor
    assert torch.equal((v - w).controls["shuffled-0"].tensor, expected)
    assert not v.random_control().controls
    normal = caa.normalize_across({"a": caa.VectorSet([v]), "b": caa.VectorSet([w])})["a"][1]
    ratio = normal.norm / v.norm
    torch.testing.assert_close(normal.controls["letter"].tensor, ratio * v.controls["letter"].tensor)


def test_a_sets_controls_are_those_of_its_vectors():
    vectors = caa.VectorSet([controlled(0), controlled(3)])
    assert set(vectors.controls) == {"shuffled-0", "letter"}
    assert vectors.controls["letter"].layers == (0, 3)
    assert torch.equal((2 * vectors).controls["letter"].stack(), 2 * vectors.controls["letter"].stack())
    assert not caa.VectorSet([controlled(0), vector(3)]).controls  # the second has none
    assert set(caa.VectorSet(list(vectors.values()), {"letter": vectors.controls["letter"]}).controls) == {"letter"}
    with pytest.raises(caa.MissingError, match="no vector for layer 3"):
        caa.VectorSet([vector(3)], {"letter": caa.VectorSet([vector(0)])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: caa.SteeringVector(torch.tensor([1.0] * 7 + [float("nan")]), 0, MADE), "NaN or infinite"),
        (lambda: caa.SteeringVector(torch.zeros(7), 0, MADE), r"has shape \[8\]; got \[7\]"),
        (lambda: vector(4), "layer 4 is out of range: org/Tiny has layers 0 to 3"),
        (lambda: vector(0) + vector(1), "layers 0 and 1 cannot be added"),
        (lambda: vector() + vector(model="other"), "retarget"),
        (lambda: vector() + vector(basis="centred"), "to_basis"),
        (lambda: vector(basis="centred").to_basis("raw"), "extract it again"),
        (lambda: (vector() - vector()).with_norm(1), "zero vector"),
        (
            lambda: replace(vector(1), controls={"letter": vector(2)}),
            "'letter' of a vector of layer 1 belongs to another",
        ),
        (lambda: caa.VectorSet([]), "at least one"),
        (lambda: caa.VectorSet([vector(), vector()]), "two vectors of the same layer"),
    ],
)
def test_refusals_say_what_to_do(make, message):
    with pytest.raises(caa.CaaLensError, match=message):
        make()


def test_basis_folded_is_raw_and_centring_removes_the_mean():
    assert (vector() + vector(basis="folded")).norm > 0
    assert float(vector().to_basis("centred").tensor.mean()) == pytest.approx(0, abs=1e-7)


def test_round_trip_is_exact(tmp_path):
    vectors = caa.VectorSet([vector(0), vector(3, seed=3)], {"shuffled-0": caa.VectorSet([vector(0, 5), vector(3, 6)])})
    path = tmp_path / "v.safetensors"
    vectors.save(path)
    again = caa.load_vectors(path)
    assert again.provenance == vectors.provenance
    assert torch.equal(again.stack(), vectors.stack())
    assert torch.equal(again.controls["shuffled-0"].stack(), vectors.controls["shuffled-0"].stack())
    assert torch.equal(again[3].controls["shuffled-0"].tensor, vectors[3].controls["shuffled-0"].tensor)
    assert [v.residual_norm for v in again.values()] == [10.0, 10.0]
    assert again[3].raw_norm == vectors[3].raw_norm
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_unusable_files_are_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(caa.InputError, match="cannot be read as a vector file"):
        caa.load_vectors(path)
    caa.VectorSet([vector()]).save(path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(caa.InputError, match="cut short"):
            caa.load_vectors(path)
    save_file({"layer.0": torch.zeros(8)}, path)
    with pytest.raises(caa.InputError, match="not one of steering vectors"):
        caa.load_vectors(path)
    save_file(
        {"layer.0": torch.zeros(8)},
        path,
        metadata={"caa_lens": json.dumps({"format": "caa_lens.vectors", "version": 99})},
    )
    with pytest.raises(caa.InputError, match="format version 99"):
        caa.load_vectors(path)
    save_file(
        {"layer.0": torch.zeros(8)},
        path,
        metadata={"caa_lens": json.dumps({"format": "caa_lens.vectors", "version": 1})},
    )
    with pytest.raises(caa.InputError, match="not a whole vector file"):
        caa.load_vectors(path)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v.safetensors"
    caa.VectorSet([vector()]).save(path)
    before = path.read_bytes()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("caa_lens.storage.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        caa.VectorSet([vector(seed=9)]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_normalize_across_gives_the_mean_norm():
    sets = {name: caa.VectorSet([vector(layer, seed) for layer in (0, 1)]) for seed, name in enumerate("abc")}
    normal = caa.normalize_across(sets)
    for layer in (0, 1):
        mean = sum(s[layer].norm for s in sets.values()) / 3
        assert [s[layer].norm for s in normal.values()] == pytest.approx([mean] * 3)
        assert normal["a"][layer].raw_norm == sets["a"][layer].raw_norm
    assert normal["a"].provenance.normalized_across == ("a", "b", "c")
    with pytest.raises(caa.InputError, match="at least two"):
        caa.normalize_across({"a": sets["a"]})
    with pytest.raises(caa.InputError, match="zero vector"):
        caa.normalize_across({"a": sets["a"], "b": 0 * sets["b"]})
    with pytest.raises(caa.InputError, match=r"\(raw weights\), whose norms cannot be compared"):
        caa.normalize_across(
            {"a": sets["a"], "b": caa.VectorSet([vector(0, basis="centred"), vector(1, basis="centred")])}
        )


def test_published_raw_vectors_become_the_published_normalised_ones():
    root = fixture_path("caa/vectors")
    made = caa.Provenance(model="Llama-2-7b-chat-hf", n_layers=32, d_model=4096)
    name = "vec_layer_13_Llama-2-7b-chat-hf.pt"

    def read(folder):
        return caa.VectorSet([caa.SteeringVector(torch.load(folder / name, weights_only=True), 13, made)])

    raw = {folder.name: read(folder) for folder in sorted(root.iterdir())}
    assert len(raw) == 7
    for behaviour, vectors in caa.normalize_across(raw).items():
        published = torch.load(fixture_path(f"caa/normalized_vectors/{behaviour}/{name}"), weights_only=True)
        assert relative_error(vectors[13].tensor, published.float()) < 1e-6
