"""The report: one HTML page that needs nothing else, written from the sections that are kept, without a model."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape

from caa_lens.errors import MissingError
from caa_lens.experiments.report.claims import CLAIMS
from caa_lens.experiments.report.published import kept_published
from caa_lens.experiments.report.section import Section, read_section
from caa_lens.experiments.report.status import MEANINGS
from caa_lens.files import atomic_path

LONGEST_TABLE = 60
"""Rows shown of a table; the files hold all of them."""


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` from a study's folder; returns its path.

    Raises:
        MissingError: the folder holds no study.
    """
    folder = Path(folder)
    if not (folder / "study.json").exists():
        raise MissingError(f"{folder} holds no study; run `caa-lens reproduce --out {folder}` first.")
    made = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    study, about = made["study"], folder / "model.json"
    found = {
        place.name: read_section(place)
        for place in sorted((folder / "sections").glob("*"))
        if (place / "section.json").exists()
    }
    present = {place[3:] for place in found}
    names = {short: name for name in study["behaviours"] if (short := name.replace("/", "-")) in present}
    study["behaviours"] = list(names.values())
    claims = []
    for claim in CLAIMS:
        own = {place[3:]: section for place, section in found.items() if place.startswith(f"{claim.number:02d}-")}
        if own:
            order = [short for short in (*names, "all") if short in own]
            sections = [(short, names.get(short, "All together"), _shown(own[short])) for short in order]
            claims.append({"claim": claim, "sections": sections, "by_name": own})
    page = _template().render(
        study=study,
        model=json.loads(about.read_text(encoding="utf-8")) if about.exists() else {"model": study["model"]},
        versions=made["versions"],
        behaviours=[(name, short) for short, name in names.items()],
        claims=claims,
        meanings=MEANINGS,
        published={name: _table(table) for name, table in kept_published(folder).items()},
    )
    target = folder / "report.html"
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("caa_lens.experiments.report", "pages"), autoescape=select_autoescape()
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("report.html")


def _shown(section: Section) -> dict[str, Any]:
    """A section as the page shows it: figures embedded, tables as HTML."""
    figures = {}
    for name, path in section.figures.items():
        assert isinstance(path, Path)
        figures[name.replace("_", " ")] = base64.b64encode(path.read_bytes()).decode()
    return {
        "status": section.status,
        "lines": section.words.split("\n"),
        "figures": figures,
        "tables": {name.replace("_", " "): _table(table) for name, table in section.tables.items()},
        "html": section.html,
        "notes": (*section.notes, *([f"Made from {', '.join(section.made_from)}."] if section.made_from else [])),
    }


def _table(table: pd.DataFrame) -> dict[str, Any]:
    """The first rows as text; which columns are numbers decides how they are set."""
    numbers = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in table.dtypes]
    rows = [[_cell(value) for value in row] for row in table.head(LONGEST_TABLE).itertuples(index=False)]
    return {"columns": list(zip(table.columns, numbers, strict=True)), "rows": rows, "n": len(table)}


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
