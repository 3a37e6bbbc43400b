"""Failures, deaths, timeouts, and ends of all kinds: nothing hangs, nothing is left behind, and the error tells all."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import time
import weakref
from typing import Any

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.interpreter import Interpreter
from torchwq.loading import failure_place, worker_pool

from . import datasets
from .datasets import same

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_failure_comes_with_type_traceback_and_index_and_the_loader_goes_on(method: str) -> None:
    loader = torchwq.DataLoader(datasets.Failing({5, 13}), batch_size=4, num_workers=2, multiprocessing_context=method)
    iterator = iter(loader)
    found = []
    errors = []
    while True:
        try:
            found.append(next(iterator)[:, 0].tolist())
        except StopIteration:
            break
        except KeyError as error:
            errors.append(error)
    assert found == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    assert [error.args for error in errors] == [("no sample 5",), ("no sample 13",)]
    assert "__getitem__" in str(errors[0].__cause__)
    if sys.version_info >= (3, 11):
        assert errors[0].__notes__ == ["in DataLoader worker process 1, at index 5"]


def test_a_failing_init_fn() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), batch_size=4, num_workers=2, worker_init_fn=datasets.fail_to_start)
    with pytest.raises(OSError, match="worker 0 finds no data"):
        next(iter(loader))


def test_a_batch_that_cannot_travel_is_an_error_with_its_place() -> None:
    loader = torchwq.DataLoader(
        datasets.Plain(), batch_size=4, num_workers=1, collate_fn=lambda batch: {"it": (x for x in batch)}
    )
    with pytest.raises(torchwq.MarshalError, match=re.escape("batch['it']")):
        next(iter(loader))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_killed_worker_is_told_within_a_second(method: str) -> None:
    loader = torchwq.DataLoader(datasets.Dying(9), batch_size=4, num_workers=2, multiprocessing_context=method)
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    began = time.monotonic()
    with pytest.raises(torchwq.WorkerDied) as caught:
        next(iterator)
    assert time.monotonic() - began < 1.5
    death = caught.value
    assert death.mapid == 0
    assert death.signal == signal.SIGKILL
    assert death.pid
    for words in ("DataLoader worker 0", f"pid {death.pid}", "SIGKILL", "[8, 9, 10, 11]", "memory"):
        assert words in str(death)
    with pytest.raises(torchwq.WorkerDied):
        next(iterator)


def test_a_worker_that_exits_is_a_death_too() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), batch_size=4, num_workers=1, collate_fn=lambda batch: os._exit(3))
    with pytest.raises(torchwq.WorkerDied, match="exit status 3"):
        next(iter(loader))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_restarted_worker_makes_the_same_batches(tmp_path: Any, method: str, persistent: bool) -> None:
    def run(folder: Any, **more: Any) -> Any:
        torch.manual_seed(5)
        loader = torchwq.DataLoader(
            datasets.Dying(9, folder),
            batch_size=2,
            shuffle=True,
            num_workers=2,
            multiprocessing_context=method,
            persistent_workers=persistent,
            **more,
        )
        return [batch for _ in range(2) for batch in loader], loader

    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "9").touch()
    (tmp_path / "killed").mkdir()
    expected, _ = run(str(tmp_path / "whole"))
    with pytest.warns(UserWarning, match=r"SIGKILL.*It is restarted \(1 of 3\)"):
        found, loader = run(str(tmp_path / "killed"), on_worker_death="restart")
    assert same(expected, found)
    assert loader.stats().restarts == 1


def test_a_worker_restarted_after_an_epoch_that_was_broken_off_draws_the_same_numbers(tmp_path: Any) -> None:
    mark = tmp_path / "0"

    def run(dies: bool) -> Any:
        torch.manual_seed(5)
        mark.touch()
        loader = torchwq.DataLoader(
            datasets.Dying(0, str(tmp_path)), 4, num_workers=1, persistent_workers=True, on_worker_death="restart"
        )
        next(iter(loader))
        if dies:
            mark.unlink()
        return list(loader)

    expected = run(dies=False)
    with pytest.warns(UserWarning, match="restarted"):
        assert same(expected, run(dies=True))


def test_a_worker_that_is_restarted_in_the_epoch_after_a_loaded_one_goes_on_in_it(tmp_path: Any) -> None:
    flag = tmp_path / "die"

    def make() -> Any:
        stream = datasets.DyingStream(str(flag), at=21)
        return torchwq.DataLoader(stream, 4, num_workers=1, persistent_workers=True, on_worker_death="restart")

    loader = make()
    list(loader)
    state = loader.state_dict()
    expected = list(loader)
    flag.touch()
    resumed = make()
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="restarted"):
        assert same(expected, list(resumed))


def test_restarts_are_limited() -> None:
    loader = torchwq.DataLoader(
        datasets.Dying(9), batch_size=4, num_workers=2, on_worker_death="restart", max_restarts=2
    )
    with pytest.warns(UserWarning, match="restarted"), pytest.raises(torchwq.WorkerDied, match="2 restarts were"):
        list(loader)


class Unreadable:
    """Cannot be rebuilt in the loader's process."""

    def __reduce__(self) -> Any:
        return _only_in, (os.getpid(),)


def _only_in(pid: int) -> str:
    if pid != os.getpid():
        raise ValueError("not here")
    return "here"


def unreadable_at_two(batch: list[Any]) -> Any:
    return Unreadable() if int(batch[0][0]) == 2 else batch[0]


