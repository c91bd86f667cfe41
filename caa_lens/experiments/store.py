"""What is finished stays: results item by item in a folder, and tables with their provenance; each file whole or absent."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.files import atomic_path, claim_folder, digest, is_claimed, require_room_for, write_json
from caa_lens.workers import is_main, on_main, require_same

Item = TypeVar("Item")

_ITEM = re.compile(r"item-(\d{6,})\.json")  # others in the folder are not the store's


class ItemStore(Generic[Item]):
    """Finished items by number, in memory and, if a folder is given, one JSON file an item.

    Args:
        folder: where they are kept; None keeps them in memory only.
        made: what determines the results; `versions` are recorded, and may differ when the run is taken up again.
        what: name of such a run, for the message.
        encode, decode: an item to what JSON can hold, and back.

    Raises:
        InputError: the folder holds a run made otherwise.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        made: dict[str, Any],
        *,
        what: str,
        encode: Callable[[Item], Any] = lambda item: item,
        decode: Callable[[Any], Item] = lambda item: item,
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.encode = encode
        signature = digest({key: value for key, value in made.items() if key != "versions"})
        require_same(signature, what)
        # Read by one process for all: they must agree on what is missing while one of them already adds to it.
        opened = on_main(lambda: self._open(signature, made, what))
        self.found: dict[int, Item] = {number: self._decoded(number, decode, item) for number, item in opened.items()}

    def _open(self, signature: str, made: dict[str, Any], what: str) -> dict[int, Any]:
        if self.folder is None:
            return {}
        about = self.folder / "about.json"
        files = {int(name[1]): file for file in self.folder.glob("item-*.json") if (name := _ITEM.fullmatch(file.name))}
        if not is_claimed(about, signature, what):
            if files:
                raise InputError(
                    f"{self.folder} holds items, but {about.name} is not there to say of which {what}; give another folder."
                )
            claim_folder(about, signature, made)
        return {number: _read(file) for number, file in files.items()}

    def _decoded(self, number: int, decode: Callable[[Any], Item], item: Any) -> Item:
        try:
            return decode(item)
        except (TypeError, ValueError) as error:
            raise _damaged(self._file(number), error) from error

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"item-{number:06d}.json"

    def add(self, number: int, item: Item) -> None:
        """Keeps a finished item; the main process writes it."""
        self.found[number] = item
        if self.folder is not None and is_main():
            write_json(self._file(number), self.encode(item), indent=None)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} cannot be read ({error}); delete this file and run again.")


def table_path(path: str | os.PathLike[str]) -> Path:
    """Where a table can be saved, by the suffix.

    Raises:
        InputError: another suffix, or a file where its folder should be.
    """
    target = Path(path)
    require_room_for(target)
    if target.suffix not in (".parquet", ".json", ".csv"):
        raise InputError(f"{target.name}: allowed suffixes are .parquet, .json and .csv.")
    return target


def save_table(items: pd.DataFrame, provenance: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a table with its provenance: `.parquet`, `.json` or `.csv` (without it) by the suffix, whole or not at all.

    Raises:
        InputError: another suffix.
    """
    target = table_path(path)
    with atomic_path(target) as temporary:
        if target.suffix == ".parquet":
            table = items.copy()
            table.attrs = {"caa_lens": json.dumps(provenance)}
            table.to_parquet(temporary)
        elif target.suffix == ".json":
            rows = json.loads(items.to_json(orient="records"))
            temporary.write_text(json.dumps({"provenance": provenance, "items": rows}), encoding="utf-8")
        else:
            items.to_csv(temporary, index=False)
