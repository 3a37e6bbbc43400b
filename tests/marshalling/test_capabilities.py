"""A peer that shares no memory and gets no descriptors, as on another machine, gets values, or a clear refusal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import sharedctypes
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from torchwq import MarshalError
from torchwq.marshalling import codec, exceptions
from torchwq.marshalling.attachments import Attachments
from torchwq.marshalling.tensors import _refuse_device
from torchwq.memory.anonymous import Descriptor
from torchwq.memory.message import Message
from torchwq.transport.capabilities import OTHER_MACHINE, SAME_MACHINE, Capabilities

from . import library
from .support import facts, identical, received
from .test_tensors import ALL, dense, values

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about prototypes and deprecations


def marshal(obj: Any, **how: Any) -> Any:
    """The message: bytes, or a ``ValueMessage``, and no descriptors beside it."""
    (payload,) = codec.encode_all([obj], codec.CALL_LIMIT, peer=OTHER_MACHINE, **how)
    data, fds = received(payload)
    assert not fds
    return data


def roundtrip(obj: Any, **how: Any) -> Any:
    return codec.decode(marshal(obj, **how), [])


@pytest.mark.parametrize("kind", ALL)
def test_a_tensor_goes_by_value_and_comes_out_as_it_was(kind: str) -> None:
    tensor = ALL[kind]()
    before = facts(tensor)
    out = roundtrip(tensor)
    assert facts(tensor) == before
    before.pop("offset", None)  # what is seen of the storage is the storage that arrives
    assert {name: fact for name, fact in facts(out).items() if name in before} == before
    if tensor.device.type != "meta":
        assert values(out) == values(tensor)


def test_a_tensor_stays_where_it_is_for_one_who_sees_only_a_copy() -> None:
    tensors = [dense(), dense()[1:], torch.arange(1 << 20)]
    places = [tensor.data_ptr() for tensor in tensors]
    roundtrip(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert not any(tensor.is_shared() for tensor in tensors)


@pytest.mark.parametrize("kind", ["dense", "large", "in a dict", "twice"])
def test_neither_side_sees_the_others_writes(kind: str) -> None:
    tensor = torch.arange(1 << 20) if kind == "large" else dense()
    obj = {"in a dict": {"a": tensor, "b": torch.ones(3)}, "twice": [tensor, tensor]}.get(kind, tensor)
    out = roundtrip(obj)
    if kind == "twice":
        assert out[0] is out[1]
    arrived = out["a"] if kind == "in a dict" else out[0] if kind == "twice" else out
    assert torch.equal(arrived, tensor)
    arrived.zero_()
    assert tensor.any()
    tensor.fill_(5)
    assert not arrived.any()


def test_views_of_one_storage_arrive_as_views_of_one_storage_with_what_is_seen_of_it() -> None:
    base = torch.arange(1 << 20)
    rows = [base[:10], base[5:15], base[-10:]]
    data = marshal(rows)
    assert data.nbytes < 2_000
    first, second, last = codec.decode(data, [])
    assert (first.tolist(), second.tolist(), last.tolist()) == tuple(each.tolist() for each in rows)
    first[5:].zero_()
    assert second.tolist() == [0] * 5 + [*range(10, 15)]


def test_what_has_come_by_reference_or_in_a_pack_goes_on_by_value() -> None:
    many = [torch.full((5,), float(number)) for number in range(300)]
    there = codec.decode(*received(codec.encode(many, 1 << 30)))
    again = roundtrip(there)
    assert [each.tolist() for each in again] == [each.tolist() for each in many]
    again[7].zero_()
    assert there[7].any()


@pytest.mark.parametrize("storage", [torch.Tensor.untyped_storage, torch.Tensor.storage])
def test_storages_go_by_value(storage: Callable[[torch.Tensor], Any]) -> None:
    tensor = dense()
    out = roundtrip(storage(tensor))
    assert type(out) is type(storage(tensor))
    assert bytes(getattr(out, "_untyped_storage", out).tolist()) == bytes(tensor.untyped_storage().tolist())
    out.fill_(0)
    assert tensor.any()


@pytest.mark.parametrize("size", [10, 100_000])
def test_arrays_and_bytes_go_by_value_whatever_their_size(size: int) -> None:
    obj = {"array": np.arange(size), "bytes": b"x" * size, "text": "y" * size, "numbers": (1, 2.5, None)}
    out = roundtrip(obj)
    assert identical(out, obj)
    out["array"][0] = 9  # the reader's own
    assert obj["array"][0] == 0
    assert roundtrip("z" * size) == "z" * size


def test_modules_functions_and_what_was_marshalled_go_along() -> None:
    model = torch.nn.Linear(3, 2)
    out = roundtrip({"model": model, "function": library.plain, "marshalled": torchwq.marshal([dense()])})
    assert all(map(torch.equal, out["model"].parameters(), model.parameters()))
    assert out["function"] is library.plain
    assert torch.equal(out["marshalled"].read()[0], dense())
    factor = 3
    assert roundtrip(lambda number: number * factor, upvalues=True)(2) == 6


def test_an_encoder_that_was_used_for_such_a_peer_shares_memory_again_afterwards() -> None:
    tensor = [dense(), object]
    roundtrip(tensor)
    payload = codec.encode(tensor, codec.CALL_LIMIT)
    assert isinstance(payload, Message)
    codec.decode(*received(payload))[0].zero_()
    assert not tensor[0].any()


def _descriptor() -> Descriptor:
    return Descriptor(os.open(os.devnull, os.O_RDONLY))


#: multiprocessing keeps the memory that they are in.
_VALUE, _ARRAY = multiprocessing.get_context("spawn").Value("i", 3), sharedctypes.RawArray("i", 3)

HERE_ONLY: dict[str, tuple[Callable[[], Any], str]] = {
    "mutex": (torchwq.mutex, "one machine only"),
    "descriptor": (_descriptor, "file descriptor"),
    "connection": (lambda: multiprocessing.Pipe()[0], "file descriptor"),
    "lock": (multiprocessing.get_context("spawn").Lock, "this machine"),
    "event": (multiprocessing.get_context("spawn").Event, "this machine"),
    "shared value": (lambda: _VALUE, "this machine"),
    "shared array": (lambda: _ARRAY, "this machine"),
}


@pytest.mark.parametrize("kind", HERE_ONLY)
def test_what_is_of_this_machine_is_refused_with_its_place(kind: str) -> None:
    make, why = HERE_ONLY[kind]
    obj = make()
    with pytest.raises(MarshalError, match=rf"args\[0\]\['inner'\]\[1\].*{why}"):
        marshal({"inner": [1, obj]}, worker_resources=[])
    with contextlib.suppress(AttributeError):
        obj.close()


@pytest.mark.parametrize("make", [torchwq.workqueue, torchwq.channel])
def test_a_handle_is_an_object_of_the_message_which_its_carrier_replaces(make: Callable[[], Any]) -> None:
    with make() as handle:
        message = marshal([1, handle])
        assert [ref.target.far_kind for ref in message.objects] == ["queue" if "queue" in make.__name__ else "channel"]
        message.objects = ["far"]
        assert message.decode() == [1, "far"]


def test_a_large_tensor_is_copied_once_into_memory_that_is_used_again() -> None:
    tensor = torch.arange(1 << 18)
    message = marshal({"large": tensor})
    assert [part.obj.ctypes.data for part in message.parts] == [tensor.data_ptr()]
    before = torchwq.memory_stats().blocks
    places = {message.decode()["large"].data_ptr() for _ in range(10)}
    assert len(places) <= 2
    assert torchwq.memory_stats().blocks <= before + 2


def test_an_exception_that_holds_a_tensor_goes_by_value() -> None:
    error = ValueError("with a tensor", dense(), torchwq.workqueue)
    packed = exceptions.pack_for(OTHER_MACHINE, error)
    data, fds = received(exceptions.encode(packed, codec.CALL_LIMIT, OTHER_MACHINE))
    assert not fds
    value, arrived = exceptions.decode_answer(data, fds)
    assert value is None
    assert type(arrived) is ValueError
    assert arrived.args[0] == "with a tensor"
    assert torch.equal(arrived.args[1], dense())
    arrived.args[1].zero_()
    assert error.args[1].any()


def test_memory_of_a_device_is_refused_with_the_way_out() -> None:
    for device in ("cuda:0", "xpu"):
        with pytest.raises(MarshalError, match=rf"a tensor on {device} .*tensor\.cpu\(\)"):
            _refuse_device(_encoder(OTHER_MACHINE), torch.device(device))
        _refuse_device(_encoder(SAME_MACHINE), torch.device(device))
    _refuse_device(_encoder(OTHER_MACHINE), torch.device("meta"))


def _encoder(peer: Capabilities) -> Any:
    encoder = Attachments()
    encoder.peer = peer
    return encoder


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("cuda_context")
@pytest.mark.parametrize("make", [lambda x: x, torch.Tensor.untyped_storage], ids=["tensor", "storage"])
def test_a_tensor_on_a_gpu_is_refused_with_its_place(make: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(MarshalError, match=r"args\[0\]\[0\].*tensor\.cpu\(\)"):
        marshal([make(torch.ones(2, device="cuda"))])
