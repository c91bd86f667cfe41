"""Truncated, corrupt and hostile files: the right vectors or a `CaaLensError`; no code run, no memory taken, no old file lost."""

import errno
import json
import os
import pickle
import resource
import struct
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_formats import MADE, made_set, same, vector

import caa_lens as caa
from caa_lens import formats, storage
from caa_lens.formats.gguf_file import read_gguf
from caa_lens.formats.torch_files import read_torch

VECTORS = caa.VectorSet([vector(1), vector(3)])
TRIES = int(os.environ.get("CAA_LENS_FUZZ", "120"))
"""Examples a format; more with `CAA_LENS_FUZZ=20000`."""


@contextmanager
def little_memory(most=2**24):
    """Python's allocations inside stay below `most` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# Pickles


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def torch_zip(path, pickled, records=()):
    """A file as `torch.save` writes it, with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("v/data.pkl", pickled)
        archive.writestr("v/byteorder", "little")
        for name, data in records:
            archive.writestr(f"v/data/{name}", data)
        archive.writestr("v/version", "3\n")


@pytest.mark.parametrize("format", [None, "caa", "lm_eval", "own", "gguf", "sae", "hub"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_no_pickle_is_run(tmp_path, container, nested, format):
    marker, path = tmp_path / "ran", tmp_path / "v.pt"
    evil = {"layers.1": {"steering_vector": torch.ones(6), "action": Evil(marker)}} if nested else Evil(marker)
    if container == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=container == "zip")
    marker.unlink(missing_ok=True)
    with pytest.raises(caa.CaaLensError) as refused:
        caa.load_vectors(path, format=format, model="T", n_layers=4, layer=1)
    assert not marker.exists()
    assert "weights_only" not in str(refused.value)  # torch's advice to trust the file is not passed on
    if container == "zip" and format in (None, "caa", "lm_eval"):
        assert "open" in str(refused.value)


def test_the_evil_pickle_would_run(tmp_path):
    """The check of the checks: unpickled, it does leave its mark."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


def storage_of(numbers, key="0", length=None):
    """Opcodes of a tensor's storage, as `torch.save` writes them."""
    return (
        b"(" + unicode("storage") + b"ctorch\nFloatStorage\n" + unicode(key) + unicode("cpu")
        + b"J" + struct.pack("<i", numbers if length is None else length) + b"tQ"
    )  # fmt: skip


def unicode(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def tensor_pickle(stored, size, stride=1):
    number = b"\x8a\x08" + struct.pack("<q", size)
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\x00" + number + b"\x85K" + bytes([stride])
        + b"\x85\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


def test_pickles_that_state_what_is_not_there(tmp_path):
    path = tmp_path / "v.pt"
    data = torch.arange(6.0).numpy().tobytes()
    torch_zip(path, tensor_pickle(storage_of(6), 6), [("0", data)])
    assert torch.equal(read_torch(path), torch.arange(6.0))  # the hand-made file is right as such
    for pickled, message in (
        (tensor_pickle(storage_of(2**30), 6), "stated size is not that of its data"),
        (tensor_pickle(storage_of(7), 7), "stated size is not that of its data"),
        (tensor_pickle(storage_of(6, key="1"), 6), "stated size is not that of its data"),
        (tensor_pickle(storage_of(-1), 6), "stated size is not that of its data"),
        # A right tuple last made, but another one on the stack.
        (tensor_pickle(storage_of(2**30)[:-1] + storage_of(6)[:-1] + b"0Q", 6), "stated size is not that of its data"),
        (tensor_pickle(storage_of(6), 2**40, stride=0), r"states a tensor \[1099511627776\], larger than the file"),
        (tensor_pickle(storage_of(6), 7), "cannot be read"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "holds builtins.bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.", "holds torch.FloatTensor"),
        (b"\x80\x02cposix\nsystem\n" + unicode("true") + b"\x85R.", "holds posix.system"),
        (b"\x80\x04" + b"\x8c\x05posix\x8c\x06system\x93" + unicode("true") + b"\x85R.", "cannot be read|refused"),
        (b"\x80\x02" + b"(" * 10_000 + b".", "cannot be read"),
        (b"\x80\x02" + b"]" + b"q\x00h\x00a" * 3 + b".", "cannot be read"),
        (b"", "cannot be read"),
    ):
        torch_zip(path, pickled, [("0", data)])
        with little_memory(), pytest.raises(caa.InputError, match=message):
            caa.load_vectors(path, model="T", n_layers=4, layer=1)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(6, dtype=torch.long),
        torch.ones(6, dtype=torch.bool),
        torch.ones(2, 6),
        torch.ones(()),
        torch.ones(0),
        torch.ones(6).to_sparse(),
        torch.ones(6, dtype=torch.complex64),
        torch.tensor([1.0, float("nan")] * 3),
        torch.tensor([1.0, float("inf")] * 3),
        torch.full((6,), 1e300, dtype=torch.float64),
        "text",
        None,
        [],
        {1: {2: {}}},
    ],
    ids=str,
)
def test_torch_files_of_anything_else(tmp_path, value):
    path = tmp_path / "vec_layer_1_Llama-2-7b-hf.pt"
    torch.save(value, path)
    for format in (None, "caa", "lm_eval"):
        with pytest.raises(caa.InputError):
            caa.load_vectors(path, format=format)


