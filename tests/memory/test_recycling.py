"""Memory is used again, and only when nobody can see it any more; limits lead to errors, copies or warnings."""

from __future__ import annotations

import gc
import multiprocessing.resource_sharer
import os
import signal
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

import torchwq
from tests.conftest import wait_until
from tests.marshalling.support import (
    Peer,
    apply_to_kept,
    drop_kept,
    keep,
    mapping_at,
    marshal,
    received,
    roundtrip,
    same,
    started_peer,
)
from torchwq.marshalling import codec
from torchwq.memory import limits, maintenance, pool, received_blocks, recycling, sharing, storages, tree_table
from torchwq.transport import reactor, sockets


@pytest.fixture
def peer() -> Any:
    with started_peer() as started:
        yield started


def overwrite_free_blocks(elements: int) -> None:
    """Write over all memory for so many floats that is believed to be free."""
    tensors = [torchwq.empty(elements).fill_(-1) for _ in range(8)]
    del tensors


def test_the_memory_of_a_dropped_tensor_is_used_again(peer: Peer) -> None:
    places = set()
    for number in range(50):
        tensor = torch.full((100,), float(number))
        assert peer.ask(torch.Tensor.tolist, tensor) == [number] * 100
        places.add(tensor.data_ptr())
    assert len(places) <= 4


def test_a_block_seen_before_costs_the_reader_no_mapping(peer: Peer) -> None:
    for _ in range(10):
        peer.echo(torch.ones(100))
    before = peer.ask(torchwq.memory_stats)
    for _ in range(20):
        peer.echo(torch.ones(100))
    after = peer.ask(torchwq.memory_stats)
    assert after.misses == before.misses
    assert after.hits - before.hits >= 20


def test_tensors_of_other_sizes_share_the_same_memory(peer: Peer) -> None:
    for size in list(range(10, 400)):
        assert peer.ask(torch.Tensor.numel, torch.ones(size)) == size
    assert torchwq.memory_stats().blocks <= 8
    out = peer.echo(torch.ones(77))
    assert out.untyped_storage().nbytes() == 77 * 4


@pytest.mark.parametrize("how", ["tensor", "view", "storage", "numpy", "graph", "module"])
def test_memory_that_a_reader_sees_is_not_used_again(peer: Peer, how: str) -> None:
    peer.ask(keep_somehow, how, torch.full((100,), 7.0))
    try:
        for _ in range(3):
            overwrite_free_blocks(100)
            assert peer.ask(apply_to_kept, value_of) == 7.0
    finally:
        peer.ask(forget_kept)
    wait_until(lambda: peer.ask(torchwq.memory_stats).mapped_in_use == 0)


def forget_kept() -> None:
    drop_kept()


def keep_somehow(how: str, tensor: torch.Tensor) -> None:
    if how == "view":
        keep(tensor[50:])
    elif how == "storage":
        keep(tensor.untyped_storage())
    elif how == "numpy":
        keep(tensor.numpy()[3:])
    elif how == "graph":
        weight = torch.ones(100, requires_grad=True)
        keep((weight, (weight * tensor).sum()))
    elif how == "module":
        layer = torch.nn.Linear(100, 1, bias=False)
        layer.weight.data = tensor[None]
        keep(layer)
    else:
        keep(tensor)


def value_of(kept: Any) -> float:
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.empty(0).set_(kept)
    if isinstance(kept, torch.nn.Module):
        kept = kept.weight
    if isinstance(kept, tuple):
        weight, loss = kept
        weight.grad = None
        loss.backward(retain_graph=True)
        kept = weight.grad
    assert kept.min() == kept.max()
    return float(kept.min())


@pytest.mark.parametrize(
    "alias", [torch.Tensor.numpy, lambda t: t[1:], torch.Tensor.untyped_storage, torch.Tensor.view_as]
)
def test_memory_that_the_writer_sees_is_not_used_again(peer: Peer, alias: Any) -> None:
    tensor = torch.full((100,), 7.0)
    peer.ask(same, tensor)
    kept = alias(tensor, tensor) if alias is torch.Tensor.view_as else alias(tensor)
    del tensor
    overwrite_free_blocks(100)
    assert value_of(kept) == 7.0


