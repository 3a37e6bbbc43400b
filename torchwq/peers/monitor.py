"""Reports changes in a table of peers as events, so that a thread that waits there need not poll.

The reactor watches two kinds of descriptors:

* the table's ``notify_fd`` (see ``table``): a peer that comes, leaves, fails or changes a word writes to it;
* a *pidfd* of each process that has a slot (see pidfd_open(2)), which becomes readable when that process has ended,
  however it ended. The kernel has released the locks of the process by then.

Invariants:

* The caller opens the monitor first and reads the table afterwards. So it sees what happened before, and the monitor
  reports what happens later.
* A peer fills its slot before it notifies, and the monitor looks for new slots at each notification. So each living
  peer is watched, or its notification is still to come.
* The record lock decides whether a peer is alive; a pidfd only says that it is time to look. The monitor opens the
  pidfd and then looks at the lock: if the peer is alive then, the pidfd is that peer's, and not that of a later
  process with the same id.
* The caller itself looks every ``POLL_INTERVAL`` seconds for what no event covers: a peer in another PID namespace,
  whose process id means nothing here; a system that has no pidfd, eventfd or epoll (before Linux 5.3, macOS) or
  refuses them; a process without free descriptors; a peer that executes another program, which ends its locks and not
  its process; a dead process whose lock a forked child holds for another moment.
* While nobody waits, the monitor watches nothing and has no descriptor open.
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

#: A thread that waits looks this often, in seconds, for what no event covers.
POLL_INTERVAL: Final = 1.0


class PeerMonitor:
    """Watches one table for one process. Safe to use from several threads.

    Args:
        table: the table, in which this process has a slot.
        on_change: called in the reactor's thread, which it must not block, when the table may have changed.
    """

    def __init__(self, table: PeerTable, on_change: Callable[[], None]) -> None:
        self._table = table
        self._on_change = on_change
        self._lock = threading.RLock()
        self._num_watchers = 0
        self._epoll: select.epoll | None = None
        #: By peer id; -1 for a peer whose end causes no event.
        self._pidfds: dict[int, int] = {}
        self._closed = False
        closed_in_child(self)

    @property
    def covers_all_peers(self) -> bool:
        """Whether the end of each known peer causes an event."""
        with self._lock:
            return self._epoll is not None and -1 not in self._pidfds.values()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Call ``on_change`` within this block."""
        self.open()
        try:
            yield
        finally:
            with self._lock:
                self._num_watchers -= 1
                if not self._num_watchers:
                    self._unwatch_all()

    def open(self) -> None:
        """Call ``on_change`` from now on, until ``close``."""
        with self._lock:
            self._num_watchers += 1
            if self._num_watchers > 1 or self._closed:
                return
            try:
                self._epoll = self._open_epoll()
                self._update_pidfds()
            except BaseException:  # Ctrl-C: the next ``open`` finds the peers that this one has not found
                self._num_watchers -= 1
                self._unwatch_all()
                raise

    def close(self) -> None:
        """Stop for good, before this process leaves the table. May be called again."""
        with self._lock:
            self._closed = True
            self._unwatch_all()

    def _open_epoll(self) -> select.epoll | None:
        if self._table.notify_fd < 0:
            return None
        try:
            reactor.get()  # it may need descriptors, too
            epoll = descriptors.epoll()
        except ResourceError:
            return None
        if epoll is not None:
            # Edge-triggered: no process reads the eventfd, and each notification wakes this one once.
            try:
                epoll.register(self._table.notify_fd, select.EPOLLIN | select.EPOLLET)
            except (OSError, ValueError):  # another thread is leaving the table
                epoll.close()
                return None
            reactor.get().set_reader(epoll.fileno(), self._on_event)
        return epoll

    def _on_event(self) -> None:
        """A peer has notified, or its process has ended."""
        with self._lock:
            self._update()
        self._on_change()

    def _update(self) -> None:
        if self._closed or not self._num_watchers:
            return
        if self._epoll is not None:
            self._epoll.poll(0)
        self._update_pidfds()

    def _update_pidfds(self) -> None:
        """Watch each living peer, and no other."""
        ended = set(self._pidfds)
        try:
            for slot, peer_id, alive in self._table.other_peers():
                if alive:
                    ended.discard(peer_id)
                    if peer_id not in self._pidfds:
                        self._pidfds[peer_id] = self._watch_process(slot, peer_id)
        except (OSError, ValueError):
            if self._table.fd >= 0:  # else another thread is leaving the table
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
            # The kernel should have released its lock, too. If it has not yet, no event will say when.
            # An end that is known and not yet taken in is not to be seen: the same hold of the lock does both.
            fd = self._pidfds.get(peer_id, -1)
            if fd >= 0:
                self._pidfds[peer_id] = -1
                self._unwatch(fd)
            self._update()
        self._on_change()

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
