"""``Mutex`` and its barrier: exclusion and rounds over processes and threads, and what deaths do to them."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import time

import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.locking import jobs
from torchwq.locking import barrier as barriers
from torchwq.locking.layout import NUM_WAITING
from torchwq.transport import cleanup


def test_only_one_at_a_time_has_it(backend: str) -> None:
    mutex, shared = torchwq.mutex(), torch.zeros(1)
    torchwq.map(3, jobs.count, mutex, shared, 500, backend=backend).join(30)
    assert shared[0] == 1500


def test_processes_and_threads_together() -> None:
    mutex, shared = torchwq.mutex(), torch.zeros(1)
    workers = [torchwq.map(2, jobs.count, mutex, shared, 300, backend=kind) for kind in ("process", "thread")]
    jobs.count(mutex, shared, 300)
    for each in workers:
        each.join(30)
    assert shared[0] == 1500


def test_acquire_with_a_timeout(backend: str) -> None:
    mutex, held, gate = torchwq.mutex(), torchwq.channel(), torchwq.channel()
    worker = torchwq.map(1, jobs.hold_until, mutex, held, gate, backend=backend)
    held.read(timeout=20)
    assert not mutex.acquire(timeout=0)
    assert not mutex.acquire(timeout=0.05)
    assert "locked" in repr(mutex)
    gate.write("go")
    assert mutex.acquire(timeout=20)
    mutex.release()
    worker.join(20)
    assert repr(mutex) == "<torchwq.Mutex, unlocked>"


def test_misuse_is_refused() -> None:
    mutex = torchwq.mutex()
    with pytest.raises(torchwq.MutexError, match="does not hold"):
        mutex.release()
    with mutex as death:
        assert death is None
        with pytest.raises(torchwq.MutexError, match="holds the mutex already"):
            mutex.acquire()
    with pytest.raises(ValueError, match="at least 1"):
        mutex.barrier(0)
    with pytest.raises(TypeError, match="torchwq"):
        pickle.dumps(mutex)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_next_holder_is_told_of_a_death(number: signal.Signals) -> None:
    mutex = torchwq.mutex()
    with pytest.raises(torchwq.WorkerDied):
        torchwq.map(1, jobs.hold_and_die, mutex, number).join(20)
    with pytest.warns(RuntimeWarning, match=r"half done"):
        mutex.acquire()
    death = mutex.abandoned
    assert death is not None
    assert (death.mapid, death.signal) == (0, number)
    mutex.release()
    with mutex as death:
        assert death is None


@pytest.mark.filterwarnings("ignore:the last holder")
def test_a_thread_that_ends_does_not_keep_the_lock() -> None:
    mutex = torchwq.mutex()
    for start in (
        lambda: torchwq.map(1, jobs.hold_and_end, mutex, backend="thread").join(20),
        lambda: run_in_thread(mutex.acquire),
    ):
        start()
        gc.collect()
        assert mutex.acquire(timeout=20)
        assert "thread of this process" in str(mutex.abandoned)
        mutex.release()
    torchwq.map(1, jobs.hold_and_end, mutex).join(20)
    assert mutex.acquire(timeout=20)
    assert mutex.abandoned is not None
    mutex.release()


def run_in_thread(f: object) -> None:
    thread = threading.Thread(target=f)  # type: ignore[arg-type]
    thread.start()
    thread.join(20)


@pytest.mark.filterwarnings("ignore:the last holder")
def test_killed_holders_block_nobody_under_load() -> None:
    mutex, shared = torchwq.mutex(), torch.zeros(1)
    workers = torchwq.map(2, jobs.count, mutex, shared, 2_000)
    for _ in range(5):
        with pytest.raises(torchwq.WorkerDied):
            torchwq.map(1, jobs.hold_and_die, mutex, signal.SIGKILL).join(20)
    workers.join(40)
    assert shared[0] == 4_000


def test_ctrl_c_while_waiting_takes_nothing(run_script: object) -> None:
    done = run_script(  # type: ignore[operator]
        """
        import os, signal, threading, time, torchwq

        def hold(mutex, held, gate):
            with mutex:
                held.write(1)
                gate.read()

        mutex, held, gate = torchwq.mutex(), torchwq.channel(), torchwq.channel()
        worker = torchwq.map(1, hold, mutex, held, gate)
        held.read()
        for wait in (mutex.acquire, lambda: mutex.acquire(30), lambda: mutex.barrier(3)):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                wait()
            except KeyboardInterrupt:
                print("interrupted")
        gate.write(1)
        worker.join(20)
        print(mutex.acquire(20), mutex.abandoned)
        """
    )
    assert done.stdout == "interrupted\ninterrupted\ninterrupted\nTrue None\n"


def test_barriers_let_all_through_together_and_can_be_used_again(backend: str) -> None:
    mutex, shared = torchwq.mutex(), torch.zeros(4)
    workers = torchwq.map(3, jobs.rounds, mutex, shared, 4, 30, backend=backend)
    mine = jobs.rounds(mutex, shared, 4, 30, 3)
    for positions in zip(mine, *workers.join(30), strict=True):
        assert sorted(positions) == [0, 1, 2, 3]


def test_a_barrier_of_plain_threads_on_one_handle() -> None:
    mutex, positions = torchwq.mutex(), []
    threads = [threading.Thread(target=lambda: positions.append(mutex.barrier(4))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(positions) == [0, 1, 2, 3]
    assert mutex.barrier(1) == 0


@pytest.mark.parametrize("end", [jobs.die, jobs.fail])
def test_a_worker_that_will_not_come_breaks_the_barrier(end: object, backend: str) -> None:
    if end is jobs.die and backend == "thread":
        pytest.skip("threads cannot be killed")
    mutex = torchwq.mutex()
    waiting = torchwq.map(2, jobs.wait_at_barrier, mutex, 3, backend=backend)
    lost = torchwq.map(1, end, mutex, backend=backend)  # type: ignore[arg-type]
    started = time.monotonic()
    results = waiting.join(20)
    assert time.monotonic() - started < 5
    assert all(isinstance(each, torchwq.WorkerDied) for each in results), results
    with pytest.raises((torchwq.WorkerDied, ValueError)):
        lost.join(20)
    with pytest.raises(torchwq.WorkerDied, match="cannot be completed"):
        mutex.barrier(2)  # it is told here, too
    assert mutex.barrier(1) == 0


@pytest.mark.parametrize("end", [jobs.die, jobs.end])
def test_one_who_waits_at_a_barrier_is_woken_by_a_death_and_by_one_who_leaves(
    end: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barriers, "POLL_INTERVAL", 1000.0)  # nobody finds it by looking now and then
    mutex, gate = torchwq.mutex(), torchwq.channel()
    worker = torchwq.map(1, jobs.when_told, gate, end, mutex)

    def tell() -> None:
        state = mutex._state
        wait_until(lambda: state.table.get_word(state.table.slot, NUM_WAITING))
        time.sleep(0.6)  # the first look is over
        gate.write("go")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(torchwq.WorkerDied, match=r"SIGKILL|have gone"):
        mutex.barrier(2, timeout=30)
    assert time.monotonic() - started < 15
    thread.join(20)
    with contextlib.suppress(torchwq.WorkerDied):
        worker.join(20)


def test_those_who_are_left_go_on_with_fewer(backend: str) -> None:
    mutex = torchwq.mutex()
    workers = torchwq.map(2, jobs.wait_twice, mutex, 3, backend=backend)
    failing = torchwq.map(1, jobs.fail, mutex, backend=backend)
    assert sorted(workers.join(20)) == [0, 1]
    with pytest.raises(ValueError, match="cannot come"):
        failing.join(20)


def test_who_is_sent_the_mutex_after_a_death_is_not_told_of_it() -> None:
    mutex = torchwq.mutex()
    with pytest.raises(torchwq.WorkerDied):
        torchwq.map(1, jobs.die, mutex).join(20)
    assert sorted(torchwq.map(2, jobs.wait_at_barrier, mutex, 2).join(20)) == [0, 1]


def test_when_all_others_have_gone_the_barrier_cannot_be_completed() -> None:
    mutex = torchwq.mutex()
    torchwq.map(2, jobs.end, mutex).join(20)
    with pytest.raises(torchwq.WorkerDied, match="others that had this mutex have gone"):
        mutex.barrier(3)


def test_a_process_that_ends_while_a_thread_of_it_waits_does_not_count_as_arrived() -> None:
    mutex = torchwq.mutex()
    torchwq.map(1, jobs.leave_a_thread_at_the_barrier, mutex, 3).join(20)
    wait_until(lambda: not list(mutex._state.table.other_slots()))
    assert mutex.barrier(1) == 0


def test_a_barrier_times_out_and_does_not_count_who_has_left() -> None:
    mutex = torchwq.mutex()
    with pytest.raises(TimeoutError):
        mutex.barrier(2, timeout=0.05)
    thread = threading.Thread(target=mutex.barrier, args=(2,))
    thread.start()
    assert mutex.barrier(2, timeout=20) in (0, 1)
    thread.join(20)


def test_two_barriers_of_different_size_at_a_time_are_refused() -> None:
    mutex = torchwq.mutex()
    thread = threading.Thread(target=mutex.barrier, args=(2,))
    thread.start()
    until = time.monotonic() + 20
    while True:  # until the other one has arrived
        try:
            mutex.barrier(3, timeout=0.01)
        except TimeoutError:
            assert time.monotonic() < until
        except ValueError as error:
            assert "barrier of 2" in str(error)
            break
    assert mutex.barrier(2) in (0, 1)
    thread.join(20)


def test_a_mutex_may_go_while_its_barrier_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [torchwq.mutex()._state]
    wait_until(lambda: kept[0].closed)
    table, look = kept[0].table, kept[0]._barrier._monitor._on_change
    locked = table.locked

    def lose_it() -> contextlib.AbstractContextManager[None]:
        kept.clear()
        return locked()

    monkeypatch.setattr(table, "locked", lose_it)
    look()
    cleanup.finish()
    assert not kept
    assert not capsys.readouterr().err


def test_a_forked_child_closes_nothing_that_a_mutex_has_given_up_already() -> None:
    state = torchwq.mutex()._state
    wait_until(lambda: state.closed)
    others = [fd for _ in range(8) for fd in os.pipe()]  # they get the numbers of what it has closed
    pid = os.fork()
    if pid == 0:
        missing = 0
        for fd in others:
            try:
                os.fstat(fd)
            except OSError:
                missing += 1
        os._exit(missing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in others:
        os.close(fd)


def test_a_forked_child_cannot_use_it() -> None:
    mutex = torchwq.mutex()
    mutex.acquire()
    pid = os.fork()
    if pid == 0:
        refused = 0
        for use in (mutex.acquire, mutex.release, lambda: mutex.barrier(1)):
            try:
                use()
            except torchwq.MutexError as error:
                refused += "fork" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert not torchwq.map(1, jobs_try, mutex).join(20)[0], "the child's end has not released it"
    mutex.release()
    assert torchwq.map(1, jobs_try, mutex).join(20)[0]


def jobs_try(mutex: torchwq.Mutex) -> bool:
    if taken := mutex.acquire(timeout=0):
        mutex.release()
    return taken


def test_many_mutexes_leave_no_descriptor() -> None:
    for _ in range(200):
        with torchwq.mutex():
            pass
    gc.collect()
