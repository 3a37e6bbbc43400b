"""The native part: the hot path in C, in one extension module, ``_core``.

Each of its types and functions has a twin in Python, which does the same: where the extension could not be built, in a
Python without a GIL, with ``TORCHWQ_NATIVE=0`` in the environment, and as the reference in tests. Both write the same
messages and the same reference table, so a process with the one talks to a process with the other.

The twin is the module that uses the native part: it defines its class or function, and then takes the native one in its
place if there is one. So this package knows nothing of the others.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from .sources import digest

#: Set to "0", it turns the native part off.
VARIABLE: Final = "TORCHWQ_NATIVE"


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether this process uses the native part, which is true of the status as well, and why not if it does not.

    Attributes:
        active: whether it does.
        reason: why it does not, and what to do about that; empty if it does.
    """

    active: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.active


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(VARIABLE) == "0":
        return None, f"{VARIABLE}=0 is set; unset it to have the native part"
    if sys.platform != "linux" or sys.implementation.name != "cpython":
        return None, "the native part is made for CPython on Linux"
    # Nor is there an extension for a build that could be without one, and has it on.
    if sysconfig.get_config_var("Py_GIL_DISABLED") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None, "the native part is not made for a Python without a GIL; run torchwq in one with a GIL to have it"
    try:
        module = importlib.import_module(f"{__name__}._core")
    except ModuleNotFoundError:
        return None, (
            "the extension module was not built when torchwq was installed; install a C compiler and Python's header "
            "files (gcc and python3-dev, in Debian's terms), then torchwq again; pip's -v shows what is missing"
        )
    except ImportError as error:
        return None, f"the extension module cannot be loaded; install torchwq again to have it built anew ({error})"
    built_from, here = getattr(module, "sources", None), digest()
    if here and built_from not in ("", here):
        return None, "the extension module was built from other sources than those that are here; install torchwq again"
    return module, ""


#: The extension module, typed in ``_core.pyi``; None if this process uses the twins. It is ``Any`` because much of what
#: uses it can only have come with the extension, and need not ask again whether it is there.
core: Any
core, _reason = _load()

status: Final[NativeStatus] = NativeStatus(core is not None, _reason)
"""Whether this process uses the native part, the hot path of torchwq in C, and why not if it does not.

Without it, torchwq does the same in Python, and sends the same messages. ``TORCHWQ_NATIVE=0`` in the environment turns
it off, for this process and the workers that it starts.
"""
