"""``torchwq.marshal``, and local messages, which it is made of."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchwq
from torchwq.marshalling import codec
from torchwq.transport.capabilities import SAME_PROCESS


def read_and_change(marshalled: torchwq.Marshalled, mapid: int) -> tuple[float, list[int]]:
    data = marshalled.read()
    data["tensor"][mapid] += 1
    data["array"][0] = 9
    data["list"].append(mapid)
    again = marshalled.read()
    return float(again["array"][0]), again["list"]


def use_handles(marshalled: torchwq.Marshalled) -> None:
    for _ in range(2):
        queue, channel, mutex = marshalled.read()
        with mutex:
            queue.write("answer")
            channel.write("item")


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_it_is_read_many_times_in_any_worker(backend: str) -> None:
    data = {"tensor": torch.zeros(3), "array": np.zeros(50_000), "list": [1]}
    marshalled = torchwq.marshal(data)
    assert torchwq.map(3, read_and_change, marshalled, backend=backend).join(20) == [(0.0, [1])] * 3
    assert data["tensor"].tolist() == [1.0] * 3  # type: ignore[attr-defined]
    assert data["list"] == [1]
    data["list"].append("later")  # type: ignore[attr-defined]
    assert marshalled.read()["list"] == [1], "it is as it was when it was marshalled"
    assert marshalled.read()["tensor"].data_ptr() == data["tensor"].data_ptr()  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_it_may_hold_handles(backend: str) -> None:
    with torchwq.workqueue() as queue:
        channel, mutex = torchwq.channel(), torchwq.mutex()
        marshalled = torchwq.marshal((queue, channel, mutex))
        worker = torchwq.map(1, use_handles, marshalled, backend=backend)
        assert [queue.read(timeout=20), queue.read(timeout=20)] == ["answer"] * 2
        assert [channel.read(timeout=20)[1] for _ in range(2)] == ["item"] * 2
        worker.join(20)
        del marshalled


def test_it_travels_on() -> None:
    channel = torchwq.channel()
    channel.write(torchwq.marshal({"t": torch.ones(2)}))
    first = channel.read()[1]
    channel.write([first])
    channel._core.open_to_processes()
    assert channel.read()[1][0].read()["t"].tolist() == [1.0, 1.0]


def test_functions_follow_the_closure_rule() -> None:
    captured = [1, 2]
    with pytest.raises(torchwq.ClosureError, match="captured"):
        torchwq.marshal(lambda: captured)
    assert torchwq.marshal(lambda: captured, upvalues=True).read()() == [1, 2]
    with pytest.raises(torchwq.MarshalError, match=r"obj\['lock'\]"):
        torchwq.marshal({"lock": threading.Lock()})
    with pytest.raises(TypeError, match="torchwq"):
        pickle.dumps(torchwq.marshal(1))


def test_repr_and_size() -> None:
    marshalled = torchwq.marshal([torch.zeros(2), np.zeros(10_000)])
    assert marshalled.nbytes > 80_000
    assert "1 tensors" in repr(marshalled)


def through(obj: Any) -> Any:
    """The object as a thread would get it."""
    return codec.decode(*codec.deliver_local(codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS)))


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(_values)
def test_values_are_copies(value: Any) -> None:
    got = through(value)
    assert got == value
    if isinstance(value, (list, dict)):
        assert got is not value


@given(st.lists(st.integers(0, 40_000), min_size=1, max_size=4))
def test_arrays_are_writable_copies(sizes: list[int]) -> None:
    arrays = [np.arange(size, dtype=np.uint8) for size in sizes]
    got = through(arrays)
    for ours, theirs in zip(arrays, got, strict=True):
        assert np.array_equal(ours, theirs)
        assert theirs.flags.writeable
        if theirs.size:
            theirs[0] = 77
            assert ours[0] == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(3).requires_grad_(),
        torch.nn.Parameter(torch.randn(2)),
        torch.randn(3, dtype=torch.bfloat16)[1:],
        torch.randn(3, dtype=torch.cfloat).conj(),
        torch.empty(0, 3),
        torch.tensor(True),
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.empty(2, device="meta"),
    ],
    ids=["transposed", "leaf", "parameter", "bfloat16", "conj", "empty", "scalar", "coo", "csr", "meta"],
)
def test_tensors_of_any_kind_alias_the_writers_and_stay_where_they_are(tensor: torch.Tensor) -> None:
    got = through({"deep": [tensor]})["deep"][0]
    assert type(got) is type(tensor)
    assert got is not tensor
    assert (got.dtype, got.shape, got.layout, got.requires_grad) == (
        tensor.dtype,
        tensor.shape,
        tensor.layout,
        tensor.requires_grad,
    )
    assert got.is_conj() == tensor.is_conj()
    if tensor.layout is torch.strided and tensor.device.type == "cpu":
        assert got.stride() == tensor.stride()
        assert got.data_ptr() == tensor.data_ptr()
        assert not tensor.is_shared()


def test_views_and_storages_keep_their_alias() -> None:
    base = torch.zeros(4)
    got = through([base, base[1:], base.untyped_storage(), base])
    got[1][0] = 5
    assert base[1] == 5
    assert got[0] is got[3]
    assert got[2].data_ptr() == base.data_ptr()


def test_a_module_arrives_with_the_same_parameters() -> None:
    model = torch.nn.Linear(3, 2)
    got = through(model)
    assert got is not model
    assert got.weight.data_ptr() == model.weight.data_ptr()
    assert isinstance(got.weight, torch.nn.Parameter)


def test_what_is_refused_for_processes_is_refused_here() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="detach"):
        codec.encode(leaf * 2, codec.UNLIMITED, peer=SAME_PROCESS)
