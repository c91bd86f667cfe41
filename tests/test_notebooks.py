"""The notebooks run from top to bottom, and what they store is what a run gives."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from conftest import has_hooked
from run_notebooks import execute

PATHS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SPENT: dict[str, float] = {}
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, without the contents."""
    return [(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs]


def words(cell):
    """The text that a cell shows, each number (and the space that aligns it) as #."""
    shown = [output.get("text") or output.data.get("text/plain", "") for output in cell.outputs]
    return re.sub(r"\s+", " ", NUMBER.sub(" # ", "\n".join(shown)))


def test_there_are_six_numbered_notebooks():
    assert [path.name[:2] for path in PATHS] == [f"{number}_" for number in range(1, 7)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_clean_run(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"  # no warnings, no progress bars
    assert not re.search(r"/(tmp|home|root|Users)/|site-packages", path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_run_gives_the_stored_outputs(path, tmp_path):
    """Words are compared under TransformerLens 3, which the outputs were stored with: the same up to numbers; kinds always."""
    began = time.perf_counter()
    stored, run = (code_cells(book) for book in (nbformat.read(path, as_version=4), execute(path, tmp_path)))
    SPENT[path.stem] = time.perf_counter() - began
    for before, now in zip(stored, run, strict=True):
        assert kinds(now) == kinds(before), now.source
        if has_hooked():
            assert words(now) == words(before), now.source
    assert sum(SPENT.values()) < 600, f"the notebooks together take less than ten minutes; these took {SPENT}"
