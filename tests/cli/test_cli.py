"""``python -m torchwq doctor`` and ``bench``."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest

import torchwq
from torchwq.cli import bench, doctor, main
from torchwq.cli.bench import Row

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_the_doctor_finds_that_it_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torchwq works here" in printed
    assert "tensors are shared" in printed
    assert main.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"versions", "native part", "descriptors", "a queue"} <= {each["what"] for each in findings}
    assert all(each["verdict"] in ("good", "limited") for each in findings)


def test_few_descriptors_are_found_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 128))
    finding = doctor._descriptors()
    assert finding.verdict == "limited"
    assert "ulimit -n 1024" in finding.remedy


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> Any:
        """Whatever it is."""
        raise OSError("not here")

    monkeypatch.setattr(doctor, "CHECKS", [check])
    assert main.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "fails    Whatever it is  OSError: not here" in printed
    assert "1 of 1 checks failed" in printed


class Numbers:
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> int:
        return index


def test_bench_measures_both_loaders_with_a_dataset_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "tests.cli.test_cli:Numbers", "--workers", "0", "1", "--seconds", "0.05"]
    assert main.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["workers"] for row in report["rows"]] == [0, 1]
    assert all(row["torchwq"] > 0 and row["torch"] > 0 for row in report["rows"])
    assert main.main(arguments) == 0
    assert "num_workers=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "said"),
    [("tests.cli.test_cli", "module:attribute"), ("tests.cli.test_cli:None_there", "no attribute"), ("none:x", "none")],
)
def test_bench_says_how_to_name_a_dataset(place: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        main.main(["bench", place])


@pytest.mark.parametrize(
    ("rows", "workers", "said"),
    [
        ([Row(0, 100, 100), Row(1, 90, 40)], 0, "workers do not help"),
        ([Row(0, 10, 10), Row(1, 20, 10), Row(2, 39, 13), Row(4, 40, 10)], 2, "3.0 times as fast as torch's loader"),
        ([Row(0, None, None)], 0, "too few batches"),
    ],
)
def test_the_advice_is_the_smallest_number_of_workers_that_is_nearly_the_fastest(
    rows: Any, workers: int, said: str
) -> None:
    best, advice = bench._advise(rows)
    assert best == workers
    assert said in advice


def test_the_module_runs(run_script: Any) -> None:
    done = run_script(
        """
        import runpy, sys
        sys.argv = ["torchwq", "--help"]
        runpy.run_module("torchwq", run_name="__main__")
        """
    )
    assert "doctor" in done.stdout
    assert torchwq.__version__


def test_the_bench_takes_a_loader_and_a_collate_function(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ragged_data.py").write_text(
        "import torch, torchwq\n"
        "def pad(samples): return torch.nn.utils.rnn.pad_sequence(samples)\n"
        "ragged = [torch.ones(1 + index % 3) for index in range(400)]\n"
        "loader = torchwq.DataLoader(ragged, 4, collate_fn=pad)\n"
        "class Faulty(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 400\n"
        "    def __getitem__(self, index):\n"
        "        if index == 150: raise ValueError('corrupt')\n"
        "        return index\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bench.run("ragged_data:loader", None, [0], 0.1, quiet=True).batch_size == 4
    assert bench.run("ragged_data:ragged", 8, [0], 0.1, collate="ragged_data:pad", quiet=True).rows[0].torchwq
    with pytest.raises(SystemExit, match="gives no batch of 32: RuntimeError"):
        bench.run("ragged_data:ragged", None, [0], 0.1, quiet=True)
    with pytest.raises(SystemExit, match=r"has raised ValueError: corrupt; in DataLoader worker .*at index 150"):
        bench.run("ragged_data:Faulty", 1, [1], 30.0, quiet=True)
    with pytest.raises(SystemExit, match=r"for example ragged_data:loader"):
        bench.run("ragged_data.py:loader", None, [0], 0.1, quiet=True)


def test_the_command_line_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["bench", "--workers", "-1"], ["bench", "--batch-size", "0"], ["bench", "--seconds", "0"]):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert "error: argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert torchwq.__version__ in capsys.readouterr().out
