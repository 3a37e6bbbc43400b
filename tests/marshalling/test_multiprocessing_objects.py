"""Objects of multiprocessing: connections and sockets travel in any message, locks only to a new worker."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import torchwq
from torchwq import MarshalError
from torchwq.marshalling import codec
from torchwq.transport.capabilities import SAME_MACHINE, SAME_PROCESS

from .support import LIMIT, Peer, descriptors, roundtrip

SPAWN = multiprocessing.get_context("spawn")


#: multiprocessing keeps the memory of shared values, once there are some, as long as the process lives.
_heap = SPAWN.RawValue("i", 3)


class OwnConnection(multiprocessing.connection.Connection):
    """A subclass, for which multiprocessing has no reducer."""

    label = ""


class Registered:
    """A class of a library that has registered a reducer with multiprocessing."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


def _rebuild(kind: str, duplicate: Any) -> Registered:
    return Registered(duplicate if kind == "number" else duplicate.detach())


def _reduce(registered: Registered) -> Any:
    return _rebuild, ("duplicate", multiprocessing.reduction.DupFd(registered.fd))  # type: ignore[attr-defined]


class RegisteredByNumber(Registered):
    pass


def _reduce_by_number(registered: Registered) -> Any:
    popen = multiprocessing.context.get_spawning_popen()  # type: ignore[attr-defined]
    return _rebuild, ("number", popen.duplicate_for_child(registered.fd))


multiprocessing.reduction.register(Registered, _reduce)  # type: ignore[arg-type]
multiprocessing.reduction.register(RegisteredByNumber, _reduce_by_number)  # type: ignore[arg-type]


def here(obj: Any) -> Any:
    return codec.decode(*codec.deliver_local(codec.encode_one(obj, LIMIT, "obj", peer=SAME_PROCESS)))


def through_marshal(obj: Any) -> Any:
    marshalled = torchwq.marshal(obj)
    first = marshalled.read()
    if isinstance(first, socket.socket):
        first.close()  # which is its own, so what is read later is open
    return roundtrip(marshalled).read()


WAYS: list[Callable[[Any], Any]] = [roundtrip, here, through_marshal]


def _own_pipe() -> tuple[OwnConnection, OwnConnection]:
    first, second = socket.socketpair()
    return OwnConnection(first.detach()), OwnConnection(second.detach())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [SPAWN.Pipe, _own_pipe])
def test_a_connection_travels_as_a_descriptor_of_its_own(make: Any, way: Callable[[Any], Any]) -> None:
    before = descriptors()
    ours, theirs = make()
    vars(theirs)["label"] = "mine"
    out = way({"pipe": theirs})["pipe"]
    assert type(out) is type(theirs)
    assert out.fileno() not in (ours.fileno(), theirs.fileno())
    if make is _own_pipe:
        assert out.label == "mine"
    theirs.close()
    out.send("from there")
    assert ours.recv() == "from there"
    ours.close()
    out.close()
    del out
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("way", WAYS)
def test_a_socket_travels_as_a_descriptor_of_its_own(way: Callable[[Any], Any]) -> None:
    ours, theirs = socket.socketpair()
    with ours, way(theirs) as out:
        assert out.fileno() != theirs.fileno()
        theirs.close()
        out.sendall(b"from there")
        assert ours.recv(100) == b"from there"


@pytest.mark.parametrize("way", [roundtrip, here])
@pytest.mark.parametrize("cls", [Registered, RegisteredByNumber])
def test_what_a_library_has_registered_travels_with_its_descriptors(cls: Any, way: Callable[[Any], Any]) -> None:
    before = descriptors()
    reading, writing = os.pipe()
    out = way([cls(writing)])[0]
    assert out.fd not in (reading, writing)
    os.close(writing)
    os.write(out.fd, b"from there")
    assert os.read(reading, 100) == b"from there"
    os.close(reading)
    os.close(out.fd)
    gc.collect()
    assert descriptors() == before


def test_a_connection_goes_to_a_worker_and_back(peer: Peer) -> None:
    ours, theirs = SPAWN.Pipe()
    back = peer.echo(theirs)
    theirs.close()
    back.send(1)
    assert ours.recv() == 1
    back.close()
    with pytest.raises(EOFError):  # the worker has none left either
        ours.recv()
    ours.close()


def test_more_descriptors_than_one_message_can_carry_arrive() -> None:
    pairs = [socket.socketpair() for _ in range(150)]
    gc.collect()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = roundtrip([each for pair in pairs for each in pair])
    assert not told, "of a socket of the message's own"
    for first, second in pairs:
        first.close()
        second.close()
    out[-2].sendall(b"x")
    assert out[-1].recv(1) == b"x"
    for each in out:
        each.close()


def test_what_is_closed_or_cannot_travel_is_refused_with_its_place() -> None:
    ours, theirs = SPAWN.Pipe()
    ours.close()
    theirs.close()
    closed = socket.socket()
    closed.close()
    with open(os.devnull) as file:
        refused: dict[str, Any] = {"connection": theirs, "socket": closed, "file": file}
        for name, each in refused.items():
            with pytest.raises(MarshalError, match=rf"args\[0\]\['{name}'\] cannot be sent"):
                codec.encode_all([{name: each}], LIMIT)


INHERITED: dict[str, Callable[[], Any]] = {
    "Lock": SPAWN.Lock,
    "RLock": SPAWN.RLock,
    "Semaphore": SPAWN.Semaphore,
    "Event": SPAWN.Event,
    "Condition": SPAWN.Condition,
    "Barrier": lambda: SPAWN.Barrier(1),
    "Queue": SPAWN.Queue,
    "SimpleQueue": SPAWN.SimpleQueue,
    "Value": lambda: SPAWN.Value("i", 3),
    "Array": lambda: SPAWN.Array("i", 3),
    "RawArray": lambda: SPAWN.RawArray("i", 3),
}


@pytest.mark.parametrize("kind", INHERITED)
def test_what_processes_inherit_is_refused_by_an_ordinary_message_with_its_place(kind: str) -> None:
    obj = {"held": [INHERITED[kind]()]}
    for stays in (False, True):
        with pytest.raises(MarshalError, match=r"args\[0\]\['held'\]\[0\] cannot be sent: .* through inheritance"):
            codec.encode_all([obj], LIMIT, peer=SAME_PROCESS if stays else SAME_MACHINE)
        held: list[Any] = []
        payload = codec.encode_all([obj], LIMIT, peer=SAME_PROCESS if stays else SAME_MACHINE, worker_resources=held)[0]
        if stays:
            codec.decode(*codec.deliver_local(payload))
    with pytest.raises(MarshalError, match="through inheritance"):  # nothing of the others is left in the encoder
        codec.encode_all([obj], LIMIT)


def test_a_lock_that_only_a_forked_process_could_use_is_refused_with_the_remedy() -> None:
    lock = multiprocessing.get_context("fork").Lock()
    with pytest.raises(MarshalError, match=r"args\[0\] cannot be sent: .*get_context\('spawn'\).Lock"):
        codec.encode_all([lock], LIMIT, worker_resources=[])
    payload = codec.encode_all([lock], LIMIT, peer=SAME_PROCESS, worker_resources=[])[0]
    assert codec.decode(*codec.deliver_local(payload)) is lock


def test_a_ctype_with_memory_of_its_own_goes_by_value_whoever_shares_its_type() -> None:
    shared = SPAWN.RawValue("i", 3)
    assert isinstance(shared, ctypes.c_int)
    assert roundtrip(ctypes.c_int(5)).value == 5
