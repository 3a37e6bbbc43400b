"""Deaths, failures, forks: a reader of a channel is told when it waits in vain, and only then."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import resource
import signal
import threading
import time
import weakref
from typing import Any

import pytest
import torch

import torchwq
from tests.channels import jobs
from tests.channels.parts import another, descriptors_of, socket_of, write_and_die
from tests.conftest import wait_until
from torchwq import ChannelState
from torchwq.channels import core as cores
from torchwq.channels.socket import SocketChannel
from torchwq.peers import table
from torchwq.transport import cleanup, polling, reactor

OPEN, DRAINED = ChannelState.OPEN, ChannelState.DRAINED


def test_a_reader_is_told_of_a_writers_death_within_a_second_after_its_items() -> None:
    channel = torchwq.channel()
    workers = torchwq.map(1, jobs.write_and_die, channel, signal.SIGKILL)
    pid = channel.read(timeout=20)[1]
    started = time.monotonic()
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL") as caught:
        channel.read(timeout=20)
    assert time.monotonic() - started < 1.5
    assert (caught.value.pid, caught.value.mapid, caught.value.signal) == (pid, 0, signal.SIGKILL)
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=20)
    with pytest.raises(torchwq.WorkerDied):
        workers.join(20)


def test_a_death_is_told_once_while_others_can_still_write() -> None:
    channel, gate = torchwq.channel(), torchwq.channel()
    holder = torchwq.map(1, jobs.hold, channel, gate)
    wait_until(lambda: any(True for _ in channel._core.socket.table.other_slots()))  # type: ignore[union-attr]
    torchwq.map(1, jobs.write_and_die, channel, signal.SIGSEGV)
    assert channel.read(timeout=20)[0] is OPEN
    with pytest.raises(torchwq.WorkerDied, match="SIGSEGV"):
        channel.read(timeout=20)
    with pytest.raises(queue.Empty, match="no item came within"):
        channel.read(timeout=0.8)
    gate.write("go")
    holder.join(20)


def test_each_death_is_told_however_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "REUSE_AFTER", 2)
    monkeypatch.setattr(table, "MAX_PEERS", 4)
    channel = torchwq.channel()
    socket = socket_of(channel)
    for _ in range(6):
        write_and_die(socket)
        with pytest.raises(torchwq.WorkerDied, match="ended without having closed"):
            channel.read(timeout=5)
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=5)


def test_a_channel_that_too_many_have_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = torchwq.channel(capacity=3)
    socket = socket_of(channel)
    monkeypatch.setattr(table, "MAX_PEERS", 1)
    with pytest.raises(torchwq.ResourceError, match="more than 1 processes"):
        another(socket)


def test_other_readers_go_on_when_a_reader_is_killed() -> None:
    channel = torchwq.channel()
    victim = torchwq.map(1, jobs.read_and_die, channel)
    channel.write("deadly")
    with pytest.raises(torchwq.WorkerDied):
        victim.join(20)
    reader = torchwq.map(1, jobs.consume, channel)
    channel.write(1, 2)
    wait_until(lambda: channel.num_items() == 0)
    time.sleep(0.6)  # longer than a reader sleeps between two looks: it must not raise
    channel.write(3)
    channel.close()
    assert reader.join(20) == [[1, 2, 3]]


def test_a_worker_that_dies_before_it_has_written_is_reported() -> None:
    channel = torchwq.channel()
    torchwq.map(1, jobs.die, channel)
    with pytest.raises(torchwq.WorkerDied, match=r"SIGKILL|nobody is left"):
        channel.read(timeout=20)


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_stage_that_fails_ends_the_wait_for_it(backend: str) -> None:
    source, sink = torchwq.channel(), torchwq.channel()
    stage = torchwq.map(1, jobs.fail_after, source, sink, 2, backend=backend)
    source.write(1, 2, 3)
    assert [sink.read(timeout=20)[1] for _ in range(2)] == [1, 2]
    with pytest.raises(torchwq.WorkerDied, match="ended with an error"):
        sink.read(timeout=20)
    with pytest.raises(ValueError, match="no more"):
        stage.join(20)


def test_workers_that_end_leave_nobody_to_wait_for() -> None:
    channel = torchwq.channel()
    workers = torchwq.map(2, jobs.produce, channel, 3)
    assert len([channel.read(timeout=20) for _ in range(6)]) == 6
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=20)
    workers.join(20)
    assert channel.write("to myself") is OPEN
    assert channel.read() == (OPEN, "to myself")


def test_thread_workers_that_end_leave_nobody_to_wait_for() -> None:
    channel = torchwq.channel()
    torchwq.map(2, jobs.produce, channel, 3, backend="thread").join(20)
    assert len([channel.read(timeout=20) for _ in range(6)]) == 6
    with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
        channel.read(timeout=20)


def test_before_anybody_has_come_a_reader_waits() -> None:
    channel = torchwq.channel()
    timer = threading.Timer(0.6, channel.write, ["late"])
    timer.start()
    assert channel.read(timeout=20) == (OPEN, "late")
    timer.join()


def test_a_thread_that_writes_now_and_then_keeps_the_channel_alive() -> None:
    channel, stop = torchwq.channel(), threading.Event()
    torchwq.map(1, jobs.produce, channel, 1).join(20)

    def write() -> None:
        channel.write("first")
        stop.wait(0.8)
        channel.write("second")

    assert channel.read() == (OPEN, (0, 0))
    thread = threading.Thread(target=write)
    thread.start()
    assert channel.read(timeout=20) == (OPEN, "first")
    assert channel.read(timeout=20) == (OPEN, "second")
    thread.join()


def test_a_writer_that_waits_for_room_is_told_of_a_readers_death() -> None:
    channel = torchwq.channel(capacity=1)
    torchwq.map(1, jobs.read_and_die, channel)
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        for number in range(10):
            channel.write(number)


def test_killed_writers_leave_the_channel_usable() -> None:
    channel = torchwq.channel(capacity=2)
    for _ in range(5):
        torchwq.map(1, jobs.write_and_die, channel, signal.SIGKILL)
        assert isinstance(channel.read(timeout=20)[1], int)
        with pytest.raises(torchwq.WorkerDied):
            channel.read(timeout=20)
    assert channel.write(1, 2) is OPEN
    assert [channel.read()[1], channel.read()[1]] == [1, 2]


def test_a_reader_killed_inside_read_leaves_the_channel_usable() -> None:
    channel = torchwq.channel()
    for _ in range(3):
        workers = torchwq.map(1, jobs.read_until_closed, channel)
        wait_until(lambda: any(lives for _, lives in channel._core.socket.table.other_slots()))  # type: ignore[union-attr]
        os.kill(wait_until(lambda workers=workers: workers.pids[0]), signal.SIGKILL)
        with pytest.raises(torchwq.WorkerDied):
            workers.join(20)
    channel.write(1)
    assert channel.read() == (OPEN, 1)


@pytest.mark.parametrize("kind", ["local", "socket"])
def test_a_forked_child_cannot_use_its_parents_channel(kind: str) -> None:
    channel = torchwq.channel()
    channel.write(1)
    if kind == "socket":
        channel._core.open_to_processes()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        results = []
        for use in (lambda: channel.write(0), channel.read, lambda: channel.read(True), channel.close):
            try:
                use()
                results.append("nothing raised")
            except torchwq.QueueClosed as error:
                results.append("ok" if "fork" in str(error) else str(error))
        os.write(write_end, ";".join(results).encode())
        os._exit(0)
    os.close(write_end)
    os.waitpid(pid, 0)
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == "ok;ok;ok;ok"
    assert channel.read(timeout=5) == (OPEN, 1)


def test_a_program_that_leaves_channels_open_ends(run_script: object) -> None:
    done = run_script(  # type: ignore[operator]
        """
        import torchwq

        def read(channel):
            for item in channel:
                pass

        channel = torchwq.channel()
        processes = torchwq.map(2, read, channel)
        threads = torchwq.map(2, read, channel, backend="thread")
        channel.write(*range(1000))
        print("end")
        """
    )
    assert done.stdout == "end\n"
    assert done.stderr == ""


def test_a_thread_that_works_while_another_waits_may_still_write() -> None:
    todo, done = torchwq.channel(), torchwq.channel()
    todo.write(3)
    workers = torchwq.map(2, follow_up, todo, done, backend="thread")
    del todo
    assert [done.read(timeout=20)[1] for _ in range(4)] == [3, 2, 1, 0]
    workers.join(20)


def follow_up(todo: torchwq.Channel, done: torchwq.Channel) -> None:
    """Each number makes a smaller one; 0 closes."""
    for number in todo:
        time.sleep(0.4)  # longer than it takes to be sure that nobody is left
        done.write(number)
        if number:
            todo.write(number - 1)
        else:
            todo.close()


@pytest.mark.parametrize("how", [{"timeout": 0}, {"nonblocking": True}], ids=["timeout", "nonblocking"])
def test_what_select_has_found_the_next_read_says(how: dict[str, Any]) -> None:
    channel = torchwq.channel()
    torchwq.map(1, jobs.produce, channel, 1).join(20)
    channel.read(timeout=20)
    assert channel.read(nonblocking=True) == (OPEN, None), "one that does not wait may write itself"
    for _ in range(2):
        assert torchwq.select([channel], 20) == [channel]
        with pytest.raises(torchwq.WorkerDied, match="nobody is left"):
            channel.read(**how)


def test_select_learns_that_nobody_is_left_whatever_the_reactor_looks_at_meanwhile() -> None:
    class Meanwhile:
        """Never ready itself; each time it is asked, the reactor looks at the channel."""

        def __init__(self) -> None:
            self._read_end, self._write_end = os.pipe()

        def fileno(self) -> int:
            return self._read_end

        def _is_ready(self) -> bool:
            looked = threading.Event()
            reactor.get().call_later(0, lambda: (channel._core._update_readiness(), looked.set()))
            assert looked.wait(20)
            return False

        def close(self) -> None:
            os.close(self._read_end)
            os.close(self._write_end)

    channel = torchwq.channel()
    torchwq.map(1, jobs.produce, channel, 1).join(20)
    channel.read(timeout=20)
    with contextlib.closing(Meanwhile()) as meanwhile:
        assert torchwq.select([channel, meanwhile], 20) == [channel]


def test_the_descriptor_is_not_ready_for_what_only_an_unwatched_handle_has_not_been_told() -> None:
    channel, carrier = torchwq.channel(), torchwq.channel()
    carrier.write(channel)
    other = carrier.read()[1]
    torchwq.map(1, jobs.write_and_die, channel, signal.SIGKILL)
    fd = other.fileno()
    assert other.read(timeout=20)[0] is OPEN
    wait_until(lambda: polling.readable(0, fd))
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        other.read(timeout=20)
    wait_until(lambda: not polling.readable(0, fd))
    assert polling.readable(20, channel.fileno()), "this one has not been told"
    with pytest.raises(torchwq.WorkerDied, match="SIGKILL"):
        channel.read(timeout=20)


def test_a_failed_closing_is_told_to_whoever_reads_the_end() -> None:
    channel = torchwq.channel()
    with pytest.raises(ValueError, match="half"), channel:
        channel.write(1)
        raise ValueError("half done")
    assert channel.read()[1] == 1
    with pytest.raises(torchwq.WorkerDied, match="items may be missing"):
        channel.read(nonblocking=True)
    assert channel.read() == (DRAINED, None), "once"


def test_an_error_of_a_signal_handler_sends_nothing_twice() -> None:
    """An alarm that limits the time raises TimeoutError, which is an OSError, perhaps just after the item has left."""
    channel = torchwq.channel()
    socket = socket_of(channel)
    if not socket._sender.is_active:
        pytest.skip("a stream is sent to under a lock")
    if torchwq.native:
        pytest.skip("no signal handler runs in the middle of the native part")
    send = socket._sender._send_bare

    def interrupted(*args: object) -> None:
        send(*args)
        raise TimeoutError("too late")

    socket._sender._send_bare = interrupted  # type: ignore[assignment]
    with pytest.raises(TimeoutError, match="too late"):
        channel.write(1)
    socket._sender._send_bare = send
    channel.write(2)
    assert [channel.read(timeout=20)[1] for _ in range(2)] == [1, 2]
    assert channel.read(nonblocking=True) == (ChannelState.OPEN, None)


def test_a_writer_that_is_late_hears_of_the_closing() -> None:
    channel = torchwq.channel()
    local = channel._core.local
    socket = socket_of(channel)
    channel.write("before")
    socket.close()  # as another process does
    assert local.try_write(1) is ChannelState.CLOSED
    assert (local.state(), local.is_closed, local.num_items()) == (ChannelState.CLOSED, True, 1)
    assert local.try_read() == (ChannelState.CLOSED, "before")
    assert local.try_write(1) is ChannelState.DRAINED


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_bounded_channel_moves_while_a_thread_closes_it_and_another_writes(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = torchwq.channel(capacity=2)
    channel.write(1)
    send, states = SocketChannel.send, []
    others = [threading.Thread(target=lambda: states.append(channel.write(2)), daemon=True)]
    if when == "before":
        channel.close()
    else:
        others.insert(0, threading.Thread(target=channel.close, daemon=True))

    def send_late(self: SocketChannel, payload: Any) -> bool:
        if threading.current_thread() is mover:
            for each in others:
                each.start()
                each.join(0.2)
        return send(self, payload)

    monkeypatch.setattr(SocketChannel, "send", send_late)
    mover = threading.Thread(target=socket_of, args=(channel,), daemon=True)
    mover.start()
    for each in (mover, *others):
        each.join(10)
        assert not each.is_alive()
    assert channel.closed()
    assert list(channel) == ([1] if states == [ChannelState.CLOSED] else [1, 2])


def test_a_writer_that_waits_while_its_channel_moves_keeps_to_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = torchwq.channel(capacity=2)
    channel.write(1, 2)
    send = SocketChannel.send
    moving = threading.Event()
    writer = threading.Thread(target=channel.write, args=(3,), daemon=True)

    def send_late(self: SocketChannel, payload: Any) -> bool:
        if threading.current_thread() is mover and not moving.is_set():
            moving.set()
            writer.start()
            writer.join(0.2)
        return send(self, payload)

    monkeypatch.setattr(SocketChannel, "send", send_late)
    mover = threading.Thread(target=socket_of, args=(channel,), daemon=True)
    mover.start()
    mover.join(10)
    writer.join(0.5)
    assert (writer.is_alive(), channel.num_items()) == (True, 2)
    assert channel.read(timeout=5)[1] == 1
    writer.join(10)
    assert not writer.is_alive()
    assert [channel.read(timeout=5)[1] for _ in range(2)] == [2, 3]


def test_a_bounded_channel_never_waits_for_the_socket_while_it_holds_the_tables_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel = torchwq.channel(capacity=10)
    monkeypatch.setattr(socket_of(channel)._sender, "_send_with_timeout", lambda payload: pytest.fail("it waits"))
    channel.write(1)
    assert channel.read(timeout=5)[1] == 1


def test_what_a_watched_channel_holds_goes_with_it() -> None:
    gc.collect()
    gc.disable()
    try:
        channel = torchwq.channel()
        tensor = torch.zeros(10)
        memory = weakref.ref(tensor.untyped_storage())
        channel.write(tensor)
        channel.fileno()
        del tensor, channel
        wait_until(lambda: memory() is None)
    finally:
        gc.enable()


class Unhashable(type):
    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("process", [False, True])
def test_a_class_that_cannot_be_hashed_is_named(process: bool) -> None:
    odd = Unhashable("Odd", (), {"__reduce__": lambda self: 1 / 0})()
    channel = torchwq.channel()
    if process:
        channel._core.open_to_processes()
    with torchwq.workqueue() as q:
        for write in (channel.write, q.write):
            with pytest.raises(torchwq.MarshalError, match=r"args\[0\]"):
                write(odd)
            with pytest.raises(torchwq.MarshalError, match=r"args\[0\]"):
                write([odd])
    assert channel.num_items() == 0


def test_a_channel_that_comes_while_descriptors_run_out_leaves_none() -> None:
    channel = torchwq.channel(capacity=3)
    socket = socket_of(channel)
    reactor.get()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    failures = 0
    while True:
        gc.collect()
        cleanup.finish()
        before = open_descriptors()
        fds = descriptors_of(socket)
        taken = open_descriptors()
        free = [fd for fd in range(1024) if fd not in taken]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[failures], limits[1]))
        try:
            core = cores.open_(b"of another process", 3, fds)
        except torchwq.ResourceError:
            failures += 1
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_descriptors() == before, f"{failures - 1} were free"
        assert not list(socket.table.other_slots())
    assert failures > 1
    del core


def open_descriptors() -> set[int]:
    return {fd for fd in range(1024) if is_open(fd)}


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
