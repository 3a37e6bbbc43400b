"""Deaths, forks, late comers: what the contract says under "when things go wrong"."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import torchwq
from tests.conftest import wait_until
from tests.queues import jobs
from tests.queues.handles import worker_handle
from torchwq.transport import descriptors, link, reactor


def test_a_killed_worker_is_reported_within_a_second_with_what_it_had_in_hand() -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(2, jobs.read_one_and_die, owner, signal.SIGKILL)
        wait_until(lambda: owner.statistics().handles == 2)
        owner.write({"path": "image 17.png"})
        started = time.monotonic()
        with pytest.raises(torchwq.WorkerDied) as caught:
            owner.read(timeout=20)
        assert time.monotonic() - started < 1.5
        death = caught.value
        assert death.signal is signal.SIGKILL
        assert death.exitcode == -signal.SIGKILL
        assert death.mapid in (0, 1)
        assert death.pid == workers.pids[death.mapid]
        for part in ("SIGKILL", "image 17.png", "question 1", "memory", str(death.pid)):
            assert part in str(death)
        owner.write("for the other one")
        with pytest.raises(torchwq.WorkerDied, match="for the other one"):
            owner.read(timeout=20)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read(timeout=20)
        assert owner.read(True) is None
        with pytest.raises(torchwq.WorkerDied):
            workers.join(20)


def test_a_worker_says_goodbye_although_its_link_is_full() -> None:
    with torchwq.workqueue() as owner:
        signals = torchwq.channel()
        workers = torchwq.map(1, jobs.leave_by_a_full_link, owner, signals)
        wait_until(lambda: owner._role.members._identities)  # type: ignore[attr-defined]
        (member,) = owner._role.members  # type: ignore[attr-defined]
        connection = member.link._connection
        connection.watch(None)
        signals.write("go")
        with pytest.raises(TimeoutError):
            workers.join(1.0)  # the goodbye is still to leave
        connection.watch(member.link._ready)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read(timeout=20)
        workers.join(20)


def test_a_worker_does_not_end_between_its_last_answer_and_its_goodbye() -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.be_slow_to_leave, owner)
        for _ in range(1000):
            owner.read(timeout=20)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read(timeout=20)
        workers.join(20)


def test_the_others_go_on_after_a_death() -> None:
    with torchwq.workqueue() as owner, torchwq.workqueue() as victim:
        torchwq.map(1, jobs.die_while_reading, victim)
        torchwq.map(1, jobs.echo, owner)
        os.kill(victim.read(), signal.SIGKILL)
        with pytest.raises(torchwq.WorkerDied):
            victim.read()
        owner.write(1)
        assert owner.read() == 1


def test_answers_that_are_there_come_before_the_death() -> None:
    with torchwq.workqueue() as owner:
        workers = torchwq.map(1, jobs.answer_many, owner, 100)
        assert workers.join(20) == ["written"]
        assert [owner.read() for _ in range(100)] == list(range(100))
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read()


@pytest.mark.parametrize("job", [jobs.die_while_reading, jobs.die_while_writing])
def test_a_worker_killed_inside_read_or_write_leaves_the_queue_usable(job: object) -> None:
    with torchwq.workqueue() as owner:
        for _ in range(5):
            torchwq.map(1, job, owner)  # type: ignore[arg-type]
            while not isinstance(pid := owner.read(timeout=20), int):
                pass
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(torchwq.WorkerDied):
                while True:
                    owner.read(timeout=20)
        torchwq.map(1, jobs.echo, owner)
        owner.write("still here")
        while (answer := owner.read(timeout=20)) != "still here":
            assert answer == b"x" * 1000


def test_drain_reports_a_death_and_then_waits_for_the_rest() -> None:
    with torchwq.workqueue() as owner:
        torchwq.map(1, jobs.read_one_and_die, owner, signal.SIGSEGV)
        owner.write("deadly")
        with pytest.raises(torchwq.WorkerDied, match="SIGSEGV"):
            owner.drain(20)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read(timeout=20)
        torchwq.map(1, jobs.echo, owner)
        owner.write("harmless")
        owner.drain(20)
        assert owner.read(True) == "harmless"


def test_a_writer_with_capacity_is_told_when_nobody_is_left() -> None:
    with torchwq.workqueue(capacity=1) as owner:
        torchwq.map(1, jobs.read_one_and_die, owner, signal.SIGKILL)
        with pytest.raises(torchwq.WorkerDied):
            for number in range(10):
                owner.write(number)


def test_workers_that_fail_before_they_open_the_queue_do_not_leave_the_owner_waiting() -> None:
    with torchwq.workqueue("never opened") as owner:
        workers = torchwq.map(2, jobs.fail, "no such file")
        with pytest.raises(torchwq.WorkerDied, match="had not opened this queue"):
            owner.read(timeout=20)
        with pytest.raises(ValueError, match="no such file"):
            workers.join(20)


def test_a_queue_that_nobody_has_is_not_told_of_workers_that_fail() -> None:
    """Such as those of an earlier map, whose end is noticed when the queue is there already."""
    with torchwq.workqueue() as questions:
        workers = torchwq.map(1, _fail_at_once)
        with pytest.raises(ZeroDivisionError):
            workers.join(timeout=30)
        with pytest.raises(queue.Empty):
            questions.read(timeout=0.05)


def _fail_at_once() -> None:
    raise ZeroDivisionError


def test_before_the_first_worker_the_owner_waits() -> None:
    with torchwq.workqueue("early") as owner:
        timer = threading.Timer(0.2, lambda: torchwq.map(1, jobs.echo, "early"))
        timer.start()
        owner.write(1)
        assert owner.read(timeout=20) == 1
        timer.join()


def test_a_late_worker_still_reads_what_a_closed_queue_holds() -> None:
    owner = torchwq.workqueue("late, with questions")
    workers = torchwq.map(1, jobs.open_by_name_late, "late, with questions", 0.5)
    owner.write("a", "b")
    owner.close()
    assert workers.join(20) == [(False, ["a", "b"])]


def test_a_late_worker_does_not_become_the_owner_of_a_closed_queue() -> None:
    owner = torchwq.workqueue("late, empty")
    workers = torchwq.map(1, jobs.open_by_name_late, "late, empty", 0.5)
    owner.close()
    assert workers.join(20) == [None], "QueueClosed ends the worker, not as an error"
    assert torchwq.workqueue("late, empty").creator


def test_a_late_anonymous_handle_still_reads_what_a_closed_queue_holds() -> None:
    owner = torchwq.workqueue()
    workers = torchwq.map(1, jobs.consume, owner)
    owner.write(*range(5_000))
    owner.close()
    assert workers.join(20) == [5_000]


def test_a_name_whose_owner_was_killed_can_be_created_again() -> None:
    with pytest.raises(torchwq.WorkerDied):
        torchwq.map(1, jobs.create_and_die, "inherited").join(20)
    with torchwq.workqueue("inherited") as queue:
        assert queue.creator


def test_a_stopped_worker_does_not_stop_the_others() -> None:
    with torchwq.workqueue() as owner, torchwq.workqueue() as stopped:
        torchwq.map(1, jobs.stop_self, stopped)
        pid = stopped.read(timeout=20)
        torchwq.map(1, jobs.echo, owner)
        owner.write(1)
        assert owner.read(timeout=20) == 1
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("make", [torchwq.workqueue, torchwq.channel])
def test_a_forked_child_waits_for_no_room(make: Callable[..., Any]) -> None:
    full = make(capacity=1)
    full.write(0)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            full.write(1)
        except torchwq.QueueClosed as error:
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    full.close()


def test_a_forked_child_cannot_use_its_parents_handles() -> None:
    with torchwq.workqueue("forked") as owner:
        torchwq.map(1, jobs.echo, "forked")
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            results = []
            for use in (lambda: owner.write(0), lambda: owner.read(timeout=5), lambda: next(iter(owner)), owner.drain):
                try:
                    use()
                    results.append("nothing raised")
                except torchwq.QueueClosed as error:
                    results.append("ok" if "fork" in str(error) else str(error))
            owner.close()
            worker = torchwq.workqueue("forked")
            results.append("ok" if not worker.creator else "owner")
            os.write(write_end, ";".join(results).encode())
            os._exit(0)
        os.close(write_end)
        os.waitpid(pid, 0)
        with os.fdopen(read_end) as pipe:
            assert pipe.read() == "ok;ok;ok;ok;ok"
        owner.write("parent")
        try:
            assert owner.read(timeout=20) == "parent"
        except torchwq.WorkerDied as death:  # the forked child had opened the queue, and has gone
            assert death.pid == pid
            assert owner.read(timeout=20) == "parent"


def test_a_process_started_by_multiprocessing_opens_the_queue_by_name() -> None:

    with torchwq.workqueue("from multiprocessing") as owner:
        process = multiprocessing.get_context("fork").Process(target=jobs.echo, args=("from multiprocessing",))
        process.start()
        owner.write("hello", None)
        assert owner.read(timeout=20) == "hello"
        process.join(20)
        assert process.exitcode == 0
        process.close()


def test_unrelated_processes_do_not_see_the_name(run_script: object) -> None:
    with torchwq.workqueue("mine"):
        done = run_script("import torchwq; print(torchwq.workqueue('mine').creator)")  # type: ignore[operator]
    assert done.stdout == "True\n"


def test_a_closed_handle_that_is_not_collected_does_not_spoil_a_fork() -> None:
    """The child must not take itself for its parent: at its exit it would end the parent's namespace and workers."""
    handles = []
    with torchwq.workqueue("spoil") as owner:
        thread = threading.Thread(target=lambda: handles.append(torchwq.workqueue("spoil")))
        thread.start()
        thread.join()
        handles[0].close()
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        workers = torchwq.map(1, jobs.echo, "spoil")
        owner.write("still there")
        assert owner.read(timeout=20) == "still there"
        owner.write(None)
        workers.join(20)
    assert handles[0].closed


