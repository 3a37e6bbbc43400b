"""Descriptors stay at home where the reader has them, in whatever order messages are sent, taken and decoded."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import signal
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import torchwq
from tests.conftest import wait_until
from tests.injection import in_the_middle
from tests.marshalling.support import Peer, apply_to_kept, drop_kept, keep, started_peer
from tests.queues.handles import worker_handle
from torchwq import _native
from torchwq.marshalling.wire import References
from torchwq.memory import maintenance, promises, recycling, state_lock, tree_table
from torchwq.memory.anonymous import Descriptor
from torchwq.memory.message import Message
from torchwq.memory.promises import KeptBlocks, SenderLeft, SentBlocks
from torchwq.transport.endpoint import Received
from torchwq.transport.trailer import trailer


@pytest.fixture
def peer() -> Iterator[Peer]:
    with started_peer() as started:
        yield started


def message_with(numbers: list[int]) -> Message:
    blocks: list[Any] = [SimpleNamespace(number=number, nbytes=8) for number in numbers]
    data = b"pickle" + b"".join(References.tail((), blocks))
    return References.encode(data, [-1] * len(numbers), [], blocks, only_blocks=True)


def kept_by(queue: Any) -> int:
    """How many descriptors the queue's owner keeps for its workers."""
    return sum(map(len, queue._role._answer_socket.kept._kept.values()))


class Wire(RuleBasedStateMachine):
    """Senders of one connection, its reader, and threads that decode what they have taken when they like."""

    ROOM = 3

    def __init__(self) -> None:
        super().__init__()
        self.kept = KeptBlocks(References, [0])
        #: Messages in the connection, with the numbers that each refers to.
        self.socket: deque[tuple[Received, list[int]]] = deque()
        self.senders: dict[int, SentBlocks] = {}
        #: Messages that were taken and not decoded.
        self.taken: list[tuple[Received, list[int]]] = []
        self.current = set(range(1, 7))
        self.last_number = 6
        self.left_out = 0
        table = tree_table.current()
        assert table is not None
        self.is_current = table.is_current
        table.is_current = lambda number: number in self.current  # type: ignore[method-assign]
        self.before = len(os.listdir("/proc/self/fd"))

    def send_control(self, message: Any) -> None:
        self.socket.append(((message.data + trailer(0, message.kind), []), []))

    @precondition(lambda self: len(self.senders) < 3)
    @rule()
    def enter(self) -> None:
        sender, _ = self.kept.add_sender()
        self.senders[sender] = SentBlocks(sender, self.ROOM, self.send_control, [0])

    @precondition(lambda self: self.senders)
    @rule(data=st.data(), is_written_long_ago=st.booleans())
    def send(self, data: Any, is_written_long_ago: bool) -> None:
        """A message may have been written before one of its blocks was retired."""
        sender = self.senders[data.draw(st.sampled_from(sorted(self.senders)))]
        known = sorted(self.current) if not is_written_long_ago else list(range(1, self.last_number + 1))
        numbers = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        message = message_with(numbers)
        fds, number = sender.choose(message)
        sent = message.data + trailer(number, message.kind), [os.dup(0) for _ in fds]
        self.socket.append((sent, numbers))
        if number:
            sender.note_promise(message)
        self.left_out += not fds

    @precondition(lambda self: self.senders)
    @rule(data=st.data())
    def revoke_stale(self, data: Any) -> None:
        self.senders[data.draw(st.sampled_from(sorted(self.senders)))].revoke_stale()

    @precondition(lambda self: self.senders)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        sender = data.draw(st.sampled_from(sorted(self.senders)))
        del self.senders[sender]
        self.send_control(SenderLeft(sender))

    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        """A block's memory is another block's now, whose number is a new one."""
        self.current.discard(data.draw(st.sampled_from(sorted(self.current))))
        self.last_number += 1
        self.current.add(self.last_number)

    @precondition(lambda self: self.socket)
    @rule()
    def take(self) -> None:
        received, numbers = self.socket.popleft()
        answer = self.kept.process(received)
        if answer is not None:
            self.taken.append((answer, numbers))
        else:
            assert not numbers

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def decode(self, data: Any) -> None:
        """Any of those that were taken."""
        (_, fds), numbers = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        if fds:
            for fd in fds:
                os.close(fd)
            return
        assert isinstance(fds, promises.Epoch)
        for number in numbers:
            os.fstat(fds.descriptor(number))

    @invariant()
    def what_was_taken_can_be_decoded(self) -> None:
        for (_, fds), numbers in self.taken:
            if isinstance(fds, promises.Epoch):
                assert all(fds.descriptor(number) >= 0 for number in numbers)

    @invariant()
    def no_sender_has_more_than_its_room(self) -> None:
        assert all(len(kept) <= 2 * self.ROOM for kept in self.kept._kept.values())

    def teardown(self) -> None:
        while self.socket:
            self.take()
        self.kept.close()
        while self.taken:
            (_, fds), numbers = self.taken.pop()
            if isinstance(fds, promises.Epoch):
                assert all(fds.descriptor(number) >= 0 for number in numbers)
            else:
                for fd in fds:
                    os.close(fd)
            del fds
        assert len(os.listdir("/proc/self/fd")) == self.before, "all descriptors are closed with the last message"
        table = tree_table.current()
        assert table is not None
        table.is_current = self.is_current  # type: ignore[method-assign]


