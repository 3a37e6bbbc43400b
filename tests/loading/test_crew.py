"""A loader's end of the connection to a worker."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

from torchwq.loading.crew import Hand
from torchwq.loading.job import Part
from torchwq.loading.messages import Snapshot
from torchwq.marshalling import codec
from torchwq.transport.local import LocalEndpoint


def test_indices_that_two_threads_send_stay_in_order() -> None:
    theirs: list[LocalEndpoint] = []
    stub = SimpleNamespace()
    hand = Hand(lambda part, end: theirs.append(end) or stub, Part(0, 1, None, Snapshot()), memoryview(b""), "thread")
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            hand.flush()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=flush)
    thread.start()
    try:
        for index in range(20_000):
            hand.assign([index])
            hand.flush(3)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    hand.flush()
    received: list[int] = []
    while (message := theirs[0].try_receive()) is not None:
        _, indices = codec.decode(*message)
        received += [index for (index,) in indices]
    assert received == list(range(20_000))
    assert hand.unreceived == 20_000
    hand.close()
    theirs[0].close()