def test_what_a_killed_reader_held_is_used_again() -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(1, hold_and_wait, queue)
        tensor = torch.ones(12_345)
        place = tensor.data_ptr()
        queue.write(tensor)
        pid = queue.read(timeout=20)
        place = tensor.data_ptr()
        del tensor
        assert torchwq.memory_stats().held_remotely == 1
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(torchwq.WorkerDied):
            workers.join(20)
        assert torchwq.memory_stats().held_remotely == 0
        assert torchwq.empty(12_345).data_ptr() == place


def hold_and_wait(queue: torchwq.WorkQueue) -> None:
    tensor = queue.read()
    queue.write(os.getpid())
    queue.read()
    del tensor


def test_a_tensor_outlives_its_maker() -> None:
    def make(queue: torchwq.WorkQueue) -> None:
        import torch

        for number in range(20):
            queue.write(torch.full((1000,), float(number)))

    with torchwq.workqueue() as queue:
        torchwq.map(1, make, queue).join(20)
        tensors = [queue.read(timeout=10) for _ in range(20)]
        for number in range(3):  # new processes, which take over what the dead one had in the reference table
            torchwq.map(2, make, queue).join(20)
            for _ in range(40):
                queue.read(timeout=10)
            assert [t.mean().item() for t in tensors] == list(range(20)), number
        assert roundtrip(tensors[3])[0] == 3  # and can be sent on
        assert tensors[3].is_shared()


def test_messages_that_nobody_reads_do_not_keep_memory_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with torchwq.workqueue() as queue:
        queue._role.open_to_processes()  # type: ignore[union-attr]
        for _ in range(20):
            queue.write(torch.ones(54_321))
        assert torchwq.memory_stats().in_flight == 20
    wait_until(lambda: (pool.trim(), torchwq.memory_stats().in_flight)[1] == 0)
    assert torchwq.memory_stats().blocks == 0


def test_a_fork_sees_its_tensors_unchanged(peer: Peer) -> None:
    mine, theirs = torch.full((100,), 5.0), peer.ask(torch.full, (100,), 6.0)
    peer.ask(same, mine)
    go, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(go[0], 1)
            good = bool((mine == 5).all()) and bool((theirs == 6).all())
            os._exit(0 if good else 1)
        finally:
            os._exit(2)
    del mine, theirs
    overwrite_free_blocks(100)
    peer.ask(overwrite_free_blocks, 100)
    os.write(go[1], b"x")
    _, status = os.waitpid(pid, 0)
    for fd in (*go, *done):
        os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_fork_in_the_middle_of_a_move_spoils_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    go, children = os.pipe(), []
    move = storages.move

    def move_and_fork(tensor: torch.Tensor, *args: Any) -> Any:
        kept = move(tensor, *args)
        pid = os.fork()
        if pid == 0:
            try:
                os.read(go[0], 1)
                os._exit(0 if bool((tensor == 5).all()) else 1)
            finally:
                os._exit(2)
        children.append(pid)
        return kept

    monkeypatch.setattr(storages, "move", move_and_fork)
    tensor = torch.full((17_000,), 5.0)  # not one that torch would use threads for, which a fork does not have
    torchwq.share_(tensor)
    del tensor
    monkeypatch.undo()
    overwrite_free_blocks(17_000)
    os.write(go[1], b"x")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    for fd in go:
        os.close(fd)
    assert statuses == [0]


def descriptors_of_the_next_answer(queue: torchwq.WorkQueue) -> tuple[list[int], Any]:
    socket: Any = queue._role._answer_socket  # type: ignore[union-attr]
    receive: Any = socket.receive
    counts: list[int] = []

    def counting() -> Any:
        received = receive()
        if received is not None:
            counts.append(len(received[1]))
        return received

    socket.receive = counting
    try:
        return counts, queue.read(timeout=30)[1]
    finally:
        socket.receive = receive


@pytest.mark.parametrize("make", [torch.ones, np.ones], ids=["tensor", "array"])
def test_an_answer_brings_no_descriptor_of_what_its_reader_has(peer: Peer, make: Any) -> None:
    brought = []
    for _ in range(30):
        peer.queue.write((make, ((20_000,),)))
        counts, out = descriptors_of_the_next_answer(peer.queue)
        brought += counts
        assert (out == 1).all()
        del out
    assert brought[0] == 1, "a block that the reader has never seen"
    assert brought[-10:] == [0] * 10


