"""Tensors by reference: they arrive as they were, and a write on either side is seen on the other."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchwq import MarshalError
from torchwq.marshalling import codec

from . import library
from .support import (
    Peer,
    apply_to_kept,
    drop_kept,
    facts,
    flip_bits,
    keep,
    mapping_at,
    marshal,
    raw_bytes,
    received,
    roundtrip,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about prototypes and deprecations

Make = Callable[[], torch.Tensor]

ALL_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def complex_tensor() -> torch.Tensor:
    return torch.complex(torch.arange(6.0), torch.arange(6.0) + 1).reshape(2, 3)


def dense() -> torch.Tensor:
    return torch.arange(1.0, 17.0).reshape(4, 4)


def tagged(tensor: torch.Tensor) -> torch.Tensor:
    tensor.tag = "kept by torch for subclasses"
    return tensor


def in_inference_mode() -> torch.Tensor:
    with torch.inference_mode():
        return torch.arange(3.0)


STRIDED: dict[str, Make] = {
    **{str(dtype): lambda dtype=dtype: torch.arange(6).reshape(2, 3).to(dtype) for dtype in ALL_DTYPES},
    "0-d": lambda: torch.tensor(3.0),
    "transposed": lambda: dense().t(),
    "with an offset": lambda: dense()[1:, 2:],
    "every other": lambda: torch.arange(10)[1::2],
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "overlapping": lambda: torch.arange(6.0).as_strided((3, 3), (1, 1), 1),
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conj": lambda: complex_tensor().conj(),
    "conj of a part": lambda: complex_tensor()[:, 1:].conj().t(),
    "neg": lambda: torch._neg_view(torch.arange(5.0)),
    "imag of conj": lambda: complex_tensor().conj().imag,
    "real": lambda: complex_tensor().real,
    "requires grad": lambda: torch.arange(3.0).requires_grad_(),
    "conj that requires grad": lambda: complex_tensor().conj().requires_grad_(),
    "neg that requires grad": lambda: torch._neg_view(torch.arange(5.0)).requires_grad_(),
    "from numpy": lambda: torch.from_numpy(np.arange(5.0)),
    "from a part of numpy": lambda: torch.from_numpy(np.arange(10.0)[3::2]),
    "made in inference mode": in_inference_mode,
    "already shared": lambda: torch.arange(4.0).share_memory_(),
    "part of shared": lambda: torch.arange(4.0).share_memory_()[2:],
    "Parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "Parameter without grad": lambda: torch.nn.Parameter(torch.arange(3), requires_grad=False),
    "Parameter conj": lambda: torch.nn.Parameter(complex_tensor().conj()),
    "subclass": lambda: tagged(torch.arange(3.0).as_subclass(library.Marked)),
    "subclass conj": lambda: complex_tensor().conj().as_subclass(library.Marked),
    "subclass that requires grad": lambda: library.Marked(torch.arange(3.0)).requires_grad_(),
    "Parameter subclass": lambda: library.MarkedParameter(torch.arange(3.0)),
}
OTHERS: dict[str, Make] = {
    "quantized": lambda: torch.quantize_per_tensor(dense(), 0.5, 3, torch.quint8),
    "quantized, part": lambda: torch.quantize_per_tensor(dense(), 0.25, 0, torch.qint32)[1:, 1:],
    "quantized per channel": lambda: torch.quantize_per_channel(
        dense(), torch.tensor([0.5, 0.25, 1.0, 2.0], dtype=torch.float64), torch.arange(4), 1, torch.qint8
    ),
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor([[0, 0, 1]], [1.0, 2.0, 3.0], (4,)),
    "coo, hybrid": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)),
    "coo that requires grad": lambda: torch.eye(3).to_sparse().requires_grad_(),
    "csr": lambda: dense().to_sparse_csr(),
    "csr, batch": lambda: torch.stack([torch.eye(3), torch.eye(3).flip(0)]).to_sparse_csr(),
    "csc": lambda: dense().to_sparse_csc(),
    "csc that requires grad": lambda: dense().to_sparse_csc().requires_grad_(),
    "bsr": lambda: dense().to_sparse_bsr((2, 2)),
    "bsc": lambda: dense().to_sparse_bsc((2, 2)),
    "sparse Parameter": lambda: torch.nn.Parameter(torch.eye(3).to_sparse()),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "nested that requires grad": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(4)], requires_grad=True),
    "nested Parameter": lambda: torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
}
EMPTY: dict[str, Make] = {
    "zero-size": lambda: torch.empty(0),
    "zero-size, shape": lambda: torch.empty(3, 0, 2).transpose(0, 2),
    "zero-size part": lambda: torch.arange(5)[2:2],
    "zero-size Parameter": lambda: torch.nn.Parameter(torch.empty(0, 4)),
    "zero-size bool": lambda: torch.empty(0, dtype=torch.bool),
    "coo without values": lambda: torch.zeros(3, 3).to_sparse(),
    "meta": lambda: torch.empty(3, 4, device="meta").t(),
    "meta Parameter": lambda: torch.nn.Parameter(torch.empty(3, device="meta")),
    "meta subclass": lambda: torch.empty(3, device="meta").as_subclass(library.Marked),
}
ALL = {**STRIDED, **OTHERS, **EMPTY}


@pytest.fixture(scope="module", autouse=True)
def _torch_has_imported_what_it_needs(_quick_collections: None) -> None:
    """Let torch import late modules now, above all for nested tensors, so that no collection looks at them again."""
    for make in ALL.values():
        facts(make())
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("kind", ALL)
def test_a_tensor_comes_out_as_it_was(kind: str) -> None:
    tensor = ALL[kind]()
    before = facts(tensor)
    out = roundtrip(tensor)
    assert facts(out) == before
    assert facts(tensor) == before
    if tensor.device.type != "meta":
        assert values(out) == values(tensor)


def values(tensor: torch.Tensor) -> list[Any]:
    """The tensor's values as numbers."""
    return [part.tolist() for part in _plain(tensor)]


