"""The reentrant locks of the hot path: the native part's, which C code takes without a call; or ``threading.RLock``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from .. import _native

#: Makes a lock, to be used as a ``threading.RLock``.
new_lock: Final[Callable[[], Any]] = threading.RLock if _native.core is None else _native.core.StateLock
