"""What the owner of a queue and its workers' handles say to each other over their links.

A link carries no questions and no answers: those go over the queue's own connection, which all workers share, and look
as :mod:`torchwq.marshalling.wire` says. A link carries what concerns one handle, and it is what tells that the process
at its other end is gone.

The first byte says what kind of message it is. One that says more than that has a class, which lays it down and reads
it.
"""

from __future__ import annotations

import pickle
import struct
from typing import ClassVar, Final, NamedTuple

from ..marshalling import exceptions
from ..workers.failures import Failure

#: It is leaving, and has answers that the socket does not take: the owner makes room.
LEAVING: Final = b"L"
#: It has left; its last answer is in the socket.
GOODBYE: Final = b"B"
#: It has left, as with ``GOODBYE``, but by an error that may yet turn out to be a failure of its worker's function. If
#: not, ``GOODBYE`` follows. A link that ends without that may be that of a worker which was killed meanwhile.
IN_DOUBT: Final = b"D"
#: With a descriptor: the link of another handle, which it passes on.
ADOPT: Final = b"A"


def kind_of(data: bytes) -> bytes:
    """What kind of message this is."""
    return data[:1]


class Seat(NamedTuple):
    """From the owner, first of all: what the handle has to know."""

    #: Its slot of the counters.
    slot: int
    #: The queue's capacity.
    capacity: int | None
    #: As which sender, and for how many blocks, it may make promises: see Note [in-band promises].
    sender: int
    room: int

    def encode(self) -> bytes:
        return _SEAT.pack(b"Q", self.slot, -1 if self.capacity is None else self.capacity, self.sender, self.room)

    @classmethod
    def decode(cls, data: bytes) -> Seat:
        _, slot, capacity, sender, room = _SEAT.unpack(data)
        return cls(slot, None if capacity < 0 else capacity, sender, room)


_SEAT: Final = struct.Struct("=cQqQQ")


class Hello:
    """From a handle that has come in a message: its process id."""

    KIND: ClassVar = b"H"
    _FORMAT: ClassVar = struct.Struct("=cQ")

    @classmethod
    def encode(cls, pid: int) -> bytes:
        return cls._FORMAT.pack(cls.KIND, pid)

    @classmethod
    def decode(cls, data: bytes) -> int:
        pid: int = cls._FORMAT.unpack(data)[1]
        return pid


class FunctionFailed:
    """The function of the handle's worker has failed; the handle may still be open. The error follows, pickled.

    Before it stand the failure's number, the worker's mapid or -1, and whether its process ends.
    """

    KIND: ClassVar = b"F"
    _HEAD: ClassVar = struct.Struct("=cQq?")
    #: Longest message, in bytes; and how much of its text an error that is longer keeps, in characters.
    _LIMIT: ClassVar = 16 * 1024
    _LONGEST_TEXT: ClassVar = 4 * 1024

    @classmethod
    def encode(cls, failure: Failure) -> bytes:
        error = failure.error
        if isinstance(error, BaseException):  # of a thread
            error = exceptions.pack(error)
        if error is not None:
            error = error._replace(whole=None)
        data = cls._lay_down(failure, error)
        if len(data) > cls._LIMIT:
            summary, text = error.summary[: cls._LONGEST_TEXT], error.text[-cls._LONGEST_TEXT :]
            data = cls._lay_down(failure, exceptions.PackedException(None, None, None, error.kind, summary, text))
        return data

    @classmethod
    def _lay_down(cls, failure: Failure, error: exceptions.PackedException | None) -> bytes:
        mapid = -1 if failure.mapid is None else failure.mapid
        head = cls._HEAD.pack(cls.KIND, failure.number, mapid, failure.ends)
        return head + pickle.dumps(None if error is None else tuple(error))

    @classmethod
    def decode(cls, data: bytes) -> Failure:
        """Its error is still packed, and pickled: see ``error_in``."""
        _, number, mapid, ends = cls._HEAD.unpack_from(data)
        return Failure(number, None if mapid < 0 else mapid, data[cls._HEAD.size :], ends)

    @staticmethod
    def error_in(pickled: bytes) -> BaseException | None:
        """The error of a failure that was decoded. Runs users' code."""
        fields = pickle.loads(pickled)
        return None if fields is None else exceptions.unpack(exceptions.PackedException(*fields))
