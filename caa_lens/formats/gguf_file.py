"""Reading and writing GGUF files of plain tensors, with every stated length compared with what is left of the file.

    GGUF, version, number of tensors, number of keys | keys and values | names, shapes, types, offsets | data, aligned

Little-endian, versions 2 and 3. Not with the `gguf` package: its reader believes the sizes that a file states, so that an array of
2^60 elements fills the memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from caa_lens.errors import InputError
from caa_lens.files import atomic_path

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
UINT32, STRING, ARRAY = 4, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, as `struct` names them."""
DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Types of tensors that are not quantised."""


def read_gguf(path: Path, *, architecture: str, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys, arrays left out, and the one-dimensional tensors whose names begin with `prefix`, of a file of one architecture.

    Raises:
        InputError: not such a file, cut short, damaged, or with quantised tensors.
    """
    try:
        with path.open("rb") as file:
            reader = _Reader(file, path.stat().st_size)
            return reader.read(architecture, prefix)
    except (OSError, _Refused) as error:
        raise InputError(
            f"{path} cannot be read as a GGUF file of architecture {architecture!r} ({error}); give a file that llama.cpp, repeng "
            "or VectorSet.save() wrote, and get it again if it was cut short."
        ) from error


def write_gguf(path: Path, keys: Mapping[str, str | int], tensors: Mapping[str, Tensor]) -> None:
    """Writes texts, unsigned integers and one-dimensional fp32 tensors, whole or not at all."""
    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys))
    for key, value in keys.items():
        header += _string(key) + (
            struct.pack("<I", STRING) + _string(value) if isinstance(value, str) else struct.pack("<II", UINT32, value)
        )
    data = {name: _padded(tensor.numpy().astype("<f4").tobytes(), ALIGNMENT) for name, tensor in tensors.items()}
    offset = 0
    for name, tensor in tensors.items():
        header += _string(name) + struct.pack("<IQIQ", 1, len(tensor), 0, offset)
        offset += len(data[name])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_padded(header, ALIGNMENT))
        file.writelines(data.values())


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


class _Refused(Exception):
    pass


class _Reader:
    """Takes a file apart from its beginning; everything it takes is bounded by what is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, length: int) -> bytes:
        if length > self.size - self.file.tell():
            raise _Refused("it is cut short, or states a length beyond its end")
        return self.file.read(length)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused("a text in it is not UTF-8") from None

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, length = self.number("I"), self.number("Q")
            if item == STRING:
                for _ in range(length):
                    self.text()
                return None
            if item in SCALARS:
                self.take(length * struct.calcsize(SCALARS[item]))
                return None
        if kind not in SCALARS:
            raise _Refused(f"a value in it is of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def read(self, architecture: str, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.take(4) != MAGIC:
            raise _Refused("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, VERSION):
            raise _Refused(f"its version is {version}; 2 and 3, little-endian, are read")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        keys: dict[str, Any] = {}
        for _ in range(n_keys):
            name = self.text()
            keys[name] = self.value()
            if name == "general.architecture" and keys[name] != architecture:
                raise _Refused(f"its general.architecture is {keys[name]!r}")
        if "general.architecture" not in keys:
            raise _Refused("it has no key general.architecture")
        places: dict[str, tuple[torch.dtype, int, int]] = {}
        for _ in range(n_tensors):
            name = self.text()
            shape = [self.number("Q") for _ in range(min(self.number("I"), 5))]
            kind, offset = self.number("I"), self.number("Q")
            if not name.startswith(prefix):
                continue
            if name in places:
                raise _Refused(f"the tensor {name!r} stands twice in it")
            if not shape or len(shape) > 4 or not 0 < max(shape) == math.prod(shape) or kind not in DTYPES:
                raise _Refused(
                    f"{name!r} has shape {shape} and type {kind}; one dimension in F32, F16, BF16 or F64 is read"
                )
            places[name] = DTYPES[kind], max(shape), offset
        return keys, self.tensors(places, keys.get("general.alignment", ALIGNMENT))

    def tensors(self, places: Mapping[str, tuple[torch.dtype, int, int]], alignment: Any) -> dict[str, Tensor]:
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise _Refused(f"its general.alignment is {alignment!r}")
        if sum(length * dtype.itemsize for dtype, length, _ in places.values()) > self.size:
            raise _Refused("it states more data than it holds")  # tensors that share their data could fill the memory
        start = self.file.tell() + -self.file.tell() % alignment
        found = {}
        for name, (dtype, length, offset) in places.items():
            self.file.seek(min(start + offset, self.size))
            found[name] = torch.frombuffer(bytearray(self.take(length * dtype.itemsize)), dtype=dtype)
        return found
