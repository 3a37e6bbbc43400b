"""Time limits that have passed are told alike on every Python.

From Python 3.11 on the errors of ``concurrent.futures`` and ``asyncio`` for that are the builtin TimeoutError. On 3.10
each is one of its own. What is raised here is all three, so that code written for either Python catches it.
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
        """A time limit has passed."""

    class Future(concurrent.futures.Future[T]):
        """One whose waits end with ``TimedOut``."""

        def result(self, timeout: float | None = None) -> T:
            try:
                return super().result(timeout)
            except concurrent.futures.TimeoutError:
                if self.done():  # it is what the task has raised, or was done in the last moment
                    return super().result(0)
                raise TimedOut from None

        def exception(self, timeout: float | None = None) -> BaseException | None:
            try:
                return super().exception(timeout)
            except concurrent.futures.TimeoutError:
                if self.done():
                    return super().exception(0)
                raise TimedOut from None
