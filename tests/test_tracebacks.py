"""A traceback has the user's frames, and of torchwq's the public call at most, and what it calls."""

from __future__ import annotations

import dataclasses
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import torchwq
from torchwq import tracebacks

OWN = os.path.dirname(torchwq.__file__)


def fail(*_: Any) -> None:
    raise ValueError("the user's own")


def fail_with_queue(queue: torchwq.WorkQueue) -> None:
    queue.read()
    fail()


def die(queue: torchwq.WorkQueue) -> None:
    queue.read()
    os.kill(os.getpid(), signal.SIGKILL)


def one_and_fail() -> Iterator[int]:
    yield 1
    fail()


class Failing(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return fail(index)


class Deadly(Failing):
    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Unfit(Failing):
    def __getitem__(self, index: int) -> Any:
        return {"file": Refusing()}


class Refusing:
    def __reduce__(self) -> Any:
        raise TypeError("cannot be sent")


def of_a_queue(function: Callable[..., Any], call: Callable[[torchwq.WorkQueue], Any]) -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(1, function, queue)
        queue.write(1)
        try:
            call(queue)
        finally:
            assert workers.wait(40)


def of_a_pool(backend: str) -> None:
    with torchwq.BackgroundTaskPool(1, backend=backend) as pool:
        pool.submit(fail, 1).result(40)


def of_a_closure() -> None:
    number = 3
    torchwq.map(1, lambda: number)


def of_a_write() -> None:
    with torchwq.workqueue() as queue:
        queue.write({"a": [Refusing()]})


def of_a_channel() -> None:
    with torchwq.channel() as channel:
        channel.write({"a": [Refusing()]})


CALLS: dict[str, Callable[[], Any]] = {
    "map": lambda: torchwq.map(1, fail, 3).join(40),
    "map of threads": lambda: torchwq.map(1, fail, 3, backend="thread").join(40),
    "task": lambda: torchwq.BackgroundTask(fail, 3).result(40),
    "iterator": lambda: list(torchwq.BackgroundTask(one_and_fail)),
    "pool": lambda: of_a_pool("process"),
    "pool of threads": lambda: of_a_pool("thread"),
    "queue": lambda: of_a_queue(fail_with_queue, lambda queue: queue.read(timeout=40)),
    "dead worker": lambda: of_a_queue(die, lambda queue: queue.read(timeout=40)),
    "drain": lambda: of_a_queue(fail_with_queue, lambda queue: queue.drain(40)),
    "loader": lambda: list(torchwq.DataLoader(Failing(), num_workers=1)),
    "loader of threads": lambda: list(torchwq.DataLoader(Failing(), num_workers=1, backend="thread")),
    "dead worker of a loader": lambda: list(torchwq.DataLoader(Deadly(), num_workers=1)),
    "unfit batch": lambda: list(torchwq.DataLoader(Unfit(), num_workers=1, collate_fn=list)),
    "closure": of_a_closure,
    "write": of_a_write,
    "channel": of_a_channel,
}


def raised_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("name", CALLS)
def test_a_traceback_has_few_frames_of_ours(name: str) -> None:
    text = raised_by(CALLS[name])
    ours = [line for line in text.splitlines() if line.lstrip().startswith(f'File "{OWN}')]
    assert 1 <= len(ours) <= 2, text
    assert "During handling" not in text
    in_worker = text.partition("--- in the worker ---")[2].partition("---------------------")[0]
    assert OWN not in in_worker
    if "the user's own" in text:
        assert "in fail" in text


def interrupt(queue: torchwq.WorkQueue, pid: int) -> None:
    queue.write("here")
    os.kill(pid, signal.SIGINT)
    queue.read()


def test_an_interrupt_of_a_read_has_few_frames_of_ours() -> None:
    with torchwq.workqueue() as queue:
        workers = torchwq.map(1, interrupt, queue, os.getpid())
        with pytest.raises(KeyboardInterrupt) as caught:
            for _ in range(2):
                queue.read(timeout=40)
        ours = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename.startswith(OWN)]
        assert len(ours) <= 2
        queue.write(None)
        workers.join(40)


def test_all_frames_are_there_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracebacks.VARIABLE, "debug")
    text = raised_by(CALLS["map of threads"])
    assert "in run_worker" in text


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


def fail_frozen(*_: Any) -> None:
    raise Frozen(7)


class FailingFrozen(Failing):
    def __getitem__(self, index: int) -> Any:
        raise Frozen(index)


class RefusingFrozen:
    def __reduce__(self) -> Any:
        raise Frozen(3)


def test_an_error_whose_class_is_frozen_arrives(backend: str) -> None:
    with pytest.raises(Frozen) as caught:
        torchwq.map(1, fail_frozen, backend=backend).join(40)
    assert caught.value.code == 7
    with pytest.raises(Frozen) as caught:
        list(torchwq.DataLoader(FailingFrozen(), num_workers=1, backend=backend))
    assert caught.value.code == 0
    with torchwq.workqueue() as queue, pytest.raises(torchwq.MarshalError) as refused:
        queue.write(RefusingFrozen())
    assert isinstance(refused.value.__cause__, Frozen)


def test_an_error_of_code_without_line_numbers_arrives(backend: str) -> None:
    def fail_nowhere() -> None:
        raise ValueError("nowhere")

    fail_nowhere.__code__ = fail_nowhere.__code__.replace(co_linetable=b"")
    with pytest.raises(ValueError, match="nowhere"):
        torchwq.map(1, fail_nowhere, backend=backend).join(40)


def test_a_users_folder_may_have_any_name(run_script: Any, tmp_path: Any) -> None:
    (tmp_path / "cloudpickle").mkdir()
    script = tmp_path / "cloudpickle" / "mine.py"
    script.write_text("def fail():\n    raise ValueError('mine')\n")
    done = run_script(f"""
        import importlib.util, torchwq
        spec = importlib.util.spec_from_file_location("__main__", {str(script)!r})
        mine = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mine)
        try:
            torchwq.map(1, mine.fail, backend="thread").join(40)
        except ValueError:
            import traceback
            traceback.print_exc()
    """)
    assert "in fail" in done.stderr


def test_an_error_in_its_own_context_is_trimmed_once() -> None:
    error = ValueError("a")
    error.__cause__ = other = ValueError("b")
    other.__context__ = error
    assert tracebacks.trim(error) is error


def test_what_a_user_has_handled_stays_the_context() -> None:
    handled, his_own = KeyError("ours"), KeyError("his")
    raised = ValueError("a")
    raised.__context__, his_own.__context__ = his_own, handled
    tracebacks.detach(raised, handled)
    assert raised.__context__ is his_own
    assert his_own.__context__ is None
