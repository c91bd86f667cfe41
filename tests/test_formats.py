"""Other programs' files: exact round trips, the same layer on both sides, and refusals that say what is missing."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fixture_path
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import caa_lens as caa
from caa_lens import formats
from caa_lens.cli import main

MADE = caa.Provenance(
    model="org/Tiny",
    n_layers=4,
    d_model=6,
    revision="abc",
    expression="1.5 * tone",
    n_pairs=3,
    pairs_hash="f00",
    prompt_digests=("a", "b"),
    template="Plain()",
    template_hash="7",
    read="answer",
    normalized_across=("tone", "mood"),
    versions={"torch": "2"},
)


def vector(layer, seed=None, made=MADE):
    tensor = torch.randn(made.d_model, generator=torch.Generator().manual_seed(layer if seed is None else seed))
    return caa.SteeringVector(tensor, layer, made, residual_norm=10.0 + layer, raw_norm=0.1)


def made_set(*layers, controls=False, **changes):
    made = replace(MADE, **changes)
    groups = {"shuffled-0": caa.VectorSet([vector(layer, 50 + layer, made) for layer in layers])} if controls else None
    return caa.VectorSet([vector(layer, made=made) for layer in layers], groups)


def same(a, b):
    return a.layers == b.layers and torch.equal(a.stack(), b.stack())


@pytest.mark.parametrize(
    ("name", "format"),
    [("v.safetensors", None), ("v", "own"), ("v.gguf", None), ("v.bin", "gguf"), ("v.pt", None), ("repository", "hub")],
)
def test_round_trip_is_exact(tmp_path, name, format):
    """Tensors, layers, norms and provenance, in every format that has room for them, found without being told which."""
    vectors = made_set(1, 3)
    vectors.save(tmp_path / name, format=format)
    again = caa.load_vectors(tmp_path / name)
    assert same(again, vectors)
    assert again.stack().dtype == torch.float32
    assert again.provenance == vectors.provenance
    assert again.provenance.versions == {"torch": "2"}
    assert [(v.residual_norm, v.raw_norm) for v in again.values()] == [(11.0, 0.1), (13.0, 0.1)]
    assert caa.load_vectors(tmp_path / name, layer=3).layers == (3,)
    assert caa.load_vectors(tmp_path / name, model="tiny").layers == (1, 3)
    with pytest.raises(caa.InputError, match=r"holds vectors of org/Tiny, not of Other; .* retarget"):
        caa.load_vectors(tmp_path / name, model="Other")
    with pytest.raises(caa.MissingError, match="no vector for layer 2"):
        caa.load_vectors(tmp_path / name, layer=2)


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_what_a_format_cannot_carry_is_named(tmp_path, format):
    vectors = made_set(1, controls=True)
    entry = formats.FORMATS[format]
    if entry.save is None:
        with pytest.raises(caa.InputError, match=r"format 'sae' is read only; written are own, hub, .*remote"):
            vectors.save(tmp_path / "v", format=format)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors.save(tmp_path / "v", format=format)
    said = " ".join(str(warning.message) for warning in caught)
    for part, word in (
        ("controls", "the controls (shuffled-0)"),
        ("norms", "the residual norms"),
        ("provenance", "how they were made"),
        ("model", "org/Tiny"),
    ):
        assert (word in said) == (part not in entry.carries)


def test_gguf_leaves_block_0_out(tmp_path):
    with pytest.warns(caa.CaaLensWarning, match="cannot reach block 0; its vector was left out"):
        made_set(0, 2).save(tmp_path / "v.gguf")
    assert caa.load_vectors(tmp_path / "v.gguf").layers == (2,)
    with pytest.raises(caa.InputError, match="cannot reach block 0; choose another layer, or bake"):
        made_set(0).save(tmp_path / "w.gguf")


# CAA


def test_published_vectors_load_as_they_are():
    root = fixture_path("caa")
    found = 0
    for variant in ("vectors", "normalized_vectors"):
        for folder in sorted((root / variant).iterdir()):
            vectors = caa.load_vectors(folder)
            file = folder / "vec_layer_13_Llama-2-7b-chat-hf.pt"
            published = torch.load(file, weights_only=True)
            assert (vectors.layers, vectors.n_layers) == ((13,), 32)
            assert vectors.provenance.model == "Llama-2-7b-chat-hf"
            assert vectors.provenance.expression == folder.name
            assert len(vectors.provenance.normalized_across) == (7 if variant == "normalized_vectors" else 0)
            assert published.dtype == torch.float32
            assert torch.equal(vectors[13].tensor, published)
            assert same(caa.load_vectors(file, model="meta-llama/Llama-2-7b-chat-hf"), vectors)
            found += 1
    assert found == 14
    with pytest.raises(caa.InputError, match=r"several behaviours.* vectors/refusal.*normalized_vectors/refusal"):
        caa.load_vectors(root)


@pytest.mark.parametrize("normalized", [False, True])
def test_caa_folder_of_a_whole_model(tmp_path, normalized):
    across = ("tone",) if normalized else ()
    vectors = made_set(*range(4), expression="tone", model="org/Tiny-7b", normalized_across=across)
    with pytest.warns(caa.CaaLensWarning, match="does not carry how they were made"):
        vectors.save(tmp_path, format="caa")
    folder = tmp_path / ("normalized_vectors" if normalized else "vectors") / "tone"
    assert sorted(file.name for file in folder.iterdir()) == [f"vec_layer_{layer}_Tiny-7b.pt" for layer in range(4)]
    for where in (tmp_path, folder):
        again = caa.load_vectors(where, n_layers=4)
        assert same(again, vectors)
        assert again.provenance == caa.Provenance("Tiny-7b", 4, 6, expression="tone", normalized_across=across)
    assert caa.load_vectors(tmp_path, n_layers=4, layer=2).layers == (2,)
    assert caa.load_vectors(folder / "vec_layer_3_Tiny-7b.pt", n_layers=4).layers == (3,)
    assert torch.load(folder / "vec_layer_3_Tiny-7b.pt", weights_only=True).dtype == torch.float32


def test_half_precision_13b_vectors_widen_exactly(tmp_path):
    folder = tmp_path / "vectors" / "refusal"
    folder.mkdir(parents=True)
    half = torch.randn(6).half()
    torch.save(half, folder / "vec_layer_35_Llama-2-13b-chat-hf.pt")
    torch.save(-half, folder / "vec_layer_9_Llama-2-13b-hf.pt")
    vectors = caa.load_vectors(folder, model="Llama-2-13b-chat-hf")
    assert (vectors.layers, vectors.n_layers) == ((35,), 40)
    assert torch.equal(vectors[35].tensor.half(), half)
    assert caa.load_vectors(tmp_path, model="Llama-2-13b-hf").layers == (9,)
    with pytest.raises(caa.InputError, match=r"of Llama-2-13b-chat-hf, Llama-2-13b-hf; name one of them as model="):
        caa.load_vectors(folder)


def test_a_name_that_is_no_folder_is_changed_and_said_so(tmp_path):
    with pytest.warns(caa.CaaLensWarning) as caught:
        made_set(1, expression="ab/refusal").save(tmp_path, format="caa")
    assert any("'ab/refusal' cannot name a folder; written as 'ab-refusal'" in str(each.message) for each in caught)
    assert caa.load_vectors(tmp_path / "normalized_vectors", n_layers=4).provenance.expression == "ab-refusal"


def test_caa_activations_are_a_store(tmp_path):
    sides = {"pos": torch.randn(5, 6), "neg": torch.randn(5, 6)}
    for side, values in sides.items():
        for layer in (2, 10):
            torch.save(values + layer, tmp_path / f"activations_{side}_{layer}_Llama-2-7b-chat-hf.pt")
    activations = formats.load_caa_activations(tmp_path)
    assert list(activations) == [2, 10]
    assert torch.equal(activations[10][0], sides["pos"] + 10)
    assert torch.equal(activations[10][1], sides["neg"] + 10)
    assert caa.pca(activations, layers=[10]).to_pandas()["layer"].unique().tolist() == [10]  # taken as a store is
    (tmp_path / "activations_neg_10_Llama-2-7b-chat-hf.pt").unlink()
    with pytest.raises(caa.InputError, match="no neg activations of layer 10"):
        formats.load_caa_activations(tmp_path)
    with pytest.raises(caa.InputError, match="of no such model"):
        formats.load_caa_activations(tmp_path, model="gpt2")


# GGUF


def test_the_gguf_package_reads_ours(tmp_path):
    gguf = pytest.importorskip("gguf")
    vectors = made_set(1, 3)
    vectors.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "org/Tiny"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.3"]
    for layer, v in vectors.items():
        assert found[f"direction.{layer}"].tensor_type.name == "F32"
        assert np.array_equal(found[f"direction.{layer}"].data, v.tensor.numpy())


def write_gguf(path, directions, *, extra=lambda writer: None):
    """As repeng's `export_gguf` and llama.cpp's generator do."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    extra(writer)
    for name, values in directions.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_we_read_what_the_gguf_package_writes(tmp_path):
    path = tmp_path / "happy.gguf"
    values = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)

    def extra(writer):
        writer.add_array("tokenizer.words", ["a", "b"])
        writer.add_array("some.numbers", [1, 2, 3])
        writer.add_bool("a.flag", True)
        writer.add_custom_alignment(64)

    tensors = {"direction.2": values[1], "direction.1": values[0].astype(np.float16), "other": values}
    write_gguf(path, tensors, extra=extra)
    with pytest.raises(caa.InputError, match=r"happy.gguf does not say which model .*pass model="):
        caa.load_vectors(path)
    with pytest.raises(caa.InputError, match=r"does not say how many layers Tiny has; pass n_layers="):
        caa.load_vectors(path, model="Tiny")
    vectors = caa.load_vectors(path, model="Tiny", n_layers=4)
    assert vectors.provenance == caa.Provenance("Tiny", 4, 6, expression="happy")
    assert torch.equal(vectors[2].tensor, torch.from_numpy(values[1]))
    assert torch.equal(vectors[1].tensor, torch.from_numpy(values[0].astype(np.float16)).float())
    shifted = caa.load_vectors(path, model="Tiny", n_layers=4, shift=-1, behaviour="joy")
    assert shifted.layers == (0, 1)
    assert torch.equal(shifted[1].tensor, vectors[2].tensor)
    assert shifted.provenance.expression == "joy"
    with pytest.raises(caa.InputError, match="layer 4 is out of range: Tiny has layers 0 to 3"):
        caa.load_vectors(path, model="Tiny", n_layers=4, shift=3)