@pytest.mark.parametrize("whose", ["the reader's", "the writer's"])
def test_memory_given_up_while_an_answer_is_under_way_arrives(peer: Peer, whose: str) -> None:
    if whose == "the reader's":
        mine = torch.full((300,), 4.0)
        peer.ask(keep, mine)
        del mine
    else:
        peer.ask(keep_one_and_show_it, 300, 4.0)
    peer.queue.write((apply_to_kept, (itself,)))
    wait_until(lambda: unread(peer.queue), what="the answer")
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    pool.trim()
    received_blocks.trim()
    for _ in range(5):
        maintenance.run()
    overwrite_free_blocks(300)
    good, out = peer.queue.read(timeout=30)
    assert good
    assert (out == 4).all()
    peer.ask(drop_kept)
    del out
    wait_until(lambda: (maintenance.run(), pool.trim(), received_blocks.trim(), recycling.open_blocks)[-1] == 0)


def test_a_row_that_is_used_again_does_not_take_an_unread_answer_along(peer: Peer) -> None:
    """The peer gives a block up whose answer is unread; its row, and so our word, goes to another block."""
    peer.ask(keep_one_and_show_it, 300, 4.0)
    with started_peer() as other:
        row = peer.ask(row_of_kept)
        peer.queue.write((apply_to_kept, (itself,)))
        wait_until(lambda: unread(peer.queue), what="the answer")
        gate = peer.queue
        gate.write((fork_and_use_the_row_again, (row,)))
        wait_until(lambda: unread(peer.queue) > 200, what="the second answer")
        other.echo(torch.ones(5))
        for _ in range(6):
            maintenance.run()
        good, out = peer.queue.read(timeout=30)
        assert good, out
        assert (out == 4).all()
        good, out = peer.queue.read(timeout=30)
        assert good, out
    peer.ask(drop_kept)


def unread(queue: Any) -> int:
    """How many bytes of answers wait in the queue's socket."""
    return sockets.readable_bytes(queue._role.end._socket)


def row_of_kept() -> int:
    return apply_to_kept(lambda kept: recycling.block_of(kept.untyped_storage()).number & 0xFFFFFFFF)  # type: ignore


