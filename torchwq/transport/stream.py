"""An AF_UNIX SOCK_STREAM socket with a lock as an endpoint, for systems whose AF_UNIX has no SOCK_SEQPACKET (macOS).

A stream has no message boundaries, so readers exclude each other by a lock, and so do writers. The lock is a POSIX
record lock (``fcntl.lockf``) on a file that travels with the socket: the kernel frees it when its holder dies.

Invariants, all of which keep a killed process from leaving half a message behind:

* A frame is ``length (4 bytes) + data``, at most ``FRAME`` bytes, so that one ``send`` puts it into the socket as one
  piece. It is sent only while the socket is writable, which for AF_UNIX means that it has room for several frames.
* A reader looks at the length without taking it (MSG_PEEK), then takes the whole frame with one ``recvmsg``.
* Record locks belong to a process: its threads exclude each other by a lock of the process, found by the inode of the
  lock file. Closing *any* descriptor of that file drops the process's record locks, so closing happens under that lock.
* A frame that is read before the end of file is whole.

Source: fcntl(2), "Advisory record locking".
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from . import descriptors, polling, trailer
from .endpoint import ReceiveBare, Received, SendBare
from .fork import reset_in_child
from .sockets import (
    ANCILLARY_SIZE,
    CLOEXEC,
    NO_WAIT,
    SocketEndpoint,
    check_sendable,
    received_fds,
    scm_rights,
    set_buffer_size,
)

FRAME: Final = 16 * 1024
_LENGTH: Final = struct.Struct("=I")
_BUFFER: Final = 1 << 20


def send_frame(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Send one frame as one piece; False if the socket has no room now. Raises OSError as ``sendmsg`` does."""
    if not polling.writable(0, sock.fileno()):
        return False
    frame = _LENGTH.pack(len(data)) + data
    sent = sock.sendmsg([frame], scm_rights(fds) if fds else [], NO_WAIT)
    while sent < len(frame):
        # A writable socket takes a frame whole on every known system; on one that does not, the stream stays sound.
        sent += sock.send(frame[sent:])
    return True


def receive_frame(sock: socket.socket, locks: _Locks) -> Received:
    """Take one frame. Raises BlockingIOError if there is none, EOFError at the end.

    ``locks``: those that are held. A finalizer or signal handler may take a frame of the same socket meanwhile.
    """
    while True:
        taken = locks.taken
        head = sock.recv(_LENGTH.size, NO_WAIT | socket.MSG_PEEK)
        if not head:
            raise EOFError
        size = _LENGTH.size + _LENGTH.unpack(head)[0]
        if taken == locks.taken:  # else the head belonged to a frame that such code has taken
            locks.taken += 1
            break
    frame, ancillary, flags, _ = sock.recvmsg(size, ANCILLARY_SIZE, NO_WAIT | CLOEXEC)
    return frame[_LENGTH.size :], received_fds(ancillary, flags)


class _Locks:
    """The locks of readers and of writers among the threads of this process, for one lock file.

    They are reentrant: a finalizer or a signal handler may receive or send in the middle of either. The outermost call
    takes and frees the record lock.
    """

    def __init__(self) -> None:
        self.reading = threading.RLock()
        self.writing = threading.RLock()
        #: How often the thread that holds the lock of each byte holds it.
        self.depths = [0, 0]
        #: How many frames were taken.
        self.taken = 0


_locks: weakref.WeakValueDictionary[tuple[int, int], _Locks] = weakref.WeakValueDictionary()
_locks_guard = threading.RLock()


@reset_in_child
def _forget_locks() -> None:
    global _locks, _locks_guard
    _locks, _locks_guard = weakref.WeakValueDictionary(), threading.RLock()


def _locks_of(fd: int) -> _Locks:
    stat = os.fstat(fd)
    with _locks_guard:
        return _locks.setdefault((stat.st_dev, stat.st_ino), _Locks())


def _lock(fd: int, byte: int) -> None:
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, byte)
            return
        except OSError as error:
            # The kernel counts locks by process, so it takes two processes whose threads hold and await different
            # locks for a deadlock. There is none: a thread that holds a lock waits for nothing.
            if error.errno != errno.EDEADLK:
                raise
            time.sleep(0)


class StreamEndpoint(SocketEndpoint):
    """One end of a stream socket pair with its lock file; takes both descriptors over.

    An end that no other process holds needs no lock file.
    """

    max_message = FRAME - _LENGTH.size
    max_payload = max_message - trailer.SIZE
    send_bare: SendBare | None = None
    receive_bare: ReceiveBare | None = None

    def __init__(self, fd: int, lock_fd: int = -1) -> None:
        self._lock_fd = lock_fd
        super().__init__(fd)
        self._locks = _Locks() if lock_fd < 0 else _locks_of(lock_fd)

    @contextmanager
    def _held(self, lock: threading.RLock, byte: int) -> Iterator[None]:
        with lock:
            if self._socket.fileno() < 0:
                raise EOFError
            depths = self._locks.depths
            if self._lock_fd >= 0:
                _lock(self._lock_fd, byte)  # a call further down the stack does this again, to no effect
            depths[byte] += 1
            try:
                yield
            finally:
                depths[byte] -= 1
                if not depths[byte] and self._lock_fd >= 0:
                    fcntl.lockf(self._lock_fd, fcntl.LOCK_UN, 1, byte)

    def try_send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        try:
            with self._held(self._locks.writing, 0):
                return send_frame(self._socket, data, fds)
        except OSError as error:
            check_sendable(error, self._socket.fileno() < 0)
            return False
        except EOFError:
            raise BrokenPipeError("this end is closed") from None

    def send_with_timeout(self, data: bytes) -> bool:
        return False

    def try_receive(self) -> Received | None:
        while True:
            try:
                with self._held(self._locks.reading, 1):
                    return receive_frame(self._socket, self._locks)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise EOFError from None
                raise

    def peek(self) -> bytes | None:
        with self._held(self._locks.reading, 1):
            try:
                head = self._socket.recv(_LENGTH.size, NO_WAIT | socket.MSG_PEEK)
                size = _LENGTH.size + _LENGTH.unpack(head)[0] if head else 0
                return self._socket.recv(size, NO_WAIT | socket.MSG_PEEK)[_LENGTH.size :] if head else b""
            except (BlockingIOError, ConnectionResetError):
                return None

    def handover(self) -> list[int]:
        return [*super().handover(), self._lock_fd]

    def leave_open(self) -> None:
        super().leave_open()
        self._lock_fd = -1

    def close(self) -> None:
        with self._locks.reading, self._locks.writing:
            self.abandon()

    def abandon(self) -> None:
        self._socket.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def pair() -> tuple[StreamEndpoint, StreamEndpoint]:
    a, b = descriptors.socketpair()
    ends: list[StreamEndpoint] = []
    try:
        for sock in (a, b):
            set_buffer_size(sock, _BUFFER)
            lock_fd = descriptors.memory_file("torchwq-lock")
            ends.append(StreamEndpoint(sock.detach(), lock_fd))
    except BaseException:
        for end in ends:
            end.close()
        a.close()
        b.close()
        raise
    return ends[0], ends[1]