@pytest.mark.parametrize("way", ["read", "aread"])
def test_an_answer_given_just_before_the_last_worker_leaves_comes_before_its_leaving(way: str) -> None:
    with torchwq.workqueue() as owner:
        worker = worker_handle(owner)
        owner.write("question")
        role, left = owner._role, []
        may_raise = role.may_raise

        def answer_and_leave() -> bool:
            """Between the owner's look at its answers and its look at its workers."""
            if not left:
                left.append(True)
                worker.write(worker.read())
                worker.close()
                wait_until(lambda: role.alarm.is_set(), what="the owner's knowing that nobody is left")
            return may_raise()

        role.may_raise = answer_and_leave
        read = owner.read if way == "read" else lambda: asyncio.run(owner.aread())
        assert read() == "question"
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            read()


def test_each_of_many_handles_has_a_slot_of_its_own_however_many_came_and_went() -> None:
    with torchwq.workqueue() as owner:
        # Handles of threads count as handles, but have no slots.
        threads = [threading.Thread(target=lambda: kept.append(torchwq.marshal(owner).read())) for _ in range(3)]
        kept: list[object] = []
        for thread in threads:
            thread.start()
            thread.join()
        handles = []
        for count in (100, 60):
            handles += [worker_handle(owner) for _ in range(count)]
            for handle in handles[:20]:
                handle.close()
            handles = handles[20:]
            wait_until(lambda: owner.statistics().handles <= 143)
        slots = [handle._role._slot.number_index for handle in handles]
        assert len(set(slots)) == len(handles) == 120
        for handle in handles:
            handle.close()