Wire.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWire = Wire.TestCase


def test_a_message_that_another_thread_has_taken_keeps_what_it_refers_to() -> None:
    kept = KeptBlocks(References, [0])
    sender, _ = kept.add_sender()
    data = message_with([7]).data
    fd = os.dup(0)
    first = kept.process((data + trailer(sender, References.kind), [fd]))
    second = kept.process((data + trailer(0, References.kind), []))
    assert first is not None
    assert second is not None
    assert kept.process((SenderLeft(sender).data + trailer(0, SenderLeft.kind), [])) is None
    kept.close()
    del first
    assert isinstance(second[1], promises.Epoch)
    assert second[1].descriptor(7) == fd
    os.fstat(fd)
    del second
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def make_and_keep(size: int) -> torch.Tensor:
    tensor = torch.full((size,), 4.0)
    keep(tensor)
    return tensor


def test_a_worker_that_is_gone_has_its_last_answers_read_and_then_nothing_kept() -> None:
    with torchwq.workqueue() as queue:
        worker = torchwq.map(1, answer_with_the_same_tensor_until_killed, queue)
        pid = queue.read(timeout=30)
        first = queue.read(timeout=30)
        assert kept_by(queue) == 1
        queue.write(None)
        wait_until(lambda: queue._role.end.is_readable(), what="the second answer")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(torchwq.WorkerDied):
            worker.join(20)
        second = queue.read(timeout=30)
        assert second.data_ptr() == first.data_ptr()
        assert (second == 3).all()
        with pytest.raises(torchwq.WorkerDied):
            queue.read(timeout=30)
        wait_until(lambda: (queue.read(nonblocking=True), not kept_by(queue))[1], what="giving up what was kept")
    del first, second


def answer_with_the_same_tensor_until_killed(queue: torchwq.WorkQueue) -> None:
    tensor = torch.full((100,), 3.0)
    queue.write(os.getpid(), tensor)
    queue.read()
    queue.write(tensor)
    signal.pause()


def test_a_program_that_does_not_read_gets_rid_of_what_its_worker_has_given_up(peer: Peer) -> None:
    peer.ask(make_and_keep, 300)
    assert kept_by(peer.queue) == 1
    peer.ask(drop_kept)
    maintenance.run()  # the tensor is gone here, too
    peer.queue.write((retire_all, ()))
    wait_until(lambda: not kept_by(peer.queue), what="the kept descriptors to be closed")
    peer.queue.read(timeout=30)


