"""Hands out what this process owns under a name, to processes of the same user that ask for it.

One listening socket per process that owns named things, served by the reactor. The protocol, on a connection whose
peer's user id the kernel vouches for:

* request ``O`` + pid + start time of the asking process + name;
* reply ``Q`` + whatever the publisher says, with descriptors, and the connection stays open as the liveness link of
  what was handed out; or ``N``: not here (any more), you may create the name; or ``C``: it was here when you were
  started, and was closed since.

``C`` is what keeps a worker that starts slowly from becoming the owner of an empty queue, on which it would then
wait for ever, only because its owner had finished and closed the queue before the worker came to open it.
"""

from __future__ import annotations

import functools
import os
import resource
import secrets
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import NamespaceError, ResourceError
from . import descriptors, namespace, reactor
from .descriptors import close_fds
from .endpoint import Received
from .fork import closed_in_child, reset_in_child
from .link import Link, socket_type
from .sockets import peer_uid
from .timing import ACCEPT_INTERVAL, RECONNECT_INTERVAL, REPLY_TIMEOUT

_REQUEST: Final = struct.Struct("=cQQ")

#: Given the asking process's link and pid: sends the reply itself and keeps the link. False: not any more.
Opener = Callable[[Link, int], bool]

#: When this process was started, by the clock all processes share; a worker gets its owner's time of ordering it.
started_ns = time.monotonic_ns()


@dataclass(slots=True)
class _Tombstone:
    closed_ns: int
    opener: Opener | None


class Directory:
    """The names that this process owns. Safe to use from several threads."""

    def __init__(self, space: namespace.Namespace) -> None:
        self.space = space
        self.path = f"{space.path}/s-{os.getpid()}-{secrets.token_hex(4)}"
        #: Over names, tombstones and claims: a name may be given up and owned again by different threads.
        self._lock = threading.RLock()
        self._names: dict[str, Opener] = {}
        self._tombstones: dict[str, _Tombstone] = {}
        self._asking: set[Link] = set()
        self._has_told = False
        watcher = reactor.get()
        self._socket = descriptors.unix_socket(socket_type())
        try:
            self._socket.bind(self.path)
            os.chmod(self.path, 0o600)
            self._socket.listen(1024)
            self._socket.setblocking(False)
            watcher.set_reader(self._socket.fileno(), self._accept)
        except BaseException:
            self._socket.close()
            raise
        closed_in_child(self)

    def publish(self, name: str, opener: Opener) -> None:
        """Own ``name``. Only under the namespace's lock, after ``ask`` has found no living owner."""
        with self._lock:
            self._names[name] = opener
            self._tombstones.pop(name, None)
            self.space.claim(name, self.path)

    def withdraw(self, name: str, opener: Opener, *, remember: bool, leftovers: Opener | None) -> None:
        """Give ``name`` up, if it is still what was published with ``opener``. ``remember``: processes started before
        now are still told that it was closed, or get the ``leftovers``."""
        with self._lock:
            if self._names.get(name) != opener:
                return
            del self._names[name]
            if remember:
                self._tombstones[name] = _Tombstone(time.monotonic_ns(), leftovers)
            else:
                self.space.release(name, self.path)

    def forget_closed(self, before_ns: int) -> None:
        """Nobody can ask any more for what was closed before then (time.monotonic_ns)."""
        with self._lock:
            for name, tombstone in list(self._tombstones.items()):
                if tombstone.closed_ns < before_ns:
                    del self._tombstones[name]
                    if name not in self._names:
                        self.space.release(name, self.path)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:  # none left, or the peer has gone
                if error.errno in descriptors.SHORTAGE:
                    self._wait_for_descriptors()
                return
            self._has_told = False
            if peer_uid(connection) != os.geteuid():
                connection.close()
                continue
            try:
                link = Link(descriptors.above_stdio(connection.detach()))
            except ResourceError:  # it is closed, and asks again
                continue
            self._asking.add(link)
            link.watch(functools.partial(self._answer, link), functools.partial(self._gone, link))

    def _wait_for_descriptors(self) -> None:
        """Who asks waits in the socket meanwhile. It would be reported as readable all the time."""
        watcher = reactor.get()
        watcher.set_reader(self._socket.fileno(), None)
        watcher.call_later(ACCEPT_INTERVAL, self._listen_again)
        if self._has_told:
            return
        self._has_told = True
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        text = (
            f"no file descriptor is free (RLIMIT_NOFILE: {soft}): a process that opens a queue of this one by name "
            f"waits until one is. Raise the limit with `ulimit -n`, or keep fewer queues and shared tensors at a time"
        )
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # made an error, which nobody could catch here
            if sys.stderr is not None:
                print(f"torchwq: {text}", file=sys.stderr)

    def _listen_again(self) -> None:
        if self._socket.fileno() >= 0:
            reactor.get().set_reader(self._socket.fileno(), self._accept)

    def _gone(self, link: Link) -> None:
        self._asking.discard(link)
        link.close()

    def _answer(self, link: Link, data: bytes, fds: list[int]) -> None:
        close_fds(fds)
        self._asking.discard(link)
        if len(data) < _REQUEST.size or data[:1] != b"O":
            link.close()
            return
        _, pid, started = _REQUEST.unpack_from(data)
        name = data[_REQUEST.size :].decode(errors="replace")
        opener = self._names.get(name)
        tombstone = self._tombstones.get(name)
        if opener is not None and opener(link, pid):
            return
        reply = b"N"
        if tombstone is not None and started <= tombstone.closed_ns:
            if tombstone.opener is not None and tombstone.opener(link, pid):
                return
            reply = b"C"
        try:
            link.send(reply)
        except BrokenPipeError:
            pass
        link.close()

    def close(self) -> None:
        reactor.get().remove(self._socket.fileno())
        for link in list(self._asking):
            self._gone(link)
        self._socket.close()
        try:
            os.unlink(self.path)
        except OSError:
            pass  # removed with the whole folder

    def abandon(self) -> None:
        self._socket.close()