def test_a_handle_of_very_many_busy_threads_is_waited_for() -> None:
    with torchwq.workqueue() as owner, worker_handle(owner) as worker:
        owner.write(*range(256))
        may_answer = threading.Event()

        def work() -> None:
            question = worker.read()
            may_answer.wait(30)
            worker.write(question)

        threads = [threading.Thread(target=work) for _ in range(256)]
        for thread in threads:
            thread.start()
        wait_until(lambda: owner.statistics().taken == 256)
        with pytest.raises(TimeoutError):
            owner.drain(0.5)
        may_answer.set()
        owner.drain(20)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("opened", [False, True])
def test_threads_that_write_together_keep_to_the_capacity(opened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torchwq.workqueue(capacity=3) as owner:
        if opened:
            owner._role.open_to_processes()
        most = 0
        send = owner._role._send

        def send_late(payload: object) -> bool:
            nonlocal most
            time.sleep(0.01)  # for the other threads to look whether there is room
            send(payload)
            most = max(most, owner.statistics().unsent + owner.statistics().written - owner.statistics().taken)
            return True

        monkeypatch.setattr(owner._role, "_send", send_late)
        threads = [threading.Thread(target=owner.write, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        worker = worker_handle(owner) if opened else torchwq.marshal(owner).read()
        got = {worker.read(timeout=20) for _ in range(12)}
        for thread in threads:
            thread.join()
        assert got == set(range(12))
        assert most <= 3
        worker.close()


def test_a_process_that_dies_while_it_asks_for_a_queue_is_no_worker_for_ever() -> None:
    with torchwq.workqueue("asked for by one that dies") as owner:
        ours, theirs = link.pair()
        os.close(theirs)
        reactor.get().call_later(0, lambda: owner._role.open_by_name(ours, os.getppid()))  # type: ignore[attr-defined]
        with pytest.raises(torchwq.WorkerDied, match=str(os.getppid())):
            owner.read(timeout=20)
        with pytest.raises(torchwq.WorkerDied, match="no worker is left"):
            owner.read(timeout=20)


def test_a_process_that_could_not_be_answered_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fds: object) -> list[int]:
        raise descriptors.resource_error(OSError(errno.EMFILE, "Too many open files"))

    with torchwq.workqueue("not answered") as owner:
        ours, theirs = link.pair()
        monkeypatch.setattr(link.descriptors, "dup_all", refuse)
        assert owner._role.open_by_name(ours, os.getppid())  # type: ignore[attr-defined]
        assert ours.fileno() < 0
        assert owner.statistics().handles == 0
        os.close(theirs)
