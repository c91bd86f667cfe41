"""`.pt` files of plain tensors, from anyone: no code of theirs is run and no more memory is taken than they are long.

`torch.load(weights_only=True)` runs no code, but makes whatever arrays a file asks for, and older versions believe the sizes that
it states. So the records of the file (a zip, as `torch.save` writes it) are first read with their checksums; their `data.pkl` may
name nothing but floating-point tensors, each exactly as long as its record. What was checked, and nothing else, is then loaded.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caa_lens.errors import InputError

ITEM_SIZES = {
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch DoubleStorage": 8,
}
ALLOWED = {
    *ITEM_SIZES,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
}
"""What `data.pkl` may name: floating-point tensors and parameters."""

CONSTANTS = {"GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINGET", "LONG_BINGET"}


def read_torch(path: Path) -> Any:
    """What a `.pt` file holds: tensors, numbers and texts in dicts and lists.

    Raises:
        InputError: missing, cut short, damaged, of the form before torch 1.6, or with anything in it but floating-point tensors.
    """
    try:
        data = path.read_bytes() if path.is_file() else b""
        records = _records(data)
        _check(records)
        clean = io.BytesIO()
        with zipfile.ZipFile(clean, "w") as archive:
            for name, record in records.items():
                archive.writestr(f"archive/{name}", record)
        clean.seek(0)
        value = torch.load(clean, map_location="cpu", weights_only=True)
        for tensor in _tensors(value):
            if tensor.numel() * tensor.element_size() > len(data):  # a view that repeats its data
                raise _Refused(f"it states a tensor {list(tensor.shape)}, larger than the file")
        return value
    except _Refused as error:
        raise InputError(f"{path} is refused: {error}. Only plain tensors are read; nothing is unpickled.") from error
    except Exception as error:  # zipfile, pickletools and torch raise whatever the bytes lead them to
        raise InputError(
            f"{path} cannot be read as a file of torch.save (zip form, torch 1.6 or newer); it is missing, cut short or "
            "damaged: get it again."
        ) from error


class _Refused(Exception):
    pass


def _records(data: bytes) -> dict[str, bytes]:
    """The records by name, without the folder that they are all in; zipfile compares every checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data):
            raise _Refused("its records are longer than the file")
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}


def _check(records: Mapping[str, bytes]) -> None:
    """Refuses a pickle that names anything but tensors, or a storage that is not as long as its record.

    `torch.save` writes a storage as five constants in a row ("storage", class, key, device, length), made a tuple and turned
    into the storage by BINPERSID. A constant may be read back from the memo, so that is followed.
    """
    memo: dict[Any, Any] = {}
    constant: Any = None  # what the last instruction pushed, if a constant
    row: list[Any] | None = None  # the constants since the last MARK, if nothing else
    storage: list[Any] | None = None  # the tuple that the last instruction made
    for opcode, argument, _ in pickletools.genops(records["data.pkl"]):
        name = opcode.name
        if name == "GLOBAL" and argument not in ALLOWED:
            raise _Refused(f"it holds {str(argument).replace(' ', '.')}")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = constant
            continue
        if name == "BINPERSID":
            kind, of, key, _, length = storage if storage and len(storage) == 5 else (None,) * 5
            if kind != "storage" or len(records.get(f"data/{key}", b"")) != ITEM_SIZES.get(str(of), -1) * (length or 0):
                raise _Refused("a tensor's stated size is not that of its data")
        storage = row if name == "TUPLE" else None
        if name in CONSTANTS:
            constant = memo.get(argument) if name.endswith("BINGET") else argument
            row = None if row is None else [*row, constant]
        else:
            constant, row = None, [] if name == "MARK" else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
