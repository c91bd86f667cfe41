"""The paper's tables from the authors' own result files, without a model: what the report shows beside the model's numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from caa_lens.experiments.published import read_published, read_published_judged
from caa_lens.files import atomic_path

CONDITIONS = (
    "model_size",
    "use_base_model",
    "system_prompt",
    "override_vector",
    "override_vector_model",
    "override_weights",
)


def published_numbers(folder: str | os.PathLike[str]) -> dict[str, pd.DataFrame]:
    """Tables by name, one row a behaviour, condition and layer, one column a multiplier: `multiple choice` (the authors' formula)
    and `open-ended` (their judge's mean score, 0 to 10), of whichever there are files; and either `..., detail`, with intervals,
    numbers of items, and for multiple choice the mass of the letters and the items keyed otherwise.

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    judged = any(Path(folder).rglob("results_*type=open_ended*.json"))
    if judged and not any(Path(folder).rglob("results_*type=ab*.json")):
        return _tables("open-ended", read_published_judged(folder), ("unscored",))
    lettered = _tables("multiple choice", read_published(folder), ("letter", "mass", "other_keys"))
    return lettered | (_tables("open-ended", read_published_judged(folder), ("unscored",)) if judged else {})


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
                    temporary.write_text(
                        table.to_latex(index=False, float_format="%.3f", escape=True), encoding="utf-8"
                    )
        written.append(stem.with_suffix(".csv"))
    return written
