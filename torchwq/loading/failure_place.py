"""Says at which sample loading has failed, or else at which batch."""

from __future__ import annotations

import dis
import types
from typing import Any


def describe_failure_place(error: BaseException, index: Any) -> str:
    """The sample at which ``error`` was raised, if a frame of torch's fetcher shows it; else the batch.

    Args:
        error: raised while a batch was made.
        index: what the sampler gave for that batch.
    """
    traceback, in_fetcher = error.__traceback__, False
    while traceback is not None:
        frame = traceback.tb_frame
        was_in_fetcher, in_fetcher = in_fetcher, frame.f_globals.get("__name__") == "torch.utils.data._utils.fetch"
        if in_fetcher and "idx" in frame.f_locals:
            return f"at index {frame.f_locals['idx']!r}"
        if was_in_fetcher and not in_fetcher:
            # From Python 3.12 on the fetcher's loop has no frame of its own, and its variable is gone.
            return f"at {_index_in_dataset(frame, index)}"
        traceback = traceback.tb_next
    return f"at {describe_index(index)}"


def _index_in_dataset(frame: types.FrameType, index: Any) -> str:
    """Which of the batch's indices the dataset was to get, if its frame shows that; else all of them."""
    code = frame.f_code
    if code.co_name == "__getitem__" and code.co_argcount > 1 and isinstance(index, (list, tuple)):
        name = code.co_varnames[1]
        found = frame.f_locals.get(name)
        if any(each is found for each in index) and not _sets(code, name):
            return f"index {found!r}"
    return describe_index(index)


def _sets(code: types.CodeType, name: str) -> bool:
    """Whether the code may give its variable another value."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("STORE_", "DELETE_")):
            names = instruction.argval  # of some instructions several
            if name in (names if isinstance(names, tuple) else (names,)):
                return True
    return False


def describe_index(index: Any) -> str:
    """The indices of a batch in a few words."""
    if isinstance(index, (list, tuple)) and index and all(each is None for each in index):
        return f"a batch of {len(index)}"
    if index is None:
        return "a sample"
    text = repr(index)
    if len(text) > 200:
        text = f"{text[:150]} ... {text[-40:]}"
    return f"the batch of indices {text}" if isinstance(index, (list, tuple)) else f"index {text}"
