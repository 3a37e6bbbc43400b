"""Functions travel as code: by name, by value, or not at all, with an error that says why."""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchwq
from torchwq import ClosureError, MarshalError

from . import library
from .support import Peer, marshal, roundtrip, run_in_main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about prototypes


def refusal(obj: Any) -> str:
    with pytest.raises(ClosureError) as caught:
        marshal(obj)
    assert isinstance(caught.value, MarshalError)
    assert isinstance(caught.value, TypeError)
    return str(caught.value)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """At the worker."""
    return function(*args)


# --- what goes by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obj",
    [
        library.plain,
        library.Holder,
        library.Cached.make,
        library.cached,
        library.Cached.static,
        math.hypot,
        len,
        np.sin,
        torch.relu,
        torch.nn.functional.gelu,
        torch.nn.Linear,
        json.dumps,
        str.join,
        dict.fromkeys,
        functools.partial,
    ],
    ids=lambda obj: f"{getattr(obj, '__module__', '')}.{getattr(obj, '__qualname__', obj)}",
)
def test_what_an_importable_module_gives_goes_by_name(obj: Any) -> None:
    out = roundtrip([obj])[0]
    assert out is obj or (isinstance(obj, types.MethodType | types.BuiltinMethodType) and out == obj)


def test_an_importable_cached_function_keeps_its_cache() -> None:
    library.cached.cache_clear()
    library.cached(1)
    assert roundtrip(library.cached).cache_info().currsize == 1


def test_a_method_of_an_importable_class_goes_with_its_object(peer: Peer) -> None:
    assert peer.ask(call, library.Slotted(5).__getattribute__, "first") == 5
    assert peer.ask(call, [1, 2].__len__) == 2
    assert peer.ask(call, torch.ones(3).sum) == 3


# --- what goes by value and is fine ------------------------------------------------------------------

