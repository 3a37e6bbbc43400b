"""What the benchmarks have measured can be drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RATES = {"torchwq": [20.0, 30.0, 40.0], "torch": [10.0, 10.0, 10.0], "limit": [40.0, 40.0, 40.0]}


def test_each_group_becomes_a_picture_of_ratios(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    environment = {"python": "3.11", "torch": "2.13", "system": "Linux 6.1 x86_64", "cpus": 2}
    results = {"some rates": {"unit": "batches/s", "figures": {"A": RATES}}, "alone": {"unit": "s", "figures": {}}}
    (tmp_path / "loader.json").write_text(json.dumps({"environment": environment, "results": results}))
    assert plot.main(tmp_path, tmp_path / "to") == 0
    (picture,) = (tmp_path / "to").iterdir()
    assert picture.name == "benchmark-loader-some-rates.svg"
    text = picture.read_text("utf-8")
    assert re.match(r'<svg width="\d+" height="\d+" ', text)
    shown = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", text)
    assert {"3", "0.75", "to torch", "to limit", "A"} <= set(shown)
    assert "times as fast; 2 cores, Linux on x86_64, torch 2.13, Python 3.11" in shown


def test_without_figures_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    assert plot.main(tmp_path, tmp_path) == 1
    assert "run a benchmark with --json first" in capsys.readouterr().out
