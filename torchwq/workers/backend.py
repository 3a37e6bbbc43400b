"""What a kind of workers has to offer, and the table of all kinds: ``backend="..."`` is a key of it.

Whoever starts workers looks the name up once, here, and asks the object from then on. Nobody compares names, and nobody
asks what class a worker has: what a worker can take is its ``peer``, whether force ends it is ``can_be_killed``. The
implementations are ``processes`` and ``threads``; ``starting`` has the line of each in the table.

A backend for other machines (Ray, say) is one more module and one more such line. That module has to have:

* A ``Worker``: ``send`` takes bytes, because the worker's ``peer`` is ``OTHER_MACHINE`` and the encoder keeps to that:
  tensors go by value, in the message, and what needs a descriptor is refused with its place. ``on_message`` is called
  with ``(worker, bytes, [])`` for each message, then ``on_end`` once (see ``worker``), from one thread that blocks for
  nobody. The liveness is what the other system tells of an actor's end; it becomes ``exitcode`` or ``reason``, and then
  ``_report_end()``. ``pid`` stays None: it would be that of a process here. ``kill`` is the other system's.
* A ``Context`` (see ``child``) that runs ``entry`` over there: ``receive``, ``send``, ``finish``, and ``peer`` and
  ``max_payload`` as what leads back to the owner has them. What ``processes`` puts into the setup
  (namespace, limits, descriptors) stays on this machine; what is left of it (``sys.path``, environment, filters, seed,
  ``info``) goes along.
* ``connect``: two ends with the methods of :class:`~torchwq.transport.endpoint.Endpoint`; and what stands for the
  second in a message to the worker, as ``loading.startup._WorkersEnd`` does for one that consists of descriptors:
  over TCP an address and a secret.
* Before a byte from there is unpickled, proof that the sender is one of ours: there are no peer credentials over TCP.

Handles on queues and channels are descriptors, so a worker over there is refused one, until a handle can also travel
as an address. ``map`` and pools need no handle; ``BackgroundTask`` does. A loader's worker counts in words that it
shares with its loader (``loading.counters``), and puts its batches together for this machine.
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
    #: What its workers are to their owner, and their owner to them.
    peer: Capabilities
    #: Whether force ends its workers, whatever they are at.
    can_be_killed: bool
    #: What a user may give for these workers, of what not all kinds of workers have.
    options: frozenset[str] = frozenset()

    @abc.abstractmethod
    def start(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> Worker:
        """Start one worker that runs ``entry`` (``module:function``) with a :class:`~.child.Context`.

        Args:
            info: its place among those that are started with it; they have the same ``group``.
            on_message, on_end: see ``worker``.

        Raises:
            OSError: a limit of the system does not allow it.
            WorkerStartError: it cannot be started for another reason.
        """

    @abc.abstractmethod
    def connect(self) -> Ends:
        """A connection beside the one that each worker has: the end that stays, and the end for a worker.

        Raises OSError if descriptors have run out.
        """

    @abc.abstractmethod
    def warm_up(self, wait: bool) -> None:
        """Get ready what the first worker would wait for, if there is such a thing; ``wait``: until it is.

        Raises as ``start``.
        """


_table: Final[dict[str, Backend]] = {}


def register(backend: Backend) -> None:
    """Let users start workers of this kind, by its name."""
    _table[backend.name] = backend


def find(name: str) -> Backend:
    """The backend of this name. Raises ValueError if there is none."""
    try:
        return _table[name]
    except (KeyError, TypeError):
        *others, last = map(repr, _table)
        raise ValueError(f"backend must be {', '.join(others)} or {last}, not {name!r}") from None
