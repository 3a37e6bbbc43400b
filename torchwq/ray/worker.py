"""A worker on a Ray cluster, as its owner sees it.

Each message to the worker is a call of its actor. The calls return what the worker has sent: the first call that has
not returned takes what is there, or waits. So a task and its result are one call, which costs what any call of an actor
costs. While the owner has nothing to send, calls wait for messages.

Invariants:

* Calls are numbered. The actor takes their messages in, and lets them return, in that order; the owner's thread gets
  their results in that order. So no message overtakes another.
* As long as the worker has not ended, ``_MIN_CALLS`` calls or more have not returned: a message that is ready while
  another one is on its way finds a call.
* Ray tries no call again: a message is delivered once, or its worker has died.
* At most ``_MAX_CALLS`` calls have not returned; messages beyond wait here. A call that comes early (Ray holds one with
  a large message back until that is there) waits in a thread of the actor, and the missing one needs a thread, too.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import threading
from collections import deque
from typing import Any, Final

import torch

from ..transport.capabilities import OTHER_MACHINE
from ..workers import processes
from ..workers.info import WorkerInfo
from ..workers.worker import OnEnd, OnMessage, Worker, register
from . import actor
from .serving import HandleServer
from .transit import CLOSE, CLOSED, END, FAILED, HELLO, MAX_WAITING, MESSAGE, REPLY, REQUEST, Shared, pack, unpack

log = logging.getLogger("torchwq")

#: After so many seconds without a sign of life, the owner says what the worker waits for.
_PLACE_TIMEOUT: Final = 10.0
#: So many calls have always not returned.
_MIN_CALLS: Final = 2
_MAX_CALLS: Final = actor.THREADS - MAX_WAITING


class RayWorker(Worker):
    """A worker that is an actor.

    Args:
        ray: the module, connected.
        options: of the actor.
    """

    peer = OTHER_MACHINE
    can_be_killed = True

    def __init__(
        self,
        ray: Any,
        options: dict[str, Any],
        info: WorkerInfo,
        entry: str,
        on_message: OnMessage,
        on_end: OnEnd,
        group: int,
    ) -> None:
        super().__init__(info, on_message, on_end, group)
        register(self)
        self.started_event.set()  # its pid is one of another machine
        self._ray = ray
        self._options = options
        self._where = ""
        #: Over the next three. Reentrant: a finalizer may send something in the middle of a call.
        self._sending = threading.RLock()
        self._numbers = itertools.count()
        #: The calls that have not returned, or the errors that making them has raised.
        self._calls: dict[int, Any] = {}
        #: What waits for a call.
        self._held: deque[tuple[Any, Any]] = deque()
        #: Set when there is a further call.
        self._called = threading.Event()
        self._killed_by: signal.Signals | None = None
        self._handles = HandleServer(info, group, self.reply)
        setup = {
            "info": info,
            "entry": entry,
            "path": list(sys.path),
            "filters": processes.warning_filters(),
            "dtype": torch.get_default_dtype(),
        }
        try:
            remote = ray.remote(actor.Actor)
            self._actor = remote.options(max_concurrency=actor.THREADS, **options).remote(setup)
        except BaseException:
            self._unregister()
            raise
        for _ in range(_MIN_CALLS):
            self._call(None)
        self._thread = threading.Thread(target=self._run, name=f"torchwq-ray-{info.mapid}", daemon=True)
        self._thread.start()

    @property
    def identity(self) -> object:
        return self

    # To the worker

    def send(self, payload: Any) -> bool:
        message = payload.ref if isinstance(payload, Shared) else pack(payload, self._handles.offer)
        return self._call((MESSAGE,), message)

    def reply(self, request: int, good: bool, payload: Any) -> None:
        """Answer a request."""
        self._call((REPLY, request, good), pack(payload, self._handles.offer))

    def close_connection(self) -> None:
        """Tell the worker that no message will come any more."""
        self._call((CLOSE,))

    def _call(self, head: Any, message: Any = None) -> bool:
        """Call the actor. Returns False if the worker has ended."""
        actor = self._actor
        if actor is None or self.ended_event.is_set():
            return False
        with self._sending:
            if self._held or len(self._calls) >= _MAX_CALLS:
                self._held.append((head, message))
                return True
            number = next(self._numbers)
            try:
                self._calls[number] = actor.exchange.remote(number, head, message)
            except BaseException as error:
                # The cluster is gone, or this process has left it; or Ctrl-C. No later message may get in.
                self._calls[number] = error
                if not isinstance(error, Exception):
                    raise
            finally:
                self._called.set()
        return True

    def _returned(self, number: int, poll: bool) -> None:
        """A call has returned: let another go, with what waits, or, if ``poll``, without a message."""
        with self._sending:
            del self._calls[number]
            if self._held:
                held, self._held = self._held, deque()
                while held:
                    self._call(*held.popleft())
            elif poll and len(self._calls) < _MIN_CALLS:
                self._call(None)

    def kill(self, number: signal.Signals = signal.SIGTERM) -> None:
        if not self.ended_event.is_set():
            self._killed_by = number
            self._give_up_actor()

    # From the worker

    def _run(self) -> None:
        try:
            self._receive_all()
        except Exception as error:
            self.reason = self._cause(error)
            self._give_up_actor()
        self._calls.clear()
        self._held.clear()
        if self.exitcode is not None:
            self._end_actor()
        self._handles.end(self.exitcode, None if self.exitcode == 0 else self.death_error())
        if self._killed_by is not None and self.exitcode is None:
            self.exitcode, self.reason = -self._killed_by, ""
        self._report_end()

    def _receive_all(self) -> None:
        for number in itertools.count():
            while number not in self._calls:
                self._called.wait()
                self._called.clear()
            call = self._calls[number]
            if isinstance(call, BaseException):
                raise RuntimeError(f"a message could not be sent: {type(call).__name__}: {call}") from call
            if not number:
                self._wait_for_a_place(call)
            signals = self._ray.get(call)
            call = None
            self._returned(number, poll=not (signals and signals[-1][0] == END))
            for each in signals:
                self._handle(*each)
            signals = each = None  # or the last batch would stay in the object store until the next one comes
            if self.exitcode is not None:
                return

    def _wait_for_a_place(self, call: Any) -> None:
        """Ray waits for ever until the cluster has room for a worker. Say so, or it would look like a hang."""
        ready, _ = self._ray.wait([call], timeout=_PLACE_TIMEOUT)
        if not ready:
            needs = {"CPU": self._options["num_cpus"], **self._options.get("resources", {})}
            free = {name: self._ray.available_resources().get(name, 0) for name in needs}
            log.warning(
                "torchwq: worker %d of %d has no place yet: it needs %s, and the cluster has %s free. It starts when "
                "there is room. Make fewer workers, or smaller ones: torchwq.ray.Backend(num_cpus=0.5).",
                self.info.mapid,
                self.info.num_workers,
                _listed(needs),
                _listed(free),
            )

    def _handle(self, kind: int, *content: Any) -> None:
        if kind == HELLO:
            pid, node, address = content
            self._where = f"node {node[:8]} ({address}), pid {pid} there"
        elif kind == MESSAGE:
            self._on_message(self, unpack(content[0], self._handles.returned), [])
        elif kind == REQUEST:
            self._handles.request(*content)
        elif kind == CLOSED:
            self._handles.close(*content)
        elif kind == FAILED:
            self._handles.failed(unpack(content[0], self._handles.returned))
        elif kind == END:
            (self.exitcode,) = content

    def _cause(self, error: Exception) -> str:
        """Why the worker is gone, in words."""
        where = f" on {self._where}" if self._where else ""
        text = " ".join(str(error).split())
        for begin in ("The actor is dead because ", "The actor died because of an error "):  # before it come ids
            text = text[max(0, text.find(begin)) :]
        text = text.partition(" Some common causes")[0]
        actor_errors = self._ray.exceptions.RayActorError, self._ray.exceptions.NodeDiedError
        what = "is gone" if isinstance(error, actor_errors) else "was given up"
        return f"its actor{where} {what}: {type(error).__name__}: {text}"

    def _give_up_actor(self) -> None:
        """End an actor that may live, although no message comes from it any more: another may need its place."""
        try:
            self._ray.kill(self._actor, no_restart=True)
        except Exception:  # it is gone, or the cluster is
            log.debug("an actor could not be ended", exc_info=True)

    def _end_actor(self) -> None:
        """Let the process of a worker that has finished end, with its exit functions."""
        try:
            self._actor.__ray_terminate__.remote()
        except Exception:  # the cluster is gone
            log.debug("an actor could not be ended", exc_info=True)
        self._actor = None


def _listed(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
