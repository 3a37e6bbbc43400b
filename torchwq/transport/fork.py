"""What the child of a fork does with this library's objects and state.

The child inherits descriptors, locks in unknown states, and no thread. With none of them it may touch the parent's
queues.

Invariants:

* Every object that owns descriptors of the transport registers with :func:`closed_in_child`. The child calls its
  ``abandon()`` before any user code runs: that closes the *child's copies* of the descriptors, sends nothing, shuts
  nothing down, and takes no lock.
* Every module with process-wide state registers a function with :func:`reset_in_child` that replaces that state.

Source: fork(2); ``os.register_at_fork``.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol


class Abandonable(Protocol):
    def abandon(self) -> None: ...


_owners: weakref.WeakSet[Abandonable] = weakref.WeakSet()
_resets: list[Callable[[], None]] = []


def closed_in_child(owner: Abandonable) -> None:
    """Let ``owner.abandon()`` run in the child of every fork, for as long as ``owner`` lives."""
    _owners.add(owner)


def reset_in_child(reset: Callable[[], None]) -> Callable[[], None]:
    """Let ``reset()`` run in the child of every fork, after the descriptors were closed. Usable as a decorator."""
    _resets.append(reset)
    return reset


def _after_fork_in_child() -> None:
    global _owners
    owners, _owners = list(_owners), weakref.WeakSet()
    # Every step, although one may fail: a child with some of the parent's state would act for the parent.
    failure: Exception | None = None
    for step in [*(owner.abandon for owner in owners), *_resets]:
        try:
            step()
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure  # the interpreter reports it and goes on


os.register_at_fork(after_in_child=_after_fork_in_child)