def retire_all() -> None:
    from tests.marshalling.support import retire_memory

    retire_memory()


def test_a_queue_in_which_nothing_is_to_be_read_is_not_ready(peer: Peer) -> None:
    """A control message of the worker is no answer."""
    peer.ask(make_and_keep, 300)
    peer.ask(drop_kept)
    maintenance.run()
    peer.queue.write((maintain_after_the_answer, ()))
    peer.queue.read(timeout=30)
    wait_until(lambda: peer.queue._role.end.is_readable(), what="the control message")
    assert torchwq.select([peer.queue], timeout=0) == []
    assert not kept_by(peer.queue)


def maintain_after_the_answer() -> None:
    import threading
    import time

    from tests.marshalling.support import retire_memory

    threading.Thread(target=lambda: (time.sleep(0.5), retire_memory())).start()


def test_a_sender_without_room_sends_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "_MAX_ROOM", 2)
    with started_peer() as small:
        for number in range(6):
            assert (small.ask(make_number, number) == number).all()
        assert kept_by(small.queue) == 2
        assert small.ask(sum_of_kept) == sum(100 * n for n in range(6))
        small.ask(drop_kept)


def make_number(number: int) -> torch.Tensor:
    tensor = torch.full((100,), float(number))
    keep([*(apply_to_kept(list) if number else []), tensor])
    return tensor


def sum_of_kept() -> float:
    return float(apply_to_kept(lambda kept: sum(map(torch.sum, kept))))


def test_rooms_of_all_senders_together_leave_descriptors_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises.limits, "max_open_blocks", lambda: 200)
    monkeypatch.setattr(promises, "_granted", 0)
    connections = [KeptBlocks(References, [0]) for _ in range(40)]
    rooms = [each.add_sender()[1] for each in connections]
    assert rooms[0] > rooms[5] > 0
    assert promises._granted == sum(rooms) <= 100
    for each in connections:
        each.close()
    assert promises._granted == 0


def test_an_answer_of_a_sender_that_was_stopped_for_long_arrives(peer: Peer) -> None:
    """It is stopped between choosing what goes along and sending; its reader retires all that it can meanwhile."""
    mine = torch.full((300,), 4.0)
    peer.ask(keep, mine)
    assert (peer.ask(apply_to_kept, itself) == 4).all()
    del mine
    pid = peer.ask(os.getpid)
    peer.queue.write((stop_in_the_middle_of_sending, ()))
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, what="the worker to be stopped")
    gc.collect()
    for _ in range(5):
        maintenance.run()
    recycling.expire_in_flight()
    os.kill(pid, signal.SIGCONT)
    good, out = peer.queue.read(timeout=30)
    assert good, out
    assert (out == 4).all()
    peer.ask(drop_kept)


def itself(kept: Any) -> Any:
    return kept


def stop_in_the_middle_of_sending() -> Any:
    choose = SentBlocks.choose
    for find in list(promises._senders):
        sender = find()
        if sender is not None:
            sender.uncertain.add(0)  # which is no block's number: the native part leaves the choice to ``choose``

    def stop(self: SentBlocks, message: Any) -> Any:
        SentBlocks.choose = choose  # type: ignore[method-assign]
        chosen = choose(self, message)
        os.kill(os.getpid(), signal.SIGSTOP)
        return chosen

    SentBlocks.choose = stop  # type: ignore[method-assign]
    return apply_to_kept(itself)


