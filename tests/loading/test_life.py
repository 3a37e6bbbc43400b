"""How the workers of a loader live and end, as programs that were written for torch's loader see it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import torchwq
from tests.conftest import wait_until
from torchwq.loading.counters import Counters
from torchwq.memory import maintenance, recycling

from . import datasets

METHODS = ["fork", "forkserver"]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def of(iterator: Any) -> list[Any]:
    return list(iterator._workers)


@pytest.mark.parametrize("method", METHODS)
def test_workers_are_found_where_torch_has_them(method: str) -> None:
    iterator = iter(torchwq.DataLoader(datasets.Plain(), num_workers=2, multiprocessing_context=method))
    workers = of(iterator)
    assert len({worker.pid for worker in workers} - {None, os.getpid()}) == 2
    next(iterator)
    for worker in workers:
        os.kill(worker.pid, 0)
        assert worker.is_alive()
        assert worker.exitcode is None
    del iterator
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
        assert worker.exitcode == 0
    iterator = iter(torchwq.DataLoader(datasets.Slow(), num_workers=1, multiprocessing_context=method))
    (worker,) = of(iterator)
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("method", METHODS)
def test_a_death_is_told_in_torchs_words_and_alone(method: str) -> None:
    killed = torchwq.DataLoader(datasets.Dying(9), batch_size=4, num_workers=2, multiprocessing_context=method)
    with pytest.raises(torchwq.WorkerDied) as caught:
        list(killed)
    death = caught.value
    assert f"DataLoader worker (pid {death.pid}) is killed by signal: Killed. " in str(death)
    assert death.__cause__ is death.__context__ is None
    exiting = torchwq.DataLoader(datasets.Exiting(), num_workers=1, multiprocessing_context=method)
    with pytest.raises(torchwq.WorkerDied, match=r"DataLoader worker \(pid \d+\) exited unexpectedly") as caught:
        list(exiting)
    assert caught.value.__context__ is None


def test_the_death_of_a_producer_is_told_alone() -> None:
    def produce() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(torchwq.WorkerDied, match="SIGKILL") as caught:
        list(torchwq.BackgroundTask(produce))
    assert caught.value.__context__ is None


class Wrapped(torchwq.DataLoader[Any]):
    """Wraps what iterates, as loaders of PyG and litdata do."""

    def _get_iterator(self) -> Any:
        return Wrapper(super()._get_iterator())


class Wrapper:
    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __iter__(self) -> Wrapper:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)


def _raise_in_the_loop(loader: Any) -> None:
    try:
        for _ in loader:
            raise KeyError
    except KeyError:
        pass


def _hear_of_a_failure(loader: Any) -> None:
    loader.collate_fn = datasets.fail
    iterator = iter(loader)
    with pytest.raises(ValueError, match="no batch"):
        next(iterator)


LEAVE: dict[str, Callable[[Any], Any]] = {
    "wrapped by a subclass": lambda loader: next(iter(Wrapped(loader.dataset, num_workers=2, backend=loader.backend))),
    "in a generator": lambda loader: next(batch for batch in loader),
    "in zip": lambda loader: next(zip(loader, loader, strict=True)),
    "in islice": lambda loader: list(itertools.islice(loader, 2)),
    "in chain": lambda loader: next(itertools.chain(loader, loader)),
    "in a traceback": _raise_in_the_loop,
    "after a failure": _hear_of_a_failure,
}


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_workers_end_with_the_last_reference_however_it_was_held(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    get_iterator = torchwq.DataLoader._get_iterator

    def note(loader: Any) -> Any:
        iterator = get_iterator(loader)
        started.extend(of(iterator))
        return iterator

    monkeypatch.setattr(torchwq.DataLoader, "_get_iterator", note)
    gc.collect()
    gc.disable()
    try:
        for how, leave in LEAVE.items():
            loader: Any = torchwq.DataLoader(datasets.Plain(200), num_workers=2, backend=backend)
            leave(loader)
            assert started
            if backend == "thread":  # it may have the last reference for a moment: in an error of its own
                wait_until(lambda: not any(worker.is_alive() for worker in started), what=f"the end, {how}")
            assert not any(worker.is_alive() for worker in started), how
            started.clear()
            del loader
    finally:
        gc.enable()


class CollatesItself(torchwq.DataLoader[Any]):
    """As loaders of PyG do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(datasets.Plain(), num_workers=1, collate_fn=self.collate, **options)

    def collate(self, samples: list[Any]) -> list[Any]:
        return samples


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_loader_that_collates_by_its_own_method_is_garbage_with_its_workers() -> None:
    loader = CollatesItself(persistent_workers=True, multiprocessing_context="fork")
    next(iter(loader))
    (worker,) = of(loader._iterator)
    assert worker.is_alive()
    del loader
    gc.collect()
    assert not worker.is_alive()


