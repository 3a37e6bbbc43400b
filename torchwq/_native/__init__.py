"""The native part: the hot path in C, in one extension module, ``_core``.

Each of its types and functions has a twin in Python, which does the same: where the extension could not be built, in a
Python without a GIL, with ``TORCHWQ_NATIVE=0`` in the environment, and as the reference in tests. Both write the same
messages and the same reference table, so a process with the one talks to a process with the other.

The twin is the module that uses the native part: it defines its class or function, and then takes the native one in its
place if there is one. So this package knows nothing of the others.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

#: Set to "0", it turns the native part off.
VARIABLE: Final = "TORCHWQ_NATIVE"


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether this process uses the native part.

    Attributes:
        active: whether it does.
        reason: why it does not; empty if it does.
    """

    active: bool
    reason: str

    def __bool__(self) -> bool:
        return self.active


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(VARIABLE) == "0":
        return None, f"{VARIABLE}=0 is set"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None, "this Python has no GIL, for which the native part is not made"
    try:
        from . import _core
    except ImportError as error:
        return None, f"the extension module is not there, or does not fit this Python: {error}"
    return _core, ""


def _find() -> tuple[Any, NativeStatus]:
    module, reason = _load()
    return module, NativeStatus(module is not None, reason)


#: The extension module; None if this process uses the twins.
core: Any
core, status = _find()