#: Name, source of a script, its function ``f``. Run here and at the worker with the same result.
FINE = {
    "plain": "def f(): return 1",
    "lambda": "f = lambda: 2",
    "default": "def f(x=[1, 2], *, y={'a': 3}): return x, y",
    "recursion": "def f(n=5): return 1 if n == 0 else n * f(n - 1)",
    "mutual recursion": """
def even(n): return n == 0 or odd(n - 1)
def odd(n): return n != 0 and even(n - 1)
def f(): return even(10), odd(10)
""",
    "helper": "def helper(x): return x + 1\ndef f(): return helper(1)",
    "helper of a helper": "def a(): return 3\ndef b(): return a() + 1\ndef f(): return [b() for _ in range(2)]",
    "recursion in a nested function": """
def make():
    def inner(n=3): return 0 if n == 0 else 1 + inner(n - 1)
    return inner
f = make()
""",
    "no_grad": """
import torch
@torch.no_grad()
def g(): return torch.is_grad_enabled()
def f(): return g()
""",
    "generator": "def gen():\n    yield from range(3)\ndef f(): return list(gen())",
    "coroutine": "import asyncio\nasync def g(): return 4\ndef f(): return asyncio.run(g())",
    "module": "import math\ndef f(): return math.pi",
    "module under another name": "import numpy as np, torch\ndef f(): return np.sum([1]), torch.ones(2).sum().item()",
    "module in a cell": """
def make():
    import math
    return lambda: math.pi
f = make()
""",
    "submodule": "import xml.dom.minidom\ndef f(): return xml.dom.minidom.parseString('<a/>').documentElement.tagName",
    "submodule under a name": "import concurrent.futures as c\ndef f(): return c.ThreadPoolExecutor.__name__",
    "submodule not named in the package": """
import logging.handlers
def f(): return logging.handlers.DEFAULT_TCP_LOGGING_PORT
""",
    "import inside": "def f():\n    import json\n    return json.dumps([1])",
    "importable function": "from json import dumps\ndef f(): return dumps({'a': 1})",
    "importable class": "from fractions import Fraction\ndef f(): return Fraction(1, 3)",
    "builtin function": "from math import sqrt\nfrom time import time\ndef f(): return sqrt(4), time() > 0",
    "importable function in a cell": """
def make():
    from os.path import join
    from collections import Counter
    return lambda: (join('a', 'b'), Counter('aab'))
f = make()
""",
    "ufunc": "from numpy import sin, add\ndef f(): return float(sin(0)), add.reduce([1, 2]).item()",
    "torch function": "from torch import ones, stack, relu\ndef f(): return stack([relu(ones(2))]).tolist()",
    "torch.nn.functional": "from torch.nn.functional import relu, conv2d\ndef f(): return conv2d.__name__",
    "classmethod of an importable class": """
from fractions import Fraction
from datetime import datetime
make, stamp, keys, join = Fraction.from_float, datetime.fromtimestamp, dict.fromkeys, str.join
def f(): return make(0.5), stamp(0).year > 0, keys('ab'), join('-', 'ab')
""",
    "function of random": "from random import randint, random\ndef f(): return randint(3, 3), random() < 1",
    "function of numpy.random": "from numpy.random import rand\ndef f(): return rand(2).shape",
    "typing": "from typing import Any, Optional\ndef f() -> Optional[int]:\n    x: Any = 3\n    return x",
    "own global": "def f():\n    global counter\n    counter = 4\n    return counter",
    "own global that the script has set": """
counter = [1, 2, 3]
def f():
    global counter
    counter = 7
    return counter
""",
    "own global of an inner function": """
total = object()
def f():
    def inner():
        global total
        total = 8
    inner()
    return total
""",
    "missing global": """
def f():
    try:
        return not_there
    except NameError as error:
        return str(error)
""",
    "missing cell": """
def make():
    def inner():
        try:
            return late
        except NameError:
            return 'unbound'
    if False:
        late = 1
    return inner
f = make()
""",
    "name": "def f(): return __name__, __doc__",
    "names in a class body": """
x = [1, 2, 3]
def f():
    class Inner:
        x = 1
        y = x + 1
    return Inner.y
""",
    "attribute": "def f(): return f.__name__\nf.note = 'an attribute'",
    "comprehension": "def f(): return {i: [j for j in range(i)] for i in range(3)}",
    "class": """
class A:
    factor = 3
    def __init__(self, x): self.x = x
    def method(self): return self.x * self.factor
def f(): return A(2).method()
""",
    "super": """
class A:
    def __init__(self, x): self.x = x
    def get(self): return self.x
class B(A):
    def __init__(self, x): super().__init__(x + 1)
    def get(self): return super().get() * 10, __class__.__name__
def f(): return B(1).get()
""",
    "properties": """
import functools
class A:
    def __init__(self): self._x = 1
    @property
    def x(self): return self._x
    @x.setter
    def x(self, value): self._x = value
    @staticmethod
    def static(v): return v + 1
    @classmethod
    def of(cls, v):
        made = cls(); made.x = v; return made
    part = functools.partialmethod(lambda self, v: v, 5)
def f(): return A.of(3).x, A.static(1), A().part()
""",
    "cached property": """
import functools
class A:
    @functools.cached_property
    def x(self): return [1]
def f():
    a = A()
    return a.x is a.x, a.x
""",
    "dataclass": """
import dataclasses
@dataclasses.dataclass(order=True)
class P:
    x: int
    y: list = dataclasses.field(default_factory=list)
    z: float = 2.5
def f(): return P(1).y, P(1) < P(2), repr(P(3)), P(1) == P(1), dataclasses.replace(P(1), x=5).x
""",
    "dataclass, frozen, slots, super": """
import dataclasses
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class P:
    x: int = 4
    k: dataclasses.InitVar[int]
    def __post_init__(self, k): object.__setattr__(self, 'x', self.x + k)
def f():
    try:
        P(k=3).x = 1
    except dataclasses.FrozenInstanceError:
        return P(x=1, k=3).x, hash(P(k=3)) == hash(P(k=3))
""",
    "NamedTuple": """
from typing import NamedTuple
class P(NamedTuple):
    x: int
    y: int = 2
    def total(self): return self.x + self.y
def f(): return tuple(P(1)), P(1).total(), repr(P(1)), P(1)._replace(x=5).x, P._make([3, 4]).y, P(1)._asdict()
""",
    "namedtuple": """
from collections import namedtuple
P = namedtuple('P', 'x y', defaults=[9])
def f(): return tuple(P(1)), repr(P(1)), P(1)._replace(y=5).y, P._fields
""",
    "Enum": """
import enum
class Color(enum.Enum):
    RED = 1
    BLUE = 'b'
    def low(self): return self.name.lower()
class Flags(enum.IntFlag):
    A = 1
    B = 2
def f(): return Color.RED.low(), Color('b').name, len(Color), (Flags.A | Flags.B).value
""",
    "exception class": """
class Trouble(ValueError):
    def __init__(self, code): super().__init__(code); self.code = code
def f():
    try:
        raise Trouble(5)
    except ValueError as error:
        return error.code
""",
    "abstract class": """
import abc
class A(abc.ABC):
    @abc.abstractmethod
    def go(self): ...
class B(A):
    def go(self): return 'gone'
def f():
    try:
        A()
    except TypeError:
        return B().go(), isinstance(B(), A)
""",
    "metaclass": """
class Meta(type):
    def __new__(cls, name, bases, namespace):
        made = super().__new__(cls, name, bases, namespace)
        made.tag = name
        return made
class A(metaclass=Meta): ...
def f(): return A.tag
""",
    "generic class": """
from typing import Generic, TypeVar, Protocol
T = TypeVar('T')
class Box(Generic[T]):
    def __init__(self, x: T): self.x = x
def f(): return Box[int](3).x
""",
    "torch module": """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.layer.weight)
    def forward(self, x): return self.layer(x)
def f(): return Net()(torch.ones(2)).item()
""",
    "autograd function": """
import torch
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, grad): return grad * 2
def f():
    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    return x.grad.tolist()
""",
    "lru_cache": "import functools\n@functools.lru_cache(maxsize=3)\ndef f(): return f.cache_info().maxsize",
    "lru_cache, recursive": """
import functools
@functools.lru_cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
def f(): return fib(30), fib.cache_info().currsize
""",
    "lru_cache method": """
import functools
class A:
    @functools.lru_cache
    def m(self, x): return x + 1
    @staticmethod
    @functools.cache
    def s(x): return x + 2
def f(): return A().m(1), A.s(1)
""",
    "partial": "import functools\ndef g(a, b): return a, b\nf = functools.partial(g, 1, b=[2])",
    "decorator": """
import functools
def twice(function):
    @functools.wraps(function)
    def wrapper(*args): return function(*args), function(*args)
    return wrapper
@twice
@twice
def f(): return 1
""",
    "decorated method": """
import functools
def logged(function):
    @functools.wraps(function)
    def wrapper(self): return 'logged', function(self)
    return wrapper
class A:
    @logged
    def go(self): return 5
def f(): return A().go()
""",
    "contextmanager": """
import contextlib
@contextlib.contextmanager
def opened():
    yield 'open'
def f():
    with opened() as value:
        return value
""",
    "class made in a function": """
def make():
    class Local:
        def go(self): return 'local'
        def copy(self): return Local()
    return lambda: Local().copy().go()
f = make()
""",
    "bound method of a class": """
class A:
    @classmethod
    def make(cls): return cls.__name__
maker = A.make
def f(): return maker()
""",
    "instance with a call": """
class A:
    def __init__(self): self.x = 3
    def __call__(self): return self.x
f = A()
""",
}


