"""The mutex: ``handle`` is what users hold, ``core`` what all handles of one process share, ``lock`` and ``barrier``
what it can do."""

from .handle import Mutex, mutex

__all__ = ["Mutex", "mutex"]
