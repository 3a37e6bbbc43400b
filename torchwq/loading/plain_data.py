"""Plain data: what ``torch.load`` reads with ``weights_only=True``, and JSON keeps as it is.

The state of a random number generator is thousands of words. Only as text is it plain data: a tensor or an array does
not survive JSON, and ``bytes`` survive neither.
"""

from __future__ import annotations

import base64
import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import torch


class StateDict(dict[str, Any]):
    """A state as its user gets it: a dict with a short repr. It pickles as an OrderedDict, which is plain data."""

    def __repr__(self) -> str:
        shown = {name: self[name] for name in ("yielded", "num_workers", "_iterator_finished") if name in self}
        return f"<state of a torchwq.DataLoader: {shown}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDict:
        return StateDict(copy.deepcopy(dict(self), memo))


def encode_bytes(state: bytes) -> str:
    """``state`` as text."""
    return base64.b64encode(state).decode("ascii")


def decode_bytes(text: str) -> bytes:
    """The reverse of ``encode_bytes``."""
    return base64.b64decode(text)


def decode_tensor(text: str) -> torch.Tensor:
    """The same as a tensor, for a generator's ``set_state``."""
    return torch.frombuffer(bytearray(decode_bytes(text)), dtype=torch.uint8)


def plain_index(index: Any) -> Any:
    """What a sampler has drawn, with Python's numbers in place of numpy's."""
    if isinstance(index, (list, tuple)):
        return [plain_index(each) for each in index]
    return index.item() if isinstance(index, np.generic) else index


def is_stateful(candidate: Any) -> bool:
    """Whether it has a state, as torchdata understands that."""
    return hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict")


def copy_of_state(state: Any) -> Any:
    """A copy of a state, whose source may change what it has returned."""
    if type(state) is dict and all(type(each) in (int, float, str, bool, type(None)) for each in state.values()):
        return state.copy()
    try:
        return copy.deepcopy(state)
    except Exception:
        return state  # it cannot be copied, so it is no plain data anyway