@pytest.mark.parametrize("kind", FINE)
def test_code_of_a_script_runs_at_a_worker_as_it_does_here(peer: Peer, kind: str) -> None:
    f = run_in_main(FINE[kind])["f"]
    assert peer.ask(call, f) == f()


def test_a_whole_script_of_them_works_without_a_guard(run_script: Any) -> None:
    source = "import torchwq\n" + "\n".join(
        part for kind, part in FINE.items() if kind in ("dataclass", "Enum", "super", "lru_cache, recursive")
    )
    source += "\nexpected = f()\nassert torchwq.map(2, f).join(30) == [expected] * 2\nprint('done')\n"
    assert run_script(source).stdout == "done\n"


def test_instances_of_classes_of_a_script_come_back_as_such(peer: Peer) -> None:
    names = run_in_main(FINE["dataclass"] + FINE["Enum"])
    point, color = names["P"](1, [2]), names["Color"].BLUE
    out = peer.echo([point, color, names["P"]])
    assert out == [point, color, names["P"]]
    assert type(out[0]) is names["P"]
    assert out[1] is color


def test_a_nested_function_without_captures_goes(peer: Peer) -> None:
    def outer() -> Callable[[], int]:
        def inner() -> int:
            return len([1, 2])

        return inner

    assert peer.ask(call, outer()) == 2


