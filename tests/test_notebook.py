"""The quickstart runs from its first cell to its last one, and its stored outputs are those of a run without errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.patience import PATIENCE

PATH = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SIZES, TINY = "images, steps = 1000, 200", "images, steps = 100, 2"


def said(cell) -> str:
    """Everything that a cell has written."""
    return json.dumps(cell.get("outputs", []))


def test_the_stored_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    text = "".join(map(said, cells))
    assert PATH.stat().st_size < 200_000 and '"error"' not in text and "image/png" in text
    assert not re.search(r"/(home|tmp|root|work)/", text)  # of no particular machine
    found = re.search(r"Results\(val: .*?rSum ([\d.]+)", text)
    assert found is not None and float(found[1]) > 60  # chance is 32


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]))
    notebook = nbformat.read(PATH, as_version=4)
    assert notebook.cells[1].source == SIZES
    notebook.cells[1].source = TINY
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [said(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert "stored 120 images" in outputs[1] and "Results(val: " in outputs[2]
    for output, wanted in zip(outputs[3:], ("chance", "scene-0-", "image/png", "scene-0-"), strict=True):
        assert wanted in output
    assert (tmp_path / "runs/quickstart/metrics.jsonl").is_file()