def test_descriptors_are_closed_with_what_keeps_them() -> None:
    kept = KeptBlocks(References, [0])
    sender, _ = kept.add_sender()
    fd = os.dup(0)
    kept.process((message_with([7]).data + trailer(sender, References.kind), [fd]))
    assert isinstance(kept._kept[sender][7], Descriptor)
    del kept
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_answer_that_is_read_in_the_middle_of_reading_another_has_what_that_one_has_brought() -> None:
    """A signal handler reads; the first message brings the descriptor, the second does without."""

    def take() -> None:
        received = queue._role.take()
        if received is not None:
            data, fds = received
            if isinstance(fds, promises.Epoch):
                taken.append(min(map(fds.descriptor, References.numbers(data))) >= 0)
            else:
                taken.append(True)
                os.close(*fds)

    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        for at in itertools.count():
            tensor = torch.full((16,), 1.0)
            worker.write(tensor, tensor)
            taken: list[bool] = []
            more = in_the_middle(take, take, at)
            while len(taken) < 2:
                take()
            assert all(taken), f"at place {at}"
            if not more:
                break
        assert at > 20


@pytest.mark.parametrize("make", [int, torch.tensor], ids=["int", "tensor"])
def test_waiting_for_an_answer_in_the_middle_of_reading_one_loses_nothing(make: Any) -> None:
    """Where a tensor would need what the read further up has just brought, it is refused."""
    got: list[int] = []
    refused: list[str] = []

    def read() -> None:
        got.append(int(queue.read(timeout=10)))

    def read_in_the_middle() -> None:
        try:
            read()
        except RuntimeError as error:
            refused.append(str(error))

    with torchwq.workqueue() as queue, worker_handle(queue) as worker:
        for at in itertools.count():
            worker.write(make(1), make(2))
            got.clear()
            more = in_the_middle(read, read_in_the_middle, at)
            while len(got) < 2:
                read()
            assert sorted(got) == [1, 2]
            if not more:
                break
    # In the native part there is no place between receiving an answer and knowing what it has brought.
    assert bool(refused) == (make is not int and _native.core is None)
    assert all("nonblocking=True" in each for each in refused)


def test_an_answer_that_is_taken_while_the_reader_closes_is_thrown_away() -> None:
    kept = KeptBlocks(References, [0])
    sender, room = kept.add_sender()
    assert room
    data = message_with([7]).data
    kept.process((data + trailer(sender, References.kind), [os.dup(0)]))
    kept.close()
    assert kept.process((data + trailer(0, References.kind), [])) is None


def test_who_comes_to_a_closed_connection_takes_no_room_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "_granted", 0)
    kept = KeptBlocks(References, [0])
    kept.close()
    assert kept.add_sender()[1] == 0
    assert promises._granted == 0


def test_workers_that_come_and_go_while_nobody_reads_give_their_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PERIOD", 0.01)
    with torchwq.workqueue() as queue:
        before = promises._granted
        for _ in range(3):
            worker_handle(queue).close()
        wait_until(lambda: promises._granted == before, what="the rooms to be given back")


class RecordingOutbox:
    def __init__(self) -> None:
        self.had_lock: list[bool] = []

    def send_control(self, message: Any) -> None:
        self.had_lock.append(state_lock.is_locked_by_this_thread())


def test_promises_are_taken_back_without_the_lock_of_the_memory() -> None:
    """Whoever sends sees to what others have handed in, and so waits for locks of theirs."""
    outbox = RecordingOutbox()
    sent = SentBlocks(1, 10, outbox.send_control, [0])
    sent.note_promise(message_with([7]))
    maintenance.run()
    assert outbox.had_lock == [False]


def test_what_a_lost_message_has_brought_is_brought_again() -> None:
    with torchwq.workqueue() as queue:
        worker = torchwq.map(1, answer_with_the_same_tensor, queue)
        queue.write("question")
        wait_until(lambda: queue._role.end.is_readable(), what="the answer")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            with pytest.raises(torchwq.ResourceError, match="a message was lost"):
                queue.read(timeout=30)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for _ in range(3):
            queue.write("question")
            assert (queue.read(timeout=30) == 3).all()
        assert kept_by(queue) == 1
        queue.write(None)
        worker.join(20)


def answer_with_the_same_tensor(queue: torchwq.WorkQueue) -> None:
    tensor = torch.full((100,), 3.0)
    for _ in queue:
        queue.write(tensor)
