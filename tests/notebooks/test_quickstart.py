"""The notebook runs from its first cell to its last, and stores what the present recipe prints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
SECONDS = 300  # at most, for one cell


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook") / "clone"
    left_out = shutil.ignore_patterns(".*", "output", "data", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=left_out)


@pytest.mark.parametrize("first", ["", "import paddle"], ids=["as it is", "paddle is imported"])
def test_every_cell_runs(clone, first):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    place = {"metadata": {"path": str(clone / "notebooks")}}
    options = dict(timeout=SECONDS, kernel_name="python3", resources=place)
    nbclient.NotebookClient(notebook, **options).execute()
    assert (clone / "output" / "quickstart" / "pictures" / "token_mixing.png").is_file()
    if not first:
        found, stored = said(notebook), said(nbformat.read(NOTEBOOK, as_version=4))
        assert found[0] == stored[0]
        assert found[1] == pytest.approx(stored[1], abs=2)  # two points: processors round apart


def said(notebook) -> tuple[list[str], list[float]]:
    """What a run of the notebook says of its recipe and model, and its top-1 accuracies, %."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    recipe = re.findall(r"^adamw: .*|^resmlp_demo: .*|^epoch .*? lr \S+|^\S+ +\(.*\)$", text, re.M)
    return recipe, [float(number) for number in re.findall(r"top-1 (\S+) %", text)]


def test_the_stored_outputs_are_there_and_small():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code[1:])  # the first cell prints nothing in a clone
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 1_000_000
