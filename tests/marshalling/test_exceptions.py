"""Exceptions of a worker: the original type where it can be, always the original text and traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from torchwq import RemoteError, RemoteTraceback, WorkerDied
from torchwq.marshalling import exceptions

from . import library
from .support import roundtrip, run_in_main


def travelled(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        packed = exceptions.pack(caught)
    return exceptions.unpack(roundtrip(packed, upvalues=True))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("text", 3),
        KeyError("missing"),
        StopIteration(5),
        OSError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        KeyboardInterrupt(),
        library.Carrier("text", {"a": [1]}),
        library.BrokenText("hidden"),
        torchwq.MarshalError("place"),
        torchwq.ResourceError(24, "descriptors"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_keeps_its_type_and_content(error: BaseException) -> None:
    out = travelled(error)
    assert type(out) is type(error)
    assert repr(out.args) == repr(error.args)
    assert isinstance(out.__cause__, RemoteTraceback)
    assert "in travelled" in str(out.__cause__)
    assert type(error).__qualname__ in str(out.__cause__)


def test_attributes_and_notes_come_along() -> None:
    error = ValueError("text")
    error.code = 5  # type: ignore[attr-defined]
    error.__notes__ = ["a note"]  # as add_note does, which Python 3.10 lacks
    out = travelled(error)
    assert out.code == 5  # type: ignore[attr-defined]
    assert out.__notes__ == ["a note"]


def test_a_dead_worker_is_reported_on_with_all_that_is_known() -> None:
    out = travelled(WorkerDied("text", mapid=1, pid=2, signal=9, exitcode=-9))
    assert isinstance(out, WorkerDied)
    assert (str(out), out.mapid, out.pid, out.signal, out.exitcode) == ("text", 1, 2, 9, -9)


DATA: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.arange(3.0),
    "array": lambda: np.zeros(100_000),
    "bytes": lambda: b"x" * 100_000,
}


@pytest.mark.parametrize("kind", DATA)
def test_an_exception_that_carries_data_keeps_its_type(kind: str) -> None:
    data = DATA[kind]()
    out = travelled(library.Carrier("text", data))
    assert type(out) is library.Carrier
    assert np.array_equal(np.asarray(out.data), np.asarray(data))
    assert "in travelled" in str(out.__cause__)


@pytest.mark.parametrize("kind", DATA)
def test_a_worker_may_raise_an_exception_that_carries_data(kind: str) -> None:
    data = DATA[kind]()
    with pytest.raises(library.Carrier, match="text") as caught:
        torchwq.map(1, raise_carrier, data).join(30)
    assert caught.value.args[0] == "text"
    assert np.array_equal(np.asarray(caught.value.data), np.asarray(data))
    assert "in raise_carrier" in str(caught.value.__cause__)


def raise_carrier(data: Any) -> None:
    raise library.Carrier("text", data)


def raise_unpicklable() -> None:
    raise library.Unpicklable("the original text")


def raise_unrebuildable() -> None:
    raise library.Unrebuildable(5, "the original text")


def raise_becomes_text() -> None:
    raise library.BecomesText("the original text")


def raise_raises_on_rebuild() -> None:
    raise library.RaisesOnRebuild("the original text")


RAISERS = [raise_unpicklable, raise_unrebuildable, raise_becomes_text, raise_raises_on_rebuild]


@pytest.mark.parametrize("raiser", RAISERS)
def test_what_cannot_come_back_is_told_by_its_text(raiser: Callable[[], None]) -> None:
    try:
        raiser()
    except Exception as caught:
        kind, out = type(caught), travelled(caught)
    assert type(out) is RemoteError
    assert isinstance(out, RuntimeError)
    assert str(out).startswith(f"{kind.__module__}.{kind.__qualname__}: ")
    assert "the original text" in str(out)
    assert f"in {raiser.__name__}" in str(out.__cause__)


@pytest.mark.parametrize("raiser", RAISERS)
def test_a_worker_may_raise_what_cannot_come_back(raiser: Callable[[], None]) -> None:
    with pytest.raises(RemoteError, match="the original text") as caught:
        torchwq.map(1, raiser).join(30)
    assert f"in {raiser.__name__}" in str(caught.value.__cause__)


def test_an_exception_without_text_can_be_told_too() -> None:
    out = travelled(library.BrokenTextUnpicklable())
    assert type(out) is RemoteError
    assert "BrokenTextUnpicklable" in str(out)
    assert "in travelled" in str(out.__cause__)


def test_a_builtin_is_named_without_its_module() -> None:
    try:
        raise ValueError("text", (i for i in range(3)))
    except ValueError as caught:
        out = travelled(caught)
    assert type(out) is RemoteError
    assert str(out).startswith("ValueError: ('text', <generator")


def test_an_exception_class_of_a_script_comes_back_as_itself() -> None:
    names = run_in_main("""
limit = [1]
class Trouble(Exception):
    def limit(self): return limit
""")
    out = travelled(names["Trouble"]("text"))
    assert type(out) is names["Trouble"]
    assert out.args == ("text",)


def test_the_chain_of_causes_is_in_the_text() -> None:
    try:
        try:
            raise KeyError("the first")
        except KeyError as first:
            raise ValueError("the second") from first
    except ValueError as caught:
        out = travelled(caught)
    assert "KeyError: 'the first'" in str(out.__cause__)
    assert "direct cause" in str(out.__cause__)
