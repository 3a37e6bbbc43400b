"""The notebook runs from its first cell to its last, and its cells show what they are there for."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook.ipynb"

#: In a process of its own: what talks to the kernel keeps threads and descriptors.
RUN = """
import json, os, sys
import nbclient, nbformat
os.environ.pop("PYTEST_CURRENT_TEST", None)  # in a test, a kernel does not show what its child processes print
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=100, kernel_name="here").execute()
print(json.dumps(notebook.cells))
"""

pytestmark = pytest.mark.timeout(240)


def _text(cell: dict[str, Any]) -> str:
    """What a cell shows as text."""
    shown = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join(shown)


def test_the_notebook_runs(run_script: Any, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    done = run_script(RUN, str(NOTEBOOK), timeout=200, fresh=True, env={"JUPYTER_PATH": str(tmp_path)})
    cells = [cell for cell in json.loads(done.stdout.splitlines()[-1]) if cell["cell_type"] == "code"]
    outputs = {cell["source"].splitlines()[0]: cell for cell in cells}
    assert "16 batches" in _text(outputs["class Images(Dataset):"])
    (shown,) = outputs["loader.stats()"]["outputs"]
    assert "slowest samples" in shown["data"]["text/html"]
    assert any("image/png" in each.get("data", {}) for each in outputs["numbers = [0, 1, 2, 4]"]["outputs"])
    printed = _text(outputs["def report(mapid):"])
    assert [f"worker {mapid} is at work" in printed for mapid in range(3)] == [True] * 3
    assert printed.endswith("[0, 1, 2]")
    assert "interrupted" in _text(outputs["import os"])
    assert _text(outputs["queue.write(3, 4)"]) == "[9, 16]"
    assert ast.literal_eval(_text(cells[-3]).splitlines()[-1]) == (5, 11)
    assert _text(cells[-1]) == "[None, None]"


def test_the_notebook_is_kept_without_what_it_prints() -> None:
    """What it prints would be another one's, and would change with each run."""
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
