"""The workqueue: ``handle`` is what users hold, ``owner`` and ``worker`` its two roles, ``registry`` opens it by
name."""

from .handle import QueueStatistics, WorkQueue
from .registry import labelled, workqueue

__all__ = ["QueueStatistics", "WorkQueue", "labelled", "workqueue"]