def fork_and_use_the_row_again(row: int) -> Any:
    """Returns a tensor on a block that has this row."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    made = []
    for size in range(1, 300):
        tensor = torch.ones(size * 2000)
        torchwq.share_(tensor)
        block = recycling.block_of(tensor.untyped_storage())
        assert block is not None
        recycling.prepare_to_send(block)
        made.append(tensor)
        if block.number & 0xFFFFFFFF == row:
            return [tensor, "x" * 200]
    raise AssertionError("the row has not come back")


def test_an_answer_with_other_descriptors_brings_them_all(peer: Peer) -> None:
    out = peer.ask(many_queues_and_a_tensor)
    assert len(out[0]) == 85
    assert out[1].tolist() == [2.0] * 4
    for queue in out[0]:
        queue.close()
    peer.ask(drop_kept)


def many_queues_and_a_tensor() -> Any:
    queues = [torchwq.workqueue() for _ in range(85)]
    keep(queues)
    return queues, torch.full((4,), 2.0)


def test_a_tensor_may_be_moved_while_the_block_for_its_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(100_000)
    acquire = pool._acquire

    def move_and_acquire(nbytes: int) -> Any:
        monkeypatch.setattr(pool, "_acquire", acquire)
        mover = threading.Thread(target=sharing.share, args=(tensor,))
        mover.start()
        mover.join()
        tensor.fill_(7)  # where it is now
        return acquire(nbytes)

    monkeypatch.setattr(pool, "_acquire", move_and_acquire)
    copied = sharing.copy(tensor)
    assert copied is not None
    _, storage, geometry = copied
    assert (storages.place(storage, *geometry) == 7).all()


def test_a_finalizer_may_write_what_its_own_thread_is_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.full((200_000,), 2.0)
    move = storages.move

    def move_after_an_interruption(moved: torch.Tensor, *args: Any) -> Any:
        monkeypatch.undo()
        payload = marshal(tensor)
        assert (codec.decode(*received(payload)) == 2).all()
        return move(moved, *args)

    monkeypatch.setattr(storages, "move", move_after_an_interruption)
    torchwq.share_(tensor)
    assert tensor.is_shared()
    torchwq.share_(tensor)


def test_a_reader_without_a_queue_has_promised_nothing_to_the_next_queues_senders(peer: Peer) -> None:
    """The peer reads through one queue after the other, has none in between, and retires what it can then."""
    tensor = torch.full((600,), 7.0)
    for _ in range(3):
        queue = peer.ask(open_a_queue)
        queue.write(tensor)
        queue.close()
        assert peer.ask(apply_to_kept, read_and_close) == 7.0
        peer.ask(retire_all)


def open_a_queue() -> torchwq.WorkQueue:
    queue = torchwq.workqueue()
    keep(queue)
    return queue


def read_and_close(queue: torchwq.WorkQueue) -> float:
    with queue:
        return float(queue.read(timeout=20).mean())


def retire_all() -> None:
    drop_kept()
    gc.collect()
    pool.trim()
    received_blocks.trim()


def itself(kept: Any) -> Any:
    return kept


def keep_one_and_show_it(size: int, value: float) -> torch.Tensor:
    tensor = torch.full((size,), value)
    keep(tensor)
    return tensor


@pytest.mark.parametrize("order", [0, 1], ids=["tensor first", "storage first"])
def test_a_storage_in_a_variable_aliases_the_tensor_after_the_move(peer: Peer, order: int) -> None:
    tensor = torch.zeros(8)
    storage = tensor.untyped_storage()
    both: tuple[Any, ...] = (tensor, storage) if order == 0 else (storage, tensor)
    out = peer.echo(both)
    out[order].fill_(1)
    assert tensor.tolist() == [1] * 8
    assert storage.data_ptr() == tensor.data_ptr()
    assert out[1 - order].data_ptr() == out[order].data_ptr()


def test_two_threads_that_write_one_tensor_move_it_once(peer: Peer) -> None:
    for size in (16, 200_000):
        tensor = torch.zeros(size)
        gate = threading.Barrier(4)

        def share(tensor: torch.Tensor = tensor, gate: threading.Barrier = gate) -> int:
            gate.wait()
            torchwq.share_(tensor)
            return tensor.data_ptr()

        with ThreadPoolExecutor(4) as pool_of_threads:
            places = {task.result() for task in [pool_of_threads.submit(share) for _ in range(4)]}
        assert places == {tensor.data_ptr()}
        peer.echo(tensor).fill_(3)
        assert (tensor == 3).all()


def see(queue: Any, answers: Any) -> None:
    tensor = queue.get()
    answers.put("have it")
    queue.get()
    answers.put(tensor.tolist())


@pytest.mark.parametrize("made", ["here", "elsewhere"])
def test_a_tensor_goes_on_through_torchs_own_multiprocessing(peer: Peer, made: str) -> None:
    torch.multiprocessing.reductions.init_reductions()  # whoever does that must not lose what torchwq needs to know
    tensor = torchwq.zeros(10) + 4 if made == "here" else peer.ask(torch.full, (10,), 4.0)
    if made == "here":
        torchwq.share_(tensor)
    assert tensor.is_shared()
    context = torch.multiprocessing.get_context("fork")
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=see, args=(queue, answers))
    process.start()
    queue.put(tensor)
    assert answers.get() == "have it"
    tensor[0] = 9
    del tensor
    gc.collect()
    overwrite_free_blocks(10)
    peer.ask(overwrite_free_blocks, 10)
    queue.put(None)
    assert answers.get() == [9.0] + [4.0] * 9
    process.join()
    process.close()
    multiprocessing.resource_sharer.stop()
    for each in (queue, answers):
        each.close()


def test_a_tensor_that_torch_moves_to_a_file_leaves_its_block(run_script: Any) -> None:
    done = run_script("""
        import torch, torchwq

        def serve(queue):
            import torch, torchwq
            kept = None
            for what, tensor in queue:
                if what != "look":
                    kept = tensor if what == "keep" else torch.full((10,), 4.0)
                tensor = [torchwq.empty(10).fill_(-1) for _ in range(8)]
                tensor = None
                queue.write(kept)

        def ask(what, tensor=None):
            queue.write((what, tensor))
            return queue.read(timeout=30)

        with torchwq.workqueue() as queue:
            workers = torchwq.map(1, serve, queue)
            for made in ("here", "elsewhere"):
                tensor = torchwq.zeros(10) + 4 if made == "here" else ask("make")
                if made == "here":
                    ask("keep", tensor)
                place = tensor.data_ptr()
                torch.multiprocessing.set_sharing_strategy("file_descriptor")
                assert tensor.share_memory_().data_ptr() == place, "it is shared already"
                torch.multiprocessing.set_sharing_strategy("file_system")
                assert tensor.share_memory_().data_ptr() != place
                torch.multiprocessing.set_sharing_strategy("file_descriptor")
                tensor.fill_(5)
                del tensor
                tensor = [torchwq.empty(10).fill_(-1) for _ in range(8)]
                del tensor
                print(made, ask("look").tolist() == [4.0] * 10)
                ask("look").fill_(6)
                print(ask("look").tolist() == [6.0] * 10)
    """)
    assert done.stdout.split() == ["here", "True", "True", "elsewhere", "True", "True"]


def test_a_received_tensor_can_be_swapped(peer: Peer) -> None:
    tensor, other = peer.ask(keep_one_and_show_it, 100, 4.0), torch.zeros(3)
    net = peer.ask(torch.nn.Linear, 3, 2)
    torch.utils.swap_tensors(tensor, other)
    assert tensor.tolist() == [0.0] * 3
    del tensor
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.half()
        net.load_state_dict({"weight": peer.ask(torch.ones, 2, 3), "bias": peer.ask(torch.ones, 2)}, assign=True)
        net.half()
        assert net.weight.dtype is torch.half
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    peer.ask(drop_kept)
    peer.ask(overwrite_free_blocks, 100)
    assert other.tolist() == [4.0] * 100, "its memory is held for whoever has it now"
    del other, net
    peer.ask(overwrite_free_blocks, 100)
    assert torchwq.memory_stats().mapped_in_use == 0


@pytest.mark.parametrize("together", [1, 7])
def test_memory_is_used_again_however_late_it_is_dropped(peer: Peer, together: int) -> None:
    """A reader that keeps the last so many tensors of many is sent them on not many more blocks."""
    for kept in (1, 16):
        last: deque[Any] = deque(maxlen=kept)
        for number in range(150):
            last.append(peer.ask(several, together, 50, float(number)))
        assert [batch[-1][0].item() for batch in last] == list(range(150 - kept, 150))
        del last
        made = peer.ask(torchwq.memory_stats).blocks
        assert made <= (2 * kept + 4) * together, f"{made} blocks for {kept} that are kept"


def several(number: int, size: int, value: float) -> list[torch.Tensor]:
    return [torch.full((size,), value) for _ in range(number)]


def test_the_same_large_array_is_in_memory_once_for_eight_readers(run_script: Any) -> None:
    done = run_script("""
        import numpy as np, torchwq
        def use(array, mapid):
            array[0, 0] = mapid
            return float(array.sum())
        array = np.ones((1000, 1000))
        sums = torchwq.map(8, use, array).join(60)
        print(sums == [999_999.0 + mapid for mapid in range(8)], array[0, 0], torchwq.memory_stats().bytes < 10_000_000)
    """)
    assert done.stdout.strip() == "True 1.0 True"


# --- limits ----------------------------------------------------------------------------------------


def test_5000_received_tensors_can_be_held_with_64_descriptors(run_script: Any) -> None:
    done = run_script(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        import torch, torchwq

        def send(queue):
            import torch
            for number in range(5_000):
                queue.write(torch.full((4,), float(number)))

        with torchwq.workqueue() as queue:
            workers = torchwq.map(1, send, queue)
            held = [queue.read() for _ in range(5_000)]
            workers.join()
        print(all((tensor == number).all() for number, tensor in enumerate(held)))
        """,
        timeout=55,
    )
    assert done.stdout == "True\n"
    assert 1 <= done.stderr.count("copied instead of shared") <= 2  # once in each process
    assert "ulimit -n" in done.stderr


