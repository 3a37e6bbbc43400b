"""Plain data: what ``torch.load`` reads with ``weights_only=True``, and JSON keeps as it is.

States of random number generators are thousands of words. As text they are both; as a tensor or an array they would
not survive JSON, and of ``bytes`` neither would.
"""

from __future__ import annotations

import base64
import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

_WORDS_OF_PYTHON: Final = 625


class StateDict(dict[str, Any]):
    """A state as its user gets it: a dict that prints short. Pickled, it is one of the classes that are plain data."""

    def __repr__(self) -> str:
        shown = {name: self[name] for name in ("yielded", "num_workers", "_iterator_finished") if name in self}
        return f"<state of a torchwq.DataLoader: {shown}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> StateDict:
        return StateDict(copy.deepcopy(dict(self), memo))


def text_of(state: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(state).decode("ascii")


def bytes_of(text: str) -> bytes:
    """What ``text_of`` was given."""
    return base64.b64decode(text)


def tensor_of(text: str) -> torch.Tensor:
    """The same as a generator's ``set_state`` takes it."""
    return torch.frombuffer(bytearray(bytes_of(text)), dtype=torch.uint8)


def plain_index(index: Any) -> Any:
    """What a sampler has drawn, with numbers of Python's in place of numpy's."""
    if isinstance(index, (list, tuple)):
        return [plain_index(each) for each in index]
    return index.item() if isinstance(index, np.generic) else index


def is_stateful(candidate: Any) -> bool:
    """Whether it can tell its state and be given one, as torchdata understands that."""
    return hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict")


def detached(state: Any) -> Any:
    """A state apart from its source, which may go on to change what it has given away."""
    if type(state) is dict and all(type(each) in (int, float, str, bool, type(None)) for each in state.values()):
        return state.copy()
    try:
        return copy.deepcopy(state)
    except Exception:
        return state  # it cannot be copied; then it is no plain data either


def taken(indices: deque[Any]) -> Iterator[Any]:
    """What is in ``indices``, which lose it."""
    while indices:
        yield indices.popleft()


def skip(iterator: Any, count: int) -> None:
    """Take and drop so many. Not by ``islice``: that asks for ``iter(iterator)``, with which some begin anew."""
    for _ in range(count):
        try:
            next(iterator)
        except StopIteration:
            return


def after(first: Iterator[Any], indices: Any) -> Iterator[Any]:
    """``first``, and then ``indices``, of which nothing is asked but ``next``."""
    yield from first
    while True:
        try:
            index = next(indices)
        except StopIteration:
            return
        yield index


# The generators of a process


def state_of_python() -> Any:
    """The state of ``random``, as plain data."""
    version, words, gauss = random.getstate()
    return [version, text_of(np.array(words, "<u4").tobytes()), gauss]


def set_state_of_python(state: Any) -> None:
    version, words, gauss = state
    random.setstate((version, tuple(np.frombuffer(bytes_of(words), "<u4").tolist()), gauss))


def state_of_numpy() -> Any:
    """The state of ``numpy.random``, as plain data."""
    return _without_arrays(np.random.get_state(legacy=False))


def set_state_of_numpy(state: Any) -> None:
    np.random.set_state(_with_arrays(state))


def state_of_torch() -> str:
    """The state of torch's generator, as plain data."""
    return text_of(torch.get_rng_state().numpy().tobytes())


def set_state_of_torch(state: str) -> None:
    torch.set_rng_state(tensor_of(state))


def _without_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_arrays(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "array": text_of(value.tobytes())}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "array" in value:
            return np.frombuffer(bytes_of(value["array"]), value["dtype"]).copy()
        return {name: _with_arrays(each) for name, each in value.items()}
    return value
