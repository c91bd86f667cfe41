"""Small file helpers: stable digests, writes that are whole or absent, and folders that belong to one run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caa_lens.errors import InputError


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of key order and whitespace."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block succeeds.

    Works for a file or a directory, and for several processes (of several machines) at once: the last one stays. On an
    exception the temporary is removed and what stood at `path` stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = 1) -> None:
    """Writes what JSON can hold, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")


def require_room_for(path: Path) -> None:
    """Refuses a path below a file.

    Raises:
        InputError: names the file.
    """
    stands = next(place for place in path.absolute().parents if place.exists())
    if not stands.is_dir():
        raise InputError(f"{stands} is a file, not a folder to keep results in; give another path.")


def claim_folder(file: Path, signature: str, about: Mapping[str, Any]) -> None:
    """Marks the folder of `file` as the one of a run: its signature and what it was asked."""
    write_json(file, {"signature": signature, **about})


def is_claimed(file: Path, signature: str, what: str) -> bool:
    """Whether `file` says that its folder belongs to the run of this signature; False where there is no such file. A call alone
    refuses a folder of another run.

    Raises:
        InputError: it belongs to another run; `what` names such a run. A file stands where the folder should be.
    """
    require_room_for(file)
    if not file.exists():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["signature"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} does not say which {what} its folder holds ({error!r}); give another folder."
        ) from error
    if found != signature:
        raise InputError(f"{file.parent} holds another {what}; give another folder, or delete this one.")
    return True
