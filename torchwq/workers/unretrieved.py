"""Logs errors that were never retrieved, each once, with its traceback, as asyncio does.

A report stands for one error. The report is made when the error is known, and dropped when a caller retrieves the
error. It is printed when the object that would give the error is garbage, or when the process exits.

Note [unretrieved errors]. The invariants:

* The thread that takes a report out of ``_pending`` drops or prints it. So an error is printed at most once, and never
  after it was retrieved.
* Printing runs users' code (``__str__`` of an error). So the cleanup thread prints, or the thread that exits; never a
  finalizer, and never the reactor's thread.
* A worker's error may be a consequence of its owner's exit. torchwq's own errors are not reported then, and after
  Ctrl-C none is.

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
    """An error that is printed unless a caller retrieves it: see ``retrieved``.

    Args:
        holder: the object from which a caller would get the error.
        what: whose error it is, for the log.
        error: the error.
        process: the worker that ended with the error, if one did: a reader of a queue may get the error too.
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
        """A caller has got the error: do not print it."""
        _pending.discard(self)
        self._finalizer.detach()


#: Reports of errors that a caller can still retrieve, and those that are about to be printed.
_pending: set[Report] = set()


@reset_in_child
def _forget() -> None:
    _pending.clear()  # the parent prints them


def log_error(what: str, error: BaseException) -> None:
    """Print an error. Call it only in threads that may run users' code."""
    log.error("%s: exception was never retrieved", what, exc_info=error)


def should_report(process: Worker, error: BaseException) -> bool:
    """Whether to print the error of an ended worker if no caller retrieves it."""
    if isinstance(error, QueueClosed) or (process.was_terminated and isinstance(error, TorchwqError)):
        return False
    return not process.ended_at_exit or not (isinstance(error, TorchwqError) or shutdown.interrupted())


def _print_later(report: Report) -> None:
    cleanup.call_soon(functools.partial(_print, report))


def _print(report: Report, at_exit: bool = False) -> None:
    process = report.process
    if process is not None and process.error_will_be_retrieved and not process.error_was_retrieved and not at_exit:
        return  # a reader of a queue will get it; if not, it is printed at exit
    try:
        _pending.remove(report)
    except KeyError:
        return  # printed at exit meanwhile
    if process is None or not process.error_was_retrieved:
        log_error(report.what, report.error)


def _print_all() -> None:
    for report in list(_pending):
        _print(report, at_exit=True)


shutdown.at_report(_print_all)


class Future(futures.Future[T]):
    """A future that prints its error if no caller retrieves it."""

    #: Whether the error, present or future, must not be printed.
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
            self = None  # type: ignore[assignment] # the error's traceback would keep the future alive

    def cancel(self) -> bool:
        """Cancel as always, and never print the error, even if it is too late to cancel.

        ``Executor.map`` cancels the rest when one of its results is an error.
        """
        self.ignore_error()
        return super().cancel()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if error is not None:
            self.ignore_error()
        return error

    def set_exception(self, exception: BaseException | None, what: str = "", process: Worker | None = None) -> None:
        """Complete the future with an error. ``what``, ``process``: see ``Report``."""
        if exception is not None and not self._is_retrieved:
            self._report = Report(self, what or "a future", exception, process)
        try:
            super().set_exception(exception)
        except BaseException:  # cancelled, or done
            self.ignore_error()
            raise

    def ignore_error(self) -> None:
        """Do not print the error that the future has or will have."""
        self._is_retrieved = True
        report, self._report = self._report, None
        if report is not None:
            report.retrieved()
