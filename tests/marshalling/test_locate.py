"""An object that cannot travel: the error names where in the message it sits."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import types
from typing import Any, NamedTuple

import pytest
import torch

import torchwq
from torchwq import MarshalError
from torchwq.marshalling import codec

from . import library
from .support import marshal

LOCK = threading.Lock()


@dataclasses.dataclass
class Config:
    name: str = "x"
    resource: Any = None


@dataclasses.dataclass(slots=True)
class SlottedConfig:
    resource: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


class Several(list):  # a list with attributes
    pass


def model_with(attribute: str, value: Any) -> torch.nn.Module:
    net = library.Net()
    holder = net
    *path, last = attribute.split(".")
    for name in path:
        holder = getattr(holder, name)
    setattr(holder, last, value)
    return net


def several_with_attribute() -> Several:
    several = Several([1])
    several.extra = LOCK
    return several


def non_leaf() -> torch.Tensor:
    return torch.ones(1, requires_grad=True) * 2


PLACES = [
    (lambda: LOCK, ""),
    (lambda: [1, LOCK], "[1]"),
    (lambda: (1, [2, (3, LOCK)]), "[1][1][1]"),
    (lambda: {"model": LOCK}, "['model']"),
    (lambda: {("a", 1): {None: LOCK}}, "[('a', 1)][None]"),
    (lambda: {1, LOCK}, f"{{{LOCK!r}}}"[:62]),
    (lambda: frozenset([LOCK]), f"{{{LOCK!r}}}"[:62]),
    (lambda: {LOCK: 1}, f".keys()[{LOCK!r:.60}]"),
    (lambda: Pair(1, LOCK), ".second"),
    (lambda: Config(resource=LOCK), ".resource"),
    (lambda: [Config(resource={"in": LOCK})], "[0].resource['in']"),
    (lambda: SlottedConfig(LOCK), ".resource"),
    (lambda: library.Slotted(1, LOCK), ".second"),
    (lambda: library.Slotted(secret=LOCK), "._Slotted__secret"),
    (lambda: library.Holder(a=1, b=library.Holder(c=LOCK)), ".b.c"),
    (lambda: types.SimpleNamespace(a=LOCK), ".a"),
    (several_with_attribute, ".extra"),
    (lambda: {"model": model_with("hook", LOCK)}, "['model'].hook"),
    (lambda: {"model": model_with("layer.lock", LOCK)}, "['model'].layer.lock"),
    (lambda: model_with("layer", model_with("norm.lock", LOCK)), ".layer.norm.lock"),
    (lambda: functools.partial(library.plain, 1, LOCK), ".args[1]"),
    (lambda: functools.partial(library.plain, key=[LOCK]), ".keywords['key'][0]"),
    (lambda: functools.partial(library.Holder(lock=LOCK).method), ".func.__self__.lock"),
    (lambda: library.Holder(lock=LOCK).method, ".__self__.lock"),
    (lambda: collections.OrderedDict(a=LOCK), "['a']"),
    (lambda: collections.defaultdict(list, a=[LOCK]), "['a'][0]"),
    (lambda: collections.deque([1, LOCK]), "[1]"),
    (lambda: collections.UserDict(a=LOCK), "['a']"),
    (lambda: {"batch": [torch.ones(1), non_leaf()]}, "['batch'][1]"),
    (lambda: library.Holder(loss=non_leaf()), ".loss"),
    (lambda: {"gen": (i for i in range(3))}, "['gen']"),
]


@pytest.mark.parametrize(
    ("make", "place"), PLACES, ids=[place.partition(" at 0x")[0][:40] or "itself" for _, place in PLACES]
)
def test_the_error_begins_with_the_place(make: Any, place: str) -> None:
    with pytest.raises(MarshalError) as caught:
        marshal(make())
    assert str(caught.value).startswith(f"args[0]{place} cannot be sent: ")
    assert isinstance(caught.value, TypeError)


def test_the_contracts_example_at_a_queue() -> None:
    with torchwq.workqueue() as queue:
        with pytest.raises(MarshalError, match=r"^args\[0\]\['model'\]\.hook cannot be sent: TypeError: .*lock"):
            queue.write({"model": model_with("hook", LOCK)})
        with pytest.raises(MarshalError, match=r"^args\[2\]\[0\] cannot be sent"):
            queue.write(1, 2, [LOCK])
        assert queue.statistics().written == 0


def test_a_call_names_the_argument_or_the_function() -> None:
    with pytest.raises(MarshalError, match=r"^args\[1\]\['x'\] cannot be sent"):
        codec.encode_call(library.plain, (1, {"x": LOCK}), None)
    with pytest.raises(MarshalError, match=r"^function method\.__self__\.lock cannot be sent"):
        codec.encode_call(library.Holder(lock=LOCK).method, (), None)
    with pytest.raises(MarshalError, match=r"^the call\['key'\] cannot be sent"):
        codec.encode_call(library.plain, (), {"key": LOCK})


def test_a_shared_part_is_named_where_it_is_met_first() -> None:
    bad = [LOCK]
    with pytest.raises(MarshalError, match=r"^args\[0\]\['first'\]\[0\] cannot"):
        marshal({"first": bad, "second": bad})


def test_a_cycle_does_not_keep_the_search_from_its_end() -> None:
    ring: list[Any] = []
    ring += [ring, library.Holder(ring=ring, lock=LOCK)]
    with pytest.raises(MarshalError, match=r"^args\[0\]\[1\]\.lock cannot be sent"):
        marshal(ring)


def test_an_open_file_is_refused_by_name(tmp_path: Any) -> None:
    for mode in ("w", "wb", "rb", "r+b"):
        with open(tmp_path / "file.txt", mode) as file, pytest.raises(MarshalError) as caught:
            marshal({"log": file})
        assert str(caught.value).startswith("args[0]['log'] cannot be sent: TypeError: an open file (")
        assert "file.txt" in str(caught.value)


def test_a_generator_is_refused_with_advice() -> None:
    with pytest.raises(MarshalError, match="send the generator function and its arguments"):
        marshal(i for i in range(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: {library.WithoutText(): LOCK},
        lambda: {library.WithoutText(LOCK): 1},
        lambda: {library.WithoutText(LOCK)},
        lambda: [library.WithoutText(LOCK)],
        library.BrokenMapping,
        lambda: functools.partial(library.plain, library.BrokenMapping()),
    ],
    ids=["key", "key that fails", "set", "list", "mapping", "mapping in a partial"],
)
def test_what_cannot_even_be_looked_at_is_a_marshal_error_all_the_same(make: Any) -> None:
    with pytest.raises(MarshalError, match=r"^args\[0\].*lock"):
        marshal(make())


class RaisingAttributes:
    __slots__ = ("lock", "other")

    def __init__(self) -> None:
        self.lock = LOCK

    def __getattribute__(self, name: str) -> Any:
        if name in ("other", "__dict__"):
            raise RuntimeError("attributes are not to be touched")
        return object.__getattribute__(self, name)


def test_attributes_that_raise_do_not_hide_the_error() -> None:
    with pytest.raises(MarshalError, match=r"^args\[0\]\['x'\]"):
        marshal({"x": RaisingAttributes()})


class CountsReductions:
    def __init__(self) -> None:
        self.parts = [1, 2, 3]
        self.count = 0

    def __reduce__(self) -> Any:
        self.count += 1
        raise ValueError("not me")


def test_an_object_whose_parts_are_fine_is_itself_the_place() -> None:
    bad = CountsReductions()
    with pytest.raises(MarshalError, match=r"^args\[0\]\['it'\] cannot be sent: ValueError: not me$"):
        marshal({"it": bad})
    assert bad.count >= 1


def test_long_keys_are_cut_short() -> None:
    with pytest.raises(MarshalError) as caught:
        marshal({"k" * 1000: LOCK})
    assert len(str(caught.value)) < 200