def test_a_closure_over_functions_and_modules_only_goes(peer: Peer) -> None:
    def helper(x: int) -> int:
        return x + 1

    module, cls = math, library.Holder

    def function() -> Any:
        return helper(1), module.floor(2.5), cls(a=1).a

    assert peer.ask(call, function) == (2, 2, 1)


# --- globals of importable modules -------------------------------------------------------------------


def test_a_lambda_of_an_importable_module_finds_that_modules_live_globals(peer: Peer) -> None:
    start = peer.ask(call, library.read_counter)
    assert peer.ask(call, library.count) == start + 1
    assert peer.ask(call, library.read_counter) == start + 1
    assert peer.ask(call, library.count_through_lambda) == start + 2
    assert peer.ask(call, library.read_counter) == start + 2


def test_a_lambda_of_an_importable_module_changes_that_modules_globals(peer: Peer) -> None:
    peer.ask(call, library.change_level, 5)
    try:
        assert peer.ask(call, library.level) == 5
        assert peer.ask(call, library.make_nested()) == 5
        assert library.level() == 1
    finally:
        peer.ask(call, library.change_level, 1)


def test_it_is_the_modules_own_namespace_that_it_finds_here_too() -> None:
    out = roundtrip(library.read_counter)
    assert out.__globals__ is vars(library)
    assert out() == library.counter


def test_upvalues_do_not_bring_a_copy_of_an_importable_modules_globals(peer: Peer) -> None:
    start = peer.ask(call, library.read_counter, upvalues=True)
    peer.ask(call, library.count)
    assert peer.ask(call, library.read_counter, upvalues=True) == start + 1


def test_a_nested_function_of_an_importable_module_that_captures_is_refused() -> None:
    assert "captured: list" in refusal(library.make_nested([1], capture=True))


