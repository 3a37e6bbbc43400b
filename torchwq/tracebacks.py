"""Leaves torchwq's own frames out of the tracebacks that users read.

Between a user's call and his own function that failed there are frames that only say how one reached the other. A
public call that raises cuts those below it, and a worker those above the user's function. What is left of ours is the
call. With TORCHWQ_LOG=debug in the environment, all of them stay.

A traceback is cut by making a shorter one from the same frames, which ``types.TracebackType`` is public for.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Final, TypeVar

import cloudpickle

E = TypeVar("E", bound=BaseException)

#: With the value "debug", all frames are shown.
VARIABLE: Final = "TORCHWQ_LOG"
#: Where the files are whose frames are left out: this package's, and those of cloudpickle, which calls it back.
_OWN: Final = tuple(
    os.path.join(os.path.dirname(os.path.abspath(file)), "") for file in (__file__, cloudpickle.__file__)
)


def _cut(traceback: TracebackType | None) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_OWN):
            kept.append(traceback)
        traceback = traceback.tb_next
    cut: TracebackType | None = None
    for each in reversed(kept):
        line: int | None = each.tb_lineno  # None for code without line numbers
        cut = TracebackType(cut, each.tb_frame, each.tb_lasti, -1 if line is None else line)
    return cut


def trim(error: E) -> E:
    """Leave torchwq's frames out of the traceback of ``error``, and of those it was caused by. Returns ``error``.

    An exception's class may be the user's, and refuse to be changed: its own methods are not asked.
    """
    if os.environ.get(VARIABLE, "").lower() == "debug":
        return error
    trimmed: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in trimmed:
            continue
        trimmed.add(id(each))
        BaseException.with_traceback(each, _cut(each.__traceback__))
        pending += each.__cause__, each.__context__
    return error


def set_cause(error: BaseException, cause: BaseException) -> None:
    """``error.__cause__ = cause``, also if the class of ``error`` is frozen."""
    object.__setattr__(error, "__cause__", cause)


def detach(error: BaseException, handled: BaseException) -> None:
    """``error`` was raised while ``handled`` was, and has nothing to do with it: it is not shown beside ``error``."""
    seen: set[int] = set()
    while error.__context__ is not None and id(error) not in seen:
        seen.add(id(error))
        if error.__context__ is handled:
            object.__setattr__(error, "__context__", None)
            return
        error = error.__context__
