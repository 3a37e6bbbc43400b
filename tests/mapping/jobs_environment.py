"""Functions for the workers of the tests of the environment."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_changed = False


def warn(text: str) -> str:
    warnings.warn(text, DeprecationWarning, stacklevel=1)
    return "warned"


def change_everything() -> str:
    """Tells whether anything was as another worker has left it, and changes it."""
    global _changed
    was = _changed or "LEFT_BEHIND" in os.environ or "left behind" in sys.path or torch.get_num_threads() != 1
    _changed = True
    os.environ["LEFT_BEHIND"] = "1"
    sys.path.append("left behind")
    torch.set_num_threads(2)
    return "changed" if was else "clean"


def read_stdin() -> str:
    return sys.stdin.read()
