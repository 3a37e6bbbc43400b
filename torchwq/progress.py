"""A bar that shows how far a call is, where ``progress=True`` asks for one: tqdm's, in a terminal and in a notebook.

tqdm is an extra. It is imported when a bar is asked for, before anything is started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check(wanted: bool) -> Callable[..., Any] | None:
    """tqdm if bars are ``wanted``, else None. Raises ImportError."""
    if not wanted:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            'progress=True needs tqdm: pip install "torchwq[progress]", or pip install tqdm ipywidgets for a notebook'
        ) from None
    make: Callable[..., Any] = tqdm
    return make
