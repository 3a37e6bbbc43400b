"""``map``, the background classes, queues and channels with workers on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import torchwq
import torchwq.ray
from tests.conftest import wait_until
from torchwq import ChannelState, ClosureError, MarshalError, WorkerDied
from torchwq.transport import namespace

from .conftest import NODES, Cluster, ray

pytestmark = pytest.mark.timeout(120)


def twice(tensor: torch.Tensor, mapid: int) -> Any:
    tensor += mapid
    return tensor * 2, torch.get_num_threads(), torchwq.worker_info(), torch.rand(1)


def test_map_runs_its_function_in_each_worker_and_tensors_go_by_value() -> None:
    torch.manual_seed(3)
    tensor = torch.arange(4.0)
    results = torchwq.map(2, twice, tensor, backend="ray").join()
    assert tensor.tolist() == [0, 1, 2, 3]
    assert [result.tolist() for result, *_ in results] == [[0, 2, 4, 6], [2, 4, 6, 8]]
    assert [(threads, info.mapid, info.num_workers) for _, threads, info, _ in results] == [(1, 0, 2), (1, 1, 2)]
    seeds = [info.seed for _, _, info, _ in results]
    assert seeds[0] != seeds[1]
    for seed, (*_, drawn) in zip(seeds, results, strict=True):
        assert drawn == torch.rand(1, generator=torch.Generator().manual_seed(seed))


def where() -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


def test_workers_are_spread_over_the_nodes() -> None:
    found = torchwq.map(NODES, where, backend="ray").join()
    assert len({node for node, _ in found}) == NODES
    assert os.getpid() not in {pid for _, pid in found}


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_a_backend_with_options_puts_workers_where_its_resources_are() -> None:
    backend = torchwq.ray.Backend(num_cpus=0.5, resources={"head": 1}, runtime_env={"env_vars": {"TWQ_TEST": "yes"}})
    pool = torchwq.BackgroundTaskPool(2, backend=backend)
    with pool:
        assert pool.submit(environment, "TWQ_TEST").result() == "yes"
        nodes = {pool.submit(where).result()[0] for _ in range(4)}
    (node,) = nodes
    heads = [each["NodeID"] for each in ray.nodes() if each["Resources"].get("head")]
    assert [node] == heads


def fail(mapid: int) -> None:
    raise KeyError("far", mapid)


def test_the_error_of_a_worker_has_its_type_and_its_traceback() -> None:
    with pytest.raises(KeyError, match="far") as caught:
        torchwq.map(1, fail, backend="ray").join()
    assert caught.value.args == ("far", 0)
    assert "in fail" in str(caught.value.__cause__)


def test_closures_are_refused_before_a_worker_starts() -> None:
    data = [1]
    with pytest.raises(ClosureError, match="data"):
        torchwq.map(1, lambda: data, backend="ray")
    assert torchwq.map(1, lambda: data, backend="ray", upvalues=True).join() == [[1]]


def test_what_works_on_one_machine_only_is_refused_with_its_place() -> None:
    with pytest.raises(MarshalError, match=r"args\[0\]\[1\].*one machine"):
        torchwq.map(1, print, [0, torchwq.mutex()], backend="ray")


def add(left: int, right: int) -> int:
    return left + right


def test_a_pool_is_an_executor() -> None:
    with torchwq.BackgroundTaskPool(2, backend="ray") as pool:
        futures = [pool.submit(add, number, 1) for number in range(10)]
        assert sorted(future.result() for future in concurrent.futures.as_completed(futures)) == list(range(1, 11))
        assert list(pool.map(add, range(3), range(3))) == [0, 2, 4]
        with pytest.raises(TypeError):
            pool.submit(add, 1, "x").result()
        array = pool.submit(np.arange, 100_000).result()
        array[0] = 5  # the reader's own
        assert array.sum() == np.arange(100_000).sum() + 5


def first(array: Any) -> float:
    return float(array[0])


def test_a_task_gets_its_arguments_as_they_were_when_it_was_submitted() -> None:
    array, tensor, futures = np.zeros(50_000), torch.zeros(50_000), []
    with torchwq.BackgroundTaskPool(1, backend="ray") as pool:
        for number in range(6):
            array[:] = number
            tensor.fill_(number)
            futures += [pool.submit(first, array), pool.submit(first, tensor)]
        assert [future.result() for future in futures] == [number for number in range(6) for _ in range(2)]


def drop_handles(questions: Any) -> int:
    """Far handles in cycles, which the garbage collector finds at any time."""
    import gc

    for _ in range(20):
        inner = questions.read()
        cycle = [inner]
        cycle.append(cycle)
        del inner, cycle
        gc.collect()
        questions.write(None)
    return 1


def test_handles_that_are_garbage_are_told_of_whenever_they_are_collected() -> None:
    with torchwq.workqueue() as questions:
        workers = torchwq.map(1, drop_handles, questions, backend="ray")
        for _ in range(20):
            with torchwq.workqueue() as inner:
                questions.write(inner)
                questions.read(timeout=60)
        assert workers.join(timeout=60) == [1]


def die(_: Any) -> None:
    os._exit(3)


def test_a_pool_replaces_a_worker_that_died_and_only_its_task_fails() -> None:
    with torchwq.BackgroundTaskPool(1, backend="ray") as pool:
        assert pool.submit(abs, -1).result() == 1
        with pytest.raises(WorkerDied, match=r"its actor on node \w+ \(127\.0\.0\.1\), pid \d+ there is gone"):
            pool.submit(die, 0).result()
        assert pool.submit(abs, -2).result() == 2


def count(upto: int) -> Iterator[torch.Tensor]:
    for number in range(upto):
        yield torch.full((3,), number)
    if upto == 3:
        raise ValueError("after three")


def test_a_task_can_be_an_iterator() -> None:
    assert torchwq.BackgroundTask(add, 1, 2, backend="ray").result() == 3
    task = torchwq.BackgroundTask(count, 7, prefetch=2, backend="ray")
    assert [int(item[0]) for item in task] == list(range(7))
    got = []
    with pytest.raises(ValueError, match="after three"):
        for item in torchwq.BackgroundTask(count, 3, backend="ray"):
            got.append(int(item[0]))
    assert got == [0, 1, 2]
    for item in torchwq.BackgroundTask(count, 1000, backend="ray"):
        if int(item[0]) == 2:
            break  # the producer ends


def echo(questions: Any) -> str:
    for question in questions:
        questions.write((question, question * 2))
    return repr(questions)


def test_a_queue_reaches_workers_and_none_ends_them() -> None:
    with torchwq.workqueue() as questions:
        workers = torchwq.map(2, echo, questions, backend="ray")
        questions.write(*range(8), torch.ones(2))
        answers = [questions.read(timeout=60) for _ in range(9)]
        assert sorted(b for a, b in answers if isinstance(a, int)) == list(range(0, 16, 2))
        questions.drain(timeout=30)
        questions.write(None, None)
        assert all("another machine" in shown for shown in workers.join(timeout=60))


def use_queue(questions: Any, mapid: int) -> Any:
    with pytest.raises(queue.Empty):
        questions.read(timeout=0.05)
    assert questions.read(nonblocking=True) is None
    assert questions.capacity is None
    assert not questions.creator
    assert not questions.closed
    questions.write("begin")
    try:
        questions.read()
    except torchwq.QueueClosed:
        return "closed"
    return "open"


def test_a_worker_that_waits_hears_that_the_owner_has_closed_the_queue() -> None:
    questions = torchwq.workqueue()
    workers = torchwq.map(1, use_queue, questions, backend="ray")
    assert questions.read(timeout=60) == "begin"
    questions.close()
    assert workers.join(timeout=60) == ["closed"]


def write_items(channel: Any, mapid: int) -> None:
    for number in range(5):
        assert channel.write((mapid, number)) is ChannelState.OPEN
    assert channel.capacity == 2


def read_items(channel: Any, sink: Any) -> int:
    found = 0
    for item in channel:
        sink.write(item)
        found += 1
    assert channel.closed()
    assert channel.drained()
    assert channel.num_items() == 0
    return found


def test_channels_go_between_workers_of_both_kinds() -> None:
    with torchwq.channel(capacity=2) as items, torchwq.channel() as sink:
        readers = torchwq.map(2, read_items, items, sink, backend="ray")
        far, near = torchwq.map(2, write_items, items, backend="ray"), torchwq.map(1, write_items, items)
        far.join(timeout=60)
        near.join(timeout=60)
        items.close()
        assert sum(readers.join(timeout=60)) == 15
        sink.close()
        found = sorted(sink)
    assert found == sorted([(mapid, n) for mapid in (0, 1, 0) for n in range(5)])


def send_back(questions: Any, answers: Any) -> None:
    inner = questions.read()
    inner.write("by the inner queue")
    answers.write(inner)


def test_handles_travel_in_messages_and_back() -> None:
    with torchwq.workqueue() as questions, torchwq.channel() as answers, torchwq.workqueue() as inner:
        workers = torchwq.map(1, send_back, questions, answers, backend="ray")
        questions.write(inner)
        _, again = answers.read(timeout=60)
        workers.join(timeout=60)
        assert inner.read(timeout=10) == "by the inner queue"
        assert isinstance(again, torchwq.WorkQueue)
        again.close()


def take_and_die(questions: Any) -> None:
    questions.read()
    os._exit(5)


def test_who_waits_for_a_worker_that_dies_is_told_with_node_and_cause() -> None:
    with torchwq.workqueue() as questions:
        workers = torchwq.map(1, take_and_die, questions, backend="ray")
        questions.write("the question")
        with pytest.raises(WorkerDied, match="its actor on node") as told:
            questions.read(timeout=60)
        assert told.value.mapid == 0
        with pytest.raises(WorkerDied, match=r"on node \w+ \(127\.0\.0\.1\), pid \d+ there.*worker process has died"):
            workers.join(timeout=60)


def take_and_raise(questions: Any) -> None:
    questions.read()
    raise ValueError("in the worker")


def test_who_waits_for_a_worker_that_fails_gets_its_error_as_the_cause() -> None:
    with torchwq.workqueue() as questions:
        workers = torchwq.map(1, take_and_raise, questions, backend="ray")
        questions.write("the question")
        with pytest.raises(WorkerDied, match="in the worker") as told:
            questions.read(timeout=60)
        assert isinstance(told.value.__cause__, ValueError)
        with pytest.raises(ValueError, match="in the worker"):
            workers.join(timeout=60)


def test_a_worker_without_a_place_is_told_of_and_can_be_ended(caplog: Any, monkeypatch: Any) -> None:
    import torchwq.ray.worker

    monkeypatch.setattr(torchwq.ray.worker, "_PLACE_TIMEOUT", 0.5)
    task = torchwq.BackgroundTask(add, 1, 1, backend=torchwq.ray.Backend(resources={"not there yet": 1}))
    until = time.monotonic() + 20
    while "has no place yet: it needs 1 CPU, 1 not there yet" not in caplog.text:
        assert time.monotonic() < until
        time.sleep(0.05)
    task._worker.kill()
    with pytest.raises(WorkerDied):
        task.result(timeout=60)


def test_there_is_no_such_backend() -> None:
    with pytest.raises(ValueError, match="backend must be 'process', 'thread' or 'ray', not 'rai'"):
        torchwq.map(1, print, backend="rai")


PROGRAM = """
import os, signal, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
import torchwq

