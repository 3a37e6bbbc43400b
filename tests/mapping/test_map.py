"""torchwq.map: the function's arguments, the results of join and check_errors, and the calls that it refuses."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import operator
import os
import random
import signal
import threading
import time
import traceback
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import torchwq
from tests.conftest import wait_until
from tests.mapping import jobs
from torchwq.workers import worker


def flags(n: int = 1) -> torch.Tensor:
    """Flags that the owner and its workers see."""
    return torch.zeros(n, dtype=torch.int64).share_memory_()


# --- the mapid rule ---

ADDER = jobs.Adder(5)


@pytest.mark.parametrize(
    ("f", "args", "expected"),
    [
        pytest.param(jobs.nothing, (), ["nothing", "nothing"], id="takes nothing"),
        pytest.param(jobs.one_more, ("a",), [("a", 0), ("a", 1)], id="one more positional"),
        pytest.param(jobs.one_more, ("a", "b"), [("a", "b")] * 2, id="no more positional"),
        pytest.param(jobs.one_more_positional_only, ("a",), [("a", 0), ("a", 1)], id="positional only"),
        pytest.param(jobs.star, (), [(0,), (1,)], id="*args alone"),
        pytest.param(jobs.star, ("a", "b"), [("a", "b", 0), ("a", "b", 1)], id="*args"),
        pytest.param(jobs.mapid_last, ("a",), [("a", 0), ("a", 1)], id="mapid"),
        pytest.param(jobs.mapid_last, ("a", 7), [("a", 7)] * 2, id="mapid given"),
        pytest.param(jobs.mapid_default, ("a",), [("a", 0), ("a", 1)], id="mapid with a default"),
        pytest.param(jobs.mapid_after_default, ("a",), [("a", "b", 0), ("a", "b", 1)], id="mapid after a default"),
        pytest.param(jobs.mapid_after_default, ("a", "c"), [("a", "c", 0), ("a", "c", 1)], id="mapid last of three"),
        pytest.param(jobs.mapid_keyword_only, ("a",), [("a", 0), ("a", 1)], id="keyword only"),
        pytest.param(jobs.mapid_keyword_only_default, ("a",), [("a", 0), ("a", 1)], id="keyword only with a default"),
        pytest.param(jobs.other_default, ("a",), [("a", "default")] * 2, id="another default is left alone"),
        pytest.param(jobs.keywords, ("a",), [("a", {})] * 2, id="**keywords get none"),
        pytest.param(functools.partial(jobs.one_more, "a"), (), [("a", 0), ("a", 1)], id="partial, one more"),
        pytest.param(functools.partial(jobs.one_more, "a", "b"), (), [("a", "b")] * 2, id="partial, full"),
        pytest.param(
            functools.partial(jobs.mapid_after_default, b="c"),
            ("a",),
            [("a", "c", 0), ("a", "c", 1)],
            id="partial with a keyword",
        ),
        pytest.param(ADDER, (), [5, 6], id="callable object"),
        pytest.param(ADDER.method, (), [50, 51], id="bound method"),
        pytest.param(jobs.Adder.of_class, (), [("Adder", 0), ("Adder", 1)], id="class method"),
        pytest.param(jobs.Adder.static, (), [0, 2], id="static method"),
        pytest.param(math.sqrt, (), [0.0, 1.0], id="builtin, one more"),
        pytest.param(math.sqrt, (9,), [3.0, 3.0], id="builtin, full"),
        pytest.param(operator.add, (10,), [10, 11], id="builtin of two"),
        pytest.param(max, (3, 5), [5, 5], id="builtin without a signature"),
        pytest.param(torch.tensor, (3,), [torch.tensor(3)] * 2, id="torch's builtin"),
    ],
)
def test_mapid_goes_to_those_who_want_it(f: Any, args: tuple[Any, ...], expected: list[Any]) -> None:
    assert torchwq.map(2, f, *args).join() == expected


def test_a_class_makes_an_object_in_each_worker() -> None:
    made = torchwq.map(2, jobs.Adder).join()
    assert [type(each) for each in made] == [jobs.Adder, jobs.Adder]
    assert [each.base for each in made] == [0, 1]


@pytest.mark.parametrize(
    ("f", "args"),
    [
        pytest.param(jobs.nothing, ("too many",), id="too many"),
        pytest.param(jobs.two_more, ("a",), id="two are missing"),
        pytest.param(math.sqrt, (1, 2), id="builtin"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_the_call(f: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="cannot be called with these arguments"):
        torchwq.map(2, f, *args)
    assert not worker.active_workers()


@pytest.mark.parametrize(
    ("n", "f", "keywords", "error"),
    [
        pytest.param(0, jobs.nothing, {}, ValueError, id="no workers"),
        pytest.param(-2, jobs.nothing, {}, ValueError, id="fewer than none"),
        pytest.param("2", jobs.nothing, {}, TypeError, id="n is no number"),
        pytest.param(2, "jobs.nothing", {}, TypeError, id="no function"),
        pytest.param(2, None, {}, TypeError, id="None"),
        pytest.param(2, jobs.nothing, {"backend": "fibre"}, ValueError, id="no such backend"),
        pytest.param(2, jobs.nothing, {"name": "x"}, TypeError, id="no such option"),
    ],
)
def test_bad_calls_are_refused_by_the_call(n: Any, f: Any, keywords: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        torchwq.map(n, f, **keywords)
    assert not worker.active_workers()


def test_an_argument_that_cannot_travel_is_named_and_nothing_starts() -> None:
    with pytest.raises(torchwq.MarshalError, match=r"args\[1\]\['model'\]\[1\]"):
        torchwq.map(2, jobs.two_more, "fine", {"model": [0, threading.Lock()]})
    assert not worker.active_workers()


# --- closures ---


def test_a_closure_is_refused_by_the_call_and_nothing_starts() -> None:
    weights = torch.ones(10)

    def uses_weights() -> float:
        return float(weights.sum())

    with pytest.raises(torchwq.ClosureError, match="weights") as caught:
        torchwq.map(2, uses_weights)
    assert "upvalues=True" in str(caught.value)
    assert not worker.active_workers()


def test_upvalues_take_a_closure_along() -> None:
    weights = torch.ones(10)

    def uses_weights(mapid: int) -> float:
        return float(weights.sum()) + mapid

    assert torchwq.map(2, uses_weights, upvalues=True).join() == [10.0, 11.0]


def test_a_nested_function_that_captures_no_data_travels() -> None:
    def uses_a_module(mapid: int) -> float:
        return math.sqrt(mapid)

    assert torchwq.map(2, uses_a_module).join() == [0.0, 1.0]


def test_a_partial_does_not_smuggle_a_closure() -> None:
    data = [1, 2, 3]
    with pytest.raises(torchwq.ClosureError, match="data"):
        torchwq.map(1, functools.partial(lambda k: data[k]))


# --- join ---


def test_join_is_in_mapid_order_whatever_the_order_of_ends() -> None:
    assert torchwq.map(4, jobs.in_reverse, flags(4)).join() == [0, 10, 20, 30]


def test_join_times_out_and_can_be_called_again() -> None:
    gate = flags()
    workers = torchwq.map(2, jobs.gated, gate)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="2 of 2 workers"):
            workers.join(timeout=0.05)
    with pytest.raises(TimeoutError):
        workers.join(0)
    gate[0] = 1
    assert workers.join(timeout=30) == [0, 1]
    assert workers.join(0) == [0, 1]


def test_join_raises_the_first_error_by_mapid_and_notes_the_others() -> None:
    workers = torchwq.map(4, jobs.fail_if, (1, 2))
    with pytest.raises(KeyError) as caught:
        workers.join()
    assert caught.value.args == ("worker 1 failed",)
    assert [note for note in caught.value.__notes__ if "worker 2" in note]
    assert "OSError" in "".join(caught.value.__notes__)
    with pytest.raises(KeyError) as again:
        workers.join()
    assert len(again.value.__notes__) == 1  # the notes do not pile up


def test_an_error_brings_the_workers_traceback() -> None:
    with pytest.raises(KeyError) as caught:
        torchwq.map(2, jobs.fail_if, (1,)).join()
    cause = caught.value.__cause__
    assert isinstance(cause, torchwq.RemoteTraceback)
    assert "raise_deeply" in cause.text
    assert os.path.basename(jobs.__file__) in cause.text
    assert "raise_deeply" in "".join(traceback.format_exception(caught.value))


def test_join_waits_for_all_before_it_raises() -> None:
    gate, ended = flags(), flags(3)
    workers = torchwq.map(3, jobs.fail_or_wait, gate, ended, (0,))
    with pytest.raises(TimeoutError):
        workers.join(timeout=0.1)
    gate[0] = 1
    with pytest.raises(ZeroDivisionError):
        workers.join()
    assert ended.tolist() == [0, 1, 1]


def test_exceptions_keep_type_and_fields() -> None:
    with pytest.raises(jobs.Refused) as caught:
        torchwq.map(1, jobs.fail_with, "refused").join()
    assert (caught.value.args, caught.value.code) == (("no", 42), 42)


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_an_exception_that_holds_data_keeps_its_type(kind: str) -> None:
    with pytest.raises(jobs.Refused) as caught:
        torchwq.map(1, jobs.fail_with, kind).join()
    expected = torch.arange(3) if kind == "tensor" else np.ones(1_000_000)
    assert bool((caught.value.code == expected).all())


def test_a_long_message_arrives_whole() -> None:
    with pytest.raises(ValueError, match=r"^x{1000}") as caught:
        torchwq.map(1, jobs.fail_with, "long").join()
    assert len(str(caught.value)) == 1_000_000


def test_an_exception_class_made_in_a_function_keeps_its_base() -> None:
    with pytest.raises(ValueError, match="of a function") as caught:
        torchwq.map(1, jobs.fail_with, "local").join()
    assert type(caught.value).__name__ == "Local"


def test_a_chained_exception_shows_its_chain() -> None:
    with pytest.raises(RuntimeError, match="the consequence") as caught:
        torchwq.map(1, jobs.fail_with, "chained").join()
    assert "the reason" in str(caught.value.__cause__)


@pytest.mark.parametrize(("kind", "type_"), [("not rebuilt", jobs.NotRebuilt), ("not pickled", jobs.NotPickled)])
def test_an_exception_that_cannot_travel_as_it_is_keeps_its_type_and_its_text(
    kind: str, type_: type[Exception]
) -> None:
    with pytest.raises(type_, match="the original text") as caught:
        torchwq.map(1, jobs.fail_with, kind).join()
    assert "fail_with" in str(caught.value.__cause__)
    (note,) = caught.value.__notes__
    assert ("made here without its __init__" if kind == "not rebuilt" else "cannot") in note


def test_an_exception_whose_text_cannot_be_had_keeps_its_type() -> None:
    with pytest.raises(jobs.NoText):
        torchwq.map(1, jobs.fail_with, "no text").join()


def test_what_is_no_exception_arrives_too() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        torchwq.map(1, jobs.fail_with, "interrupt").join()
    assert isinstance(caught.value.__cause__, torchwq.RemoteTraceback)


# --- check_errors ---


def check_until_raised(workers: torchwq.Map) -> BaseException:
    def check() -> BaseException | None:
        try:
            workers.check_errors()
        except Exception as error:
            return error
        return None

    return wait_until(check, what="an error")


def test_check_errors_raises_while_the_others_work_and_join_leaves_it_out() -> None:
    gate = flags()
    workers = torchwq.map(4, jobs.fail_or_wait, gate, flags(4), (1,))
    error = check_until_raised(workers)
    assert isinstance(error, KeyError)
    assert isinstance(error.__cause__, torchwq.RemoteTraceback)
    workers.check_errors()  # the error was consumed
    with pytest.raises(TimeoutError):
        workers.join(timeout=0.01)
    gate[0] = 1
    assert workers.join() == [0, 2, 3]


def test_check_errors_hands_out_each_error_once() -> None:
    workers = torchwq.map(3, jobs.fail_if, (0, 1, 2))
    with pytest.raises(ZeroDivisionError) as caught:
        workers.join()  # does not consume
    assert len(caught.value.__notes__) == 2
    for expected in (ZeroDivisionError, KeyError, OSError):
        with pytest.raises(expected):
            workers.check_errors()
    workers.check_errors()
    assert workers.join() == []


def test_join_after_check_errors_raises_the_next_error() -> None:
    workers = torchwq.map(3, jobs.fail_if, (0, 2))
    with pytest.raises(ZeroDivisionError):
        workers.join()
    with pytest.raises(ZeroDivisionError):
        workers.check_errors()
    with pytest.raises(OSError, match="worker 2"):
        workers.join()


def test_check_errors_of_a_sound_map_raises_nothing() -> None:
    gate = flags()
    workers = torchwq.map(2, jobs.gated, gate)
    workers.check_errors()
    gate[0] = 1
    workers.join()
    workers.check_errors()
    assert workers.join() == [0, 1]


def test_check_errors_reports_a_death() -> None:
    workers = torchwq.map(1, jobs.end_by, "SIGKILL")
    error = check_until_raised(workers)
    assert isinstance(error, torchwq.WorkerDied)
    assert workers.join() == []


# --- how workers end ---


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM", "SIGABRT"])
def test_a_killed_worker_is_worker_died(name: str) -> None:
    gate, pids = flags(), flags(3)
    workers = torchwq.map(3, jobs.die_or_wait, gate, pids)
    wait_until(lambda: bool(pids.all()))
    wait_until(lambda: workers.pids == pids.tolist())  # the fork server tells of them a moment later
    os.kill(int(pids[1]), getattr(signal, name))
    killed = time.monotonic()
    error = check_until_raised(workers)
    assert time.monotonic() - killed < 1.0
    assert isinstance(error, torchwq.WorkerDied)
    assert isinstance(error, RuntimeError)
    assert (error.mapid, error.pid) == (1, int(pids[1]))
    assert (error.signal, error.exitcode) == (getattr(signal, name), -getattr(signal, name))
    assert f"{int(pids[1])}" in str(error)
    assert name in str(error)
    assert ("memory" in str(error)) == (name == "SIGKILL")
    gate[0] = 1
    assert workers.join() == [0, 2]  # the others went on


def test_join_raises_worker_died() -> None:
    with pytest.raises(torchwq.WorkerDied) as caught:
        torchwq.map(1, jobs.end_by, "SIGKILL").join(timeout=30)
    assert caught.value.mapid == 0


@pytest.mark.parametrize("how", ["exit", "exit0"])
def test_a_clean_exit_is_no_error(how: str) -> None:
    assert torchwq.map(2, jobs.end_by, how).join() == [None, None]


@pytest.mark.parametrize(("how", "status"), [("exit3", 3), ("_exit3", 3), ("exit text", 1), ("_exit255", 255)])
def test_an_exit_status_is_worker_died(how: str, status: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(torchwq.WorkerDied) as caught:
        torchwq.map(2, jobs.end_by, how).join()
    assert (caught.value.mapid, caught.value.exitcode, caught.value.signal) == (0, status, None)
    assert caught.value.pid is not None
    assert f"status {status}" in str(caught.value)
    assert "memory" not in str(caught.value)
    if how == "exit text":
        assert capfd.readouterr().err.count("the last words") == 2


def test_an_exit_without_a_trace_does_not_hang() -> None:
    workers = torchwq.map(2, jobs.end_by, "_exit0")
    with contextlib.suppress(torchwq.WorkerDied):
        assert workers.join(timeout=30) == [None, None]


def test_queue_closed_that_leaves_the_function_is_a_normal_end() -> None:
    started = flags(2)
    with torchwq.workqueue() as queue:
        workers = torchwq.map(2, jobs.read_all, queue, started)
        wait_until(lambda: bool(started.all()))
    assert workers.join(timeout=30) == [None, None]


def test_a_worker_waits_for_its_threads() -> None:
    ended = flags()
    assert torchwq.map(1, jobs.exit_in_thread, ended).join() == ["returned"]
    assert int(ended[0]) == 1


def test_a_worker_leaves_ctrl_c_to_its_owner() -> None:
    gate, pids = flags(), flags()
    workers = torchwq.map(1, jobs.interrupted, gate, pids)
    wait_until(lambda: bool(pids.all()))
    os.kill(int(pids[0]), signal.SIGINT)
    gate[0] = 1
    assert workers.join() == ["went on"]


# --- results ---


def test_results_by_value_and_tensors_by_reference() -> None:
    tensor = flags(2)
    first, second = torchwq.map(2, jobs.set_and_return, tensor).join()
    assert tensor.tolist() == first.tolist() == second.tolist() == [1, 2]
    tensor[0] = 9
    assert (int(first[0]), int(second[0])) == (9, 9)


def test_a_big_result_and_none() -> None:
    assert torchwq.map(1, jobs.give, "big").join() == [bytes(20_000_000)]
    assert torchwq.map(2, jobs.give, "none").join() == [None, None]


def test_a_result_that_cannot_be_sent_names_the_place() -> None:
    with pytest.raises(torchwq.MarshalError, match="lock") as caught:
        torchwq.map(1, jobs.give, "lock").join()
    # The place in the function's result, not in torchwq's answer
    assert "result['hooks'][1]" in str(caught.value)


@pytest.mark.parametrize(("kind", "error"), [("generator", torchwq.MarshalError), ("closure", torchwq.ClosureError)])
def test_other_results_that_cannot_be_sent(kind: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        torchwq.map(1, jobs.give, kind).join()


def test_a_result_that_cannot_be_read_is_the_error_of_its_worker() -> None:
    workers = torchwq.map(3, jobs.give_unreadable, 1)
    with pytest.raises(LookupError, match="cannot be rebuilt here") as caught:
        workers.join()
    assert "worker 1" in "".join(caught.value.__notes__)
    with pytest.raises(LookupError):
        workers.check_errors()
    assert workers.join() == [0, 2]


def test_a_map_that_is_dropped_works_on() -> None:
    gate, flag = flags(), flags()
    torchwq.map(1, jobs.flag_at_gate, gate, flag)
    gc.collect()
    gate[0] = 1
    wait_until(lambda: bool(flag[0]))


def test_a_map_that_is_never_joined_leaves_no_descriptor() -> None:
    for _ in range(3):
        workers = torchwq.map(2, jobs.set_and_return, flags(2))
        wait_until(lambda: not worker.active_workers())
        del workers
    # A fixture checks that nothing is left behind


# --- worker_info ---


def test_worker_info() -> None:
    assert torchwq.worker_info() is None
    infos = torchwq.map(3, jobs.who_am_i).join()
    assert [(info.mapid, info.num_workers) for info in infos] == [(0, 3), (1, 3), (2, 3)]
    assert len({info.seed for info in infos}) == 3


def test_workers_are_seeded_differently_and_each_map_anew() -> None:
    numbers = [*torchwq.map(2, jobs.random_numbers).join(), *torchwq.map(2, jobs.random_numbers).join()]
    assert {from_seed for from_seed, *_ in numbers} == {0}
    for of_one_library in list(zip(*numbers, strict=True))[1:]:
        assert len(set(of_one_library)) == 4


def test_the_owners_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    torchwq.map(2, jobs.random_numbers).join()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_seeds_follow_torchs_seed(run_script: Any) -> None:
    source = """
        import sys
        import torch, torchwq

        torch.manual_seed(int(sys.argv[1]))
        def numbers():
            import random
            import numpy
            import torch, torchwq
            return torchwq.worker_info().seed, int(torch.randint(2**31, ())), random.random(), numpy.random.rand()
        print(torchwq.map(2, numbers).join(), torchwq.map(2, numbers).join())
    """
    assert run_script(source, "7").stdout == run_script(source, "7").stdout


def test_workers_use_one_thread() -> None:
    owners = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torchwq.map(2, jobs.threads).join() == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(owners)


def test_what_workers_print_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    torchwq.map(2, jobs.speak).join()
    out, err = capfd.readouterr()
    for mapid in (0, 1):
        assert f"worker {mapid} to stdout\n" in out
        assert f"worker {mapid} to descriptor 1\n" in out
        assert f"worker {mapid} to stderr\n" in err


def test_len_pids_and_repr() -> None:
    gate, started = flags(), flags(2)
    workers = torchwq.map(2, jobs.announced, gate, started)
    wait_until(lambda: bool(started.all()))
    assert len(workers) == 2
    wait_until(lambda: None not in workers.pids)
    assert len({*workers.pids, os.getpid()}) == 3
    assert "2 workers, 2 running" in repr(workers)
    gate[0] = 1
    workers.join()
    assert "0 running" in repr(workers)


# --- many, at once, and below each other ---


def test_two_maps_at_once() -> None:
    gate, other = flags(), flags()
    slow, quick = torchwq.map(2, jobs.gated, gate), torchwq.map(3, jobs.gated, other)
    other[0] = 1
    assert quick.join() == [0, 1, 2]
    gate[0] = 1
    assert slow.join() == [0, 1]


def test_maps_from_several_threads() -> None:
    results: dict[int, list[int]] = {}

    def start(number: int) -> None:
        results[number] = torchwq.map(2, operator.add, number).join()

    threads = [threading.Thread(target=start, args=(10 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {10 * number: [10 * number, 10 * number + 1] for number in range(6)}


@pytest.mark.timeout(120)
def test_two_hundred_workers() -> None:
    started = flags(200)
    with torchwq.workqueue() as queue:
        workers = torchwq.map(200, jobs.answer_one, queue, started)
        wait_until(lambda: bool(started.all()), 60, "200 workers at the same time")
        queue.write(*range(200))
        assert sorted(queue.read() for _ in range(200)) == list(range(200))
        assert workers.join() == list(range(200))


def test_a_queue_as_an_argument_is_a_workers_handle() -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(3, jobs.double_questions, queue)
        queue.write(*range(20), None, None, None)
        assert sorted(queue.read() for _ in range(20)) == list(range(0, 40, 2))
        assert sum(workers.join()) == 20


def test_workers_of_workers_open_the_owners_queue_by_name() -> None:
    with torchwq.workqueue("outermost") as queue:
        gate = flags()
        workers = torchwq.map(2, jobs.nested, "outermost", gate)
        queue.write("a", "b", "c", "d")
        answers = [queue.read(timeout=30) for _ in range(4)]
        assert {question for question, *_ in answers} == {"a", "b", "c", "d"}
        assert {(outer, mapid) for _, outer, mapid in answers} == {(0, 0), (0, 1), (1, 0), (1, 1)}
        gate[0] = 1
        expected = [[(outer, mapid, False) for mapid in (0, 1)] for outer in (0, 1)]
        assert workers.join() == expected


def test_workers_own_queues() -> None:
    expected = [[2 * (10 * mapid + k) for k in range(5)] for mapid in range(2)]
    assert torchwq.map(2, jobs.own_queue).join() == expected


def test_an_error_comes_up_through_two_maps() -> None:
    with pytest.raises(KeyError, match="worker 1 failed") as caught:
        torchwq.map(1, jobs.nested_failure).join()
    shown = "".join(traceback.format_exception(caught.value))
    assert "raise_deeply" in shown
    assert "nested_failure" in shown


def test_the_workers_of_a_killed_worker_end() -> None:
    pids, gate = flags(2), flags()
    workers = torchwq.map(1, jobs.leave_workers, pids, gate)
    wait_until(lambda: bool(pids.all()))
    os.kill(wait_until(lambda: workers.pids[0]), signal.SIGKILL)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.tolist()), 2.0, "their end")
    with pytest.raises(torchwq.WorkerDied):
        workers.join()


def test_the_workers_of_a_worker_that_returns_end() -> None:
    pids, gate = flags(2), flags()
    assert torchwq.map(1, jobs.return_with_workers, pids, gate).join(timeout=30) == ["returned"]
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.tolist()), 2.0, "their end")
