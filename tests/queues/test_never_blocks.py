"""What runs in the reactor's thread neither waits for anybody nor runs code of the user's."""

from __future__ import annotations

import gc
import threading
from typing import Any

import torch

import torchwq
from tests.conftest import wait_until
from tests.queues import jobs
from torchwq.transport import directory, namespace, reactor

#: In which threads objects of class ``Told`` were pickled.
pickled_in: list[str] = []


class Told:
    def __reduce__(self) -> Any:
        pickled_in.append(threading.current_thread().name)
        return Told, ()


def reactor_answers() -> bool:
    answered = threading.Event()
    reactor.get().call_later(0, answered.set)
    return answered.wait(10)


def test_a_dropped_queue_marshals_what_waits_in_it_elsewhere() -> None:
    gate = torchwq.workqueue()
    worker = torchwq.map(1, jobs.consume, gate)  # it might be on its way to the queue: so questions are kept
    queue = torchwq.workqueue()
    queue.write([torch.zeros(2), Told()])
    assert queue._role.peer.same_process
    pickled_in.clear()
    del queue
    gc.collect()
    wait_until(lambda: pickled_in, what="the closing of a dropped queue")
    assert "torchwq-reactor" not in pickled_in
    gate.close()
    worker.join(20)


def test_a_dropped_queue_whose_names_are_locked_does_not_hold_the_reactor_up() -> None:
    queue = torchwq.workqueue("locked names")
    role = queue._role
    with namespace.current().locked():
        del queue
        gc.collect()
        wait_until(lambda: role.closed, what="the closing of a dropped queue")
        assert reactor_answers()
    # Its name is free as soon as the lock is.
    wait_until(lambda: namespace.current().lookup("locked names") is None, what="giving up the name")


def test_who_waits_for_the_owner_of_a_name_does_not_hold_up_those_who_close(monkeypatch: Any) -> None:
    asked, may_go_on = threading.Event(), threading.Event()
    ask = directory.ask

    def slow_ask(name: str) -> Any:
        if name == "slow" and not may_go_on.is_set():
            asked.set()
            assert may_go_on.wait(20)
        return ask(name)

    monkeypatch.setattr(directory, "ask", slow_ask)
    other = torchwq.workqueue("other")
    opened: list[torchwq.WorkQueue] = []
    opener = threading.Thread(target=lambda: opened.append(torchwq.workqueue("slow")))
    opener.start()
    assert asked.wait(10)
    try:
        closer = threading.Thread(target=other.close)
        closer.start()
        closer.join(10)
        assert not closer.is_alive()
        assert reactor_answers()
    finally:
        may_go_on.set()
    opener.join(10)
    opened[0].close()