def test_zip_bombs(tmp_path):
    path = tmp_path / "v.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("v/data.pkl", bytes(2**24))
    with little_memory(), pytest.raises(caa.InputError, match="records are longer than the file"):
        caa.load_vectors(path)
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr("v/data.pkl", b"\x80\x02N.")
    with pytest.raises(caa.InputError):
        caa.load_vectors(path)


# GGUF


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


ARCHITECTURE = string("general.architecture") + struct.pack("<I", 8) + string("controlvector")
HUGE = 2**60


def gguf(keys=ARCHITECTURE, n_keys=1, infos=b"", n_tensors=0, version=3, data=b""):
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + infos
    return header + bytes(-len(header) % 32) + data


def info(name="direction.1", shape=(6,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


SIX = struct.pack("<6f", *range(6))


def test_gguf_that_is_right(tmp_path):
    (tmp_path / "v").write_bytes(gguf(infos=info(shape=(6, 1, 1)), n_tensors=1, data=SIX))
    keys, tensors = read_gguf(tmp_path / "v", architecture="controlvector", prefix="direction.")
    assert keys == {"general.architecture": "controlvector"}
    assert tensors["direction.1"].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf(n_keys=HUGE), "cut short"),
        (gguf(n_tensors=HUGE), "cut short"),
        (gguf(keys=struct.pack("<Q", HUGE) + b"x"), "cut short"),
        (gguf(keys=ARCHITECTURE + string("a") + struct.pack("<IIQ", 9, 0, HUGE), n_keys=2), "cut short"),
        (gguf(keys=ARCHITECTURE + string("a") + struct.pack("<IIQ", 9, 8, HUGE), n_keys=2), "cut short"),
        (gguf(keys=ARCHITECTURE + string("a") + struct.pack("<IIQ", 9, 9, HUGE), n_keys=2), "unknown type"),
        (gguf(keys=ARCHITECTURE + string("a") + struct.pack("<I", 99), n_keys=2), "unknown type 99"),
        (gguf(keys=string("general.architecture") + struct.pack("<I", 8) + string("llama")), "architecture is 'llama'"),
        (gguf(keys=b"", n_keys=0), "no key general.architecture"),
        (gguf(keys=struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (gguf(version=1), "version is 1"),
        (gguf(version=3 << 24), "version is 50331648; 2 and 3, little-endian"),
        (gguf(), "no tensor"),
        (gguf(infos=info(shape=(HUGE,)), n_tensors=1, data=SIX), "more data than it holds"),
        (gguf(infos=info(shape=(2**32, 2**32)), n_tensors=1, data=SIX), "one dimension"),
        (gguf(infos=info(shape=(0,)), n_tensors=1, data=SIX), "one dimension"),
        (gguf(infos=info(shape=()), n_tensors=1, data=SIX), "one dimension"),
        (gguf(infos=string("direction.1") + struct.pack("<I", 2**31), n_tensors=1), "cut short"),
        (gguf(infos=info(kind=2), n_tensors=1, data=SIX), "type 2"),
        (gguf(infos=info(offset=2**63), n_tensors=1, data=SIX), "beyond its end"),
        (gguf(infos=info() * 2, n_tensors=2, data=SIX), "stands twice"),
        (gguf(infos=info("direction.x"), n_tensors=1, data=SIX), "no control vector: it holds 'direction.x'"),
        (gguf(infos=info("direction.01"), n_tensors=1, data=SIX), "no control vector"),
        (gguf(infos=info("direction.-1"), n_tensors=1, data=SIX), "no control vector"),
        (gguf(infos=info("direction.9"), n_tensors=1, data=SIX), "layer 9 is out of range"),
        (gguf(infos=b"".join(info(f"direction.{k}") for k in range(9)), n_tensors=9, data=SIX), "out of range"),
        (gguf(infos=info(), n_tensors=1, data=SIX[:-1]), "beyond its end"),
        (gguf(infos=info(), n_tensors=1, data=struct.pack("<6f", *[float("nan")] * 6)), "NaN"),
        (
            gguf(keys=ARCHITECTURE + string("general.alignment") + struct.pack("<II", 4, 0), n_keys=2, infos=info(), n_tensors=1),
            "alignment is 0",
        ),
        (
            gguf(
                keys=ARCHITECTURE + string("caa_lens") + struct.pack("<I", 8) + string("[" * 100_000),
                n_keys=2, infos=info(), n_tensors=1, data=SIX,
            ),
            "cannot be read as a vector file",
        ),
    ],
)  # fmt: skip
def test_gguf_with_absurd_contents(tmp_path, data, message):
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    with little_memory(), pytest.raises(caa.InputError, match=message):
        caa.load_vectors(path, model="T", n_layers=4)


def test_gguf_tensors_that_share_their_data_do_not_fill_the_memory(tmp_path):
    width, many = 2**18, 100
    infos = b"".join(info(f"direction.{k}", (width,)) for k in range(1, many))
    (tmp_path / "v.gguf").write_bytes(gguf(infos=infos, n_tensors=many - 1, data=bytes(4 * width)))
    with little_memory(), pytest.raises(caa.InputError, match="more data than it holds"):
        caa.load_vectors(tmp_path / "v.gguf", model="T", n_layers=many)


# The package's own file


def write_own(path, change):
    """A file with right checksum and changed metadata or tensors, as a hostile writer could make it."""
    text, tensors = storage.pack(VECTORS)
    metadata = json.loads(text)
    del metadata["checksum"]
    change(metadata, tensors)
    metadata["checksum"] = storage._checksum(metadata, tensors)
    save_file(tensors, path, metadata={"caa_lens": json.dumps(metadata)})


def test_own_files_as_they_are(tmp_path):
    write_own(tmp_path / "v", lambda metadata, tensors: None)
    assert same(caa.load_vectors(tmp_path / "v"), VECTORS)


WRONG = [None, True, 1, -1, 2**70, 1.5, "x", "", [], [1], {}, {"a": 1}, {"1": None}, [[[]]]]


@pytest.mark.parametrize("key", ["provenance", "residual_norms", "raw_norms", "version", "format", *asdict(MADE)])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_metadata_of_wrong_types(tmp_path, key, value):
    """Either it is refused, or the value is one that the field may have."""

    def change(metadata, tensors):
        (metadata["provenance"] if key in metadata["provenance"] else metadata)[key] = value

    write_own(tmp_path / "v", change)
    try:
        vectors = caa.load_vectors(tmp_path / "v")
    except caa.InputError:
        return
    if key == "version":
        assert value == 1
    else:
        stored = getattr(vectors.provenance, key)
        assert (list(stored) if isinstance(stored, tuple) else stored) == value
        assert type(stored) in (type(getattr(MADE, key)), type(None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: t.update({"layer.1": torch.full((6,), float("nan"))}), "NaN or infinite"),
        (lambda m, t: t.update({"layer.1": torch.ones(6, dtype=torch.long)}), "not float32"),
        (lambda m, t: t.update({"layer.1": torch.ones(6, dtype=torch.float16)}), "not float32"),
        (lambda m, t: t.update({"layer.1": torch.ones(7)}), r"shape \[6\]; got \[7\]"),
        (lambda m, t: t.update({"layer.1": torch.ones(2, 3)}), "not a whole vector file"),
        (lambda m, t: t.update({"layer.x": torch.ones(6)}), "not a whole vector file"),
        (lambda m, t: t.update({"layer.01": torch.ones(6)}), "not a whole vector file"),
        (lambda m, t: t.update({"layer.-1": torch.ones(6)}), "not a whole vector file"),
        (lambda m, t: t.update({"control.a.layer.1": torch.ones(6)}), "no vector for layer 3"),
        (lambda m, t: t.update({"other": torch.ones(6)}), "not a whole vector file"),
        (lambda m, t: t.clear(), "not a whole vector file"),
        (lambda m, t: m["residual_norms"].update({"1": float("nan")}), "a norm is nan"),
        (lambda m, t: m["residual_norms"].update({"1": -1.0}), "a norm is -1"),
        (lambda m, t: m["provenance"].update(basis="odd"), "basis"),
        (lambda m, t: m["provenance"].update(more=1), "not a whole vector file"),
        (lambda m, t: m["provenance"].pop("read"), "not a whole vector file"),
        (lambda m, t: m["provenance"].update(n_layers=2), "layer 3 is out of range"),
    ],
)
def test_own_files_that_cannot_be(tmp_path, change, message):
    write_own(tmp_path / "v", change)
    with pytest.raises(caa.InputError, match=message):
        caa.load_vectors(tmp_path / "v")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "null", "NaN", "{}", '{"format": 1}', '"' + "x" * 10, "9" * 5000]
)
def test_metadata_that_is_no_object(tmp_path, text):
    save_file({"layer.1": torch.ones(6)}, tmp_path / "v", metadata={"caa_lens": text})
    with pytest.raises(caa.InputError):
        caa.load_vectors(tmp_path / "v")


