"""Runs notebooks in a fresh kernel and an empty folder; `python tests/run_notebooks.py notebooks/*.ipynb` stores the outputs."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run by this interpreter, in `folder`; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    # The package beside these tests, whichever is installed.
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=180,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    metadata = dict(notebook.metadata)
    quiet = "ignore:IProgress not found"  # tqdm's, where ipywidgets are not installed
    settings = {"PYTHONPATH": search, "PYTHONWARNINGS": quiet, "OMP_WAIT_POLICY": "PASSIVE"}
    client.execute(env={**os.environ, **settings})
    notebook.metadata.update(metadata)  # without the interpreter's version
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        print(path)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)


if __name__ == "__main__":
    main()