@pytest.mark.parametrize("kind", ALL)
def test_a_tensor_comes_to_a_worker_as_it_was_and_back(peer: Peer, kind: str) -> None:
    tensor = ALL[kind]()
    assert peer.ask(facts, tensor) == facts(tensor)
    assert facts(peer.echo(tensor)) == facts(tensor)


@pytest.mark.parametrize("kind", {**STRIDED, **OTHERS})
def test_a_write_at_the_worker_is_seen_by_the_owner_and_the_other_way_round(peer: Peer, kind: str) -> None:
    tensor = ALL[kind]()
    start = raw_bytes(tensor)
    peer.ask(keep, tensor)
    try:
        assert raw_bytes(tensor) == start
        assert peer.ask(apply_to_kept, raw_bytes) == start
        peer.ask(apply_to_kept, flip_bits)
        changed = raw_bytes(tensor)
        assert changed != start
        assert peer.ask(apply_to_kept, raw_bytes) == changed
        flip_bits(tensor)
        assert raw_bytes(tensor) == start
        assert peer.ask(apply_to_kept, raw_bytes) == start
    finally:
        peer.ask(drop_kept)


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.is_nested:
        return list(tensor.detach().unbind())
    tensor = tensor.detach().as_subclass(torch.Tensor) if tensor.layout is torch.strided else tensor.detach()
    if tensor.is_quantized:
        return [tensor.dequantize()]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    return [tensor.to(torch.float32) if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor]


def test_the_same_tensor_twice_in_a_message_is_one_tensor() -> None:
    for make in (dense, OTHERS["quantized"], OTHERS["coo"], OTHERS["nested"], STRIDED["conj"], STRIDED["Parameter"]):
        tensor = make()
        first, second = roundtrip([tensor, {"again": tensor}])
        assert second["again"] is first


def test_tensors_on_one_storage_stay_on_one_storage() -> None:
    base = complex_tensor()
    group = [base, base[1:], base.t(), base.conj(), base.imag, base.detach(), base.untyped_storage()]
    for order in (group, group[::-1]):
        out = roundtrip(order)
        assert len({_storage_of(part).data_ptr() for part in out}) == 1
        plain = out[order.index(group[0])] if order is group else out[-1]
        plain.fill_(3 + 4j)
        assert base.tolist() == [[3 + 4j] * 3] * 2


def _storage_of(obj: Any) -> torch.UntypedStorage:
    return obj if isinstance(obj, torch.UntypedStorage) else obj.untyped_storage()