def test_a_reader_short_of_descriptors_copies_what_it_receives(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    monkeypatch.setattr(limits, "max_open_blocks", lambda: 4)
    monkeypatch.setattr(limits, "_warned", False)
    before = torchwq.memory_stats().copies
    with pytest.warns(RuntimeWarning, match="ulimit -n"):
        held = [peer.ask(torch.full, (4,), float(number)) for number in range(50)]
    assert [tensor[0].item() for tensor in held] == list(range(50))
    assert torchwq.memory_stats().copies - before == 46
    array = peer.ask(np.full, 100_000, 3)
    assert (array == 3).all()
    array[0] = 4
    monkeypatch.undo()
    assert peer.ask(torchwq.memory_stats).held_remotely == 4  # what was copied is not held


def test_more_than_the_limit_is_used_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWQ_MEMORY_LIMIT", "100000")
    tensors = [torchwq.empty(10_000) for _ in range(10)]
    assert torchwq.memory_stats().bytes > 400_000
    del tensors
    torchwq.empty(1)
    assert torchwq.memory_stats().bytes <= 100_000


def test_the_limit_is_set_for_workers_too(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWQ_MEMORY_LIMIT", "0")
    assert peer.ask(torchwq.memory_stats).limit > 0
    torchwq.set_memory_limit(1 << 20)
    assert torchwq.memory_stats().limit == 1 << 20
    assert torchwq.map(1, torchwq.memory_stats).join(20)[0].limit == 1 << 20
    torchwq.set_memory_limit(None)
    assert torchwq.memory_stats().limit > 1 << 20
    with pytest.raises(ValueError, match="-1"):
        torchwq.set_memory_limit(-1)


def test_more_memory_than_there_is_is_refused_with_the_limits_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torchwq.ResourceError, match=r"bytes of shared memory are needed.*(MemAvailable|control group)"):
        torchwq.empty(1 << 42, dtype=torch.uint8)


def test_without_a_reference_table_tensors_travel_by_descriptor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_table, "current", lambda: None)
    tensor = torch.zeros(10)
    out = roundtrip(tensor)
    out[3] = 3
    assert tensor[3] == 3
    assert tensor.is_shared()
    assert (roundtrip(np.ones(100_000)) == 1).all()
    assert torchwq.memory_stats().blocks == 0  # nobody would say when it is free


