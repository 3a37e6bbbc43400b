"""The interface of one end of a two-way message connection: ``kinds`` makes them.

Many processes may hold one end at once: exactly one of them takes each message, whole. Every kind keeps these
invariants:

* A message arrives whole or not at all, whichever process is killed at whatever point.
* No operation blocks. ``try_send`` and ``try_receive`` say that they would have to wait, and leave that to the caller.
* Messages that were sent before one side closed can still be received; then :class:`EOFError`.
* ``try_send`` raises :class:`BrokenPipeError` if no process holds the other end any more, and only then. A message that
  cannot be sent for another reason raises :class:`~torchwq.transport.sockets.NotSent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

#: A message: its bytes, and the descriptors that came with it, owned by the receiver.
Received = tuple[bytes, list[int]]

#: The descriptors of every message that came without any. Never changed.
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
    #: ``socket.send`` and ``socket.recv`` for messages without descriptors; None where they do not suffice.
    send_bare: SendBare | None
    receive_bare: ReceiveBare | None

    def try_send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one message; False if there is no room now. Raises BrokenPipeError if nobody can receive it."""
        ...

    def send_with_timeout(self, data: bytes) -> bool:
        """``try_send`` without descriptors. Waits up to SEND_TIMEOUT for room, where the kind can."""
        ...

    def try_receive(self) -> Received | None:
        """Take one message; None if there is none now. Raises EOFError, or ResourceError if it brought more
        descriptors than this process may hold."""
        ...

    def peek(self) -> bytes | None:
        """The bytes of the next message, which stays there; b"" at the end; None if there is no message now."""
        ...

    def unread_by_peer(self) -> int | None:
        """0 if the peer has taken all messages, more than 0 if not, None if the system does not say."""
        ...

    def stop_receiving(self) -> None:
        """From now on the peer's sends raise BrokenPipeError; this end can still send."""
        ...

    def stop_sending(self) -> None:
        """From now on no process can send from this end; the peer gets EOFError after the last message."""
        ...

    def is_readable(self) -> bool:
        """Whether there is a message, or the end of messages."""
        ...

    def set_buffer_size(self, nbytes: int) -> None:
        """How many bytes may be under way from this end, as far as the system allows."""
        ...

    def fileno(self) -> int: ...

    def handover(self) -> list[int]:
        """The descriptors (still owned by this object) from which ``adopt`` makes the same end elsewhere."""
        ...

    def leave_open(self) -> None:
        """Leave the descriptors to the end of the process: other threads may be using them."""
        ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...
