"""Each process has one definition of a script's function or class: identity, state and globals between messages."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchwq
from torchwq.marshalling import codec

from .support import Peer, marshal, received, roundtrip, run_in_main


def call(function: Callable[..., Any], *args: Any) -> Any:
    """At the worker."""
    return function(*args)


#: A script that defines objects of all kinds. ``check`` compares a worker's with the owner's.
KINDS = """
    import dataclasses, enum, functools, pickle, typing
    import torch, torchwq

    class Meta(type):
        made = []

        def __new__(meta, name, bases, names):
            assert name == "Plain" or names["required"]
            meta.made.append(name)
            return super().__new__(meta, name, bases, names)

        def __setattr__(cls, name, value):
            assert name != "required"
            super().__setattr__(name, value)

    class Sample(metaclass=Meta):
        required = True
        count = 0

        def __init__(self, x): self.x = x
        def score(self): return 1

    class Kinds:
        by_key = {}

        def __init_subclass__(cls, *, key, **others):
            super().__init_subclass__(**others)
            Kinds.by_key[key] = cls

    class Special(Kinds, key="special"): ...

    class Secretive:
        __slots__ = ("__secret", "open")

        def __init__(self, secret): self.__secret, self.open = secret, 1
        def secret(self): return self.__secret

    class OneSlot:
        __slots__ = "only"

    @dataclasses.dataclass(slots=True)
    class Slotted:
        x: int
        y: list = dataclasses.field(default_factory=list)

    class Planet(enum.Enum):
        EARTH = (1, 2)
        TERRA = (1, 2)
        MARS = (3, 4)

        def __init__(self, mass, radius): self.mass, self.radius = mass, radius
        def density(self): return self.mass / self.radius

    Id = typing.NewType("Id", int)
    T = typing.TypeVar("T", bound=Sample)
    P = typing.ParamSpec("P")
    Pairs = list[tuple[int, T]]

    class Generic(typing.Generic[T]):
        def __init__(self, item: T): self.item = item

    class Sentinel:
        def __reduce__(self): return "MISSING"

    MISSING, NOTHING = Sentinel(), object()

    @functools.singledispatch
    def show(x): return "anything"

    @show.register
    def _(x: int): return "int"

    @show.register(list)
    def _(x): return [show(each) for each in x]

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def cast(): return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    @functools.lru_cache
    def cached(): return cached.cache_info().misses, object()

    def check(x, missing=MISSING, *, nothing=NOTHING):
        assert missing is MISSING and nothing is NOTHING
        assert (Id(4), Pairs) == (4, list[tuple[int, T]]) and T.__bound__ is Sample and Generic[Sample](1).item == 1
        secretive, slotted = Secretive(3), Slotted(1)
        for each in (secretive, slotted, OneSlot()):
            assert not hasattr(each, "__dict__"), each
        assert secretive.secret() == 3 and Secretive.__slots__ == ("__secret", "open")
        assert show([1, "a"]) == ["int", "anything"], show([1, "a"])
        assert Kinds.by_key["special"] is Special and Meta.made == ["Sample"], (Kinds.by_key, Meta.made)
        assert Planet.MARS.density() == 0.75 and Planet((3, 4)) is Planet.MARS and Planet.TERRA is Planet.EARTH
        sent = [Sample(1), secretive.open, slotted, Special(), Planet.MARS, check, T, MISSING]
        back = pickle.loads(pickle.dumps(sent))
        assert type(back[0]) is Sample and back[4:] == sent[4:]
        Sample.count += 1
        check.calls = getattr(check, "calls", 0) + 1
        same = [Sample, Id, T, P, MISSING, NOTHING, show, cached, check, Special, Planet.MARS]
        return same, [Sample(x), secretive, slotted, Special()], cast(), Sample.count, check.calls, cached()[0]
"""

ONCE = (
    KINDS
    + """
    Sample.score = lambda self: "replaced"
    same = [Sample, Id, T, P, MISSING, NOTHING, show, cached, check, Special, Planet.MARS]
    sample, kinds = Sample(0), [Sample, Secretive, Slotted, Special]
    with torchwq.BackgroundTaskPool(1) as pool:
        for turn in range(3):
            back, made, dtype, count, calls, misses = pool.submit(check, turn, MISSING, nothing=NOTHING).result()
            for mine, its in zip(same, back):
                assert its is mine, (mine, its)
            assert [type(each) for each in made] == kinds, made
            assert (made[0].score(), Sample.count, hasattr(check, "calls")) == ("replaced", 0, False)
            assert (dtype, count, calls, misses) == (torch.bfloat16, turn + 1, turn + 1, 1), (count, calls, misses)
            assert made[1].secret() == 3 and Meta.made == ["Sample"] and Kinds.by_key == {"special": Special}
    print("same")
