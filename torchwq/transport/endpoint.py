"""The interface of one end of a two-way message connection. ``kinds`` chooses the kind.

One end may be held by many processes at once: each message is taken whole by exactly one of them. Both kinds keep
these invariants:

* A message arrives whole or not at all, whichever process is killed at whatever point.
* No operation blocks. ``try_send`` and ``try_receive`` say that they would have to wait, and leave the waiting to
  the caller.
* What was sent before one side closed can still be received; then :class:`EOFError`.
* ``try_send`` to a side that no process holds any more raises :class:`BrokenPipeError`, and nothing else does. A
  message that cannot be sent for another reason is :class:`~torchwq.transport.sockets.NotSent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

#: A message: its bytes, and the descriptors that came with it, owned by the receiver.
Received = tuple[bytes, list[int]]

#: The descriptors of a message that came without any. Never changed: one list serves them all.
NO_FDS: Final[list[int]] = []

#: Descriptors that one message can carry (the kernel's SCM_MAX_FD).
MAX_FDS: Final = 253


SendBare = Callable[[bytes, int], int]
ReceiveBare = Callable[[int, int], bytes]


class Endpoint(Protocol):
    """One end of a connection. Safe to use from several threads at once."""

    #: Largest message in bytes, and largest payload of one; larger payloads travel out of band.
    max_message: int
    max_payload: int
    #: What sends and receives a message without descriptors in the shortest way, with the flags and errors of
    #: ``socket.send`` and ``socket.recv``; None where there is nothing shorter than ``try_send`` and ``try_receive``.
    send_bare: SendBare | None
    receive_bare: ReceiveBare | None

    def try_send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one message; False if there is no room now. Raises BrokenPipeError if nobody can receive it."""
        ...

    def send_with_timeout(self, data: bytes) -> bool:
        """The same for one without descriptors, waiting a moment for room where the system can do that by itself."""
        ...

    def try_receive(self) -> Received | None:
        """Take one message; None if there is none now. Raises EOFError, or ResourceError if it brought more
        descriptors than this process may hold."""
        ...

    def peek(self) -> bytes | None:
        """The bytes of the next message, which stays there; none of the end; None if there is nothing now."""
        ...

    def unread_by_peer(self) -> int | None:
        """0 if the other side has taken all that was sent, more than 0 if not, None if the system does not say."""
        ...

    def stop_receiving(self) -> None:
        """From now on the other side's sends raise BrokenPipeError; this side can still send."""
        ...

    def stop_sending(self) -> None:
        """From now on nobody can send from this end, in any process; the other side gets EOFError when it has received
        all that was sent before."""
        ...

    def is_readable(self) -> bool:
        """Whether there is something to receive, were it the end."""
        ...

    def set_buffer_size(self, nbytes: int) -> None:
        """How much may be under way from this end, in bytes, as far as the system allows."""
        ...

    def fileno(self) -> int: ...

    def handover(self) -> list[int]:
        """The descriptors (still owned by this object) from which ``adopt`` makes the same end elsewhere."""
        ...

    def leave_open(self) -> None:
        """Use its descriptors no more, which end with the process: other threads may be in the middle of using them."""
        ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...