def test_a_model_says_what_a_file_does_not(tmp_path, model):
    values = np.ones(48, np.float32)
    write_gguf(tmp_path / "v.gguf", {"direction.1": values})
    vectors = caa.load_vectors(tmp_path / "v.gguf", model=model)
    assert (vectors.provenance.model, vectors.n_layers) == ("tiny", 3)
    with caa.steer(model, vectors):  # accepted as this model's
        pass
    write_gguf(tmp_path / "w.gguf", {"direction.1": values[:8]})
    with pytest.raises(caa.InputError, match="vectors of width 8, tiny has d_model 48"):
        caa.load_vectors(tmp_path / "w.gguf", model=model)


def other_python(*packages):
    """An interpreter that has the packages: this one, that of CAA_LENS_OTHERS_PYTHON, or the benchmark's."""
    if all(importlib.util.find_spec(package) for package in packages):
        return sys.executable
    beside = Path(__file__).parents[1] / ".venv-bench" / "bin" / "python"
    python = os.environ.get("CAA_LENS_OTHERS_PYTHON") or (str(beside) if beside.exists() else None)
    if python is None:
        pytest.skip(f"{', '.join(packages)} not installed here; set CAA_LENS_OTHERS_PYTHON, or run `make bench` once")
    return python


REPENG = """
import sys, json
from repeng import ControlVector
ours, theirs = sys.argv[1:]
vector = ControlVector.import_gguf(ours)
(2 * vector).export_gguf(theirs)
print(json.dumps([vector.model_type, {layer: values.tolist() for layer, values in vector.directions.items()}]))
"""


