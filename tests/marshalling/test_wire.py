"""The layout of messages: one class for each kind, and no other module takes a message apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from torchwq.marshalling import wire
from torchwq.memory.anonymous import Descriptor
from torchwq.memory.message import Message
from torchwq.transport import descriptors as duplicates
from torchwq.transport import trailer

from .support import descriptors, identical, marshal, received


def laid_down(obj: Any) -> tuple[bytes, list[int]]:
    payload = marshal(obj)
    return received(payload) if isinstance(payload, Message) else (payload, [])


KINDS: list[tuple[Callable[[], Any], type[wire.Kind], str]] = [
    (lambda: {"a": [1, 2.5, "x"]}, wire.Bare, "{'a': [1, 2.5, 'x']}"),
    (lambda: torch.arange(3), wire.References, "<tensor>"),
    (lambda: [torch.arange(3), np.zeros(10_000)], wire.References, "[<tensor>, <array>]"),
    (lambda: b"x" * 100_000, wire.InBlock, "a large object"),
    (lambda: [[torch.full((1,), float(n)) for n in range(300)], "x" * 40_000], wire.InBlock, "a large object"),
]


@pytest.mark.parametrize(("make", "kind", "text"), KINDS)
def test_each_kind_is_known_by_its_last_byte_and_has_a_description(make: Any, kind: Any, text: str) -> None:
    data, fds = laid_down(make())
    assert wire.KINDS[trailer.kind_of(data)] is kind
    assert wire.describe(data) == kind.describe(data) == text
    wire.discard(data, fds)


def plain(obj: Any) -> Any:
    if isinstance(obj, list):
        return [plain(each) for each in obj]
    return obj.tolist() if isinstance(obj, torch.Tensor) else obj


@pytest.mark.parametrize(("make", "kind", "text"), KINDS)
def test_a_decoded_message_is_whole_and_a_discarded_one_leaves_nothing(make: Any, kind: Any, text: str) -> None:
    before, in_flight = descriptors(), torchwq.memory_stats().in_flight
    obj = make()
    wire.discard(*laid_down(obj))
    data, fds = laid_down(obj)
    assert identical(plain(kind.decode(data, fds)), plain(obj))
    del obj
    assert torchwq.memory_stats().in_flight == in_flight
    assert descriptors() == before


def test_a_pickle_with_descriptors_keeps_them_until_it_is_decoded_or_discarded() -> None:
    before = descriptors()
    with open("/dev/null") as file:
        descriptor = Descriptor(duplicates.dup(file.fileno()))
    data, fds = laid_down(descriptor)
    assert wire.KINDS[trailer.kind_of(data)] is wire.Pickle
    got = wire.Pickle.decode(data, fds)
    assert got.fd >= 0
    got.close()
    data, fds = laid_down(descriptor)
    wire.discard(data, fds)
    descriptor.close()
    assert descriptors() == before


def test_a_backlog_message_has_its_items_in_order_and_discards_them_with_itself() -> None:
    before = descriptors()
    for use in ("read", "throw away"):
        items = [laid_down(obj) for obj in ("first", torch.arange(2), "last")]
        with wire.BacklogMessage.encode(items) as (data, fd):
            mine = duplicates.dup(fd)
        for _, fds in items:
            duplicates.close_fds(fds)
        assert trailer.kind_of(data) == wire.BacklogMessage.kind
        assert wire.describe(data) == "items of a channel"
        if use == "read":
            got = [
                wire.DECODERS[trailer.kind_of(item)](item, fds)
                for item, fds in wire.BacklogMessage.decode(data, [mine])
            ]
            assert (got[0], got[1].tolist(), got[2]) == ("first", [0, 1], "last")
            del got
        else:
            wire.discard(data, [mine])
    assert descriptors() == before


def test_a_trailer_is_read_as_it_was_made() -> None:
    for number in (0, 1, 255, 2**40, 2**64 - 1):
        for kind in (trailer.PICKLE, 1, 3, 200):
            data = b"payload." + trailer.trailer(number, kind)
            assert (trailer.number_of(data), trailer.kind_of(data)) == (number, kind)
            assert trailer.payload_of(data) == b"payload."
    assert trailer.payload_of(b"bare.") == b"bare."


SOURCES = Path(torchwq.__file__).parent
#: A slice, or one byte, of something that a message is called, by a number.
TAKES_APART = re.compile(
    r"\b(data|message|payload|received\[0\])\[(-?\d+|-?\d*:-?\d+|-\d+:-?\d*|:?-?trailer\.SIZE.*)\]"
)


def test_no_other_module_takes_a_message_apart() -> None:
    found = [
        f"{path.relative_to(SOURCES)}: {line.strip()}"
        for path in sorted(SOURCES.rglob("*.py"))
        for line in path.read_text().splitlines()
        if TAKES_APART.search(line)
    ]
    # Messages of other kinds: of the name directory and of links, by the class that lays them down.
    assert [each.partition(":")[0] for each in found] == ["queues/protocol.py", "transport/directory.py"], found