"""
)


def test_a_process_has_a_scripts_definitions_once_and_the_owners_never_change(run_script: Any) -> None:
    assert run_script(ONCE).stdout == "same\n"


def test_the_answers_of_a_loaders_clean_workers_have_the_owners_classes(run_script: Any) -> None:
    source = """
    import pickle
    import torch, torchwq

    class Sample:
        made = 0

        def __init__(self, i):
            self.i = i
            Sample.made += 1

    class Data(torch.utils.data.Dataset):
        def __len__(self): return 6

        def __getitem__(self, i):
            assert type(pickle.loads(pickle.dumps(Sample(i)))) is Sample
            return Sample(i)

    Sample.made = 100
    loader = torchwq.DataLoader(
        Data(), batch_size=2, num_workers=1, collate_fn=list, multiprocessing_context="forkserver"
    )
    batches = list(loader)
    assert [each.i for batch in batches for each in batch] == list(range(6))
    assert all(type(each) is Sample for batch in batches for each in batch)
    print(Sample.made)
    """
    assert run_script(source).stdout == "100\n"


#: A script whose workers have workers.
TREE = """
    import concurrent.futures, multiprocessing
    import torch, torchwq

    class Sample:
        def __init__(self, i): self.i = i
        def __eq__(self, other): return type(other) is Sample and other.i == self.i

    def leaf(x): return Sample(x)

    def tree(x):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(leaf, [x, x]) == [Sample(x)] * 2
        forked = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=forked) as pool:
            assert pool.submit(leaf, x).result() == Sample(x)
        return torchwq.map(1, leaf, x).join()

    class Data(torch.utils.data.Dataset):
        def __len__(self): return 1
        def __getitem__(self, i): return torchwq.map(1, leaf, i).join()

    def child(rank):
        loader = torchwq.DataLoader(Data(), batch_size=None, num_workers=1)
        assert list(loader) == [[Sample(0)]], list(loader)

    if __name__ == "__main__":
"""


@pytest.mark.timeout(150)  # several processes of it import torch, one after the other
def test_a_workers_own_processes_have_what_the_worker_has(run_script: Any) -> None:
    """Processes of multiprocessing, of concurrent.futures, and of torchwq itself."""
    source = TREE + "        assert torchwq.map(1, tree, 3).join() == [[Sample(3)]]\n"
    run_script(source, timeout=140)


@pytest.mark.timeout(150)  # as above
def test_a_script_that_multiprocessing_has_spawned_is_a_script(run_script: Any) -> None:
    run_script(TREE + "        torch.multiprocessing.spawn(child, nprocs=1)\n", timeout=140)


# --- globals ---------------------------------------------------------------------------------------

GLOBALS = """
def init(start):
    global counter, model
    counter, model = start, [start]
def count():
    global counter
    counter += 1
    return counter
