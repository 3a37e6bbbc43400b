"""Errors that nobody has asked for: each is printed once, with its traceback, as asyncio does it.

A report stands for one error. It is made when the error is known, and taken back when somebody asks for the error. It
is printed when the object that could have been asked is garbage, or when the process ends.

Invariants:

* Whoever takes a report out of ``_pending`` does with it what is to be done: nothing, or printing. So it is printed at
  most once, and never after somebody has asked.
* Printing runs users' code (``__str__`` of an error), so it happens in the thread that cleans up, or in the one that
  ends the process; never in a finalizer, and never in the reactor's thread.
* What a worker tells while its owner's process is ending may be a consequence of that: torchwq's own errors are not
  reported then, and after Ctrl-C none is.

Source: ``Task.__del__`` of asyncio, https://github.com/python/cpython/blob/3.11/Lib/asyncio/tasks.py
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import TypeVar

from .. import futures
from ..errors import QueueClosed, TorchwqError
from ..transport import cleanup
from ..transport.fork import reset_in_child
from . import shutdown
from .worker import Worker

T = TypeVar("T")

log = logging.getLogger("torchwq")


class Report:
    """An error that is printed unless somebody asks for it: see ``retrieved``.

    Args:
        holder: the object that can be asked.
        what: whose error it is.
        error: the error.
        process: the worker that has ended with it, if it has; somebody else may tell of the error then.
    """

    __slots__ = ("_finalizer", "error", "process", "what")

    def __init__(self, holder: object, what: str, error: BaseException, process: Worker | None = None) -> None:
        self.what = what
        self.error = error
        self.process = process
        _pending.add(self)
        self._finalizer = weakref.finalize(holder, _print_later, self)
        self._finalizer.atexit = False

    def retrieved(self) -> None:
        """Somebody has asked for the error."""
        _pending.discard(self)
        self._finalizer.detach()


#: Reports of errors that can still be asked for, and those that are about to be printed.
_pending: set[Report] = set()


@reset_in_child
def _forget() -> None:
    _pending.clear()  # they are the parent's to tell


def log_error(what: str, error: BaseException) -> None:
    """Print an error. Only where users' code may run."""
    log.error("%s: exception was never retrieved", what, exc_info=error)


def should_report(process: Worker, error: BaseException) -> bool:
    """Whether an error with which a worker has ended is one to be told, if nobody asks for it."""
    if isinstance(error, QueueClosed):
        return False
    return not process.ended_at_exit or not (isinstance(error, TorchwqError) or shutdown.interrupted())


def _print_later(report: Report) -> None:
    cleanup.call_soon(functools.partial(_print, report))


def _print(report: Report, at_exit: bool = False) -> None:
    process = report.process
    if process is not None and process.error_will_be_retrieved and not process.error_was_retrieved and not at_exit:
        return  # to one who reads from a queue; if not, then at exit
    try:
        _pending.remove(report)
    except KeyError:
        return  # the end of the process was faster
    if process is None or not process.error_was_retrieved:
        log_error(report.what, report.error)


def _print_all() -> None:
    """At exit."""
    for report in list(_pending):
        _print(report, at_exit=True)


shutdown.at_report(_print_all)


class Future(futures.Future[T]):
    """One whose error is printed if nobody asks for it."""

    #: Whether the error that it has, or will have, is nobody's concern any more.
    _is_retrieved = False
    _report: Report | None = None

    def result(self, timeout: float | None = None) -> T:
        try:
            return super().result(timeout)
        except BaseException as error:
            if error is self._exception:
                shutdown.block_daemon_at_exit()
                self.ignore_error()
            raise
        finally:
            self = None  # type: ignore[assignment] # the error's traceback would keep it alive

    def cancel(self) -> bool:
        """As always; and whoever cancels it does not want to know of an error either, be it too late for cancelling.

        That is what ``Executor.map`` does with the rest when one of its results is an error.
        """
        self.ignore_error()
        return super().cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if error is not None:
            self.ignore_error()
        return error

    def set_exception(self, exception: BaseException | None, what: str = "", process: Worker | None = None) -> None:
        """Complete it with an error. ``what``, ``process``: see ``Report``."""
        if exception is not None and not self._is_retrieved:
            self._report = Report(self, what or "a future", exception, process)
        try:
            super().set_exception(exception)
        except BaseException:  # it was cancelled, or is done
            self.ignore_error()
            raise

    def ignore_error(self) -> None:
        """Somebody knows of the error that it has, or will have; or nobody needs to."""
        self._is_retrieved = True
        report, self._report = self._report, None
        if report is not None:
            report.retrieved()
