"""The fork server: a program that imports torch once and then forks a clean worker in milliseconds.

The owner runs it as a script, by its path. Until the first request it imports nothing but the standard library: so it
can guard the namespace folder from the beginning, at the price of a bare interpreter.

Invariants:

* The server has one thread whenever it forks, and no thread pool of torch, so forking is safe.
* Each client (the process that started the server, and every worker that it has forked) has one connection. When a
  client dies, its connection ends, and the server kills its workers at once. When the first client dies, the server
  kills all workers, removes the namespace folder and ends. A dying process does nothing for that.
* The server runs in a session of its own: Ctrl-C and hang-ups of the terminal reach the owner, not the workers.
* If the server is killed, the kernel kills its workers (PR_SET_PDEATHSIG, see prctl(2)).

Note [fork server frames]. A frame is 16 bytes: ``op, number, token``.

To the server: ``F`` fork a worker; the frame carries the descriptors of its control socket, and the owner's stdout and
stderr. ``P`` import what workers need, and answer ``P``. ``K`` send signal ``token`` to process ``number``. ``R`` fork
no more for this client, and end with its last worker; ``number`` is 1 if another server guards the folder now.

From the server: ``S`` worker ``token`` has pid ``number``. ``E`` worker ``token`` could not be forked, with errno
``number``. ``X`` process ``number`` has ended with wait status ``token``.
"""

import array
import contextlib
import errno
import gc
import importlib
import json
import os
import resource
import select
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

FRAME = struct.Struct("=cxxxiQ")
MAX_FDS = 8


class Client:
    """A connection to a process that has workers."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unsent = b""
        self.retired = False

    def send(self, op: bytes, number: int, token: int) -> None:
        self.unsent += FRAME.pack(op, number, token)
        self.flush()

    def flush(self) -> None:
        try:
            sent = self.connection.send(self.unsent, socket.MSG_DONTWAIT)
        except ConnectionError:
            sent = len(self.unsent)  # the client is dead; the loop will notice
        except OSError:
            return  # the socket or the kernel has no room now: the loop tries again
        self.unsent = self.unsent[sent:]


class Server:
    def __init__(self, connection: socket.socket, namespace: str, entry: str) -> None:
        self.namespace = namespace
        #: The module whose ``main`` a worker runs; ``worker`` is that function after ``preload``.
        self.entry = entry
        self.worker: Callable[[list[int], int, int, int], int]
        self.selector = selectors.DefaultSelector()
        self.first = self.add_client(connection)
        self.workers: dict[int, Client] = {}
        self.preloaded = False
        self.wake, wake_write = socket.socketpair()
        self.wake_write = wake_write
        for sock in (self.wake, wake_write):
            sock.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.wake, selectors.EVENT_READ, None)

    def add_client(self, connection: socket.socket) -> Client:
        client = Client(connection)
        self.selector.register(connection, selectors.EVENT_READ, client)
        return client

    def run(self) -> None:
        while True:
            clients = [key.data for key in self.selector.get_map().values() if key.data is not None]
            unsent = any(client.unsent for client in clients)
            for key, _ in self.selector.select(0.05 if unsent else None):
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self.wake.recv(4096)
                else:
                    self.serve(key.data)
            self.reap()
            for client in clients:
                if client.unsent:
                    client.flush()
            if self.first.retired and not self.workers and not self.first.unsent:
                self.disconnect(self.first)

    def serve(self, client: Client) -> None:
        try:
            data, ancillary, flags, _ = client.connection.recvmsg(
                FRAME.size, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_DONTWAIT | getattr(socket, "MSG_CMSG_CLOEXEC", 0)
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        fds = array.array("i")
        for _, _, rights in ancillary:
            fds.frombytes(rights)
        if len(data) < FRAME.size:
            self.disconnect(client)
            return
        op, number, token = FRAME.unpack(data)
        if op == b"P":
            self.preload()
            client.send(b"P", 0, token)
        elif op == b"F" and flags & socket.MSG_CTRUNC:  # this process has no room for the descriptors
            client.send(b"E", errno.EMFILE, token)
        elif op == b"F" and client.retired:
            client.send(b"E", errno.EPERM, token)
        elif op == b"F":
            self.preload()
            self.fork(client, token, list(fds))
        elif op == b"R":
            client.retired = True
            if client is self.first and number:
                self.namespace = ""
        elif op == b"K" and self.workers.get(number) is client:
            os.kill(number, token)
        for fd in fds:
            os.close(fd)

    def preload(self) -> None:
        """Import once what every worker needs. ``gc.freeze`` keeps collections in workers from copying its pages."""
        if not self.preloaded:
            with self.guarded():
                importlib.import_module("torchwq")  # torch comes along
                self.worker = importlib.import_module(self.entry).main
            os.chdir("/")
            gc.collect()
            gc.freeze()
            self.preloaded = True

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Watch the first client from another thread while this one is busy. Do not fork within."""
        stop, stop_write = socket.socketpair()

        def watch() -> None:
            poll = select.poll()
            poll.register(self.first.connection, getattr(select, "POLLRDHUP", 0))
            poll.register(stop, select.POLLIN)
            if stop.fileno() not in [fd for fd, _ in poll.poll()]:
                self.disconnect(self.first)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop_write.close()
            thread.join()
            stop.close()

    def fork(self, client: Client, token: int, fds: list[int]) -> None:
        ends: tuple[socket.socket, ...] = ()
        try:
            ours, theirs = ends = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            for end in ends:
                end.close()
            client.send(b"E", error.errno or 0, token)
            return
        if pid == 0:
            ours.close()
            self.become_worker(theirs, fds)
        theirs.close()
        self.add_client(ours)
        self.workers[pid] = client
        client.send(b"S", pid, token)

    def become_worker(self, server: socket.socket, fds: list[int]) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for key in list(self.selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
            self.selector.close()
            self.wake_write.close()
            code = self.worker(fds[:-2], server.detach(), fds[-2], fds[-1])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def reap(self) -> None:
        while self.workers:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client = self.workers.pop(pid, None)
            if client is not None:
                client.send(b"X", pid, status)

    def disconnect(self, client: Client) -> None:
        """The process behind ``client`` has died: kill its workers."""
        first = client is self.first
        for pid, owner in self.workers.items():
            if first or owner is client:
                os.kill(pid, signal.SIGKILL)
        self.selector.unregister(client.connection)
        client.connection.close()
        if first:
            if self.namespace:
                shutil.rmtree(self.namespace, ignore_errors=True)
            os._exit(0)


def main(argv: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The server needs two descriptors for each worker. A worker gets the limits of its owner.
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings: dict[str, Any] = json.loads(argv[2])
    sys.path[:] = settings["path"]
    connection = socket.socket(fileno=int(argv[1]))
    os.set_inheritable(connection.fileno(), False)
    Server(connection, settings["namespace"], settings["entry"]).run()


if __name__ == "__main__":
    main(sys.argv)