def look(): return count(), model, __name__
def put(name, value): globals()[name] = value
def changed(): return other
"""


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_what_one_task_sets_in_the_script_the_next_one_finds(backend: str) -> None:
    script = run_in_main(GLOBALS)
    with torchwq.BackgroundTaskPool(1, backend=backend, initializer=script["init"], initargs=(5,)) as pool:
        assert [pool.submit(script["count"]).result() for _ in range(2)] == [6, 7]
        pool.submit(script["put"], "other", "set").result()
        assert pool.submit(script["look"]).result() == (8, [5], "__main__")
        assert pool.submit(script["changed"]).result() == "set"
    assert "counter" not in script
    with torchwq.BackgroundTaskPool(1, backend=backend) as pool, pytest.raises(NameError):
        pool.submit(script["count"]).result()


def test_upvalues_bring_what_the_owner_has_now_unless_the_worker_has_set_it(peer: Peer) -> None:
    script = run_in_main(
        "counter, data = 0, [1]\ndef f():\n    global counter\n    counter += 1\n    return counter, data"
    )
    assert peer.ask(call, script["f"], upvalues=True) == (1, [1])
    script["data"] = [2]
    assert peer.ask(call, script["f"], upvalues=True) == (2, [2])
    assert script["counter"] == 0


def test_a_function_that_was_defined_again_is_another(peer: Peer) -> None:
    script = run_in_main("def helper(): return 1\ndef f(): return helper()")
    assert peer.ask(call, script["f"]) == 1
    exec("def helper(): return 2", script)
    assert peer.ask(call, script["f"]) == 2
    exec("def f(): return helper() + 10", script)
    assert peer.ask(call, script["f"]) == 12


def test_two_scripts_do_not_see_each_others_globals(peer: Peer) -> None:
    first, second = (run_in_main(f"def helper(): return {n}\ndef f(): return helper()") for n in (1, 2))
    assert [peer.ask(call, each["f"]) for each in (first, second, first)] == [1, 2, 1]


def test_what_comes_back_does_not_touch_the_script_it_came_from() -> None:
    script = run_in_main("def helper(): return 1\ndef f(): return helper()\nclass A:\n    x = 1")
    payload_of_then = [script["f"], script["A"], lambda: None]
    out = roundtrip(payload_of_then)
    script["helper"] = lambda: 5
    assert out[0] is script["f"]
    assert out[0]() == 5
    assert out[1] is script["A"]


# --- definitions that change at home ------------------------------------------------------------------

#: A script that changes what it has defined. ``own`` is what the worker has set itself.
CHANGING = """
    import abc, enum, functools, sys
    import torchwq
    class Cfg:
        lr, own, cache, handlers = 1, 0, {}, {"a": lambda: 1}
        gone = 1
        def score(self): return "old"
        @classmethod
        def kind(cls): return "old"
    class Abstract(abc.ABC): pass
    class Named:
        def __reduce__(self): return "NAMED"
    NAMED = Named()
    NAMED.x = 1
    class Color(enum.Enum):
        RED = 1
    Color.RED.weight = 1
    def f(x=1): return x, f.tag
    f.tag = "old"
    @functools.singledispatch
    def show(x): return "anything"
    def look():
        Cfg.own += 1
        Cfg.cache[len(Cfg.cache)] = look.calls = getattr(look, "calls", 0) + 1
        return {
            "class": (Cfg.lr, Cfg().score(), Cfg.kind(), hasattr(Cfg, "gone"), [h() for h in Cfg.handlers.values()]),
            "function": f(), "dispatcher": show(1), "sentinel": NAMED.x, "member": Color.RED.weight,
            "registered": issubclass(int, Abstract), "own": (Cfg.own, len(Cfg.cache), look.calls),
        }
    def local():
        class Local:
            n = 1
            def get(self): return type(self).n, k
        def change():
            nonlocal k
            Local.n, k = 2, 2
        k = 1
        return Local, change
    def change():
        Cfg.lr, Cfg.score, Cfg.handlers["b"] = 2, lambda self: "new", lambda: 2
        Cfg.kind = classmethod(lambda cls: "new")
        del Cfg.gone
        Abstract.register(int)
        NAMED.x = Color.RED.weight = 2
        f.tag, f.__defaults__ = "new", (2,)
        show.register(int, lambda x: "int")
    BEFORE = {
        "class": (1, "old", "old", True, [1]),
        "function": (1, "old"),
        "dispatcher": "anything",
        "sentinel": 1,
        "member": 1,
        "registered": False,
    }
    AFTER = {
        "class": (2, "new", "new", False, [1, 2]),
        "function": (2, "new"),
        "dispatcher": "int",
        "sentinel": 2,
        "member": 2,
        "registered": True,
    }

    backend = sys.argv[1]
    with torchwq.BackgroundTaskPool(1, backend=backend, upvalues=True) as pool:
        for turn, expected in enumerate((BEFORE, BEFORE, AFTER, AFTER), 1):
            if turn == 3: change()
            found = pool.submit(look).result()
            assert found == {**expected, "own": (turn,) * 3}, (turn, found)
        cls, change_local = local()
        found = [pool.submit(cls().get).result()]
        change_local()
        found.append(pool.submit(cls().get).result())
        assert found == [(1, 1), (2, 2)], found
    assert Cfg.own == (0 if backend == "process" else 4)  # threads have the owner's own classes
    assert not hasattr(look, "calls")
    print("done")