# --- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "global": ("data = [1]\ndef f(): return data", "f", "global variable data: list of 1 items"),
    "global in a nested function": (
        "data = {1: 2}\ndef f(): return (lambda: data)()",
        "f",
        "global variable data: dict",
    ),
    "global in a comprehension": ("data = 5\ndef f(): return [data for _ in '12']", "f", "global variable data: int"),
    "global in a class inside": (
        "data = 5\ndef f():\n    class A:\n        x = data\n    return A.x",
        "f",
        "global variable data: int",
    ),
    "cell": (
        "def make():\n    data = 'text'\n    return lambda: data\nf = make()",
        "make.<locals>.<lambda>",
        "closure variable data: str",
    ),
    "cell of an inner function": (
        "def make():\n    data = 2.5\n    def f():\n        return lambda: data\n    return f\nf = make()",
        "make.<locals>.f",
        "closure variable data: float",
    ),
    "helper": (
        "data = [1]\ndef helper(): return data\ndef f(): return helper()",
        "helper",
        "global variable data: list",
    ),
    "helper in a cell": (
        "data = [1]\ndef make():\n    def helper(): return data\n    return lambda: helper()\nf = make()",
        "make.<locals>.helper",
        "global variable data: list",
    ),
    "helper as default": ("data = 1\ndef g(): return data\ndef f(h=g): return h()", "g", "global variable data: int"),
    "class": (
        "data = (1, 2)\nclass A:\n    def go(self): return data\ndef f(): return A().go()",
        "A.go",
        "global variable data: tuple of 2 items",
    ),
    "base class": (
        "data = 1\nclass A:\n    def go(self): return data\nclass B(A): ...\ndef f(): return B().go()",
        "A.go",
        "global variable data: int",
    ),
    "property": (
        "data = 1\nclass A:\n    @property\n    def x(self): return data\ndef f(): return A().x",
        "A.x",
        "global variable data: int",
    ),
    "static method": (
        "data = 1\nclass A:\n    @staticmethod\n    def x(): return data\ndef f(): return A.x()",
        "A.x",
        "global variable data: int",
    ),
    "dataclass method": (
        "import dataclasses\ndata = 1\n@dataclasses.dataclass\nclass A:\n    def x(self): return data\n"
        "def f(): return A().x()",
        "A.x",
        "global variable data: int",
    ),
    "local class": (
        "def make():\n    data = 3\n    class A:\n        def x(self): return super().__init__(), data\n"
        "    return A\nf = make()",
        "make.<locals>.A.x",
        "closure variable data: int",
    ),
    "class itself": ("data = 1\nclass f:\n    def x(self): return data", "f.x", "global variable data: int"),
    "instance": ("data = 1\nclass A:\n    def x(self): return data\nf = A()", "A.x", "global variable data: int"),
    "lru_cache": (
        "import functools\ndata = 1\n@functools.lru_cache\ndef g(): return data\ndef f(): return g()",
        "g",
        "global variable data: int",
    ),
    "decorated": (
        "import functools\ndata = 1\ndef deco(function):\n    @functools.wraps(function)\n"
        "    def wrapper(): return function()\n    return wrapper\n@deco\ndef f(): return data",
        "f",
        "global variable data: int",
    ),
    "partial": ("import functools\ndata = 1\ndef g(a): return data\nf = functools.partial(g, 1)", "g", "data: int"),
    "instance with a call in a global": (
        "class A:\n    def __call__(self): return 1\nmodel = A()\ndef f(): return model()",
        "f",
        "global variable model: __main__.A",
    ),
    "bound method in a global": (
        "class A:\n    def go(self): return 1\ngo = A().go\ndef f(): return go()",
        "f",
        "global variable go: method",
    ),
    "bound method of a builtin": ("append = [].append\ndef f(): append(1)", "f", "global variable append: builtin"),
    "enum with a method": (
        "import enum\ndata = 1\nclass E(enum.Enum):\n    A = 1\n    def x(self): return data\ndef f(): return E.A",
        "E.x",
        "global variable data: int",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_drags_data_along_is_refused_by_name(kind: str) -> None:
    source, culprit, variable = REFUSED[kind]
    message = refusal(run_in_main(source)["f"])
    assert f"the function {culprit!r} would drag along data" in message
    assert variable in message


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_travels_with_upvalues(peer: Peer, kind: str) -> None:
    f = run_in_main(REFUSED[kind][0])["f"]
    peer.ask(callable, f, upvalues=True)


def test_the_refusal_names_every_variable_with_type_and_size_and_both_ways_out() -> None:
    names = run_in_main("""
import numpy as np, torch
weights = torch.ones(1000, 250)
table = np.zeros((3, 4))
words = ['a'] * 5
unused = 'not this one'
class Thing: ...
thing = Thing()
def work(x): return weights, table, words, thing, math_missing
""")
    message = refusal({"job": names["work"]})
    assert message.startswith("args[0]['job']: the function 'work' would drag along data that was not passed to it:\n")
    lines = message.splitlines()
    assert lines[1] == f"  global variable table: numpy.ndarray of shape (3, 4), {names['table'].nbytes} bytes"
    assert re.fullmatch(r"  global variable thing: __main__\.Thing, \d+ bytes", lines[2])
    assert lines[3] == "  global variable weights: torch.Tensor of shape (1000, 250), 1.0 MB"
    assert re.fullmatch(r"  global variable words: list of 5 items, \d+ bytes without them", lines[4])
    assert len(lines) == 6
    assert "pass it as an argument" in lines[5]
    assert "writeup()" in lines[5]
    assert "upvalues=True" in lines[5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        torch.nn.UninitializedParameter,
        library.BrokenSize,
        library.WithoutText,
        library.BrokenMapping,
        lambda: np.zeros(()),
        lambda: range(3),
    ],
    ids=["nested", "sparse", "meta", "uninitialized", "no size", "no text", "no items", "0-d array", "range"],
)
def test_any_captured_value_can_be_described(make: Callable[[], Any]) -> None:
    value = make()

    def function() -> Any:
        return value

    message = refusal(function)
    assert f"closure variable value: {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "") in (
        message
    )


