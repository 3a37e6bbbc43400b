"""The interface of a kind of workers, and the table of all kinds: ``backend="..."`` is a key of it.

A caller looks the name up once, here, and uses the ``Backend`` from then on. No other code compares names or classes of
workers: ``Worker.peer`` says what a message to a worker may hold, ``can_be_killed`` whether a signal ends it.
``starting`` registers the implementations, ``processes`` and ``threads``.

A further backend is one more module and one more line in ``starting``. The module has a ``Backend``, a ``Worker`` (see
``worker``), and a ``Context`` (see ``child``), with which the worker runs ``entry``. ``threads`` is the example for
workers in this process. The entries of ``map`` and ``BackgroundTask`` receive one message, those of pools and loaders
more.

A backend for other machines (Ray, say) needs:

* A ``Worker``. Its ``peer`` is ``OTHER_MACHINE``, so the encoder sends tensors by value and refuses what needs a
  descriptor; ``send`` gets bytes. One thread, which never blocks, calls ``on_message(worker, bytes, [])`` for each
  message and then ``on_end`` once (see ``worker``). When the other system reports the actor's end, the worker sets
  ``exitcode`` or ``reason`` and calls ``_report_end()``. ``pid`` stays None: a pid names a process of this machine.
* A ``Context`` (see ``child``) that runs ``entry`` on the other machine: ``receive``, ``send``, ``finish``, and the
  ``peer`` and ``max_payload`` of the connection to the owner. Of the setup that ``processes`` sends, ``sys.path``,
  environment, filters, seed and ``info`` go along; namespace, limits and descriptors stay on this machine.
* ``connect``: two ends with the methods of :class:`~torchwq.transport.endpoint.Endpoint`, and an object that stands for
  the second end in a message: over TCP, an address and a secret. ``loading.startup._WorkersEnd`` is the one for ends
  that consist of descriptors.
* Proof that the sender belongs to this program, before it unpickles a byte: TCP has no peer credentials.

Such a worker cannot get handles on queues and channels, because those are descriptors, until a handle can travel as an
address. ``map`` and pools need no handle; ``BackgroundTask`` does. A loader's worker counts in words that it shares
with its loader (``loading.counters``), and collates batches for this machine.
"""

from __future__ import annotations

import abc
from typing import Final

from ..transport.capabilities import Capabilities
from ..transport.endpoint import Endpoint
from ..transport.local import LocalEndpoint
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

    @abc.abstractmethod
    def connect(self) -> Ends:
        """Make a connection beside the one that each worker has. Returns the owner's end and the worker's.

        Raises OSError if the process has no descriptor left.
        """

    @abc.abstractmethod
    def warm_up(self, wait: bool) -> None:
        """Prepare what the first worker would wait for. ``wait``: return when that is done. Raises as ``start``."""


_table: Final[dict[str, Backend]] = {}


def register(backend: Backend) -> None:
    """Add a backend to the table."""
    _table[backend.name] = backend


def find(name: str) -> Backend:
    """Return the backend of this name. Raises ValueError if no backend has it."""
    try:
        return _table[name]
    except (KeyError, TypeError):
        *others, last = map(repr, _table)
        raise ValueError(f"backend must be {', '.join(others)} or {last}, not {name!r}") from None