_directory: Directory | None = None
_guard = threading.RLock()


@reset_in_child
def _forget() -> None:
    global _directory, _guard
    _directory, _guard = None, threading.RLock()


def get() -> Directory:
    """The directory of this process, in the namespace of its tree; opened now if it is not yet."""
    global _directory
    space = namespace.current()
    with _guard:
        if _directory is None or _directory.space is not space:
            if _directory is not None:
                _directory.close()
            _directory = Directory(space)
        return _directory


def existing() -> Directory | None:
    return _directory


def close() -> None:
    global _directory
    with _guard:
        if _directory is not None:
            _directory.close()
            _directory = None


def ask(name: str) -> tuple[Link, Received] | None:
    """Ask the owner of ``name`` for it.

    Returns the link and the reply (``Q…`` or ``C``), or None if there is no owner, or no living one: the caller may
    create the name. Raises NamespaceError if the owner is there and does not answer, ResourceError if there is no
    descriptor to ask with.
    """
    path = namespace.current().lookup(name)
    existing_here = existing()
    if path is None or (existing_here is not None and path == existing_here.path):
        return None
    until = time.monotonic() + REPLY_TIMEOUT
    while True:
        link = _connect(name, path)
        if link is None:
            return None
        try:
            link.send(_REQUEST.pack(b"O", os.getpid(), started_ns) + name.encode())
            received = link.wait(max(0.0, until - time.monotonic()))
        except (EOFError, BrokenPipeError):
            # It has ended, or it lives and could not answer: which of both, connecting again tells.
            link.close()
            if time.monotonic() < until:
                time.sleep(RECONNECT_INTERVAL)
                continue
            received = None
        except BaseException:
            link.close()
            raise
        if received is None:
            link.close()
            raise NamespaceError(
                f"the owner of the queue {name!r} is there and has not answered for {REPLY_TIMEOUT:.0f} s: it may be "
                f"stopped, or have no file descriptor left"
            )
        if received[0] == b"N":
            link.close()
            return None
        return link, received


def _connect(name: str, path: str) -> Link | None:
    """A link to the owner; None if it does not live."""
    connection = descriptors.unix_socket(socket_type())
    try:
        connection.connect(path)
        if peer_uid(connection) != os.geteuid():
            raise NamespaceError(f"the queue {name!r} belongs to another user")
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return Link(connection.detach())
