"""Workqueues, workers and background tasks for PyTorch: objects by value, tensors by reference.

The public face: what is not named here is internal.
"""

from .background import BackgroundTask
from .errors import (
    ClosureError,
    MarshalError,
    NamespaceError,
    QueueClosed,
    RemoteError,
    RemoteTraceback,
    ResourceError,
    TorchwqError,
    WorkerDied,
)
from .mapping import Map, map
from .pool import BackgroundTaskPool
from .queues import QueueStatistics, WorkQueue, workqueue
from .workers.client import warm_up
from .workers.info import WorkerInfo, worker_info

__version__ = "0.1.0"

__all__ = [
    "BackgroundTask",
    "BackgroundTaskPool",
    "ClosureError",
    "Map",
    "MarshalError",
    "NamespaceError",
    "QueueClosed",
    "QueueStatistics",
    "RemoteError",
    "RemoteTraceback",
    "ResourceError",
    "TorchwqError",
    "WorkQueue",
    "WorkerDied",
    "WorkerInfo",
    "map",
    "warm_up",
    "worker_info",
    "workqueue",
]