@pytest.mark.parametrize("method", METHODS)
def test_no_iterator_is_kept_by_the_error_that_has_ended_it(method: str) -> None:
    loader = torchwq.DataLoader(datasets.Dying(9), batch_size=4, num_workers=2, multiprocessing_context=method)
    gc.collect()
    gc.disable()
    try:
        iterator = iter(loader)
        for _ in range(2):
            with pytest.raises(torchwq.WorkerDied):
                list(iterator)
        gone = weakref.ref(iterator)
        del iterator
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_its_loader_lets_go_finishes_what_it_is_at(method: str, tmp_path: Path) -> None:
    def files() -> list[str]:
        return sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir())

    how: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": method}
    iterator = iter(torchwq.DataLoader(datasets.Finishing(str(tmp_path)), **how))
    workers = of(iterator)
    next(iterator)
    next(iterator)
    del iterator
    assert files() == ["finalizer", "finalizer", "finally", "finally"]
    assert [worker.exitcode for worker in workers] == [0, 0]
    iterator = iter(torchwq.DataLoader(datasets.Caching(str(tmp_path)), **how))
    next(iterator)
    next(iterator)
    wait_until(lambda: (tmp_path / "begun-2").exists() and (tmp_path / "begun-3").exists())
    del iterator
    begun, done = ([path.name for path in tmp_path.glob(f"{what}-[!01]*")] for what in ("begun", "done"))
    assert len(begun) == len(done) >= 2


def test_persistent_workers_finish_at_exit(run_script: Any, tmp_path: Path) -> None:
    run_script(
        """
        import sys, torchwq
        sys.path.append(sys.argv[2])
        from tests.loading import datasets
        loader = torchwq.DataLoader(datasets.Finishing(sys.argv[1]), num_workers=1, persistent_workers=True)
        for _ in loader:
            break
        """,
        str(tmp_path),
        str(Path(__file__).parents[2]),
    )
    assert len(list(tmp_path.glob("fin*"))) == 2


def test_busy_workers_end_soon_after_an_owner_that_died(tmp_path: Path) -> None:
    source = """
        import os, sys, time
        import torchwq
        from tests.loading import datasets
        iterators = [
            iter(torchwq.DataLoader(datasets.Slow(), num_workers=2, multiprocessing_context=method))
            for method in ("fork", "forkserver")
        ]
        print([worker.pid for iterator in iterators for worker in iterator._workers], flush=True)
        time.sleep(60)
    """
    folder = str(Path(__file__).parents[2])
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True, cwd=folder
    )
    with owner:
        assert owner.stdout is not None
        pids = json.loads(owner.stdout.readline())
        owner.kill()
    # 2 s on a quiet machine. The sample that they are at takes 30 s.
    wait_until(lambda: not any(_runs(pid) for pid in pids), 15)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_death_is_told_although_another_worker_is_busy() -> None:
    loader = torchwq.DataLoader(datasets.DyingBesideABusyOne(), num_workers=2)
    iterator = iter(loader)
    workers = of(iterator)
    began = time.monotonic()
    with pytest.raises(torchwq.WorkerDied):
        next(iterator)
    assert time.monotonic() - began < 5  # the busy one takes 8
    wait_until(lambda: not any(worker.is_alive() for worker in workers), 20)


def test_workers_are_silent_where_warnings_are_errors(run_script: Any) -> None:
    done = run_script(
        """
        import torch, torchwq
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 12
            def __getitem__(self, index): return torch.full((3,), float(index))
        def count(n):
            yield from range(n)
        def answer(queue):
            for question in queue:
                queue.write(question)
        def main():
            with torchwq.workqueue() as queue:
                workers = torchwq.map(2, answer, queue)
                queue.write(1, None, None)
                assert queue.read() == 1
                workers.join()
            assert list(torchwq.BackgroundTask(count, 3)) == [0, 1, 2]
            with torchwq.BackgroundTaskPool(1) as pool:
                assert pool.submit(abs, -1).result() == 1
            for how in ({}, {"multiprocessing_context": "forkserver"}, {"backend": "thread"}):
                for persistent in (False, True):
                    loader = torchwq.DataLoader(Data(), num_workers=2, persistent_workers=persistent, **how)
                    assert len(list(loader)) == 12
                    next(iter(loader))
        main()
        """,
        env={"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"},
        fresh=True,
    )
    assert re.sub(r"\s", "", done.stderr) == ""


def test_many_workers_have_words_of_their_own() -> None:
    counters = Counters(1100)
    for worker in range(1100):
        counters.of(worker)[0] = worker
    assert [counters.of(worker)[0] for worker in range(1100)] == list(range(1100))
    assert counters.grown(1200).of(1099)[0] == 1099
    with pytest.raises(IndexError, match="there are 1100"):
        counters.of(1100)
    # Of threads: as many processes would be too much for a test.
    numbers = torchwq.DataLoader(range(1100), None, num_workers=1100, backend="thread")  # type: ignore[arg-type]
    assert [int(number) for number in numbers] == list(range(1100))


@pytest.mark.parametrize("method", METHODS)
def test_more_workers_than_descriptors_is_an_error_that_names_the_limit(method: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    free = [fd for fd in range(len(used) + 20) if fd not in used]
    loader: Any = torchwq.DataLoader(range(9), None, num_workers=12, multiprocessing_context=method)  # type: ignore[arg-type]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[9], hard))
    try:
        with pytest.raises(torchwq.ResourceError, match="RLIMIT_NOFILE"):
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_of_workers_that_have_nothing_to_do_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the loader keeps for them, which does not read meanwhile."""
    monkeypatch.setattr(recycling, "IDLE_TIMEOUT", 0.1)
    monkeypatch.setattr(maintenance, "PERIOD", 0.05)
    data = datasets.Plain(64, 50_000)
    loader: Any = torchwq.DataLoader(
        data, batch_size=8, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    for batch in loader:
        assert len(batch) == 8
    del batch
    handles = loader._iterator._handles
    wait_until(lambda: not any(any(handle._kept._kept.values()) for handle in handles))
    assert len(list(loader)) == 8