def test_views_of_a_tensor_see_a_write_at_the_worker(peer: Peer) -> None:
    whole = torch.zeros(4, 4)
    row, column, alias = whole[1], whole[:, 2], whole.detach()
    peer.ask(fill_with, whole, 5.0)
    assert row.tolist() == column.tolist() == [5.0] * 4
    assert alias.sum() == 80
    row.zero_()
    assert peer.ask(torch.Tensor.tolist, whole)[1] == [0.0] * 4


def test_sending_a_view_moves_what_it_is_a_view_of(peer: Peer) -> None:
    whole = torch.zeros(4, 4)
    view = whole[1:3]
    peer.ask(fill_with, view, 1.0)
    assert whole.sum() == 8
    assert whole.is_shared()


def fill_with(tensor: torch.Tensor, value: float) -> None:
    tensor.fill_(value)


def test_a_tensor_made_at_the_worker_is_shared_too(peer: Peer) -> None:
    answer = peer.ask(make_and_keep)
    try:
        answer[0] = 5
        assert peer.ask(apply_to_kept, torch.Tensor.tolist) == [5.0, 1.0]
        peer.ask(apply_to_kept, add_one)
        assert answer.tolist() == [6.0, 2.0]
    finally:
        peer.ask(drop_kept)


def make_and_keep() -> torch.Tensor:
    tensor = torch.ones(2)
    keep(tensor)
    return tensor


def add_one(tensor: torch.Tensor) -> None:
    tensor += 1


def test_a_shared_tensor_is_not_moved_again() -> None:
    for tensor in (torch.zeros(5), torch.zeros(5).share_memory_()):
        marshal(tensor)
        place = tensor.data_ptr()
        first, second = roundtrip(tensor), roundtrip(tensor)
        assert tensor.data_ptr() == place
        first[0], second[1] = 1, 2
        assert tensor.tolist() == first.tolist() == second.tolist() == [1, 2, 0, 0, 0]
        assert roundtrip(first)[1] == 2  # and what has arrived goes on
        roundtrip(first)[2] = 3
        assert tensor[2] == 3


def test_storages_of_both_kinds_travel_by_reference(peer: Peer) -> None:
    for make in (torch.Tensor.untyped_storage, torch.Tensor.storage):
        tensor = torch.zeros(4)
        storage = make(tensor)
        out = peer.echo(storage)
        assert type(out) is type(storage)
        assert len(out) == len(storage)
        out.fill_(0)
        out[3] = 1
        assert bytes(tensor.untyped_storage().tolist()) == bytes(_storage_bytes(out))
        assert any(_storage_bytes(out))
    assert len(roundtrip(torch.UntypedStorage(0))) == 0


def _storage_bytes(storage: Any) -> list[int]:
    return getattr(storage, "_untyped_storage", storage).tolist()


def test_a_legacy_typed_storage_keeps_its_dtype() -> None:
    tensor = torch.zeros(2, dtype=torch.float64)
    out = roundtrip(tensor.storage())
    assert out.dtype is torch.float64
    out[1] = 2.5
    assert tensor.tolist() == [0, 2.5]


def test_the_buffers_of_other_containers_travel_by_reference() -> None:
    tensor = torch.zeros(2)
    obj = {"list": [tensor], "object": library.Holder(tensor=tensor), "slots": library.Slotted(tensor), "set": {tensor}}
    out = roundtrip(obj)
    assert out["list"][0] is out["object"].tensor is out["slots"].first
    out["list"][0][0] = 1
    assert tensor[0] == 1
    assert next(iter(out["set"])) is out["list"][0]


# --- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [library.SlottedTensor, library.SlottedParameter])
def test_a_subclass_keeps_what_is_in_its_slots_and_its_attributes(peer: Peer, cls: Any) -> None:
    tensor: Any = torch.arange(3.0).as_subclass(cls)
    tensor.note, tensor.tag, tensor.myself = "a note", [1], tensor
    if cls is library.SlottedTensor:
        tensor.secret(5)
    out = peer.echo(tensor)
    assert type(out) is cls
    assert (out.note, out.tag) == ("a note", [1])
    assert out.myself is out
    if cls is library.SlottedTensor:
        assert out.secret() == 5


