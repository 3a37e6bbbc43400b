"""``torchwq.register_reducer``: how objects of a user's class travel, in every way that there is."""

from __future__ import annotations

import io
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from torchwq.marshalling import reducers

from .support import Peer, roundtrip, run_in_main

BACKENDS = pytest.mark.parametrize("backend", ["process", "thread"])


class Model:
    """Cannot be pickled."""

    def __init__(self, weight: torch.Tensor, name: str = "") -> None:
        self.weight = weight
        self.name = name
        self.lock = threading.Lock()
        self.seen: Any = None


class Finer(Model):
    pass


def reduce_model(model: Model) -> tuple[Any, ...]:
    return Model, (model.weight, model.name)


def reduce_with_state(model: Model) -> tuple[Any, ...]:
    return Model, (model.weight, model.name), {"seen": "state"}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    exact = dict(reducers._exact)
    yield
    reducers.registered.clear()
    reducers._exact.clear()
    reducers._exact.update(exact)


@pytest.fixture
def _registered() -> None:
    torchwq.register_reducer(Model, reduce_model)


registered = pytest.mark.usefixtures("_registered")


def add_one(model: Model) -> str:
    assert type(model) is Model
    assert not model.lock.locked()
    model.weight += 1
    return model.name


def serve(queue: torchwq.WorkQueue, channel: torchwq.Channel, marshalled: torchwq.Marshalled) -> None:
    queue.write(add_one(queue.read()))
    for item in (channel.read()[1], marshalled.read()):
        queue.write([add_one(each) for each in item])


@registered
@BACKENDS
def test_it_goes_through_queues_channels_and_what_is_marshalled_and_tensors_by_reference(backend: str) -> None:
    model = Model(torch.zeros(3), "small")
    with torchwq.workqueue() as queue:
        channel = torchwq.channel()
        worker = torchwq.map(1, serve, queue, channel, torchwq.marshal([model]), backend=backend)
        queue.write(model)
        channel.write([model])
        assert [queue.read(timeout=20) for _ in range(3)] == ["small", ["small"], ["small"]]
        worker.join(20)
    assert model.weight.tolist() == [3.0] * 3


@registered
@BACKENDS
def test_it_is_an_argument_and_a_result(backend: str) -> None:
    model = Model(torch.zeros(2), "argument")
    assert torchwq.map(2, add_one, model, backend=backend).join(20) == ["argument"] * 2
    assert torchwq.BackgroundTask(add_one, model, backend=backend).result(20) == "argument"
    assert model.weight.tolist() == [3.0] * 2


def make_registered(name: str) -> Model:
    torchwq.register_reducer(Model, reduce_model)  # who writes registers
    return Model(torch.ones(2), name)


def test_a_worker_that_has_registered_sends_them_to_an_owner_that_has_not() -> None:
    got = torchwq.map(1, make_registered, "result").join(20)[0]
    assert (type(got), got.name, got.weight.tolist()) == (Model, "result", [1.0, 1.0])


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Model:
        torchwq.register_reducer(Model, reduce_model)
        return Model(torch.full((2,), float(index)), str(index))


def first(samples: list[Any]) -> Any:
    return {"model": samples[0]}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_of_a_loader_have_it(context: str) -> None:
    loader = torchwq.DataLoader(Samples(), 2, num_workers=1, collate_fn=first, multiprocessing_context=context)
    models = [batch["model"] for batch in loader]
    assert [(each.name, each.weight.tolist()) for each in models] == [("0", [0.0, 0.0]), ("2", [2.0, 2.0])]


def test_a_reader_needs_no_module_of_the_writers(peer: Peer) -> None:
    script = run_in_main(
        "import torchwq, threading\n"
        "class Lock:\n    def __init__(self, n): self.n, self.lock = n, threading.Lock()\n"
        "def make(n): return Lock(n)\n"
        "torchwq.register_reducer(Lock, lambda lock: (make, (lock.n,)))\n"
        "lock = Lock(7)\n"
    )
    assert peer.ask(number_of, script["lock"]) == 7


def number_of(lock: Any) -> int:
    return int(lock.n)


def test_a_state_is_set_and_the_last_reducer_counts() -> None:
    torchwq.register_reducer(Model, reduce_model)
    torchwq.register_reducer(Model, reduce_with_state)
    assert roundtrip({"a": [Model(torch.zeros(1))]})["a"][0].seen == "state"
    torchwq.register_reducer(Model, lambda model: NotImplemented)
    with pytest.raises(torchwq.MarshalError, match=r"args\[0\] cannot be sent.*lock"):
        roundtrip(Model(torch.zeros(1)))


