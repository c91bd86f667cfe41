"""The paper's tables from the authors' own result files, without a model: what the report shows beside the model's numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from caa_lens.experiments.published import read_published
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
    """Tables by name: `multiple choice`, one row a behaviour, condition and layer, one column a multiplier (the authors' formula);
    `multiple choice, detail` with intervals, the mass of the letters and the items keyed otherwise.

    Raises:
        InputError: no result file, or one that cannot be read.
    """
    found = read_published(folder)
    conditions = [name for name in CONDITIONS if found[name].nunique(dropna=False) > 1]
    axes = ["behavior", *conditions, "layer"]
    wide = found.pivot_table(index=axes, columns="multiplier", values="value", dropna=False, observed=True)
    wide = wide.dropna(how="all").reset_index()
    wide.columns = [f"{name:+g}" if isinstance(name, float) else str(name) for name in wide.columns]
    detail = found[[*axes, "multiplier", "value", "low", "high", "n", "letter", "mass", "other_keys"]]
    return {
        "multiple choice": wide,
        "multiple choice, detail": detail.sort_values([*axes, "multiplier"]).reset_index(drop=True),
    }


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