"""


@pytest.mark.parametrize("backend", ["process", "thread"])
def test_a_living_worker_computes_with_the_owners_current_definitions(run_script: Any, backend: str) -> None:
    """But it keeps a counter that it has set itself, and a cache that it has filled."""
    assert run_script(CHANGING, backend).stdout == "done\n"


def test_only_newer_states_from_its_home_change_a_definition(peer: Peer) -> None:
    script = run_in_main("class A:\n    n = 1\ndef old(x): return x.n\ndef set_own():\n    A.n = 5\n    return A()")
    made, old = script["A"](), marshal(script["A"]())
    assert peer.ask(script["old"], made) == 1
    script["A"].n = 2
    assert peer.ask(script["old"], made) == 2
    back = peer.ask(script["set_own"])
    assert type(back) is script["A"]
    assert script["A"].n == 2
    script["A"].n = 3
    assert peer.ask(script["old"], made) == 5
    assert codec.decode(*received(old)).n == 3


def test_pickle_in_a_worker_finds_what_is_nested_in_a_class_of_the_script() -> None:
    script = run_in_main("""
import pickle
class Outer:
    class Inner:
        class Most:
            k = 1
            def get(self): return self.k
        def get(self): return 0
    @staticmethod
    def static(): return 3
class Other:
    class Most:
        k = 2
        def get(self): return self.k
def again(obj):
    found = pickle.loads(pickle.dumps(obj))
    assert type(found) is type(obj) or found is obj
    return found
def look(obj): return again(obj).k, again(Outer.Inner.Most()).k, again(Outer).__name__
def seen(): return "Outer" in globals()
""")
    outer, again = script["Outer"], script["again"]
    with torchwq.BackgroundTaskPool(1) as pool:
        assert pool.submit(again, outer.Inner.Most()).result().k == 1
        assert type(pool.submit(again, outer.Inner()).result()) is outer.Inner
        assert pool.submit(again, outer.static).result() is outer.static
        assert pool.submit(again, script["Other"].Most).result() is script["Other"].Most
        assert not pool.submit(script["seen"]).result()
        assert pool.submit(script["look"], outer.Inner.Most()).result() == (1, 1, "Outer")


# --- what libraries write --------------------------------------------------------------------------


def test_classes_that_attrs_has_written_arrive(peer: Peer) -> None:
    pytest.importorskip("attrs")
    script = run_in_main("""
import attrs
@attrs.define
class Point:
    x: int
    y: list = attrs.field(factory=list, validator=attrs.validators.instance_of(list))
@attrs.frozen
class Fixed:
    x: int = attrs.field(converter=int)
@attrs.define(slots=False)
class Loose:
    x: int = 3
def f():
    try:
        Fixed(1).x = 2
    except attrs.exceptions.FrozenInstanceError:
        made = Point(1), Fixed("2"), Loose()
        return *made, Point(1) == Point(1), hasattr(Point(1), "__dict__"), attrs.evolve(Point(1), x=4).x
""")
    out = peer.ask(call, script["f"])
    assert out == script["f"]()
    assert [type(each) for each in out[:3]] == [script["Point"], script["Fixed"], script["Loose"]]


def test_what_a_librarys_decorator_closes_over_is_no_capture(peer: Peer) -> None:
    script = run_in_main("""
import contextlib, torch
from tests.marshalling import library
@torch.autocast('cpu', dtype=torch.bfloat16)
@library.with_settings({'a': 1})
def f(): return torch.is_autocast_enabled('cpu')
class Net(torch.nn.Module):
    @torch.autocast('cpu', dtype=torch.bfloat16)
    def forward(self, x): return (x @ x).dtype
@library.with_method([1, 2])
class A: pass
def g(): return f(), Net()(torch.ones(2, 2)), A().closed_over()
""")
    assert peer.ask(call, script["g"]) == script["g"]() == (True, script["torch"].bfloat16, [1, 2])


#: Classes of libraries that are not installed for the tests: these run where somebody has them.
OTHERS = {
    "msgspec": """
import msgspec
class A(msgspec.Struct, frozen=True, tag="a"):
    x: int
    y: list = []
    def total(self): return self.x + len(self.y)
