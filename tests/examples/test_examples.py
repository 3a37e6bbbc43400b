"""The examples run, and print what they say they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchwq.transport import namespace

#: Starting one on a machine that has much else to do takes its time.
pytestmark = pytest.mark.timeout(240)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(
    name: str,
    folder: Path,
    *args: str,
    statuses: tuple[int, ...] = (0,),
    launcher: tuple[str, ...] = (),
    strict: bool = True,
) -> tuple[int, str]:
    """Run an example from another folder; returns its status and what it printed.

    If ``strict``, warnings are errors, and it must print nothing to stderr: other libraries do.
    """
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    done = subprocess.run(
        [sys.executable, *(("-W", "error", "-X", "dev") if strict else ()), *launcher, str(EXAMPLES / name), *args],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env=environment,
    )
    assert done.stderr == "" or not strict
    assert done.returncode in statuses, done.stderr
    return done.returncode, done.stdout


def test_workqueue(tmp_path: Path) -> None:
    _, printed = run_example("workqueue.py", tmp_path)
    assert sorted(printed.splitlines()) == [  # two workers: in whatever order
        "{'file': 'f1.pt', 'values': tensor([0, 1, 2])}",
        "{'file': 'f2.pt', 'values': tensor([0, 2, 4])}",
        "{'file': 'f3.pt', 'values': tensor([0, 3, 6])}",
    ]


def test_map(tmp_path: Path) -> None:
    _, printed = run_example("map.py", tmp_path)
    sums = [sum(range(mapid, 1001, 4)) for mapid in range(4)]
    assert f"sums of four workers: {sums} together: 500500\n" in printed
    assert "two processes beside this one: True\n" in printed
    assert "ZeroDivisionError: division by zero" in printed
    assert "in reciprocal" in printed  # the worker's traceback
    assert "check_errors raised ZeroDivisionError('division by zero') while the others worked" in printed
    assert "join then returned [1.0, 0.5]" in printed


def test_background_checkpoint(tmp_path: Path) -> None:
    _, printed = run_example("background_checkpoint.py", tmp_path)
    landed = [int(step) for step in re.findall(r"checkpoint of step (\d+) landed", printed)]
    assert landed, printed  # at least one while training went on
    assert landed == sorted(set(landed))
    assert re.search(r"the checkpoint of step \d+ holds what the model was then\n$", printed)


def test_train_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = tmp_path / "digits"
    arguments = ("--epochs", "2", "--data", str(data))
    status, printed = run_example("train_digits.py", tmp_path, *arguments, statuses=(0, 1))
    assert f"writing the images to {data}\n" in printed
    assert len(list(data.glob("*/*.png"))) == 1797
    assert "1433 images to train on, 364 held out" in printed
    epochs = re.findall(r"epoch +(\d)/2  loss ([\d.]+) +([\d,]+) images/s  waited for data ([\d.]+) s", printed)
    assert [epoch for epoch, *_ in epochs] == ["1", "2"]
    losses = [float(loss) for _, loss, *_ in epochs]
    assert losses == sorted(losses, reverse=True)
    accuracy = re.search(r"accuracy on the held-out images ([\d.]+)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) > 80
    assert status == (0 if float(accuracy[1]) >= 97 else 1)
    assert not list(tmp_path.glob("*.partial"))


def test_lightning_digits(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "lightning_digits.py")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "trained on 460 batches from 2 workers\n" in done.stdout
    assert re.search(r"accuracy on held-out images: 9[5-9]|100", done.stdout)


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_model_parallelism(tmp_path: Path, backend: str) -> None:
    _, printed = run_example("model_parallelism.py", tmp_path, "--backend", backend)
    assert [f"stage {number} has seen 24 batches" in printed for number in range(3)] == [True] * 3
    assert printed.endswith("outputs are those of the model in one piece: True\n")


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_parameter_sharing(tmp_path: Path, backend: str) -> None:
    _, printed = run_example("parameter_sharing.py", tmp_path, "--backend", backend)
    assert printed.count("True") == 2


def test_channels_as_workqueue(tmp_path: Path) -> None:
    _, printed = run_example("channels_as_workqueue.py", tmp_path)
    assert "processes got [[0, 1, 4, 9, 16], [100, 121, 144, 169, 196]]\n" in printed
    assert "a thread got [[0, 1, 4, 9, 16]]\n" in printed
    assert "this program got [[8100, 8281, 8464, 8649, 8836]]\n" in printed
    assert printed.endswith("answered in all: 20\n")


def test_remote_decoding(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray")
    status, printed = run_example(
        "remote_decoding.py",
        tmp_path,
        *("--epochs", "1", "--workers", "2", "--data", str(tmp_path / "digits")),
        statuses=(0, 1),
        strict=False,
    )
    assert re.search(r"epoch  1/1  loss [\d.]+ +[\d,]+ images/s  waited for data [\d.]+ s", printed)
    reached = re.search(r"decoded on 3 nodes; accuracy on held-out images: ([\d.]+)%", printed)
    assert reached
    assert status == (float(reached[1]) < 97)


def test_ddp_digits_has_the_losses_of_torchs_loader(tmp_path: Path) -> None:
    found = {}
    for loader in ("torchwq", "torch"):
        _, printed = run_example(
            "ddp_digits.py",
            tmp_path,
            *("--loader", loader, "--data", str(tmp_path / "digits")),
            launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2"),
            strict=False,
        )
        found[loader] = re.findall(r"epoch \d: the sum of the losses is [\d.]+", printed)
    assert len(found["torch"]) == 2
    assert found["torchwq"] == found["torch"]


def test_vector_env(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs gymnasium")
    _, printed = run_example("vector_env.py", tmp_path, "--envs", "3", "--workers", "2", "--steps", "20", strict=False)
    assert "the same observations and rewards: True\n" in printed
    assert re.search(r"torchwq to gymnasium: [\d.]+ ×", printed)
