"""Exceptions of a worker: the original type where it can be, always the original text and traceback."""

from __future__ import annotations

import builtins
import sys
import threading
import time
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


def raise_becomes_text() -> None:
    raise library.BecomesText("the original text")


def raise_raises_on_rebuild() -> None:
    raise library.RaisesOnRebuild("the original text")


RAISERS = [raise_becomes_text, raise_raises_on_rebuild]


@pytest.mark.parametrize("raiser", RAISERS)
def test_an_exception_that_cannot_travel_arrives_as_its_text(raiser: Callable[[], None]) -> None:
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


def test_an_exception_without_text_arrives_too() -> None:
    out = travelled(library.BrokenTextUnpicklable())
    assert type(out) is library.BrokenTextUnpicklable
    assert out.args == ("hidden",)
    assert "BrokenTextUnpicklable" in str(out.__cause__)
    assert "in travelled" in str(out.__cause__)


def test_a_builtin_is_named_without_its_module() -> None:
    assert exceptions.pack(ValueError("text")).kind == "ValueError"
    assert exceptions.pack(library.BecomesText("text")).kind == f"{library.__name__}.BecomesText"


def _notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_an_attribute_that_cannot_travel_is_left_behind_and_a_note_says_so() -> None:
    error = library.Unpicklable("text")
    error.code, error.myself = 5, error  # type: ignore[attr-defined]
    error.__notes__ = ["a note of its own"]  # type: ignore[attr-defined]
    vars(error)["events"] = [1, threading.Lock(), {"key": threading.Lock()}]
    vars(error)["data"] = torch.arange(3.0)
    out: Any = travelled(error)
    assert type(out) is library.Unpicklable
    assert out.args == ("text",)
    assert (out.code, out.events[0]) == (5, 1)
    assert out.myself is out
    assert "a note of its own" in _notes(out)
    assert out.events[1].startswith("<unlocked")
    assert out.data.tolist() == [0, 1, 2]
    for place in (".lock", ".events[1]", ".events[2]['key']", "cannot pickle '_thread.lock' object"):
        assert place in _notes(out)


def test_arguments_that_cannot_travel_arrive_as_their_texts() -> None:
    out = travelled(ValueError("text", (i for i in range(3)), [threading.Lock()]))
    assert type(out) is ValueError
    assert out.args[0] == "text"
    assert out.args[1].startswith("<generator")
    assert out.args[2][0].startswith("<unlocked")
    assert "args[1]" in _notes(out)
    assert "args[2][0]" in _notes(out)


@pytest.mark.parametrize(
    ("error", "args", "note"),
    [
        (library.Unrebuildable(5, "text"), ("5: text",), "TypeError"),
        (library.EndsTheProcess("text"), ("text", True), "SystemExit: 3"),
        (library.EndsTheProcessInReduce("text"), ("text",), ""),
        (library.OwnOSError("name"), (2, "no such host"), "TypeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_exception_whose_class_cannot_make_it_again_keeps_its_type(
    error: Exception, args: tuple[Any, ...], note: str
) -> None:
    vars(error)["more"] = 7
    out: Any = travelled(error)
    assert type(out) is type(error)
    assert out.args == args
    assert out.more == 7
    assert note in _notes(out)
    if isinstance(error, OSError):
        assert (out.errno, out.filename, str(out)) == (2, "name", str(error))


def test_an_attribute_that_cannot_be_read_leaves_the_type() -> None:
    error = library.Carrier("text", None)
    vars(error).update(data=library.Exits(), code=3)
    out: Any = travelled(error)
    assert type(out) is library.Carrier
    assert (out.args, out.code) == (("text", None), 3)
    assert ".data" in _notes(out)


def test_slots_of_an_exception_come_along() -> None:
    error = library.SlottedError("text")
    error.code = 4  # type: ignore[attr-defined]
    assert travelled(error).code == 4  # type: ignore[attr-defined]


def test_exceptions_in_exceptions_keep_their_types() -> None:
    error = library.Carrier("text", {"inner": [library.Unrebuildable(5, "inner")]})
    error.cause = library.Unpicklable("cause")  # type: ignore[attr-defined]
    out: Any = travelled(error)
    assert type(out.args[1]["inner"][0]) is library.Unrebuildable
    assert type(out.cause) is library.Unpicklable
    assert ".lock" in _notes(out.cause)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_a_group_of_exceptions_keeps_what_is_in_it() -> None:
    make: Any = getattr(builtins, "ExceptionGroup", None)
    out: Any = travelled(make("group", [library.Unpicklable("a"), library.Unrebuildable(5, "b"), KeyError("c")]))
    assert type(out) is make
    assert [type(each) for each in out.exceptions] == [library.Unpicklable, library.Unrebuildable, KeyError]
    assert ".lock" in _notes(out.exceptions[0])


def raise_what_ends_the_process() -> None:
    raise library.EndsTheProcess("the original text")


def raise_what_ends_the_process_in_reduce() -> None:
    raise library.EndsTheProcessInReduce("the original text")


def raise_unrebuildable() -> None:
    raise library.Unrebuildable(5, "the original text")


def raise_one_of(mapid: int) -> None:
    raisers = (
        raise_unpicklable,
        raise_unrebuildable,
        raise_what_ends_the_process,
        raise_what_ends_the_process_in_reduce,
    )
    raisers[mapid]()


def test_the_owner_can_catch_what_its_workers_raise() -> None:
    workers = torchwq.map(4, raise_one_of)
    seen: set[type] = set()
    until = time.monotonic() + 50
    while len(seen) < 4 and time.monotonic() < until:
        try:
            workers.check_errors()
            time.sleep(0.02)
        except (
            library.Unpicklable,
            library.Unrebuildable,
            library.EndsTheProcess,
            library.EndsTheProcessInReduce,
        ) as error:
            assert "the original text" in str(error)
            assert isinstance(error.__cause__, RemoteTraceback)
            seen.add(type(error))
    assert len(seen) == 4


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
