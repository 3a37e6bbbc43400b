"""Answers for the handles of a worker on another machine, in its owner's process.

A thread, which is a worker of torchwq itself, opens a handle for each that has travelled. So queues and channels know
such a worker as they know any other: who has which question in hand, whether anybody is left, who has failed.

Invariants:

* Only that thread opens handles, and they close when it ends: after the far worker's end, with its error.
* All requests of one far thread are done by one thread here: who is busy with a question is known by its thread.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, Final

from ..handles.reference import HandleRef, Target
from ..marshalling import codec, exceptions
from ..transport.capabilities import OTHER_MACHINE
from ..workers import child
from ..workers.info import WorkerInfo
from ..workers.threads import ThreadWorker
from .transit import Handle, unpack

#: What a far handle may ask for.
_METHODS: Final = frozenset({"read", "write", "writeup", "close", "closed", "drained", "num_items"})

_OPEN, _DROP, _FAILED, _END = range(4)


class _Slot:
    """The handle that stands for a far one."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.opened = threading.Event()
        self.handle: Any = None
        self.error: BaseException | None = None


class HandleServer:
    """The handles of one worker.

    Args:
        info, group: of the worker.
        reply: answers a request: takes its number, whether it went well, and the payload.
    """

    def __init__(self, info: WorkerInfo, group: int, reply: Callable[[int, bool, Any], None]) -> None:
        self._info = info
        self._group = group
        self._reply = reply
        self._numbers = itertools.count()
        self._slots: dict[int, _Slot] = {}
        self._opener: ThreadWorker | None = None
        self._threads: dict[int, queue.SimpleQueue[Any]] = {}
        self._lock = threading.RLock()

    def offer(self, ref: HandleRef) -> Handle:
        """What the far worker gets in the place of a handle."""
        number = next(self._numbers)
        self._slots[number] = slot = _Slot(ref.target)
        with self._lock:
            if self._opener is None:
                self._opener = ThreadWorker(
                    self._info, f"{__name__}:serve", _ignore, _ignore, self._group, kind="one on another machine"
                )
        self._opener.send((_OPEN, slot, ref))
        return number, ref.target.far_kind, ref.target.shown()

    def returned(self, number: int) -> Any:
        """The far worker has sent a handle back: another on the same."""
        return HandleRef(self._slots[number].target).accept()

    def request(self, number: int, thread: int, handle: int, method: str, message: Any) -> None:
        """Do what a far thread asks for, in a thread."""
        requests = self._threads.get(thread)
        if requests is None:
            self._threads[thread] = requests = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(requests,), name="torchwq-far-handle", daemon=True).start()
        requests.put((number, handle, method, message))

    def close(self, number: int) -> None:
        """The far handle is garbage."""
        slot = self._slots.pop(number, None)
        if slot is not None and self._opener is not None:
            self._opener.send((_DROP, slot))

    def failed(self, message: Any) -> None:
        """The far worker's function has raised this packed error."""
        if self._opener is not None:
            self._opener.send((_FAILED, message))

    def end(self, exitcode: int | None, death: BaseException | None) -> None:
        """The far worker has ended, ``death`` says how if not well. Returns when its handles are closed."""
        for requests in self._threads.values():
            requests.put(None)
        if self._opener is not None:
            self._opener.send((_END, exitcode, death))
            self._opener.wait(None)
        self._slots.clear()

    def _serve(self, requests: queue.SimpleQueue[Any]) -> None:
        while (request := requests.get()) is not None:
            number, handle, method, message = request
            try:
                payload: Any = codec.encode_one(
                    self._do(handle, method, message), codec.UNLIMITED, "what was read", peer=OTHER_MACHINE
                )
                good = True
            except BaseException as error:
                packed: Any = exceptions.pack(error, peer=OTHER_MACHINE)
                payload = codec.encode(packed, codec.UNLIMITED, upvalues=True, peer=OTHER_MACHINE)
                good = False
            try:
                self._reply(number, good, payload)
            except Exception as error:
                failure = exceptions.pack(RuntimeError(f"the owner could not answer: {type(error).__name__}: {error}"))
                self._reply(number, False, codec.encode(failure, codec.UNLIMITED, peer=OTHER_MACHINE))
            request = message = payload = packed = None

    def _do(self, handle: int, method: str, message: Any) -> Any:
        args, kwargs = codec.decode(unpack(message, self.returned), [])
        if method not in _METHODS:
            raise AttributeError(method)
        slot = self._slots[handle]
        slot.opened.wait()
        if slot.error is not None:
            raise slot.error
        attribute = getattr(slot.handle, method)
        return attribute(*args, **kwargs) if callable(attribute) else attribute


def _ignore(*args: Any) -> None:
    return None


def serve(context: child.Context) -> int:
    """The thread that opens the handles."""
    has_failed = False
    while True:
        order: Any = context.receive()[0]
        if order is None:  # the program ends
            return 0
        kind, *content = order
        del order
        if kind == _OPEN:
            slot, ref = content
            try:
                slot.handle = ref.accept()
            except Exception as error:
                slot.error = error
            slot.opened.set()
            del slot, ref
        elif kind == _DROP:
            content[0].handle = None
        elif kind == _FAILED:
            context.report_task_failure(exceptions.unpack(codec.decode(content[0], [])))
            has_failed = True
        elif kind == _END:
            exitcode, death = content
            if exitcode and has_failed:
                return 1
            if exitcode != 0:
                context.report_failure(death)
            return int(exitcode != 0)
        content = []
