"""How a handle travels: counted while it is on its way, however that ends."""

from __future__ import annotations

import os
from typing import Any

import pytest

import torchwq
from tests.conftest import wait_until
from torchwq.handles.reference import HandleRef, Target, register_handle
from torchwq.marshalling import codec
from torchwq.memory.anonymous import duplicates
from torchwq.transport.capabilities import SAME_PROCESS


class Thing(Target):
    """Something that counts its handles on their way."""

    def __init__(self, fd: int) -> None:
        super().__init__(self.count)
        self.fd = fd
        self.pending = self.sent = 0

    def make_handle(self) -> Handle:
        return Handle(self)

    def for_other_process(self) -> Any:
        return receive, (), duplicates([self.fd, self.fd], self.count_sent)

    def count(self, number: int) -> None:
        self.pending += number

    def count_sent(self, number: int) -> None:
        self.sent += number


class Handle:
    def __init__(self, thing: Thing) -> None:
        self.thing = thing


def target_of(handle: Handle) -> Target:
    return handle.thing


def receive(fds: list[int]) -> HandleRef:
    os.close(fds[1])
    return HandleRef(Thing(fds[0]))


register_handle(Handle, target_of)


@pytest.fixture
def thing() -> Any:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield Thing(fd)
    os.close(fd)


def encoded_in_process(obj: Any) -> Any:
    return codec.deliver_local(codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS))


def test_a_handle_is_pending_until_its_message_is_opened(thing: Thing) -> None:
    message = encoded_in_process(Handle(thing))
    assert thing.pending == 1
    assert codec.decode(*message).thing is thing
    assert thing.pending == 0


def test_a_handle_is_not_pending_any_more_when_its_message_is_garbage(thing: Thing) -> None:
    message = encoded_in_process(Handle(thing))
    assert thing.pending == 1
    del message
    wait_until(lambda: thing.pending == 0, what="the end of the counting")


def test_a_message_that_is_opened_again_gives_another_handle_and_counts_once(thing: Thing) -> None:
    marshalled = torchwq.marshal(Handle(thing))
    first, second = marshalled.read(), marshalled.read()
    assert first is not second
    del marshalled
    assert thing.pending == 0


def test_what_goes_to_another_process_has_descriptors_of_its_own_and_is_counted_as_it_leaves(thing: Thing) -> None:
    payload = codec.encode(Handle(thing), codec.CALL_LIMIT)
    assert (thing.pending, thing.sent) == (0, 0)
    message = codec.deliver_local(payload)
    assert thing.sent == 1
    arrived = codec.decode(*message).thing
    assert arrived.fd != thing.fd
    assert os.path.sameopenfile(arrived.fd, thing.fd)
    assert arrived.pending == 0
    os.close(arrived.fd)


def test_what_was_not_sent_after_all_is_not_counted(thing: Thing) -> None:
    payload = codec.encode(Handle(thing), codec.CALL_LIMIT)
    assert not isinstance(payload, bytes)
    payload.on_send()
    payload.on_send_failed()
    assert thing.sent == 0


def test_a_reference_goes_on_to_another_process_and_arrives_unopened(thing: Thing) -> None:
    marshalled = torchwq.marshal(Handle(thing))
    arrived = codec.decode(*codec.deliver_local(codec.encode(marshalled, codec.CALL_LIMIT)))
    made = arrived.read().thing
    assert made is not thing
    assert made is arrived.read().thing
    assert made.pending == 0
    os.close(made.fd)
