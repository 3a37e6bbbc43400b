"""The random number generators of a process, Python's, numpy's and torch's, and their states as plain data."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from .plain_data import decode_bytes, decode_tensor, encode_bytes


class GeneratorStates:
    """The states of the generators when this object was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state().numpy().tobytes()
        self._numpy, self._words = _numpy_words()

    def changed(self) -> dict[str, Any] | None:
        """The present states of generators that were drawn from since, as plain data; None if none was."""
        found: dict[str, Any] = {}
        if (state := random.getstate()) != self._python:
            version, words, gauss = state
            found["python"] = [version, encode_bytes(np.array(words, "<u4").tobytes()), gauss]
        if (of_torch := torch.get_rng_state().numpy().tobytes()) != self._torch:
            found["torch"] = encode_bytes(of_torch)
        if self._numpy is None or _numpy_words() != (self._numpy, self._words):
            found["numpy"] = _without_arrays(np.random.get_state(legacy=False))
        return found or None


def set_generators(states: dict[str, Any]) -> None:
    """Set the generators of this process to what ``GeneratorStates.changed`` gave."""
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(np.frombuffer(decode_bytes(words), "<u4").tolist()), gauss))
    if "torch" in states:
        torch.set_rng_state(decode_tensor(states["torch"]))
    if "numpy" in states:
        np.random.set_state(_with_arrays(states["numpy"]))


@contextlib.contextmanager
def fork_torch_rng() -> Iterator[None]:
    """Restore torch's global generator after this block. Source: ``torch.random.fork_rng``, which does more."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _numpy_words() -> tuple[Any, bytes]:
    """numpy's generator, None if unknown, and the memory of its state, which ``get_state`` would copy three times."""
    if not hasattr(np.random, "get_bit_generator"):  # before numpy 1.24
        return None, b""
    generator = np.random.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return None, b""
    # The words and the position in them: ``struct mt19937_state``. Half a pair of normal numbers was drawn with them.
    return generator, ctypes.string_at(generator.ctypes.state_address, 625 * 4)


def _without_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_arrays(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "array": encode_bytes(value.tobytes())}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "array" in value:
            return np.frombuffer(decode_bytes(value["array"]), value["dtype"]).copy()
        return {name: _with_arrays(each) for name, each in value.items()}
    return value