def test_a_subclass_with_a_state_of_its_own_gets_that() -> None:
    tensor: Any = torch.arange(3.0).as_subclass(library.StatefulTensor)
    tensor.note = "a note"
    assert roundtrip(tensor).note == "told a note"


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.as_subclass(library.Marked), torch.Tensor.to_sparse])
def test_a_non_leaf_that_requires_grad_is_refused_with_its_place(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = make(torch.ones(2, requires_grad=True) * 2)
    assert not tensor.is_leaf
    with pytest.raises(MarshalError, match=r"args\[0\]\['batch'\]\[1\].*detach"):
        marshal({"batch": [1, tensor]})
    detached = roundtrip(tensor.detach())
    assert not detached.requires_grad


def test_sending_a_leaf_leaves_its_autograd_alone() -> None:
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = torch.full((3,), 7.0)
    out = roundtrip(leaf)
    assert out.grad is None
    (leaf * 2).sum().backward()
    assert leaf.grad.tolist() == [9.0] * 3
    (out * 3).sum().backward()
    assert out.grad.tolist() == [3.0] * 3


@pytest.mark.parametrize("which", ["input", "weight", "parameter"])
def test_sending_between_forward_and_backward_does_not_break_backward(which: str) -> None:
    given = torch.full((3,), 2.0)
    weight = torch.full((3,), 5.0, requires_grad=True)
    parameter = torch.nn.Parameter(torch.full((3,), 7.0))
    loss = (given * weight * parameter).sum()
    marshal({"input": given, "weight": weight, "parameter": parameter}[which])
    loss.backward()
    assert weight.grad.tolist() == [14.0] * 3
    assert parameter.grad.tolist() == [10.0] * 3


def test_a_tensor_arrives_whatever_mode_and_default_device_the_reader_has() -> None:
    for make in (dense, STRIDED["Parameter"], OTHERS["coo"], OTHERS["csr"], OTHERS["nested"], OTHERS["quantized"]):
        tensor = make()
        expected = facts(tensor)
        for mode in (torch.device("meta"), torch.no_grad(), torch.inference_mode()):
            with mode:
                out = roundtrip(tensor)
            assert facts(out) == expected, mode
            assert raw_bytes(out) == raw_bytes(tensor)


# --- modules ---------------------------------------------------------------------------------------


def test_a_module_travels_with_its_parameters_by_reference_and_its_ties(peer: Peer) -> None:
    net = library.Net()
    out = peer.echo(net)
    assert out.tied.weight is out.layer.weight
    assert [name for name, _ in out.named_parameters()] == [name for name, _ in net.named_parameters()]
    with torch.no_grad():
        out.layer.weight.fill_(0.5)
        out.norm.running_mean.fill_(3)
    assert (net.tied.weight == 0.5).all()
    assert net.norm.running_mean.tolist() == [3, 3, 3]
    peer.ask(train_one_step, net)
    assert not (net.layer.weight == 0.5).all()
    assert net.norm.num_batches_tracked == 1


def train_one_step(net: library.Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()


def test_a_module_that_is_not_initialised_yet_travels() -> None:
    lazy = roundtrip(torch.nn.LazyLinear(4))
    assert lazy(torch.ones(2, 3)).shape == (2, 4)


def test_a_state_dict_of_600_tensors_is_shared(peer: Peer) -> None:
    state = {f"layer{i}.weight": torch.full((2, 2), float(i)) for i in range(600)}
    peer.ask(double_all, state)
    assert all((tensor == 2 * index).all() for index, tensor in enumerate(state.values()))


def double_all(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor *= 2


def _mapped(path: Path, kind: str) -> tuple[Any, torch.Tensor]:
    """The object to send, and the tensor that torch has mapped."""
    np.arange(100.0).tofile(path)
    tensor = torch.from_file(str(path), shared="private" not in kind, size=100, dtype=torch.float64)
    if "gone" in kind:
        path.unlink()
    if "replaced" in kind:
        path.unlink()
        np.zeros(100).tofile(path)
    if "storage" in kind:
        return tensor.untyped_storage(), tensor
    return (tensor[1:] if "view" in kind else tensor), tensor


@pytest.mark.parametrize("kind", ["shared", "shared view", "shared storage", "private", "gone", "replaced"])
def test_a_tensor_that_torch_has_mapped_from_a_file_is_shared(peer: Peer, kind: str, tmp_path: Path) -> None:
    sent, tensor = _mapped(tmp_path / "numbers", kind)
    back = peer.echo([sent])[0]
    if isinstance(back, torch.UntypedStorage):
        back = torch.empty(0, dtype=torch.float64).set_(back)
    assert back[5] == tensor[5 + tensor.numel() - back.numel()]
    peer.ask(add_one, sent if isinstance(sent, torch.Tensor) else back)
    assert back[-1] == tensor[-1] == 100
    if "shared" in kind:
        assert np.fromfile(tmp_path / "numbers")[-1] == 100


@pytest.mark.parametrize("kind", ["private view", "gone view"])
def test_one_that_cannot_be_shared_arrives_as_a_copy_and_a_warning_says_so(
    peer: Peer, kind: str, tmp_path: Path
) -> None:
    sent, _tensor = _mapped(tmp_path / "numbers", kind)
    with pytest.warns(RuntimeWarning, match="mapped from a file"):
        back = peer.echo(sent)
    assert back.tolist() == list(range(1, 100))


def test_the_file_system_strategy_works_too(run_script: Any) -> None:
    done = run_script("""
        import torch, torchwq
        torch.multiprocessing.set_sharing_strategy("file_system")
        shared, private = torch.zeros(2).share_memory_(), torch.zeros(2)
        viewed = torch.zeros(2)
        view = viewed[1:]
        def work(*tensors):
            for tensor in tensors:
                tensor += 1
            return torch.full((2,), 5.0)
        answer, = torchwq.map(1, lambda a, b, c: work(a, b, c), shared, private, viewed).join(30)
        print(shared.tolist(), private.tolist(), viewed.tolist(), view.tolist(), answer.tolist())
    """)
    assert done.stdout.split("\n")[0] == "[1.0, 1.0] [1.0, 1.0] [1.0, 1.0] [1.0] [5.0, 5.0]"


# --- memory that others point into -----------------------------------------------------------------

LARGE = 12_000_000  # elements: an allocation of its own, so that freeing it would unmap it


def _free_in_shm() -> int:
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return 1 << 62
    return free.f_bavail * free.f_frsize


#: torch moves a private tensor with views there; where that is too small there is an error, which other tests look at.
needs_shm = pytest.mark.skipif(_free_in_shm() < 4 * LARGE, reason=f"needs {4 * LARGE} bytes in /dev/shm")


@pytest.mark.parametrize(
    ("alias", "with_view"),
    [(torch.Tensor.numpy, False), (torch.Tensor.numpy, True), (np.asarray, False), (np.from_dlpack, False)],
    ids=["numpy", "numpy, with a view", "asarray", "dlpack"],
)
@needs_shm
def test_an_array_that_aliases_a_tensor_stays_memory_safe_when_the_tensor_moves(alias: Any, with_view: bool) -> None:
    tensor = torch.zeros(LARGE)
    view = tensor[1:] if with_view else None
    array = alias(tensor)
    address = array.ctypes.data
    marshal(tensor)
    assert tensor.is_shared()
    assert mapping_at(address), "the array points into memory that has been given back"
    assert mapping_at(address + array.nbytes - 1)
    del tensor, view
    assert mapping_at(address), "the array points into memory that has been given back"
    assert array[LARGE // 2] == 0


@pytest.mark.parametrize("with_view", [False, True], ids=["alone", "with a view"])
@needs_shm
def test_the_array_behind_a_from_numpy_tensor_stays_memory_safe(with_view: bool) -> None:
    array = np.zeros(LARGE, np.float32)
    tensor = torch.from_numpy(array)
    view = tensor[1:] if with_view else None
    out = roundtrip(tensor)
    out[1] = 5
    assert tensor[1] == 5
    if view is not None:
        assert view[0] == 5
    del tensor, out, view
    assert mapping_at(array.ctypes.data)
    assert array[LARGE // 2] == 0


def test_a_from_numpy_tensor_outlives_its_array() -> None:
    tensor = torch.from_numpy(np.full(LARGE, 3.0, np.float32))
    out = roundtrip(tensor)
    assert out[-1] == tensor[-1] == 3


def test_a_tensor_written_by_two_threads_at_once_ends_in_one_place() -> None:
    for _ in range(12):
        tensor = torch.zeros(1_000_000)
        out: list[Any] = [None, None]
        barrier = threading.Barrier(2)

        def send(
            index: int, tensor: torch.Tensor = tensor, out: list[Any] = out, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            out[index] = roundtrip(tensor)

        threads = [threading.Thread(target=send, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tensor[0] = 7
        assert [part[0].item() for part in out] == [7, 7]


def test_a_message_keeps_its_memory_after_the_writer_dropped_the_tensor() -> None:
    payload = codec.encode([torch.full((1000,), 3.0), torch.full((10,), 4.0)[2:]], codec.CALL_LIMIT)
    first, second = codec.decode(*received(payload))
    del payload
    assert (first == 3).all()
    assert (second == 4).all()


# --- CUDA ------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA: dict[str, Callable[[], torch.Tensor]] = {
    "dense": lambda: torch.arange(6.0, device="cuda").reshape(2, 3),
    "part": lambda: torch.arange(10, device="cuda")[3::2],
    "0-d": lambda: torch.tensor(3.0, device="cuda"),
    "zero-size": lambda: torch.empty(0, 2, device="cuda"),
    "bf16": lambda: torch.ones(3, dtype=torch.bfloat16, device="cuda"),
    "bool": lambda: torch.tensor([True, False], device="cuda"),
    "conj": lambda: torch.ones(3, dtype=torch.complex64, device="cuda").mul(1j).conj(),
    "neg": lambda: torch._neg_view(torch.arange(3.0, device="cuda")),
    "requires grad": lambda: torch.ones(3, device="cuda", requires_grad=True),
    "Parameter": lambda: torch.nn.Parameter(torch.ones(3, device="cuda")),
    "coo": lambda: torch.eye(3, device="cuda").to_sparse(),
    "csr": lambda: torch.eye(3, device="cuda").to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], device="cuda"),
}


@pytest.fixture
def cuda_peer(cuda_context: None, peer: Peer) -> Iterator[Peer]:
    yield peer
    torch.cuda.synchronize()
    torch.cuda.ipc_collect()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("kind", CUDA)
def test_a_cuda_tensor_comes_to_a_worker_as_it_was(cuda_peer: Peer, kind: str) -> None:
    tensor = CUDA[kind]()
    assert cuda_peer.ask(facts, tensor) == facts(tensor)


@pytest.mark.cuda
@needs_cuda
def test_a_write_to_a_cuda_tensor_is_seen_on_the_other_side(cuda_peer: Peer) -> None:
    tensor = torch.zeros(4, device="cuda")
    cuda_peer.ask(keep, tensor)
    try:
        cuda_peer.ask(apply_to_kept, add_one_and_synchronize)
        assert tensor.tolist() == [1.0] * 4
        tensor += 1
        torch.cuda.synchronize()
        assert cuda_peer.ask(apply_to_kept, torch.Tensor.tolist) == [2.0] * 4
    finally:
        cuda_peer.ask(forget_kept)


def forget_kept() -> None:
    """A worker cannot send back a CUDA tensor that it has from the owner: torch does not."""
    drop_kept()


def add_one_and_synchronize(tensor: torch.Tensor) -> None:
    tensor += 1
    torch.cuda.synchronize()


@pytest.mark.cuda
@needs_cuda
def test_a_message_mixes_cuda_and_cpu_tensors(cuda_peer: Peer) -> None:
    mixed = {"cuda": torch.ones(3, device="cuda"), "cpu": torch.ones(3)}
    cuda_peer.ask(double_all, mixed)
    cuda_peer.ask(torch.cuda.synchronize)
    assert mixed["cuda"].tolist() == mixed["cpu"].tolist() == [2.0] * 3


@pytest.mark.cuda
@needs_cuda
@pytest.mark.usefixtures("cuda_context")
def test_a_cuda_non_leaf_that_requires_grad_is_refused() -> None:
    with pytest.raises(MarshalError, match=r"args\[0\]\[0\].*detach"):
        marshal([torch.ones(2, device="cuda", requires_grad=True) * 2])