def test_safetensors_header_of_absurd_length(tmp_path):
    for head in (struct.pack("<Q", HUGE) + b"{}", struct.pack("<Q", 2**63) + b"{", struct.pack("<Q", 2) + b"{}"):
        (tmp_path / "v").write_bytes(head)
        with little_memory(), pytest.raises(caa.InputError):
            caa.load_vectors(tmp_path / "v")


# Folders


def test_folders_with_odd_names(tmp_path):
    folder = tmp_path / "vectors" / "a b ☃ [*]"
    folder.mkdir(parents=True)
    for name in (
        "vec_layer_x_m.pt",
        "vec_layer_-1_m.pt",
        "vec_layer_1_.pt",
        "vec_layer_٣_m.pt",
        ".vec_layer_1_m.pt.7.tmp",
        "é\n.pt",
    ):
        (folder / name).write_bytes(b"?")
    (folder / "vec_layer_999999_m.pt").write_bytes(b"?")
    with pytest.raises(caa.InputError, match="holds no steering vectors"):
        caa.load_vectors(tmp_path)
    torch.save(torch.ones(6), folder / "vec_layer_1_m.pt")
    vectors = caa.load_vectors(tmp_path, n_layers=4)
    assert (vectors.layers, vectors.provenance.expression) == ((1,), "a b ☃ [*]")
    (folder / "vec_layer_2_m.pt").mkdir()
    with pytest.raises(caa.InputError, match=r"vec_layer_2_m.pt cannot be read"):
        caa.load_vectors(tmp_path, n_layers=4)
    (folder / "vec_layer_2_m.pt").rmdir()
    (folder / "vec_layer_2_m.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(caa.InputError, match=r"vec_layer_2_m.pt cannot be read"):
        caa.load_vectors(tmp_path, n_layers=4)
    (folder / "vec_layer_2_m.pt").unlink()
    torch.save(torch.ones(5), folder / "vec_layer_2_m.pt")
    with pytest.raises(caa.InputError, match=r"shape \[6\]; got \[5\]"):
        caa.load_vectors(tmp_path, n_layers=4)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "..", "", "a/../..", "C:\\evil", "x" * 300, "\0"])
