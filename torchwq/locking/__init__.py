"""The mutex: ``handle`` is what users hold, ``state`` what all handles of one process share.

``robust_lock`` and ``barrier`` are what it can do; ``layout`` says which shared word means what."""

from .handle import Mutex, mutex

__all__ = ["Mutex", "mutex"]