@pytest.mark.parametrize(
    ("obj", "place"),
    [
        (lambda bad: [1, bad], "args[0][1]"),
        (lambda bad: {"a": {"f": bad}}, "args[0]['a']['f']"),
        (lambda bad: library.Holder(callback=bad), "args[0].callback"),
    ],
)
def test_the_refusal_says_where_the_function_sits(obj: Callable[[Any], Any], place: str) -> None:
    data = [1]
    assert refusal(obj(lambda: data)).startswith(f"{place}: the function ")


def test_every_way_to_send_a_function_refuses_before_anything_starts() -> None:
    data = [1]

    def captures(x: Any = None) -> Any:
        return data

    with torchwq.workqueue() as queue:
        with pytest.raises(ClosureError, match="closure variable data"):
            queue.write(1, captures)
        assert queue.statistics().written == 0
    with pytest.raises(ClosureError, match="closure variable data"):
        torchwq.map(1, captures)
    with pytest.raises(ClosureError, match=r"args\[0\].*\n.*closure variable data"):
        torchwq.map(1, library.plain, captures)
    with pytest.raises(ClosureError, match="closure variable data"):
        torchwq.BackgroundTask(captures)


# --- upvalues --------------------------------------------------------------------------------------


def test_upvalues_carry_cells_and_globals(peer: Peer) -> None:
    names = run_in_main("""
base = [10, 20]
def helper(): return sum(base)
def make(extra):
    def f(x): return helper() + extra['n'] + x
    return f
""")
    assert peer.ask(call, names["make"]({"n": 5}), 1, upvalues=True) == 36


def test_upvalues_are_copied_but_captured_tensors_are_shared(peer: Peer) -> None:
    plain, tensor = [0], torch.zeros(2)

    def change() -> None:
        plain[0] = 1
        tensor[0] = 1

    peer.ask(call, change, upvalues=True)
    assert plain == [0]
    assert tensor.tolist() == [1, 0]


def test_with_upvalues_the_global_that_a_function_sets_comes_along(peer: Peer) -> None:
    names = run_in_main("counter = 5\ndef f():\n    global counter\n    counter += 1\n    return counter")
    assert peer.ask(call, names["f"], upvalues=True) == 6


def test_without_upvalues_the_global_that_a_function_sets_stays_here(peer: Peer) -> None:
    names = run_in_main("""
counter = 5
def f():
    global counter
    try:
        return counter
    except NameError:
        counter = 'set here'
        return counter
""")
    assert peer.ask(call, names["f"]) == "set here"


def test_upvalues_that_cannot_be_pickled_are_an_error_about_them() -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(MarshalError, match="lock") as caught:
        marshal([lambda: lock], upvalues=True)
    assert not isinstance(caught.value, ClosureError)
