"""Round trips: through the codec in this process, and through a workqueue to a worker and back."""

from __future__ import annotations

import gc
import os
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import torchwq
from torchwq.marshalling import codec
from torchwq.marshalling.value_message import ValueMessage
from torchwq.memory import maintenance, pool, received_blocks
from torchwq.memory.message import Message
from torchwq.transport.trailer import PICKLE, trailer

LIMIT = codec.CALL_LIMIT


def received(payload: bytes | Message | ValueMessage) -> tuple[Any, list[int]]:
    """The message as a reader would get it: bytes with a trailer, and its own descriptors."""
    if isinstance(payload, Message):
        return payload.copy()
    if isinstance(payload, ValueMessage):
        return payload, []
    return payload + trailer(7, PICKLE), []


def marshal(obj: Any, limit: int = LIMIT, *, upvalues: bool = False) -> bytes | Message:
    (payload,) = codec.encode_all([obj], limit, upvalues=upvalues)
    assert len(payload.data if isinstance(payload, Message) else payload) <= limit
    return payload


def roundtrip(obj: Any, limit: int = LIMIT, *, upvalues: bool = False) -> Any:
    return codec.decode(*received(marshal(obj, limit, upvalues=upvalues)))


class Peer:
    """A worker that answers one question at a time; runs functions that travel by name or by value."""

    def __init__(self, queue: torchwq.WorkQueue) -> None:
        self.queue = queue

    def ask(self, function: Callable[..., Any], *args: Any, upvalues: bool = False) -> Any:
        (self.queue.writeup if upvalues else self.queue.write)((function, args))
        good, value = self.queue.read(timeout=30)
        assert good, f"at the worker:\n{value}"
        return value

    def echo(self, obj: Any) -> Any:
        return self.ask(same, obj)

    def free_unused_memory(self) -> None:
        """Free all memory that no tensor uses, in this process and in the worker."""
        gc.collect()
        received_blocks.trim()
        pool.trim()
        self.ask(retire_memory)


@contextmanager
def started_peer() -> Iterator[Peer]:
    with torchwq.workqueue() as queue:
        worker = torchwq.map(1, serve, queue)
        peer = Peer(queue)
        assert peer.echo(1) == 1
        yield peer
        queue.write(None)
        worker.join(20)


def serve(queue: torchwq.WorkQueue) -> None:
    while True:
        try:
            question = queue.read()
        except torchwq.QueueClosed:
            return
        except Exception:
            queue.write((False, traceback.format_exc()))
            continue
        if question is None:
            return
        answer(queue, *question)
        del question  # a test may have dropped it


def answer(queue: torchwq.WorkQueue, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        queue.write((True, function(*args)))
    except Exception:
        queue.write((False, traceback.format_exc()))


def same(obj: Any) -> Any:
    return obj


def retire_memory() -> None:
    """At the worker: keep nothing for use again, and have nothing kept by the reader. What is in use stays."""
    gc.collect()
    received_blocks.trim()
    pool.trim()
    maintenance.run()


_kept: list[Any] = []


def keep(obj: Any) -> None:
    """At the worker: hold ``obj`` for later questions."""
    _kept.append(obj)


def drop_kept() -> Any:
    return _kept.pop()


def apply_to_kept(function: Callable[[Any], Any]) -> Any:
    return function(_kept[-1])


def identical(left: Any, right: Any) -> bool:
    """Equal in type and value, all the way down; a NaN is identical to itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex):
        return identical(left.real, right.real) and identical(left.imag, right.imag)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, np.ndarray):
        left, right = _native(left), _native(right)
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return bool(left == right)


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order, in which numpy unpickles one that is not contiguous."""
    return array if array.dtype.hasobject else array.astype(array.dtype.newbyteorder("="))


def descriptors() -> set[str]:
    """The open descriptors of this process, after freeing the memory that no tensor uses."""
    pool.trim()
    received_blocks.trim()
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(fd))
        except OSError:
            continue  # the descriptor of the directory itself
        found.add(fd)
    return found


def mapping_at(address: int) -> str | None:
    """The line of this process's memory map that holds ``address``; None if nothing is mapped there."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, _, end = line.split(" ", 1)[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return line
    return None


def run_in_main(source: str) -> dict[str, Any]:
    """Run source as if it were a script; returns its globals."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(source, "script.py", "exec", dont_inherit=True), namespace)
    return namespace


def raw_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The memory of a tensor of any kind, as tensors of bytes."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
        tensor = tensor.as_subclass(torch.Tensor)
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif tensor.is_nested:
        parts = [tensor.values()]
    else:
        parts = [tensor]
    return [torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage()) for part in parts]


def flip_bits(tensor: torch.Tensor) -> None:
    """Change every byte of the tensor's memory that may be changed without breaking the tensor."""
    raw_parts(tensor)[-1].bitwise_xor_(1)


def raw_bytes(tensor: torch.Tensor) -> list[bytes]:
    return [bytes(part.tolist()) for part in raw_parts(tensor)]


def facts(tensor: torch.Tensor) -> dict[str, Any]:
    """All properties that must be the same on both sides, without the memory itself."""
    found: dict[str, Any] = {
        "type": f"{type(tensor).__module__}.{type(tensor).__qualname__}",
        "dtype": tensor.dtype,
        "layout": tensor.layout,
        "device": tensor.device,
        "requires_grad": tensor.requires_grad,
        "is_leaf": tensor.is_leaf,
        "attributes": {name: value for name, value in vars(tensor).items() if name == "tag"},
    }
    if tensor.is_nested:
        found["shapes"] = [tuple(part.shape) for part in tensor.detach().unbind()]
        return found
    found["shape"] = tuple(tensor.shape)
    if tensor.layout is torch.strided:
        found["stride"], found["offset"] = tensor.stride(), tensor.storage_offset()
        found["conj"], found["neg"] = tensor.is_conj(), tensor.is_neg()
    if tensor.layout is torch.sparse_coo:
        found["coalesced"] = tensor.is_coalesced()
    if tensor.is_quantized:
        found["scheme"] = tensor.qscheme()
        if tensor.qscheme() is torch.per_tensor_affine:
            found["quantizer"] = (tensor.q_scale(), tensor.q_zero_point())
        else:
            scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
            found["quantizer"] = (scales.tolist(), zeros.tolist(), tensor.q_per_channel_axis())
    return found
