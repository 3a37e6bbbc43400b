"""Descriptions of messages: short, and without importing or running anything that they name."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchwq.marshalling import codec
from torchwq.marshalling.wire import describe

from . import library
from .support import marshal, received, run_in_main


def described(obj: Any) -> str:
    data, fds = received(marshal(obj))
    codec.discard(data, fds)
    return describe(data)


@pytest.mark.parametrize("obj", [1, None, "text", [1, "two", 3.0], {"a": (1, 2)}, {1}, b"bytes", True])
def test_plain_objects_are_shown(obj: Any) -> None:
    assert described(obj) == repr(obj)


def test_an_object_that_is_not_rebuilt_is_named() -> None:
    assert described(torch.ones(3)) == "<tensor>"
    assert described({"x": torch.ones(3), "y": np.ones(3)}) == "{'x': <tensor>, 'y': <array>}"
    assert described(np.ones((2, 3))[:, ::2]) == "<array>"
    assert described([library.Holder(a=1)]) == "[<Holder>]"
    assert described((library.plain, [5])) == "(<plain>, [5])"
    assert "5" in described((library.Slotted(1), 5, library.Holder, int))


def test_a_question_is_shown_with_its_arguments() -> None:
    assert described((library.plain, (torch.ones(1), "job 7"))) == "(<plain>, (<tensor>, 'job 7'))"


def test_a_function_by_value_is_not_rebuilt() -> None:
    assert len(described((lambda: os.getpid(), 1))) <= 200


def test_large_messages_are_not_looked_at() -> None:
    assert described(np.zeros(100_000)) == "<array>"  # whose data are not in the message
    assert described(b"x" * 100_000) == "a large object"


@pytest.mark.parametrize("obj", ["x" * 5000, list(range(3000)), dict.fromkeys(range(100), "y" * 50), ["z" * 300] * 20])
def test_a_description_is_short(obj: Any) -> None:
    assert 10 < len(described(obj)) <= 200


class Runs:
    """Leaves a trace if it is rebuilt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Stateful:
    def __getstate__(self) -> Any:
        return {"a": 1}

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("rebuilt")


def test_nothing_that_a_message_names_is_run(tmp_path: Path) -> None:
    path = tmp_path / "made by unpickling"
    text = described([Runs(path), "after"])
    assert not path.exists()
    assert "mkdir" in text
    assert "after" in text
    assert described([Stateful()]) == "[<Stateful>]"


def test_nothing_that_a_message_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for protocol_part in (b"\x8c\x0enever_imported\x8c\x04Name\x93.", b"cnever_imported\nName\n."):
        text = describe(b"\x80\x05" + protocol_part + bytes(9))
        assert "Name" in text or "type" in text
    assert "never_imported" not in sys.modules


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x05",
        b"not a pickle.",
        b"\x80\x05K\x01",
        b"\x80\x05\x97.",  # an out-of-band buffer that is not there
        b"\x80\x05K\x01Q.",  # a persistent id
        b"\x80\x05\x8c\x01a\x8c\x03b\x00c\x93.",  # a name that no class can have
        b"\x80\x05]]R.",
    ],
)
def test_a_broken_message_has_a_description_too(data: bytes) -> None:
    assert len(describe(data + bytes(9))) <= 200


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 400), place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_message_has_a_description_too(cut: int, place: int, byte: int) -> None:
    whole = pickle.dumps({"a": [1, 2.0, "x" * 20], "b": (torch.Size([1]), range(3)), "c": {1, 2}}, 5)
    damaged = bytearray(whole)
    damaged[place % len(damaged)] = byte
    for data in (whole[: cut % len(whole)], bytes(damaged)):
        assert len(describe(data + bytes(9))) <= 200


def test_a_scripts_definitions_are_named() -> None:
    script = run_in_main("class Job:\n    def __init__(self, x): self.x = x\ndef work(x): return x")
    assert described((script["work"], script["Job"](5), 7)) == "(<work>, <Job>, 7)"
