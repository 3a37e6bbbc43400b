"""Tells who waits at a table of peers that something has happened there: an event, so that nobody has to poll.

Two events are enough, and the reactor watches both:

* the table's *bell* (see ``table``): a peer that comes, leaves, fails or shows something new rings it;
* a *pidfd* (see pidfd_open(2)) of each process that has a slot: it becomes readable when that process has ended,
  however it ended. The kernel releases the locks of a process before.

Invariants:

* Who wants to know opens the monitor first and looks at the table afterwards. So it sees what happened before, and is
  told of what happens later.
* A peer that claims a slot rings after its slot is filled, and the monitor looks for new slots at each ring. So each
  peer that lives is watched, or its ring is still to be heard.
* The record lock decides whether a peer lives; a pidfd only says that it is time to look. The monitor opens a pidfd and
  looks at the lock again afterwards: if the peer lives then, the pidfd is that peer's, although its process id may be
  another's soon.
* What no event covers is looked at by whoever waits, every ``POLL_INTERVAL`` seconds: a peer in another PID namespace,
  whose id means nothing here; a system that has no pidfd, eventfd or epoll (before Linux 5.3, macOS) or refuses them;
  a process without free descriptors; a peer that executes another program, which ends its locks and not its process;
  a dead process whose lock a forked child has for another moment.
* While nobody waits, nothing is watched and no descriptor is open for it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import Final

from ..errors import ResourceError
from ..transport import descriptors, reactor
from ..transport.fork import closed_in_child
from .table import PeerTable

#: Seconds between two looks of one who waits at what no event covers.
POLL_INTERVAL: Final = 1.0


class PeerMonitor:
    """Watches one table for one process. Safe to use from several threads.

    Args:
        table: the table, in which this process has a slot.
        on_change: called in the reactor's thread, which it must not hold up, when there may be something new.
    """

    def __init__(self, table: PeerTable, on_change: Callable[[], None]) -> None:
        self._table = table
        self._on_change = on_change
        self._lock = threading.RLock()
        self._num_watchers = 0
        self._epoll: select.epoll | None = None
        #: By peer_id; -1 for one that no event tells of.
        self._pidfds: dict[int, int] = {}
        self._closed = False
        closed_in_child(self)

    @property
    def covers_all_peers(self) -> bool:
        """Whether events tell of everybody that it has found."""
        return self._epoll is not None and -1 not in self._pidfds.values()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, ``on_change`` is called."""
        self.open()
        try:
            yield
        finally:
            with self._lock:
                self._num_watchers -= 1
                if not self._num_watchers:
                    self._unwatch_all()

    def open(self) -> None:
        """Have ``on_change`` called from now on, until ``close``."""
        with self._lock:
            self._num_watchers += 1
            if self._num_watchers > 1 or self._closed:
                return
            try:
                self._epoll = self._open_epoll()
                self._update_pidfds()
            except BaseException:  # Ctrl-C: the next one finds the peers that this has not found
                self._num_watchers -= 1
                self._unwatch_all()
                raise

    def close(self) -> None:
        """Stop for good, before the table is left. May be called again."""
        with self._lock:
            self._closed = True
            self._unwatch_all()

    def _open_epoll(self) -> select.epoll | None:
        if self._table.notify_fd < 0:
            return None
        try:
            reactor.get()  # which has to have descriptors, too
            epoll = descriptors.epoll()
        except ResourceError:
            return None
        if epoll is not None:
            # Edge-triggered: nobody silences a bell that all processes hear, and each ring wakes this once.
            try:
                epoll.register(self._table.notify_fd, select.EPOLLIN | select.EPOLLET)
            except (OSError, ValueError):  # this process leaves the table just now
                epoll.close()
                return None
            reactor.get().set_reader(epoll.fileno(), self._on_event)
        return epoll

    def _on_event(self) -> None:
        """The bell was rung, or a peer's process has ended."""
        with self._lock:
            if self._closed or not self._num_watchers:
                return
            if self._epoll is not None:
                self._epoll.poll(0)
            self._update_pidfds()
        self._on_change()

    def _update_pidfds(self) -> None:
        """Watch each peer that lives, and no other."""
        ended = set(self._pidfds)
        try:
            for slot, peer_id, lives in self._table.other_peers():
                if lives:
                    ended.discard(peer_id)
                    if peer_id not in self._pidfds:
                        self._pidfds[peer_id] = self._watch_process(slot, peer_id)
        except (OSError, ValueError):
            if self._table.fd >= 0:  # else this process leaves it just now
                raise
        for peer_id in ended:
            self._unwatch(self._pidfds.pop(peer_id))

    def _watch_process(self, slot: int, peer_id: int) -> int:
        try:
            reactor.get()
            fd = descriptors.pidfd(self._table.pid(slot)) if self._table.shares_pid_namespace(slot) else None
        except (ProcessLookupError, ResourceError):
            fd = None
        if fd is None:
            return -1
        if not self._table.is_alive(slot):
            os.close(fd)
            return -1
        reactor.get().set_reader(fd, lambda: self._on_process_end(peer_id))
        return fd

    def _on_process_end(self, peer_id: int) -> None:
        with self._lock:
            # Its lock should have ended, too. If that is still to come, no event will tell of it.
            fd = self._pidfds.get(peer_id, -1)
            if fd >= 0:
                self._pidfds[peer_id] = -1
                self._unwatch(fd)
        self._on_event()

    @staticmethod
    def _unwatch(fd: int) -> None:
        if fd >= 0:
            reactor.get().remove(fd)
            os.close(fd)

    def _unwatch_all(self) -> None:
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            reactor.get().remove(epoll.fileno())
            epoll.close()
        while self._pidfds:
            self._unwatch(self._pidfds.popitem()[1])

    def abandon(self) -> None:
        self._closed = True
        if self._epoll is not None:
            self._epoll.close()
        descriptors.close_fds(self._pidfds.values())
        self._pidfds = {}