def test_names_in_provenance_do_not_leave_the_folder(tmp_path, name):
    root = tmp_path / "root"
    vectors = made_set(1, expression=name, model=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectors.save(root, format="caa")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 1
    assert files[0].parent.parent.parent == root


@pytest.mark.parametrize(
    "cfg",
    ["", "[]", "null", "{}", '{"hook_name": 3}', '{"hook_name": "blocks.1.hook_out", "metadata": 3}', "[" * 100_000],
)
def test_sae_configurations_that_are_none(tmp_path, cfg):
    (tmp_path / "cfg.json").write_text(cfg)
    save_file({"W_dec": torch.ones(2, 6)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(caa.InputError):
        caa.load_vectors(tmp_path, feature=1)


# Fuzzing


FILES = {"own": "v.safetensors", "gguf": "v.gguf", "lm_eval": "v.pt", "caa": "vec_layer_1_Llama-2-7b-hf.pt"}


@st.composite
def damage(draw, data):
    """A right file with some bytes changed, cut off, left out or put in."""
    changed = bytearray(data)
    for position, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        changed[position] = value
    if draw(st.booleans()):
        start, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 64))
        changed[start : start + length] = draw(st.binary(max_size=64))
    return bytes(changed[: draw(st.integers(0, len(changed)))]) if draw(st.booleans()) else bytes(changed)


@pytest.mark.parametrize("format", FILES)
def test_damaged_files_give_the_right_vectors_or_an_error(tmp_path, format):
    """Every format of ours has a checksum somewhere: in its metadata, or in the zip around it."""
    path = tmp_path / FILES[format]
    if format == "caa":
        torch.save(VECTORS[1].tensor, path)
    else:
        VECTORS.save(path, format=format)
    right, whole = caa.load_vectors(path), path.read_bytes()
    assert same(right, caa.VectorSet([VECTORS[1]]) if format == "caa" else VECTORS)

    @settings(max_examples=TRIES, deadline=None, derandomize="CAA_LENS_FUZZ" not in os.environ)
    @given(damage(whole), st.sampled_from([None, format]))
    def check(data, told):
        path.write_bytes(data)
        try:
            loaded = caa.load_vectors(path, format=told)
        except caa.CaaLensError:
            return
        assert same(loaded, right)
        assert loaded.provenance == right.provenance

    check()


@settings(max_examples=TRIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage(gguf(infos=info() + info("direction.2", offset=32), n_tensors=2, data=SIX + bytes(8) + SIX)))
def test_damaged_foreign_gguf_files_raise_nothing_else(tmp_path, data):
    """They have no checksum: changed numbers cannot be seen, anything else is refused."""
    (tmp_path / "v.gguf").write_bytes(data)
    try:
        vectors = caa.load_vectors(tmp_path / "v.gguf", format="gguf", model="T", n_layers=4)
    except caa.CaaLensError:
        return
    assert torch.isfinite(vectors.stack()).all()


@pytest.mark.parametrize("format", [*FILES, "sae", "hub", None])
@settings(max_examples=TRIES // 4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([b"", b"GGUF\x03\0\0\0", b"PK\x03\x04", struct.pack("<Q", 9), b"\x80\x02"]), st.binary(max_size=200)
)
def test_noise_is_refused(tmp_path, format, head, noise):
    (tmp_path / "v").write_bytes(head + noise)
    with pytest.raises(caa.CaaLensError):
        caa.load_vectors(tmp_path / "v", format=format, model="T", n_layers=4, layer=1, feature=0)


# Writing


@contextmanager
def full_disk(room):
    """No file grows beyond `room` bytes: what a full disk does to a write that is under way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


WRITTEN = [name for name, entry in formats.FORMATS.items() if entry.save]


@pytest.fixture
def old(tmp_path, request):
    """What stands there before: an older set in the same place."""
    quietly(caa.VectorSet([vector(1, 7), vector(3, 8)]), tmp_path / "v", request.node.callspec.params["format"])
    return contents(tmp_path)


def quietly(vectors, path, format):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectors.save(path, format=format)


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("room", [0, 50, 1000])
def test_a_full_disk_leaves_the_old_file(tmp_path, old, format, room):
    large = vector(1, made=caa.Provenance(**{**vars(MADE), "d_model": 4000}))
    with full_disk(room), pytest.raises((OSError, RuntimeError, SafetensorError)):
        quietly(caa.VectorSet([large, large.at_layer(3)]), tmp_path / "v", format)
    assert contents(tmp_path) == old


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["interrupt", "full"]
)
@pytest.mark.parametrize(
    "step", ["os.replace", "torch.save", "pathlib.Path.open", "pathlib.Path.write_text", "caa_lens.storage.save_file"]
)
def test_an_interrupted_write_leaves_the_old_file(tmp_path, old, monkeypatch, format, error, step):
    """Interrupted at the first step of its kind, before or after others are done; whole where it has no such step."""
    reached = []

    def stop(*args, **kwargs):
        reached.append(True)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(step, stop)
        with suppress(type(error)):
            quietly(VECTORS, tmp_path / "v", format)
    if reached:
        assert contents(tmp_path) == old
    quietly(VECTORS, tmp_path / "v", format)
    assert contents(tmp_path) != old
    assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