def test_idle_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "IDLE_TIMEOUT", 0.0)
    monkeypatch.setattr(maintenance, "PERIOD", 0.01)
    torchwq.empty(100)
    maintenance.run()
    wait_until(lambda: torchwq.memory_stats().blocks == 0)


def test_maintenance_is_scheduled_although_the_reactor_could_not_be_made_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> Any:
        raise torchwq.ResourceError(24, "descriptors")

    monkeypatch.setattr(maintenance, "_is_scheduled", False)
    with monkeypatch.context() as patched, pytest.raises(torchwq.ResourceError):
        patched.setattr(reactor, "get", fail)
        maintenance.schedule()
    assert not maintenance._is_scheduled
    maintenance.schedule()
    assert maintenance._is_scheduled


@pytest.mark.parametrize("callbacks", ["_on_period", "_after_period"])
def test_maintenance_goes_on_after_an_error(monkeypatch: pytest.MonkeyPatch, callbacks: str) -> None:
    def fail(*args: Any) -> bool:
        raise OSError("of one period")

    scheduled: list[int] = []
    monkeypatch.setattr(maintenance, "schedule", lambda: scheduled.append(1))
    monkeypatch.setattr(maintenance, callbacks, [fail])
    with pytest.raises(OSError, match="of one period"):
        maintenance.run()
    assert scheduled


