"""The notebooks of the documentation: stored without outputs, listed, and executed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LONGEST = 60  # seconds of CPU


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_listed_opens_in_colab_and_has_no_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    link = f"colab.research.google.com/github/dywspan/dywspan/blob/main/docs/notebooks/{path.name}"
    assert link in "".join(cells[0]["source"]) and "%pip install" in "".join(code[0]["source"])
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert link in page and f"](notebooks/{path.name})" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_under_a_minute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for folder in ("examples", "docs/notebooks"):  # what a notebook writes stays out of the clone
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook: Any = nbformat.read(path, as_version=4)
    last = nbformat.v4.new_code_cell("import time\ntime.process_time()")
    notebook.cells.append(last)
    start = time.perf_counter()
    where = {"metadata": {"path": str(tmp_path / "docs" / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    seconds = float(last["outputs"][0]["data"]["text/plain"])
    print(f"{path.stem}: {seconds:.0f} s of CPU, {time.perf_counter() - start:.0f} s")
    assert seconds < LONGEST
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown), "there are pictures"
