"""A worker's handle as another process has it, in the process of its owner."""

from __future__ import annotations

from torchwq import WorkQueue
from torchwq.queues.worker import accept
from torchwq.transport.link import Link


def worker_handle(queue: WorkQueue) -> WorkQueue:
    """Open a worker's handle that reads from the queue's socket. It is the caller's to close."""
    fds = [each.detach() for each in queue._role.handle_descriptors()]
    return WorkQueue(accept(fds[:-1], Link(fds[-1])), None)
