"""One timeout error for all versions of Python.

Since Python 3.11, ``concurrent.futures`` and ``asyncio`` raise the builtin TimeoutError; on 3.10 each has a class of
its own. ``TimedOut`` derives from all three, so code written for either version catches it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from typing import TypeVar

T = TypeVar("T")

if sys.version_info >= (3, 11):
    TimedOut = TimeoutError
    Future = concurrent.futures.Future
else:

    class TimedOut(TimeoutError, concurrent.futures.TimeoutError, asyncio.TimeoutError):
        """A timeout has expired."""

    class Future(concurrent.futures.Future[T]):
        """A future that raises ``TimedOut``."""

        def result(self, timeout: float | None = None) -> T:
            try:
                return super().result(timeout)
            except concurrent.futures.TimeoutError:
                if self.done():  # the task has raised this error, or has ended just now
                    return super().result(0)
                raise TimedOut from None

        def exception(self, timeout: float | None = None) -> BaseException | None:
            try:
                return super().exception(timeout)
            except concurrent.futures.TimeoutError:
                if self.done():
                    return super().exception(0)
                raise TimedOut from None