def test_repeng_reads_ours_and_we_read_repengs(tmp_path):
    python = other_python("repeng")
    vectors = made_set(1, 3)
    vectors.save(tmp_path / "ours.gguf")
    done = subprocess.run(
        [python, "-W", "ignore", "-c", REPENG, tmp_path / "ours.gguf", tmp_path / "theirs.gguf"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    hint, directions = json.loads(done.stdout)
    assert hint == "org/Tiny"
    assert {int(layer): values for layer, values in directions.items()} == {
        layer: v.tensor.tolist() for layer, v in vectors.items()
    }
    back = caa.load_vectors(tmp_path / "theirs.gguf", model="org/Tiny", n_layers=4)
    assert same(back, 2 * vectors)


# lm-eval, steering-vectors, SAEs, remote engines


def test_the_lm_eval_file_is_what_the_harness_reads(tmp_path):
    vectors = made_set(1, 3)
    vectors.save(tmp_path / "v.pt")
    entries = torch.load(tmp_path / "v.pt", weights_only=True)
    assert list(entries) == ["layers.1", "layers.3"]
    for layer, v in vectors.items():
        entry = entries[f"layers.{layer}"]
        assert torch.equal(entry["steering_vector"], v.tensor)
        assert (entry["steering_coefficient"], entry["action"], entry["bias"], entry["head_index"]) == (
            1.0,
            "add",
            None,
            None,
        )
    formats.save_lm_eval(vectors, tmp_path / "g.pt", hook_point="h.{layer}")
    assert list(torch.load(tmp_path / "g.pt", weights_only=True)) == ["h.1", "h.3"]
    assert same(caa.load_vectors(tmp_path / "g.pt"), vectors)


def entry(**changes):
    return {"steering_vector": torch.arange(6.0), "steering_coefficient": 2.5, "action": "add", "bias": None} | changes


def test_foreign_lm_eval_files(tmp_path):
    path = tmp_path / "v.pt"
    torch.save({"decoder.layers.2": entry(), "decoder.layers.1": entry(steering_coefficient=1)}, path)
    vectors = caa.load_vectors(path, model="Tiny", n_layers=4)
    assert torch.equal(vectors[2].tensor, 2.5 * torch.arange(6.0))
    assert torch.equal(vectors[1].tensor, torch.arange(6.0))
    assert vectors[2].provenance.expression == "2.5 * v"
    with pytest.raises(caa.InputError, match="does not say which model"):
        caa.load_vectors(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"layers.1": entry(action="clamp")}, "action 'clamp' is no vector that is added"),
        ({"layers.1": entry(head_index=3)}, "head_index 3"),
        ({"layers.1": entry(bias=torch.zeros(6))}, "bias tensor"),
        ({"layers.1.mlp": entry()}, r"steers at 'layers.1.mlp', which is not the output of a block"),
        ({"layers.1": entry(), "h.1": entry()}, "names one block twice"),
        ({"layers.1": torch.zeros(6)}, "expected a dict with 'steering_vector'"),
        ({"layers.1": entry(steering_coefficient="2")}, "steering_coefficient is '2'"),
        ({"layers.1": entry(steering_vector=torch.zeros(2, 6))}, r"found torch.float32 \[2, 6\]"),
        ({}, "no steering file of lm-eval"),
        ([torch.zeros(6)], "no steering file of lm-eval"),
    ],
)
def test_lm_eval_files_that_are_no_added_vectors(tmp_path, entries, message):
    torch.save(entries, tmp_path / "v.pt")
    with pytest.raises(caa.InputError, match=message):
        caa.load_vectors(tmp_path / "v.pt", model="Tiny", n_layers=4)


