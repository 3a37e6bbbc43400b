"""Answers the processes of the same user that ask for a name that this process owns.

Each process that owns names has one listening socket, served by the reactor. The protocol, on a connection of which the
kernel says that its peer is of the same user:

* request ``O`` + pid + start time of the asking process + name;
* reply ``Q`` + the publisher's data, with descriptors, and the connection stays open as the liveness link of the new
  handle; or ``N``: not here (any more), you may create the name; or ``C``: it was here when you were started, and was
  closed since.

Without ``C``, a worker that starts slowly could find that its owner has closed the queue already. It would create the
name, own an empty queue, and wait for ever.
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

#: Called with the link and the pid of an asking process: replies and keeps the link, or returns False: not any more.
Opener = Callable[[Link, int], bool]

#: When this process was started, by the clock that all processes share. In a worker: when its owner ordered it.
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
        #: Over the next two, and the claims in the namespace: different threads may withdraw and publish a name.
        self._lock = threading.RLock()
        self._names: dict[str, Opener] = {}
        self._tombstones: dict[str, _Tombstone] = {}
        self._asking: set[Link] = set()
        self._has_warned = False
        watcher = reactor.get()  # before the socket: it may raise ResourceError
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
        """Own ``name`` no more, if it was published with ``opener``. ``remember``: reply to processes that were started
        before now with ``leftovers``, or that it was closed."""
        with self._lock:
            if self._names.get(name) != opener:
                return
            del self._names[name]
            if remember:
                self._tombstones[name] = _Tombstone(time.monotonic_ns(), leftovers)
            else:
                self.space.release(name, self.path)

    def forget_closed(self, before_ns: int) -> None:
        """No process is left that was started before then (time.monotonic_ns), and could ask for a closed name."""
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
            except OSError as error:  # no connection is left, or its peer is gone
                if error.errno in descriptors.SHORTAGE:
                    self._wait_for_descriptors()
                return
            self._has_warned = False
            if peer_uid(connection) != os.geteuid():
                connection.close()
                continue
            try:
                link = Link(descriptors.above_stdio(connection.detach()))
            except ResourceError:  # the connection is closed; its peer asks again
                continue
            self._asking.add(link)
            link.watch(functools.partial(self._answer, link), functools.partial(self._gone, link))

    def _wait_for_descriptors(self) -> None:
        """Stop watching the socket, which stays readable, until a descriptor may be free. Those who ask wait in it."""
        reactor.get().set_reader(self._socket.fileno(), None)
        reactor.get().call_later(ACCEPT_INTERVAL, self._listen_again)
        if self._has_warned:
            return
        self._has_warned = True
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        text = (
            f"no file descriptor is free (RLIMIT_NOFILE: {soft}): a process that opens a queue of this one by name "
            f"waits until one is. Raise the limit with `ulimit -n`, or keep fewer queues and shared tensors at a time"
        )
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        except RuntimeWarning:  # a filter makes it an error, which no caller could catch here
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
    """The directory of this process, in the namespace of its tree."""
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
    own = existing()
    if path is None or (own is not None and path == own.path):
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
            # The owner has ended, or lives and could not answer: the next connection shows which.
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
