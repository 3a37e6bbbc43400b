"""Workqueues, workers and background tasks for PyTorch: objects by value, tensors by reference.

The public face: what is not named here is internal.
"""

from ._native import NativeStatus
from ._native import status as native
from .background import BackgroundTask
from .channels import Channel, ChannelState, ChannelStatistics, channel
from .dataloader import DataLoader
from .errors import (
    ClosureError,
    MarshalError,
    MutexError,
    NamespaceError,
    QueueClosed,
    RemoteError,
    RemoteTraceback,
    ResourceError,
    TorchwqError,
    WorkerDied,
    WorkerStartError,
)
from .group import WorkerGroup
from .loading.statistics import LoaderStatistics, SlowSample, WorkerStatistics
from .locking import Mutex, mutex
from .mapping import Map, map
from .marshalled import Marshalled, marshal
from .marshalling.reducers import register_reducer
from .memory.stats import MemoryStats
from .pool import BackgroundTaskPool
from .queues import QueueStatistics, WorkQueue, workqueue
from .selecting import select
from .shared import empty, empty_like, memory_stats, set_memory_limit, share_, zeros
from .workers.executable import set_executable
from .workers.info import WorkerInfo, worker_info
from .workers.starting import warm_up

__version__ = "0.1.0"

__all__ = [
    "BackgroundTask",
    "BackgroundTaskPool",
    "Channel",
    "ChannelState",
    "ChannelStatistics",
    "ClosureError",
    "DataLoader",
    "LoaderStatistics",
    "Map",
    "MarshalError",
    "Marshalled",
    "MemoryStats",
    "Mutex",
    "MutexError",
    "NamespaceError",
    "NativeStatus",
    "QueueClosed",
    "QueueStatistics",
    "RemoteError",
    "RemoteTraceback",
    "ResourceError",
    "SlowSample",
    "TorchwqError",
    "WorkQueue",
    "WorkerDied",
    "WorkerGroup",
    "WorkerInfo",
    "WorkerStartError",
    "WorkerStatistics",
    "channel",
    "empty",
    "empty_like",
    "map",
    "marshal",
    "memory_stats",
    "mutex",
    "native",
    "register_reducer",
    "select",
    "set_executable",
    "set_memory_limit",
    "share_",
    "warm_up",
    "worker_info",
    "workqueue",
    "zeros",
]
