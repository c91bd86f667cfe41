"""The paper's tables from the authors' own result files, without a model: what the report shows beside the model's numbers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd

from caa_lens.errors import InputError
from caa_lens.experiments.published import (
    answers_in,
    judged_by_file,
    parse_result_name,
    result_files,
    score_files,
)
from caa_lens.experiments.report.latex import latex
from caa_lens.files import atomic_path

CONDITIONS = (
    "model_size",
    "use_base_model",
    "system_prompt",
    "override_vector",
    "override_vector_model",
    "override_weights",
)
FOLDER = "published"
"""Of a study's folder: the tables of the authors' numbers."""
LETTERED = {
    "ab": ("multiple choice", ("letter", "mass", "other_keys")),
    "mmlu": ("MMLU", ("letter", "mass", "other_keys", "by_category")),
    "truthful_qa": ("TruthfulQA", ("letter", "mass", "other_keys", "by_category")),
}
"""By the type of the files: the table's name, and what its details hold beside the score."""


def published_numbers(folder: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Tables by name, one row a behaviour, condition and layer, one column a multiplier: `multiple choice`, `MMLU`, `TruthfulQA`
    (the authors' formula) and `open-ended` (their judge's mean score, 0 to 10), of whichever there are files; each `..., detail`,
    with intervals, numbers of items and, for letters, their mass and the items keyed otherwise.

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    by_type: dict[str, list[Path]] = {}
    for file in result_files(folder):
        by_type.setdefault(parse_result_name(file.name)["type"], []).append(file)
    tables: dict[str, pd.DataFrame] = {}
    for kind, (name, further) in LETTERED.items():
        if kind in by_type:
            tables |= _tables(name, score_files(by_type[kind]), further)
    if "open_ended" in by_type:
        tables |= _tables("open-ended", judged_by_file(answers_in(by_type["open_ended"])), ("unscored",))
    if not tables:
        raise InputError(
            f"{folder} holds no files results_*type={{{','.join((*LETTERED, 'open_ended'))}}}*.json; give the authors' results "
            "directory."
        )
    return tables


def _tables(name: str, found: pd.DataFrame, further: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    axes = ["behavior", *(axis for axis in CONDITIONS if found[axis].nunique(dropna=False) > 1), "layer"]
    ordered = found.sort_values([*axes, "multiplier"]).reset_index(drop=True)
    wide = ordered.pivot(index=axes, columns="multiplier", values="value").reset_index()
    wide.columns = [f"{label:+g}" if isinstance(label, float) else str(label) for label in wide.columns]
    return {name: wide, f"{name}, detail": ordered[[*axes, "multiplier", "value", "low", "high", "n", *further]]}


def write_published(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[Path]:
    """Writes the tables as parquet, CSV and LaTeX; returns the CSV files.

    Raises:
        InputError: as in `published_numbers`.
    """
    written = []
    for name, table in published_numbers(folder).items():
        stem = Path(out) / f"published_{name.replace(', ', '_').replace(' ', '_')}"
        for suffix in (".parquet", ".csv", ".tex"):
            with atomic_path(stem.with_suffix(suffix)) as temporary:
                if suffix == ".parquet":
                    table.to_parquet(temporary, index=False)
                elif suffix == ".csv":
                    table.to_csv(temporary, index=False)
                else:
                    temporary.write_text(latex(table), encoding="utf-8")
        written.append(stem.with_suffix(".csv"))
    return written


def keep_published(study: str | os.PathLike[str], results: str | os.PathLike[str]) -> None:
    """Writes the tables into a study's folder, in place of those that it has.

    Raises:
        InputError: as in `published_numbers`.
    """
    with atomic_path(Path(study) / FOLDER) as temporary:
        write_published(results, temporary)
        shutil.rmtree(Path(study) / FOLDER, ignore_errors=True)


def kept_published(study: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """The tables that a study's folder has, by name."""
    files = sorted((Path(study) / FOLDER).glob("published_*.parquet"))
    return {file.stem.removeprefix("published_").replace("_", " "): pd.read_parquet(file) for file in files}
