"""Plain data: what ``torch.load`` reads with ``weights_only=True``, and JSON keeps as it is.

States of random number generators are thousands of words. As text they are both; as a tensor or an array they would
not survive JSON, and of ``bytes`` neither would.
"""

from __future__ import annotations

import base64
import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import torch


class StateDict(dict[str, Any]):
    """A state as its user gets it: a dict that prints short. Pickled, it is one of the classes that are plain data."""

    def __repr__(self) -> str:
        shown = {name: self[name] for name in ("yielded", "num_workers", "_iterator_finished") if name in self}
        return f"<state of a torchwq.DataLoader: {shown}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDict:
        return StateDict(copy.deepcopy(dict(self), memo))


def encode_bytes(state: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(state).decode("ascii")


def decode_bytes(text: str) -> bytes:
    """What ``encode_bytes`` was given."""
    return base64.b64decode(text)


def decode_tensor(text: str) -> torch.Tensor:
    """The same as a generator's ``set_state`` takes it."""
    return torch.frombuffer(bytearray(decode_bytes(text)), dtype=torch.uint8)


def plain_index(index: Any) -> Any:
    """What a sampler has drawn, with numbers of Python's in place of numpy's."""
    if isinstance(index, (list, tuple)):
        return [plain_index(each) for each in index]
    return index.item() if isinstance(index, np.generic) else index


def is_stateful(candidate: Any) -> bool:
    """Whether it can tell its state and be given one, as torchdata understands that."""
    return hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict")


def copy_of_state(state: Any) -> Any:
    """A state apart from its source, which may go on to change what it has given away."""
    if type(state) is dict and all(type(each) in (int, float, str, bool, type(None)) for each in state.values()):
        return state.copy()
    try:
        return copy.deepcopy(state)
    except Exception:
        return state  # it cannot be copied; then it is no plain data either