@pytest.fixture
def steering_vectors(monkeypatch):
    """The library itself, from the other environment if need be: its class needs torch only."""
    python = other_python("steering_vectors")
    if python != sys.executable:
        found = subprocess.run(
            [python, "-c", "import steering_vectors; print(steering_vectors.__path__[0])"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if found.returncode:
            pytest.skip("steering_vectors is not installed in the other environment")
        monkeypatch.syspath_prepend(str(Path(found.stdout.strip()).parent))
        spec = importlib.util.spec_from_file_location(
            "steering_vectors",
            Path(found.stdout.strip()) / "__init__.py",
            submodule_search_locations=[found.stdout.strip()],
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "steering_vectors", module)
        spec.loader.exec_module(module)
    return importlib.import_module("steering_vectors")


def test_steering_vectors_object(steering_vectors):
    vectors = made_set(0, 3)
    theirs = formats.to_steering_vectors(vectors)
    assert isinstance(theirs, steering_vectors.SteeringVector)
    assert theirs.layer_type == "decoder_block"
    again = formats.from_steering_vectors(theirs, model="org/Tiny", n_layers=4, behaviour="tone")
    assert same(again, vectors)
    assert again.provenance == caa.Provenance("org/Tiny", 4, 6, expression="tone")
    last = steering_vectors.SteeringVector({-1: torch.ones(6).half()})
    assert formats.from_steering_vectors(last, model="org/Tiny", n_layers=4).layers == (3,)
    for changed, message in (({"layer_type": "mlp"}, "layer type 'mlp'"), ({"layer_activations": {}}, "no layer")):
        with pytest.raises(caa.InputError, match=message):
            formats.from_steering_vectors(replace(theirs, **changed), model="org/Tiny", n_layers=4)


def test_steering_vectors_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "steering_vectors", None)
    with pytest.raises(caa.InputError, match="pip install steering-vectors"):
        formats.to_steering_vectors(made_set(1))


DECODER = torch.arange(30.0).reshape(5, 6)


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.2.hook_resid_post", 2),
        ("blocks.2.hook_resid_pre", 1),
        ("blocks.3.hook_out", 3),
        ("blocks.1.hook_in", 0),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_sae_features(tmp_path, hook_name, layer, nested):
    """Of an object and of a saved folder, with the configuration of older and of newer versions of SAELens."""
    about = {"model_name": "gpt2-small", "hook_name": hook_name}
    cfg = {"d_in": 6, "d_sae": 5, "normalize_activations": "none"} | ({"metadata": about} if nested else about)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    save_file({"W_dec": DECODER, "W_enc": DECODER.T.contiguous()}, tmp_path / "sae_weights.safetensors")
    sae = SimpleNamespace(
        W_dec=torch.nn.Parameter(DECODER),
        cfg=SimpleNamespace(**(cfg | {"metadata": SimpleNamespace(**about)} if nested else cfg)),
    )
    for vectors in (
        formats.from_sae(sae, 4, n_layers=4),
        caa.load_vectors(tmp_path, n_layers=4, feature=4),
    ):
        assert vectors.layers == (layer,)
        assert torch.equal(vectors[layer].tensor, DECODER[4])
        assert vectors.provenance.model == "gpt2-small"
        assert vectors.provenance.expression == f"SAE feature 4 at {hook_name}"


@pytest.mark.parametrize(
    ("changes", "feature", "message"),
    [
        ({}, None, "features 0 to 4, not None; pass one as feature="),
        ({}, 5, "features 0 to 4, not 5"),
        ({"hook_name": "blocks.2.hook_mlp_out"}, 1, "'blocks.2.hook_mlp_out', which is not the output of a block"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, 1, "not the output of a block"),
        ({"model_name": None}, 1, "does not say which model"),
    ],
)
def test_saes_that_give_no_vector(tmp_path, changes, feature, message):
    cfg = {"model_name": "gpt2-small", "hook_name": "blocks.2.hook_resid_post"} | changes
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    save_file({"W_dec": DECODER}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(caa.InputError, match=message):
        caa.load_vectors(tmp_path, n_layers=4, feature=feature)


def test_sae_in_other_units_is_said(tmp_path):
    sae = SimpleNamespace(
        W_dec=DECODER,
        cfg=SimpleNamespace(hook_name="blocks.2.hook_resid_post", normalize_activations="expected_average_only_in"),
    )
    with pytest.warns(caa.CaaLensWarning, match=r"length of W_dec\[1\] is in its units"):
        formats.from_sae(sae, 1, model="Tiny", n_layers=4)


def test_remote_specification(tmp_path):
    vectors = made_set(1, 3)
    with pytest.warns(caa.CaaLensWarning, match="does not carry"):
        vectors.save(tmp_path / "v.json")
    written = json.loads((tmp_path / "v.json").read_text())
    assert written == formats.to_intervene(vectors)
    assert list(written) == ["blocks.1.hook_out", "blocks.3.hook_out"]
    assert all(set(spec) == {"op", "value"} and spec["op"] == "add" for spec in written.values())
    assert torch.equal(torch.tensor(written["blocks.3.hook_out"]["value"]), vectors[3].tensor)
    assert formats.to_intervene(vectors, positions=[5, 6])["blocks.1.hook_out"]["pos"] == [5, 6]
    with pytest.raises(caa.InputError, match="count from 0"):
        formats.to_intervene(vectors, positions=[-1])
    with pytest.raises(caa.InputError, match="format 'remote' is written only"):
        caa.load_vectors(tmp_path / "v.json", format="remote")


# Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: uploads go there, downloads come from there."""
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repository, *, private, exist_ok):
            calls.append((repository, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            calls.append(commit_message)
            return "https://hub/commit/1"

    def download(repository, path, *, repo_type, revision, local_files_only=False):
        calls.append((repository, path, repo_type, revision))
        return str(tmp_path / path)

    monkeypatch.setattr("caa_lens.formats.hub.HfApi", Api)
    monkeypatch.setattr("caa_lens.hub.hf_hub_download", download)
    return calls


def test_push_and_pull(hub, tmp_path):
    vectors = made_set(0, 2, controls=True)
    assert formats.push_to_hub(vectors, "me/tone", private=True, token="t") == "https://hub/commit/1"
    assert hub == [("token", "t"), ("me/tone", True, True), "Vectors: 1.5 * tone"]
    again = caa.load_vectors("hub:me/tone@v1")
    assert hub[-1] == ("me/tone", "vectors.safetensors", "model", "v1")
    assert same(again, vectors)
    assert 'caa.load_vectors("hub:me/tone")' in (tmp_path / "README.md").read_text()
    assert same(again.controls["shuffled-0"], vectors.controls["shuffled-0"])
    vectors.save("hub:me/tone")
    assert hub[-2] == ("me/tone", False, True)
    assert same(caa.load_vectors(tmp_path), vectors)  # the same layout as a local folder


def test_model_card(tmp_path):
    vectors = made_set(0, 2, controls=True, expression="tone | <b>\n# x")
    vectors.save(tmp_path, format="hub")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "vectors.safetensors"]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/Tiny"
    assert "steering-vectors" in card.data.tags
    assert card.text.lstrip().startswith("# Steering vectors: tone \\| \\<b\\> \\# x\n")
    for text in ("3, hash f00", "Plain()", "answer", "shuffled-0", "tone, mood", "revision abc", "resid\\_post"):
        assert text in card.text
    assert f"| 2 | {vectors[2].norm:.4g} | {vectors[2].relative_norm:.3f} |" in card.text


# Refusals and the command line


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: None, {"format": "onnx"}, "no format 'onnx'; there are own, hub, gguf"),
        (lambda path: None, {}, "cannot be read as a vector file"),
        (
            lambda path: made_set(1).save(path, format="gguf"),
            {"shift": -1},
            "written by caa_lens and says its layers itself",
        ),
        (lambda path: made_set(1).save(path), {"shift": -1}, "shift= is for GGUF control vectors"),
        (
            lambda path: torch.save(torch.ones(6), path),
            {"model": "T", "n_layers": 4},
            "which layer it belongs to.*layer=",
        ),
        (lambda path: torch.save(torch.ones(6), path), {"layer": 1}, "does not say which model"),
        (lambda path: torch.save(torch.ones(6).long(), path), {}, "anything but|refused"),
        (lambda path: path.mkdir(), {}, "holds no steering vectors"),
        (lambda path: path.mkdir(), {"format": "hub"}, "cannot be read as a vector file"),
        (lambda path: path.mkdir(), {"format": "gguf"}, "cannot be read as a GGUF file"),
        (lambda path: path.mkdir(), {"format": "lm_eval"}, "cannot be read as a file of torch.save"),
        (lambda path: made_set(1).save(path), {"format": "sae"}, "cannot be read as an SAE"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, make, options, message):
    make(tmp_path / "v")
    with pytest.raises(caa.InputError, match=message):
        caa.load_vectors(tmp_path / "v", **options)


def test_a_bare_tensor_with_everything_said(tmp_path):
    torch.save(torch.ones(6), tmp_path / "v.pt")
    vectors = caa.load_vectors(tmp_path / "v.pt", model="T", n_layers=4, layer=2)
    assert (vectors.layers, vectors.provenance.expression) == ((2,), "v")


def test_targets_that_do_not_fit(tmp_path):
    with pytest.raises(caa.InputError, match="is a folder, and 'own' is a file"):
        made_set(1).save(tmp_path)
    with (
        pytest.warns(caa.CaaLensWarning, match="does not carry"),
        pytest.raises(caa.InputError, match="a folder with a file for every layer"),
    ):
        made_set(1).save(tmp_path / "v.pt", format="caa")
    with pytest.raises(caa.InputError, match="no format 'onnx'"):
        made_set(1).save(tmp_path / "v", format="onnx")


def test_convert(tmp_path, capsys):
    own, theirs, back = tmp_path / "v.safetensors", tmp_path / "v.gguf", tmp_path / "w.safetensors"
    vectors = made_set(1, 3, controls=True)
    vectors.save(own)
    assert main(["convert", str(own), str(theirs), "--layer", "3"]) == 0
    out = capsys.readouterr().out
    assert "does not carry the controls (shuffled-0)" in " ".join(out.split())
    assert "layers 3" in out
    assert main(["convert", str(theirs), str(back)]) == 0
    assert same(caa.load_vectors(back), caa.VectorSet([vectors[3]]))
    assert main(["convert", str(own), str(tmp_path / "caa"), "--to", "caa"]) == 0
    capsys.readouterr()
    folder = tmp_path / "caa" / "normalized_vectors" / "1.5-tone"
    assert main(["convert", str(folder), str(back), "--from", "caa", "--n-layers", "4", "--behaviour", "tone"]) == 0
    assert caa.load_vectors(back).provenance == caa.Provenance(
        "Tiny", 4, 6, expression="tone", normalized_across=("1.5-tone",)
    )
    assert main(["convert", str(folder), str(back)]) == 1
    assert "n_layers=" in capsys.readouterr().err
