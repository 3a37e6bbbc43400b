"""The interface of a kind of workers, and the table of all kinds: ``backend="..."`` is a key of it.

A caller looks the name up once, here, and uses the ``Backend`` from then on. No other code compares names or classes of
workers: ``Worker.peer`` says what a message to a worker may hold, ``can_be_killed`` whether a signal ends it.
``starting`` registers the implementations, ``processes`` and ``threads``.

A further backend is one more module and one more line in ``starting``. The module has a ``Backend``, a ``Worker`` (see
``worker``), and a ``Context`` (see ``child``), with which the worker runs ``entry``. ``threads`` is the example for
workers in this process, :mod:`torchwq.ray` the one for workers on other machines. The entries of ``map`` and
``BackgroundTask`` receive one message, those of pools and loaders more.

The ``peer`` of a worker on another machine is ``OTHER_MACHINE``: messages to it are bytes or a ``ValueMessage``, with
tensors by value. Handles travel as ``handles.reference`` says. A loader's batches go over the worker's own connection:
see ``connect`` and ``attach``.
"""

from __future__ import annotations

import abc
import importlib
from typing import Any, Final

from ..transport.capabilities import Capabilities
from ..transport.endpoint import Endpoint
from ..transport.local import LocalEndpoint
from ..transport.waiting import cores
from .info import WorkerInfo
from .worker import OnEnd, OnMessage, Worker

#: The owner's end of a connection, and the worker's.
Ends = tuple[Endpoint, Endpoint] | tuple[LocalEndpoint, LocalEndpoint]


class Backend(abc.ABC):
    """One kind of workers."""

    #: What users call it.
    name: str
    #: The capabilities that a worker and its owner have for each other.
    peer: Capabilities
    #: Whether a signal ends its workers, whatever they do.
    can_be_killed: bool
    #: Arguments of users that only some backends take, of those that this one takes.
    options: frozenset[str] = frozenset()

    @abc.abstractmethod
    def start(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> Worker:
        """Start one worker that runs ``entry`` (``module:function``) with a :class:`~.child.Context`.

        Args:
            info: the worker's place among those started with it, which have the same ``group``.
            on_message, on_end: see ``worker``.

        Raises:
            OSError, ResourceError: the system's limits do not allow another worker.
            WorkerStartError: the worker cannot be started for another reason.
        """

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """The user's thread calls it before another thread starts workers for it. Raises as ``start``."""

    def places(self) -> int:
        """How many workers there is a place for, where a caller does not say how many it wants."""
        return cores()

    @abc.abstractmethod
    def connect(self) -> Ends:
        """Make a connection beside the one that each worker has. Returns the owner's end and the worker's.

        Where no descriptor can be passed to a worker, the worker's end stays here, and ``attach`` says to whom its
        messages go.

        Raises OSError if the process has no descriptor left.
        """

    def attach(self, end: LocalEndpoint, worker: Worker) -> None:
        """Let the connection with this worker's end lead to ``worker``, over the worker's own connection."""
        raise NotImplementedError(f"the connections of {self.name} workers lead to them")

    def share(self, payload: Any) -> Any:
        """A payload that is sent to several workers, in the form in which that costs least."""
        return payload

    @abc.abstractmethod
    def warm_up(self, wait: bool) -> None:
        """Prepare what the first worker would wait for. ``wait``: return when that is done. Raises as ``start``."""


_table: Final[dict[str, Backend]] = {}
#: Backends that are imported when they are asked for: the module of each, whose ``Backend()`` it is.
_modules: Final[dict[str, str]] = {}


def register(backend: Backend) -> None:
    """Add a backend to the table."""
    _table[backend.name] = backend


def register_module(name: str, module: str) -> None:
    """Add a backend that needs an extra to the table."""
    _modules[name] = module


def find(backend: str | Backend) -> Backend:
    """Return the backend of this name; or ``backend`` itself if it is one.

    Raises ValueError if no backend has the name.
    """
    if isinstance(backend, Backend):
        return backend
    try:
        if backend not in _table and backend in _modules:
            register(importlib.import_module(_modules[backend]).Backend())
        return _table[backend]
    except (KeyError, TypeError):
        *others, last = map(repr, [*(name for name in _table if name not in _modules), *_modules])
        raise ValueError(f"backend must be {', '.join(others)} or {last}, not {backend!r}") from None
