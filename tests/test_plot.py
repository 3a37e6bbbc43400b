"""What the benchmarks have measured can be drawn. In a process of its own: matplotlib keeps fonts open."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RATES = {"torchwq": [20.0, 30.0, 40.0], "torch": [10.0, 10.0, 10.0], "limit": [40.0, 40.0, 40.0]}


def plot(*folders: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.plot", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT)


def test_each_group_becomes_a_picture_of_ratios(tmp_path: Path) -> None:
    environment = {"python": "3.11", "torch": "2.13", "system": "Linux 6.1 x86_64", "cpus": 2}
    results = {"some rates": {"unit": "batches/s", "figures": {"A": RATES}}, "alone": {"unit": "s", "figures": {}}}
    (tmp_path / "loader.json").write_text(json.dumps({"environment": environment, "results": results}))
    done = plot(tmp_path, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    (picture,) = (tmp_path / "to").iterdir()
    assert picture.name == "benchmark-loader-some-rates.svg"
    text = picture.read_text("utf-8")
    assert re.match(r'<svg width="\d+" height="\d+" ', text)
    shown = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", text)
    assert {"3", "0.75", "to torch", "to limit", "A"} <= set(shown)
    assert "times as fast; 2 cores, Linux on x86_64, torch 2.13, Python 3.11" in shown


def test_without_figures_it_says_so(tmp_path: Path) -> None:
    done = plot(tmp_path)
    assert done.returncode == 1
    assert "run a benchmark with --json first" in done.stdout
