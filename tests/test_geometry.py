"""Cosines, components, AUROCs and norms: planted structure is found, and scikit-learn gives the same numbers."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import caa_lens as caa
from caa_lens.separation import auroc


def planted(n_pairs, seed, *, shift, layers=2, width=24):
    """{layer: (positive, negative)} with the same direction between the sides at every layer."""
    direction = torch.randn(width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, layers, n_pairs, width, generator=generator)
    return {layer: (noise[0, layer] + shift * direction, noise[1, layer]) for layer in range(layers)}


@pytest.fixture(scope="module")
def vector_sets():
    def made(name, seed, model="m"):
        tensors = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        origin = caa.Provenance(model, n_layers=3, d_model=16, expression=name)
        return caa.VectorSet(
            [caa.SteeringVector(t, layer, origin, residual_norm=10.0) for layer, t in enumerate(tensors)]
        )

    return {"a": made("a", 0), "b": made("b", 1), "base": made("c", 2, "other-model")}


def test_cosines_between_layers_behaviours_and_models(vector_sets):
    found = caa.similarity(vector_sets)
    torch.testing.assert_close(found.values.diagonal(), torch.ones(9))
    assert torch.equal(found.values, found.values.T)
    for (x, i), (y, j) in [(("a", 0), ("a", 2)), (("a", 1), ("b", 1)), (("b", 2), ("base", 0))]:
        v, w = vector_sets[x][i].tensor, vector_sets[y][j].tensor
        assert found.between(x, y).loc[i, j] == pytest.approx(float(torch.cosine_similarity(v, w, dim=0)), abs=1e-6)
        assert found.at_layer(1).loc[x, y] == pytest.approx(found.between(x, y).loc[1, 1])
    flipped = caa.similarity({"a": vector_sets["a"], "minus": -3 * vector_sets["a"]}, layers=[1])
    torch.testing.assert_close(flipped.values, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    zero = caa.similarity({"a": vector_sets["a"], "zero": 0 * vector_sets["a"]})
    assert not zero.between("a", "zero").to_numpy().any()


def test_cosines_of_other_widths_or_bases_are_refused(vector_sets):
    wide = caa.VectorSet([caa.SteeringVector(torch.ones(8), 0, caa.Provenance("m", n_layers=3, d_model=8))])
    with pytest.raises(caa.InputError, match=r"'wide' has width 8 \(raw weights\), others have 16"):
        caa.similarity({"a": vector_sets["a"], "wide": wide})
    centred = vector_sets["a"].map(lambda v: v.to_basis("centred"))
    with pytest.raises(caa.InputError, match="centred weights"):
        caa.similarity({"a": vector_sets["a"], "centred": centred})
    with pytest.raises(caa.MissingError, match="no vector for layer 7"):
        caa.similarity(vector_sets, layers=[7])
    with pytest.raises(caa.InputError, match="no vectors to compare"):
        caa.similarity({})


def test_pca_is_scikit_learns():
    activations = planted(30, 0, shift=0.5)
    found = caa.pca(activations, n_components=4)
    for row, layer in enumerate(found.layers):
        both = torch.cat(activations[layer]).double().numpy()
        theirs = PCA(n_components=4, svd_solver="full").fit(both)
        np.testing.assert_allclose(found.explained[row], theirs.explained_variance_ratio_, rtol=1e-5)
        sign = np.sign((found.components[row].numpy() * theirs.components_).sum(1))
        np.testing.assert_allclose(found.components[row], theirs.components_ * sign[:, None], atol=1e-5)
        points = np.concatenate([found.positive[row], found.negative[row]])
        np.testing.assert_allclose(points, theirs.transform(both) * sign, atol=1e-4)
        assert (found.positive[row].mean(0) >= found.negative[row].mean(0)).all()


def test_pca_finds_the_planted_direction_and_its_sign():
    activations = planted(50, 1, shift=3.0)
    found = caa.pca(activations, layers=[1])
    direction = torch.randn(24, generator=torch.Generator().manual_seed(99))
    assert float(torch.cosine_similarity(found.components[0, 0], direction, dim=0)) > 0.99
    assert found.explained[0, 0] > 0.6
    swapped = caa.pca({1: activations[1][::-1]})
    torch.testing.assert_close(swapped.components[0, 0], -found.components[0, 0], atol=1e-5, rtol=0)
    table = found.to_pandas()
    first = table.query("side == 'negative' and pair == 7").iloc[0]
    assert first["pc2"] == pytest.approx(float(found.negative[0, 7, 1]))


def test_auroc_is_scikit_learns_ties_included():
    generator = torch.Generator().manual_seed(0)
    for a, b in (
        (torch.randn(40, generator=generator) + 0.3, torch.randn(30, generator=generator)),
        (torch.randint(4, (40,), generator=generator).double(), torch.randint(3, (30,), generator=generator).double()),
    ):
        labels = np.r_[np.ones(len(a)), np.zeros(len(b))]
        assert auroc(a, b) == pytest.approx(roc_auc_score(labels, torch.cat([a, b]).numpy()), abs=1e-12)


def test_separability_is_that_of_held_out_pairs():
    train, held_out = planted(40, 2, shift=0.3), planted(25, 3, shift=0.3)
    found = caa.separability(train, held_out, n_shuffles=200)
    for row, layer in enumerate(found.layers):
        direction = (train[layer][0] - train[layer][1]).double().mean(0)
        scores = torch.cat([side.double() @ direction for side in held_out[layer]])
        labels = np.r_[np.ones(25), np.zeros(25)]
        assert float(found.auroc[row]) == pytest.approx(roc_auc_score(labels, scores.numpy()), abs=1e-6)
    table = found.to_pandas()
    assert (table["low"] < table["auroc"]).all()
    assert (table["auroc"] < table["high"]).all()
    assert (table["auroc"] > table["shuffled_high"]).all()
    assert table["shuffled_mean"].between(0.4, 0.6).all()
    assert caa.separability(train, held_out, n_shuffles=200).to_pandas().equals(table)


def test_nothing_planted_is_not_separated():
    table = caa.separability(planted(40, 4, shift=0.0), planted(40, 5, shift=0.0), n_shuffles=100).to_pandas()
    assert ((table["shuffled_low"] <= table["auroc"]) & (table["auroc"] <= table["shuffled_high"])).all()
    assert ((table["low"] < 0.5) & (table["high"] > 0.5)).all()


def test_stores_are_read_as_tensors_are(model, pairs, held_out, tmp_path):
    stores = {}
    for name, chosen in (("train", pairs), ("held-out", held_out)):
        caa.extract(model, chosen, store=tmp_path / name, progress=False)
        stores[name] = {layer: caa.load_activations(tmp_path / name, layer) for layer in range(3)}
    assert torch.equal(caa.pca(tmp_path / "train").positive, caa.pca(stores["train"]).positive)
    a = caa.separability(tmp_path / "train", tmp_path / "held-out", layers=[0, 2])
    b = caa.separability(stores["train"], stores["held-out"], layers=[0, 2])
    assert a.to_pandas().equals(b.to_pandas())
    with pytest.raises(caa.InputError, match="no activations of layer 5; there are 0, 1, 2"):
        caa.pca(tmp_path / "train", layers=[5])
    with pytest.raises(caa.InputError, match="10 activations of width 48 have 1 to 10"):
        caa.pca(tmp_path / "train", n_components=11)
    with pytest.raises(caa.InputError, match="judged by itself"):
        caa.separability(tmp_path / "train", tmp_path / "train")
    with pytest.raises(caa.InputError, match="holds no stored activations"):
        caa.pca(tmp_path / "nothing")


def test_norms_are_the_vectors_own(vector_sets):
    table = caa.norms({"a": vector_sets["a"], "twice": 2 * vector_sets["a"]}).to_pandas()
    for row in table.itertuples():
        v = vector_sets["a"][row.layer] * (2 if row.name == "twice" else 1)
        assert row.norm == pytest.approx(v.norm)
        assert row.relative_norm == pytest.approx(v.norm / 10)
    with pytest.raises(caa.InputError, match="no vectors to measure"):
        caa.norms({})