def f(): return A(1), A(1).total(), msgspec.json.encode(A(2, [1]))
""",
    "tensordict": """
import torch
from tensordict import tensorclass
@tensorclass
class A:
    a: torch.Tensor
    b: str
    def total(self): return self.a.sum().item()
def f():
    made = A(a=torch.ones(3, 2), b="x", batch_size=[3])
    return made, made.total(), made[0].b
""",
}


@pytest.mark.parametrize("library_name", OTHERS)
def test_classes_of_other_libraries_arrive(peer: Peer, library_name: str) -> None:
    pytest.importorskip(library_name)
    script = run_in_main(OTHERS[library_name])
    out = peer.ask(call, script["f"])
    assert type(out[0]) is script["A"]
    assert out[1:] == script["f"]()[1:]


# --- modules that cannot be imported -----------------------------------------------------------------

PLUGIN = """
import math, pickle
LIMIT = 3
class Item:
    def __init__(self, x): self.x = x
    def root(self): return math.sqrt(self.x)
def work(x):
    item = pickle.loads(pickle.dumps(Item(x)))
    return item, item.root(), __name__
def limited(): return LIMIT
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """A module that was loaded from a file, which no longer exists."""
    path = tmp_path / "a_plugin.py"
    path.write_text(PLUGIN)
    spec = importlib.util.spec_from_file_location("a_plugin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["a_plugin"] = module
    spec.loader.exec_module(module)
    path.unlink()
    yield module
    del sys.modules["a_plugin"]


def test_a_plugin_that_was_loaded_from_its_file_goes_by_value(peer: Peer, plugin: types.ModuleType) -> None:
    item, root, name = peer.ask(call, plugin.work, 4)
    assert type(item) is plugin.Item
    assert (root, name) == (2.0, "a_plugin")
    with pytest.raises(torchwq.ClosureError, match="global variable LIMIT: int"):
        torchwq.map(1, plugin.limited)
    assert peer.ask(call, plugin.limited, upvalues=True) == 3


def test_the_error_for_a_function_that_uses_a_plugin_says_that_nobody_can_import_it(
    peer: Peer, plugin: types.ModuleType
) -> None:
    script = run_in_main("def f(): return a_plugin.work(4)[1], a_plugin.limited()")
    script["a_plugin"] = plugin
    with pytest.raises(torchwq.ClosureError, match="module 'a_plugin', which no other process can import"):
        torchwq.map(1, script["f"])
    assert peer.ask(call, script["f"], upvalues=True) == (2.0, 3)
    assert roundtrip(plugin, upvalues=True) is plugin


def test_what_runpy_ran_goes_by_value(run_script: Any, tmp_path: Path) -> None:
    """Also in a working directory that no longer exists."""
    (tmp_path / "ran.py").write_text(
        "import torchwq\nclass Item:\n    def __init__(self, x): self.x = x\n"
        "def make(x): return Item(x)\ndef work(x): return make(x), __name__\n"
        "found = torchwq.map(1, work, 5).join()[0]\nassert type(found[0]) is Item\n"
    )
    source = """
    import os, runpy, sys, tempfile
    import torchwq
    os.chdir(tempfile.mkdtemp())
    sys.path.insert(0, "")
    with open("helper.py", "w") as file: file.write("def go(x): return x + 1")
    import helper
    for folder, _, names in os.walk(".", topdown=False):
        for name in names: os.remove(os.path.join(folder, name))
        if folder != ".": os.rmdir(folder)
    os.rmdir(os.getcwd())
    assert torchwq.map(1, helper.go, 1).join() == [2]
    for name in (None, "__main__"):
        ran = runpy.run_path(sys.argv[1], run_name=name)
        item, its = torchwq.map(1, ran["work"], 7).join()[0]
        assert type(item) is ran["Item"], (item, its)
    print("done")
    """
    assert run_script(source, str(tmp_path / "ran.py")).stdout == "done\n"


def test_a_nested_function_whose_assertions_pytest_has_rewritten_runs(peer: Peer) -> None:
    def checked(x: int) -> int:
        assert x == 3, "not three"
        return x

    assert peer.ask(call, checked, 3) == 3
    with pytest.raises(AssertionError, match=r"not three\n"):
        torchwq.map(1, checked, 4).join()