def test_a_batch_that_cannot_be_rebuilt_is_one_failure() -> None:
    iterator = iter(torchwq.DataLoader(datasets.Plain(6), num_workers=2, collate_fn=unreadable_at_two))
    assert [int(next(iterator)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="not here"):
        next(iterator)
    assert [int(batch[0]) for batch in iterator] == [3, 4, 5]


def test_a_fork_leaves_the_parents_workers_alone() -> None:
    iterator = iter(torchwq.DataLoader(datasets.Plain(), num_workers=2))
    next(iterator)
    pid = os.fork()
    if pid == 0:
        began = time.monotonic()
        try:
            del iterator
            gc.collect()
        finally:
            os._exit(0 if time.monotonic() - began < 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(list(iterator)) == 36


def test_timeout() -> None:
    loader = torchwq.DataLoader(datasets.Slow(), num_workers=1, timeout=0.2)
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0.2 seconds"):
        next(iterator)


def children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("method", ["fork", "forkserver"])
@pytest.mark.parametrize("how", ["exhausted", "break", "garbage", "del in mid-epoch"])
def test_no_worker_is_left(method: str, how: str) -> None:
    before = children()
    loader = torchwq.DataLoader(datasets.Plain(200), num_workers=2, multiprocessing_context=method)
    if how == "exhausted":
        list(loader)
    elif how == "break":
        for _ in loader:
            break
    else:
        iterator = iter(loader)
        next(iterator)
        if how == "garbage":
            cycle: list[Any] = [iterator]
            cycle.append(cycle)
            del iterator, cycle
            gc.collect()
        else:
            del iterator
    wait_until(lambda: children() <= before, what="the end of the workers")


def test_a_busy_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "END_TIMEOUT", 0.1)
    before = children()
    iterator = iter(torchwq.DataLoader(datasets.Slow(), num_workers=2))
    began = time.monotonic()
    del iterator
    wait_until(lambda: children() <= before)
    assert time.monotonic() - began < 10


def test_kept_batches_stay_and_dropped_ones_are_used_again() -> None:
    loader = torchwq.DataLoader(datasets.Plain(400, 100), batch_size=4, num_workers=2, shuffle=False)
    kept = list(loader)
    for number, batch in enumerate(kept):
        assert batch[:, 0].tolist() == list(range(4 * number, 4 * number + 4))
    places = set()
    for batch in loader:
        places.add(batch.data_ptr())
        del batch
    assert len(places) < 40


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_batch_changed_in_place_harms_no_one(batch_size: int | None) -> None:
    loader = torchwq.DataLoader(datasets.Cached(), batch_size=batch_size, num_workers=1, persistent_workers=True)
    collate = torchwq.DataLoader(
        datasets.Cached(), 2, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch[0]
    )
    for each in (loader, collate):
        first = [(item.clone(), row.clone()) for item, row in each]
        for item, row in each:
            item.fill_(-1)
            row.fill_(-1)
        assert same(first, [(item.clone(), row.clone()) for item, row in each])


def test_the_dataset_of_the_loaders_process_stays_private() -> None:
    dataset = datasets.Cached()
    list(torchwq.DataLoader(dataset, num_workers=1))
    assert not dataset.items[0].is_shared()


def test_an_iterator_goes_when_its_loader_goes() -> None:
    loader = torchwq.DataLoader(datasets.Plain(), num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    alive = weakref.ref(iterator)
    del iterator, loader
    gc.collect()
    assert alive() is None


SCRIPT = """
    import signal, sys, os, torch, torchwq
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 1000
        def __getitem__(self, index): return torch.ones(3) * index
    iterator = iter(torchwq.DataLoader(Data(), batch_size=2, num_workers=2{more}))
    next(iterator)
    print("begun", flush=True)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "more"),
    [
        ("pass", 0, ""),
        ("pass", 0, ", multiprocessing_context='spawn'"),
        ("pass", 0, ", persistent_workers=True"),
        ("raise ValueError('oops')", 1, ""),
        ("sys.exit(3)", 3, ", multiprocessing_context='spawn'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, ", multiprocessing_context='spawn'"),
    ],
)
def test_exit_in_mid_epoch_is_clean(run_script: Any, tmp_path: Any, end: str, code: int, more: str) -> None:
    import psutil

    done = run_script(SCRIPT.format(end=end, more=more), check=False)
    assert done.returncode == code
    assert done.stdout == "begun\n"
    assert "oops" in done.stderr if code == 1 else not done.stderr, done.stderr

    def left() -> list[Any]:
        return [it for it in psutil.process_iter(["cwd"]) if it.info["cwd"] == os.path.realpath(tmp_path)]

    wait_until(lambda: not left(), 30, what="the end of all processes")


def test_ctrl_c_is_one_keyboard_interrupt(interpreter: Interpreter, tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torchwq, time\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 10**9\n"
        "    def __getitem__(self, index):\n"
        "        time.sleep(0.01)\n"
        "        return torch.ones(3)\n"
        "for number, batch in enumerate(torchwq.DataLoader(Data(), num_workers=2)):\n"
        "    if number == 3: print('begun', flush=True)\n"
    )
    process = interpreter.start([str(script)], str(tmp_path), dict(os.environ), start_new_session=True)
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


class Fails:
    def __getitem__(self, index: int) -> int:
        raise ValueError(index)


class FailsElsewhere:
    def __getitem__(self, index: int) -> int:
        index = index + 1
        raise ValueError(index)


@pytest.mark.parametrize(
    ("dataset", "place"), [(Fails(), "index 1"), (FailsElsewhere(), "the batch of indices [1, 2]")]
)
def test_the_index_that_failed_is_named_only_if_it_is_known(dataset: Any, place: str) -> None:
    """For Pythons whose comprehensions have no frame; on others it is known from there."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - only its traceback matters
        dataset[1]
    assert failure_place._index_in_dataset(caught.tb.tb_next.tb_frame, [1, 2]) == place  # type: ignore[union-attr]
