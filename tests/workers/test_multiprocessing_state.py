"""Workers get the state that multiprocessing passes to its processes: its objects, key and tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WORKERS = """
    import gc
    import multiprocessing
    import os
    import socket
    from multiprocessing import resource_tracker, shared_memory
    import torch
    import torchwq

    ctx = multiprocessing.get_context("spawn")

    def use(pipe, sock, value, raw, event, lock, condition, queue, simple, semaphore, barrier, name, q):
        with lock, value.get_lock():
            value.value += 5
            raw[0] += 1
        pipe.send("pipe")
        with sock:
            sock.sendall(b"socket")
        queue.put("queue")
        simple.put("simple")
        with condition:
            condition.notify_all()
        barrier.wait(50)
        event.set()
        semaphore.release()
        q.write(str(name))
        for kind, obj in iter(q.read, None):
            if kind == "connection":
                obj.send("sent")
                obj.close()
            elif kind == "memory":
                obj.buf[1] = 7
                obj.close()
            elif kind == "proxy":
                obj["set"] = 2
            q.write(kind)
        made = shared_memory.SharedMemory(create=True, size=10)
        made.buf[0] = 3
        made.close()
        return made.name

    def only_begin(lock):
        with lock:
            return torchwq.map(1, key).join(50)[0]  # a worker of a worker has the key, too

    def tracker():
        fd = resource_tracker.getfd()
        return os.fstat(fd).st_ino, resource_tracker._resource_tracker._pid

    def key():
        return bytes(multiprocessing.current_process().authkey)

    for backend in ("thread", "process"):
        ours, theirs = ctx.Pipe()
        sock, other = socket.socketpair()
        value, raw, event, lock, queue = ctx.Value("i", 1), ctx.RawArray("i", 3), ctx.Event(), ctx.Lock(), ctx.Queue()
        simple, semaphore, barrier = ctx.SimpleQueue(), ctx.Semaphore(0), ctx.Barrier(1)
        q = torchwq.workqueue()
        workers = torchwq.map(
            1, use, theirs, other, value, raw, event, lock, ctx.Condition(), queue, simple, semaphore, barrier,
            torch.channels_last, q, backend=backend,
        )
        gc.collect()  # drops the condition here
        answer = q.read(timeout=50)
        assert answer == "torch.channels_last", answer
        assert event.wait(50) and semaphore.acquire(timeout=50)
        assert (value.value, raw[0]) == (6, 1), (value.value, raw[0])
        assert (ours.recv(), sock.recv(9)) == ("pipe", b"socket")
        assert (queue.get(timeout=50), simple.get()) == ("queue", "simple")

        def ask(kind, obj):
            q.write((kind, obj))
            answer = q.read(timeout=50)
            assert answer == kind, answer

        first, second = multiprocessing.Pipe()
        ask("connection", second)
        second.close()
        assert first.recv() == "sent"
        memory = shared_memory.SharedMemory(create=True, size=10)
        ask("memory", memory)
        assert memory.buf[1] == 7
        with multiprocessing.Manager() as manager:
            proxy = manager.dict()
            ask("proxy", proxy)
            assert proxy.copy() == {"set": 2}
            del proxy
        q.write(None)
        (name,) = workers.join(50)
        for there in (memory.name, name):  # the worker's end has removed neither
            again = shared_memory.SharedMemory(there)
            again.close()
        memory.close()
        memory.unlink()
        again.unlink()
        q.close()
        queue.close()
        sock.close()
        other.close()
        print(backend, "good")
    there = torchwq.map(2, tracker).join(50)
    assert there == [(os.fstat(resource_tracker.getfd()).st_ino, None)] * 2, there
    assert torchwq.map(1, only_begin, ctx.Lock()).join(50) == [key()]
    with torchwq.BackgroundTaskPool(1, initializer=only_begin, initargs=(ctx.Lock(),)) as pool:
        assert pool.submit(key).result(50) == key()
    assert torchwq.BackgroundTask(only_begin, ctx.Lock()).result(50) == key()
    print("all good")
"""


def test_workers_have_what_processes_of_multiprocessing_have(run_script: Callable[..., Any]) -> None:
    done = run_script(WORKERS)
    assert done.stdout.split() == ["thread", "good", "process", "good", "all", "good"], done.stderr
    assert not done.stderr


LOADER = """
    import functools
    import multiprocessing
    import sys
    from multiprocessing import shared_memory
    import torch
    import torchwq

    class Data(torch.utils.data.Dataset):
        def __init__(self, context):
            self.value, self.lock = context.Value("i", 0), context.Lock()
            self.raw, self.event, self.queue = context.RawArray("i", 4), context.Event(), context.Queue()
            self.memory = shared_memory.SharedMemory(create=True, size=8)

        def __len__(self):
            return 4

        def __getitem__(self, index):
            with self.lock:
                self.value.value += 1
            self.raw[index] = index
            self.memory.buf[index] = index
            self.event.set()
            self.queue.put(index)
            return index

    def collate(condition, batch):
        with condition:
            return torch.tensor(batch)

    if __name__ == "__main__":
        for method in ("forkserver", "spawn"):
            context = multiprocessing.get_context(method)
            data = Data(context)
            loader = torchwq.DataLoader(
                data, num_workers=2, multiprocessing_context=context,
                collate_fn=functools.partial(collate, context.Condition()),
            )
            for epoch in (1, 2):  # new workers each time
                assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]
                assert (data.value.value, list(data.raw)) == (4 * epoch, [0, 1, 2, 3])
                assert sorted(data.queue.get(timeout=50) for _ in range(4)) == [0, 1, 2, 3]
                assert data.event.is_set()
                assert list(data.memory.buf[:4]) == [0, 1, 2, 3]
                shared_memory.SharedMemory(data.memory.name).close()
            data.memory.close()
            data.memory.unlink()
            print(method)
"""


def test_a_loaders_workers_begin_with_what_multiprocessings_would(run_script: Callable[..., Any]) -> None:
    done = run_script(LOADER)
    assert done.stdout.split() == ["forkserver", "spawn"], done.stderr
    assert not done.stderr


def test_workers_come_also_without_a_tracker(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """
        import os
        from multiprocessing import resource_tracker
        import torchwq

        resource_tracker.ensure_running = resource_tracker.getfd = None  # as for one that cannot be started
        print(torchwq.map(1, os.getpid).join(50)[0] > 0)
        """
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