@registered
def test_what_is_one_object_stays_one_and_subclasses_are_not_included() -> None:
    model = Model(torch.zeros(1))
    got = roundtrip([model, model])
    assert got[0] is got[1]
    with pytest.raises(torchwq.MarshalError, match=r"args\[0\]\['m'\].lock"):
        roundtrip({"m": Finer(torch.zeros(1))})
    torchwq.register_reducer(Finer, lambda finer: (Finer, (finer.weight, "finer")))
    assert type(roundtrip((Finer(torch.zeros(1)),))[0]) is Finer


class Marked(torch.Tensor):
    pass


class Number(int):
    pass


class Table(dict):  # type: ignore[type-arg]
    pass


class Row(tuple):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("make", [Number, Table, Row, lambda: torch.zeros(2).as_subclass(Marked)])
@pytest.mark.parametrize("wrap", [lambda obj: obj, lambda obj: (obj, obj), lambda obj: [obj], lambda obj: {"k": obj}])
def test_no_shortcut_overlooks_it(make: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    obj = make()
    torchwq.register_reducer(type(obj), lambda obj: (str, ("reduced",)))
    expected = wrap("reduced")
    assert roundtrip(wrap(obj)) == expected
    assert torchwq.marshal(wrap(obj)).read() == expected
    channel = torchwq.channel()
    for _ in range(2):  # within the process, and through a socket
        channel.write(wrap(obj))
        assert channel.read()[1] == expected
        channel._core.open_to_processes()


def test_a_file_which_is_refused_otherwise_may_be_registered(tmp_path: Path) -> None:
    torchwq.register_reducer(io.TextIOWrapper, lambda file: (open, (file.name,)))
    (tmp_path / "file").write_text("text")
    with open(tmp_path / "file") as file, roundtrip(file) as got:
        assert got.read() == "text"


class Failed(Exception):
    def __init__(self, code: int, lock: Any) -> None:
        super().__init__(f"code {code}")
        self.code, self.lock = code, lock


def rebuild_failed(code: int) -> Failed:
    return Failed(code, "made anew")


def fail() -> None:
    torchwq.register_reducer(Failed, lambda error: (rebuild_failed, (error.code,)))
    raise Failed(5, threading.Lock())


def test_an_error_of_a_worker_travels_so() -> None:
    with pytest.raises(Failed, match="code 5") as caught:
        torchwq.map(1, fail).join(20)
    assert (caught.value.code, caught.value.lock) == (5, "made anew")


@pytest.mark.parametrize("wrong", [Model(torch.zeros(1)), "tests.Model", None, list[int]])
def test_what_is_no_class_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a class first.*pass the object's type"):
        torchwq.register_reducer(wrong, reduce_model)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"reduces a Model.*returns \(callable, args\)"):
        torchwq.register_reducer(Model, (Model, ()))  # type: ignore[arg-type]
    assert not reducers.registered


@pytest.mark.parametrize(
    ("cls", "who"),
    [
        *((cls, "torchwq") for cls in (torch.Tensor, torch.nn.Parameter, torch.UntypedStorage, np.ndarray)),
        *((cls, "torchwq") for cls in (torchwq.WorkQueue, torchwq.Channel, torchwq.Mutex, torchwq.Marshalled)),
        *((cls, "torchwq") for cls in (types.FunctionType, type)),
        *((cls, "pickle") for cls in (int, float, str, bool, bytes, bytearray, type(None), tuple, list, dict, set)),
    ],
)
def test_what_would_be_overlooked_or_breaks_torchwq_is_refused(cls: type, who: str) -> None:
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"{who} sends every .*{cls.__name__} itself: register a class of your own"
        ):
            torchwq.register_reducer(cls, reduce_model)


@pytest.mark.parametrize("wrong", [None, 5, [Model, ()]])
def test_the_error_for_a_reducer_that_returns_something_else_names_the_place(wrong: Any) -> None:
    torchwq.register_reducer(Model, lambda model: wrong)
    with pytest.raises(torchwq.MarshalError, match=r"args\[0\]\[1\].*test_register_reducer.Model.*\(callable, args\)"):
        roundtrip([1, Model(torch.zeros(1))])


def test_a_reducer_that_fails_leaves_the_queue_as_it_was() -> None:
    torchwq.register_reducer(Model, lambda model: 1 / 0)
    with torchwq.workqueue() as queue:
        with pytest.raises(torchwq.MarshalError, match=r"args\[1\].*division by zero"):
            queue.write(1, Model(torch.zeros(1)))
        assert queue.statistics().written == 0
