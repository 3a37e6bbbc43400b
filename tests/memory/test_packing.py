"""Many tensors of one message travel in few blocks, and nothing shows that they lie beside each other."""

from __future__ import annotations

import gc
import io
import multiprocessing.resource_sharer
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing import reductions

import torchwq
from tests.marshalling.support import (
    LIMIT,
    Peer,
    apply_to_kept,
    drop_kept,
    keep,
    marshal,
    received,
    roundtrip,
    started_peer,
)
from torchwq.marshalling import codec
from torchwq.memory import limits, packing
from torchwq.memory.message import Message


@pytest.fixture(scope="module")
def module_peer(_services: None) -> Iterator[Peer]:
    with started_peer() as started:
        yield started


@pytest.fixture
def peer(module_peer: Peer) -> Iterator[Peer]:
    yield module_peer
    module_peer.free_unused_memory()


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((1 + number % 7,), float(number)) for number in range(count)]


def by_value(obj: Any) -> Any:
    return codec.decode(*received(codec.encode_one(obj, LIMIT, "batch", owned_blocks=())))


def double_all(given: list[torch.Tensor]) -> list[torch.Tensor]:
    for tensor in given:
        tensor *= 2
    return given


def saved_bytes(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.tell()


@pytest.mark.parametrize("count", [300, 3000])
def test_many_tensors_of_a_message_are_shared_and_take_few_descriptors(peer: Peer, count: int) -> None:
    mine = tensors(count)
    payload = marshal(mine)
    assert isinstance(payload, Message)
    assert len(payload.fds) <= 80
    del payload
    back = peer.ask(double_all, mine)
    for number, (here, there) in enumerate(zip(mine, back, strict=True)):
        assert (here == 2 * number).all()
        assert (there == 2 * number).all()
    back[-1].fill_(-1)
    mine[-2].fill_(-2)
    assert mine[-1][0] == -1
    assert back[-2][0] == -2
    assert peer.ask(double_all, mine)[-1][0] == -2  # what was packed once goes on by reference
    assert back[-1][0] == -2


def test_a_packed_tensor_looks_as_if_it_were_alone(peer: Peer) -> None:
    mine = tensors(200)
    alone = torch.full((5,), 3.0)
    peer.echo(alone)
    for each in (mine[-1], peer.echo(mine)[-1]):
        assert each.is_shared()
        assert each.untyped_storage().nbytes() == each.nbytes
        assert saved_bytes(each) == saved_bytes(alone.new_zeros(each.shape))
        address = each.data_ptr()
        each.share_memory_()
        assert each.data_ptr() == address
        with pytest.raises(RuntimeError, match="resiz"):
            each.untyped_storage().resize_(1000)
    storage = mine[-1].untyped_storage()
    peer.ask(torch.UntypedStorage.fill_, storage, 1)
    assert mine[-1].view(torch.uint8).tolist() == [1] * mine[-1].nbytes
    try:
        again = pickle.loads(ForkingPickler.dumps(mine[-1]))  # as torch's own multiprocessing passes it on
        again.fill_(7)
        assert (mine[-1] == 7).all()
    finally:
        multiprocessing.resource_sharer.stop()


def test_a_packed_tensor_is_not_moved_away_by_reducers_that_were_registered_again() -> None:
    mine = tensors(200)
    marshal(mine)
    reductions.init_reductions()
    try:
        again = pickle.loads(ForkingPickler.dumps(mine[-1]))
        again.fill_(7)
        assert (mine[-1] == 7).all()
        reductions.init_reductions.__wrapped__()  # by who has got hold of torch's before
        with pytest.raises(torchwq.MarshalError, match="init_reductions"):
            ForkingPickler.dumps(mine[-1])
    finally:
        reductions.init_reductions()
        multiprocessing.resource_sharer.stop()


def test_threads_that_write_the_same_many_tensors_write_the_same_memory() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        write_together()
    finally:
        sys.setswitchinterval(interval)


def write_together() -> None:
    with torchwq.workqueue() as queue:
        worker = torchwq.map(1, add_one, queue)
        for _ in range(40):
            shared = [torch.zeros(3) for _ in range(150)]
            writers = [threading.Thread(target=queue.write, args=(shared,)) for _ in range(3)]
            writers += [threading.Thread(target=queue.write, args=([each],)) for each in shared[-2:]]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            for _ in writers:
                assert queue.read(timeout=20) == "added"
            expected = [3.0] * 148 + [4.0] * 2
            assert [float(each[0]) for each in shared] == expected
        queue.write(None)
        worker.join(20)


def add_one(queue: torchwq.WorkQueue) -> None:
    for tensors_ in queue:
        for tensor in tensors_:
            tensor.add_(1)
        queue.write("added")


def test_parameters_and_the_same_tensor_twice_stay_what_they_are() -> None:
    net = torch.nn.ModuleList([torch.nn.Linear(3, 2) for _ in range(100)])
    net[99].weight = net[98].weight
    out = roundtrip(net)
    assert out[99].weight is out[98].weight
    with torch.no_grad():
        out[97].bias.fill_(4)
    assert net[97].bias.tolist() == [4, 4]
    assert out[97].bias.requires_grad
    net[97](torch.ones(3)).sum().backward()
    assert net[97].weight.grad is not None


def test_memory_with_a_slice_in_use_anywhere_is_not_used_again(peer: Peer) -> None:
    mine = tensors(200)
    peer.ask(keep, [*mine[:70], mine[150]])
    peer.echo(mine)
    one = mine[160]
    del mine
    gc.collect()
    for _ in range(3):
        peer.echo([torch.full((1 + number % 7,), -1.0) for number in range(200)])
    assert (one == 160).all()
    assert peer.ask(apply_to_kept, last_values) == 150
    peer.ask(drop_kept)


@pytest.mark.parametrize("share", [marshal, torch.Tensor.share_memory_])
def test_a_slice_that_torch_has_moved_leaves_later_messages_as_they_are(share: Callable[[torch.Tensor], Any]) -> None:
    for number in range(6):
        out = by_value({"a": torch.full((5,), float(number)), "b": torch.full((7,), float(number))})
        assert (out["a"] == number).all()
        assert (out["b"] == number).all()
        if number % 2:
            share(out["b"])
        del out


def last_values(kept: list[torch.Tensor]) -> float:
    return kept[-1].mean().item()


def test_views_by_value_stay_views_of_one_storage() -> None:
    whole = torch.arange(1200 * 8.0).reshape(1200, 8)
    views = list(whole.unbind())
    payload = codec.encode_one(views, LIMIT, "batch", owned_blocks=())
    assert len(payload.fds) <= 2
    out = codec.decode(*received(payload))
    assert all(torch.equal(a, b) for a, b in zip(out, views, strict=True))
    assert len({each.untyped_storage().data_ptr() for each in out}) == 1
    assert out[0].untyped_storage().nbytes() == whole.nbytes
    assert not whole.is_shared()
    out[0].fill_(-1)
    assert whole[0].tolist() == list(range(8))

    few = by_value({"a": whole[:3], "b": whole[2:5, 1], "c": whole[0].view(torch.uint8)})
    few["a"][2, 1] = -5
    assert few["b"][0] == -5
    few["c"].zero_()
    assert few["a"][0].tolist() == [0] * 8


def test_views_by_value_take_no_more_than_is_seen() -> None:
    data = torch.arange(1_000_000.0)
    payload = codec.encode_one([data[n * 9999 : n * 9999 + 10] for n in range(100)], LIMIT, "batch", owned_blocks=())
    assert payload.nbytes < 50_000
    out = codec.decode(*received(payload))
    assert [each.tolist() for each in out] == [data[n * 9999 : n * 9999 + 10].tolist() for n in range(100)]
    assert {each.untyped_storage().nbytes() for each in out} == {40}


def test_small_tensors_by_value_share_a_block_and_keep_their_own_storages() -> None:
    batch = {f"k{number}": torch.full((4, number + 1), number) for number in range(10)}
    batch |= {"transposed": torch.rand(8, 4).t(), "scalar": torch.tensor(4.0), "large": torch.rand(100_000)}
    for _ in range(3):  # the general way, and then the short one
        payload = codec.encode_one(batch, LIMIT, "batch", owned_blocks=())
        assert len(payload.fds) == 2
        out = codec.decode(*received(payload))
        for key, tensor in batch.items():
            assert torch.equal(out[key], tensor)
            assert out[key].stride() == tensor.stride()
            assert out[key].untyped_storage().nbytes() == tensor.nbytes
            assert not out[key]._is_view()
            assert not tensor.is_shared()
        with torch.inference_mode():
            inference = codec.decode(*received(codec.encode_one(batch, LIMIT, "batch", owned_blocks=())))
        assert not inference["k1"].is_inference()


def test_many_arrays_travel_in_few_blocks(peer: Peer) -> None:
    arrays = [np.full(9000 + number, number, np.float32) for number in range(300)]
    payload = marshal(arrays)
    assert isinstance(payload, Message)
    assert len(payload.fds) <= 80
    out = codec.decode(*received(payload))
    assert all((a == b).all() and a.shape == b.shape for a, b in zip(out, arrays, strict=True))
    out[299][0] = -1
    assert arrays[299][0] == 299
    assert [each[0] for each in peer.echo(arrays)] == list(range(300))


@pytest.mark.filterwarnings("ignore:.*copied instead of shared")
def test_without_a_free_descriptor_everything_is_copied_into_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [torchwq.empty(77) for _ in range(3)]
    monkeypatch.setattr(limits, "max_open_blocks", lambda: 3)
    arrays, given = [np.full(9000, number) for number in range(5)], tensors(100)
    out = roundtrip([arrays, given])
    assert [each[0] for each in out[0]] == list(range(5))
    assert all(torch.equal(a, b) for a, b in zip(out[1], given, strict=True))
    for batch in (dict(zip("abcdefgh", given, strict=False)), [torch.arange(100.0)[n : n + 20] for n in range(9)]):
        assert str(by_value(batch)) == str(batch)
    del kept


def test_packs_have_a_bounded_size_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PACK_BYTES", 10_000)
    given = [torch.full((1000,), float(number)) for number in range(200)]
    payload = marshal(given)
    assert isinstance(payload, Message)
    assert len(payload.fds) <= 64 + 40
    out = codec.decode(*received(payload))
    assert all(torch.equal(a, b) for a, b in zip(out, given, strict=True))


@pytest.mark.timeout(180)
def test_with_256_descriptors_any_number_of_tensors_arrives(run_script: Any) -> None:
    done = run_script(
        """
        import resource, warnings
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        import numpy as np, torch, torchwq
        warnings.simplefilter("error")

        class Items(torch.utils.data.Dataset):
            def __init__(self, items):
                self.items = items
            def __len__(self):
                return len(self.items)
            def __getitem__(self, index):
                return int(self.items[index][0])

        def add(tensors, queue):
            more = queue.read()
            for tensor in more + tensors:
                tensor += 1
            queue.write(more)
            return tensors

        if __name__ == "__main__":
            items = [torch.full((4,), i) for i in range(1000)] + [np.full(5000, i) for i in range(1000, 1200)]
            loader = torchwq.DataLoader(Items(items), 400, num_workers=1, multiprocessing_context="forkserver")
            print(torch.cat(list(loader)).tolist() == list(range(1200)))
            given, written = ([torch.full((3,), i) for i in range(400)] for _ in range(2))
            with torchwq.workqueue() as queue:
                worker = torchwq.map(1, add, given, queue)
                queue.write(written)
                answer, (result,) = queue.read(timeout=30), worker.join(30)
            for each in (given, written, answer, result):
                print([int(tensor[0]) for tensor in each] == list(range(1, 401)))
    """,
        timeout=170,
    )
    assert done.stdout.split() == ["True"] * 5