# --- what users call -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3,), (2, 3), ([4, 5],), (torch.Size([2, 2]),), ()])
def test_new_tensors_are_what_torch_makes_but_shared(size: Any) -> None:
    for ours, theirs in ((torchwq.empty, torch.empty), (torchwq.zeros, torch.zeros)):
        for kwargs in ({}, {"dtype": torch.bfloat16}, {"requires_grad": True}):
            new, model = ours(*size, **kwargs), theirs(*(size or ((),)), **kwargs)
            assert (new.shape, new.stride(), new.dtype, new.requires_grad) == (
                model.shape,
                model.stride(),
                model.dtype,
                model.requires_grad,
            )
            assert new.is_shared()
            assert new.is_leaf
            assert new.untyped_storage().nbytes() == model.untyped_storage().nbytes()
    assert not torchwq.zeros(*size).any()


def test_a_new_tensor_is_written_without_a_copy(peer: Peer) -> None:
    tensor = torchwq.zeros(1000)
    place = tensor.data_ptr()
    peer.ask(torch.Tensor.add_, tensor, 5)
    assert tensor.data_ptr() == place
    assert (tensor == 5).all()


def test_no_elements_are_no_shared_memory() -> None:
    assert torchwq.empty(0, 3).shape == (0, 3)
    assert torchwq.zeros(0).numel() == 0


@pytest.mark.parametrize(
    "other", [torch.ones(3, 4).t(), torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.ones(4)[::2]]
)
def test_empty_like_lies_as_torchs_does(other: torch.Tensor) -> None:
    ours, theirs = torchwq.empty_like(other), torch.empty_like(other)
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert torchwq.empty_like(other, dtype=torch.int8).dtype is torch.int8


def test_share_moves_everything_in_place() -> None:
    net = torch.nn.Linear(3, 2)
    obj = {"net": net, "list": [torch.ones(2)], "view": torch.ones(4)[1:], "n": 1}
    assert torchwq.share_(obj) is obj
    assert all(parameter.is_shared() for parameter in net.parameters())
    assert obj["list"][0].is_shared()
    assert obj["view"].is_shared()
    assert isinstance(net.weight, torch.nn.Parameter)
    assert torchwq.memory_stats().in_flight == 0


def test_what_arrives_has_the_size_of_the_data(peer: Peer, tmp_path: Any) -> None:
    out = peer.ask(torch.ones, 3)
    assert out.untyped_storage().nbytes() == 12
    assert out.is_contiguous()
    torch.save(out, tmp_path / "x.pt")
    torch.save(torch.ones(3), tmp_path / "y.pt")
    assert (tmp_path / "x.pt").stat().st_size == (tmp_path / "y.pt").stat().st_size


def test_stats_tell_what_is_where(peer: Peer) -> None:
    tensor = torch.ones(77_777)
    peer.ask(keep, tensor)
    stats = torchwq.memory_stats()
    assert (stats.blocks, stats.in_use, stats.held_remotely, stats.in_flight) == (1, 1, 1, 0)
    assert stats.bytes >= 4 * 77_777
    assert peer.ask(torchwq.memory_stats).mapped_in_use == 1
    del tensor
    peer.ask(drop_kept)
    wait_until(lambda: torchwq.memory_stats().free == 1)
    shared = torch.ones(5).share_memory_()
    peer.ask(same, shared)
    assert torchwq.memory_stats().adopted == 1
    del shared
    wait_until(lambda: torchwq.memory_stats().adopted == 0)


def test_many_processes_use_one_reference_table() -> None:
    """More than are counted in a loop."""
    with torchwq.workqueue() as queue:
        workers = torchwq.map(12, echo_until_none, queue)
        for number in range(300):
            queue.write(torch.full((50,), float(number)))
        seen = sorted(queue.read(timeout=30)[0].item() for _ in range(300))
        queue.write(*[None] * 12)
        workers.join(30)
    assert seen == list(range(300))
    for _ in range(5):
        overwrite_free_blocks(50)
    wait_until(lambda: (received_blocks.trim(), pool.trim(), torchwq.memory_stats().blocks)[2] == 0)


def echo_until_none(queue: torchwq.WorkQueue) -> None:
    for question in queue:
        queue.write(question)


def test_a_tensor_is_mapped_in_memory_without_a_name() -> None:
    assert "memfd:torchwq" in (mapping_at(torchwq.empty(10).data_ptr()) or "")