def work(q):
    q.write(os.getpid())
    q.read()
    for _ in q:
        pass

with torchwq.workqueue() as q:
    workers = torchwq.map(2, work, q, backend="ray")
    loader = iter(torchwq.DataLoader(range(1000), 1, num_workers=1, backend="ray"))
    next(loader)
    print(q.read(), q.read(), flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    q.read()
"""


@pytest.mark.parametrize("how", ["die", "Ctrl-C"])
def test_the_actors_of_a_program_end_with_it(how: str, cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    environment = {key: value for key, value in os.environ.items() if key != namespace.VARIABLE}
    program = subprocess.Popen(
        [sys.executable, str(script), cluster.address, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2, program.communicate()[1]
    if how == "Ctrl-C":
        program.send_signal(signal.SIGINT)
    _, told = program.communicate(timeout=60)
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 30, "the end of the actors")
    if how == "die":
        assert program.returncode == -signal.SIGKILL
    else:
        assert program.returncode
        assert told.count("KeyboardInterrupt") == 1
        assert told.count("Traceback") == 1


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'backend="ray" needs Ray: pip install "torchwq\[ray\]"'):
        torchwq.map(1, abs, -1, backend="ray")


def test_a_program_without_a_cluster_gets_one_of_its_own_and_is_told_once(run_script: Any) -> None:
    folder = tempfile.mkdtemp(dir="/tmp")  # the names of sockets are short
    done = run_script(
        """
        import functools
        import ray._private.services
        ray._private.services.find_gcs_addresses = functools.cache(set)  # there are those of the tests

        import torchwq
        pool = torchwq.BackgroundTaskPool(1, backend="ray")
        print(ray.is_initialized(), pool.submit(abs, -3).result(), torchwq.map(1, abs, -4, backend="ray").join())
        pool.shutdown()
        """,
        fresh=True,
        timeout=100,
        env={"RAY_TMPDIR": folder},
    )
    shutil.rmtree(folder)
    assert done.stdout.splitlines()[-1:] == ["True 3 [4]"]
    assert done.stderr.count("no Ray cluster is running") == 1
