"""A section of a report: one claim for one behaviour, with its tables and figures, in a folder that is whole or absent.

<claim>-<behaviour>/section.json, <table>.parquet + .csv + .tex, <figure>.png + .svg
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd

from caa_lens.errors import CaaLensError
from caa_lens.experiments.report.latex import latex
from caa_lens.experiments.report.status import Status
from caa_lens.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NotRun(CaaLensError):
    """Something a claim needs is not there; the report says what."""


@dataclass(frozen=True)
class Section:
    """What was found for one claim and behaviour.

    Attributes:
        status: in a word: whether the claim holds for this model.
        words: the finding, one sentence a line.
        tables: by name.
        figures: by name: matplotlib figures, or the paths of saved ones.
        html: further content, already escaped, by caption.
        notes: what a reader must know to read the figures.
        complete: whether nothing failed that a further call may give; what is not complete is made again.
        made_from: of all behaviours together: those that it was made from.
    """

    status: Status
    words: str
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure | Path] = field(default_factory=dict)
    html: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    complete: bool = True
    made_from: tuple[str, ...] = ()


def save_section(folder: Path, section: Section) -> None:
    """Writes a section, whole or not at all; figures are the same bytes for the same numbers."""
    with atomic_path(folder) as temporary, _reproducible_svg():
        temporary.mkdir()
        for name, table in section.tables.items():
            table.to_parquet(temporary / f"{name}.parquet", index=False)
            # Quoted, so that no line break of an answer ends a row.
            table.to_csv(temporary / f"{name}.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
            (temporary / f"{name}.tex").write_text(latex(table), encoding="utf-8")
        for name, figure in section.figures.items():
            assert not isinstance(figure, Path)
            figure.savefig(temporary / f"{name}.png", dpi=160, metadata={"Software": None})
            figure.savefig(temporary / f"{name}.svg", metadata={"Date": None})
        about = {
            "status": section.status,
            "words": section.words,
            "tables": list(section.tables),
            "figures": list(section.figures),
            "html": dict(section.html),
            "notes": section.notes,
            "complete": section.complete,
            "made_from": section.made_from,
        }
        (temporary / "section.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _reproducible_svg() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "caa_lens"}):
        yield


def read_section(folder: Path) -> Section:
    """A section that was saved; its figures are paths."""
    about: dict[str, Any] = json.loads((folder / "section.json").read_text(encoding="utf-8"))
    assert about["status"] in get_args(Status)
    return Section(
        about["status"],
        about["words"],
        {name: pd.read_parquet(folder / f"{name}.parquet") for name in about["tables"]},
        {name: folder / f"{name}.png" for name in about["figures"]},
        about["html"],
        tuple(about["notes"]),
        about["complete"],
        tuple(about["made_from"]),
    )
