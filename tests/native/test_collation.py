"""The native collation gives what torch's default collation gives, and leaves to torch all that it does not know."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate

import torchwq
from torchwq import _native
from torchwq.loading import collation, internals
from torchwq.marshalling import codec
from torchwq.memory import recycling, storages, tree_table
from torchwq.memory.message import Message

pytestmark = pytest.mark.skipif(_native.core is None, reason=f"no native part: {_native.status.reason}")

LIMIT = codec.CALL_LIMIT

Pair = namedtuple("Pair", "left right")


class Typed(NamedTuple):
    first: Any
    second: Any = None


@pytest.fixture(autouse=True, scope="module")
def _as_in_a_worker() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(internals.default_collate_fn_map, torch.Tensor, collation.collate_tensor)
        collation._set_up_native(_native.core)
        tree_table.current()
        yield
    collation.collated_blocks.clear()


def native(samples: list[Any]) -> Any:
    return _native.core.collate(samples, 0)


def in_message(samples: list[Any]) -> Any:
    """What arrives of a message; what is not flat, as it is."""
    found = _native.core.collate(samples, LIMIT)
    collation.collated_blocks.clear()
    return codec.decode(*found.copy()) if type(found) is Message else found


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        one, other = one.detach(), other.detach()
        assert one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


# Any samples

_DTYPES = [
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
]

#: Makes the n-th of some samples that have the same structure.
Make = Callable[[int], Any]


def _tensor_of(dtype: torch.dtype, shape: list[int]) -> Make:
    return lambda n: (torch.arange(int(np.prod(shape))).view(shape) + n).to(dtype)


def leaves(*, with_strings: bool = True) -> st.SearchStrategy[Make]:
    numbers: st.SearchStrategy[Make] = st.sampled_from([lambda n: n - 3, lambda n: n / 3, lambda n: -0.0])
    shapes = st.lists(st.integers(1, 4), max_size=4)
    tensors = st.builds(_tensor_of, st.sampled_from(_DTYPES), shapes | st.just([9000]))
    strings: st.SearchStrategy[Make] = st.sampled_from([str, lambda n: b"x" * n])
    return numbers | tensors | strings if with_strings else numbers | tensors


def _each(makes: list[Make]) -> Callable[[int], list[Any]]:
    return lambda n: [make(n) for make in makes]


def _tuple_of(makes: list[Make]) -> Make:
    return lambda n: tuple(_each(makes)(n))


def _dict_of(makes: dict[Any, Make]) -> Make:
    return lambda n: {key: make(n) for key, make in makes.items()}


def _pair_of(left: Make, right: Make) -> Make:
    return lambda n: Pair(left(n), right(n))


def collections_of(inner: st.SearchStrategy[Make]) -> st.SearchStrategy[Make]:
    some = st.lists(inner, min_size=1, max_size=4)
    keys = st.sampled_from(["a", "b", "Ω", 1, 2])
    return (
        st.builds(_tuple_of, some)
        | st.builds(_each, some)
        | st.builds(_dict_of, st.dictionaries(keys, inner, min_size=1, max_size=4))
        | st.builds(_pair_of, inner, inner)
    )


@given(st.recursive(leaves(), collections_of, max_leaves=8), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_any_samples_are_collated_as_by_torch(make: Make, count: int) -> None:
    samples = [make(n) for n in range(count)]
    expected = default_collate(samples)
    if type(samples[0]) in (str, bytes):
        assert native(samples) is None  # torch gives the list itself
        return
    assert_same(native(samples), expected)
    assert_same(in_message(samples), expected)


@given(collections_of(leaves(with_strings=False)) | leaves(with_strings=False), st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_a_flat_batch_arrives_as_torch_collates_it(make: Make, count: int) -> None:
    samples = [make(n) for n in range(count)]
    assert_same(in_message(samples), default_collate(samples))


def test_a_flat_batch_is_a_message_with_its_small_tensors_in_one_block() -> None:
    samples = [{"small": torch.ones(3) * n, "large": torch.ones(40000) * n, "label": n} for n in range(4)]
    found = _native.core.collate(samples, LIMIT)
    assert type(found) is Message
    assert len(found.numbers) == 2
    assert_same(codec.decode(*found.copy()), default_collate(samples))


@pytest.mark.parametrize(
    "samples",
    [
        [torch.ones(3)] * 2,
        [torch.ones(30000)] * 2,
        [1, 2],
        [(torch.ones(3), 1)] * 2,
        [(torch.ones(3), torch.ones(30000))] * 2,
        [[torch.ones(30000), 1, torch.ones(20000), 1.5]] * 2,
        [{"a": torch.ones(2, 3), "b": torch.ones(30000), "c": 7}] * 2,
    ],
    ids=lambda samples: str(type(samples[0]).__name__),
)
def test_the_message_is_the_one_that_the_twin_makes(samples: list[Any]) -> None:
    natively = _native.core.collate(samples, LIMIT)
    by_twin = codec.encode(default_collate(samples), LIMIT, owned_blocks=())
    assert type(natively) is type(by_twin) is Message
    references = 16 * len(by_twin.numbers) + 4
    assert natively.data[:-references] == by_twin.data[:-references]
    for name in ("kind", "nbytes", "only_blocks"):
        assert getattr(natively, name) == getattr(by_twin, name)
    sizes = [[recycling.by_number[number].nbytes for number in each.numbers] for each in (natively, by_twin)]
    assert sizes[0] == sizes[1]


def test_a_message_that_would_be_too_long_is_none() -> None:
    assert type(_native.core.collate([1, 2], 20)) is not Message


def test_more_keys_in_later_samples_are_ignored() -> None:
    samples: list[Any] = [{"a": 1}, {"b": 2, "a": 3}]
    assert_same(native(samples), default_collate(samples))


def test_strings_keep_what_torch_has_made_of_them() -> None:
    samples: list[Any] = [("x", {"k": "y"}), (None, {"k": 3})]
    assert native(samples) == default_collate(samples) == [("x", None), {"k": ["y", 3]}]


def test_what_the_class_of_a_named_tuple_raises_is_raised() -> None:
    class Strict(Typed):
        def __new__(cls, first: Any, second: Any) -> Strict:
            if isinstance(first, torch.Tensor):
                raise ValueError("no tensors")
            return super().__new__(cls, first, second)

    samples = [Strict(1, 2)]
    for collate in (native, default_collate):
        with pytest.raises(ValueError, match="no tensors"):
            collate(samples)


# What goes to torch


class _Tensor(torch.Tensor):
    pass


class _Int(int):
    pass


class _Tuple(tuple[Any, ...]):
    pass


def _swapped() -> torch.Tensor:
    return torch.arange(6).view(2, 3).t()


OTHERS: dict[str, Callable[[], list[Any]]] = {
    "bool": lambda: [True, False],
    "an int and a bool": lambda: [1, True],
    "an int and a float": lambda: [1, 2.5],
    "a float and an int": lambda: [1.5, 2],
    "a large int": lambda: [1, 1 << 63],
    "a subclass of int": lambda: [_Int(1), _Int(2)],
    "later a subclass of int": lambda: [1, _Int(2)],
    "complex": lambda: [torch.ones(2, dtype=torch.complex64)] * 2,
    "a complex number": lambda: [1j],
    "none": lambda: [None],
    "numpy array": lambda: [np.ones(3), np.zeros(3)],
    "numpy scalar": lambda: [np.float32(1), np.float32(2)],
    "an int and a numpy scalar": lambda: [1, np.int64(2)],
    "later a numpy array": lambda: [torch.ones(3, dtype=torch.float64), np.ones(3)],
    "subclass of tensor": lambda: [torch.ones(2).as_subclass(_Tensor)] * 2,
    "parameter": lambda: [torch.nn.Parameter(torch.ones(2), requires_grad=False)] * 2,
    "requires grad": lambda: [torch.ones(2), torch.ones(2, requires_grad=True)],
    "unequal shapes": lambda: [torch.ones(2), torch.ones(3)],
    "unequal dimensions": lambda: [torch.ones(2), torch.ones(2, 1)],
    "unequal dtypes": lambda: [torch.ones(2), torch.ones(2, dtype=torch.float64)],
    "not contiguous": lambda: [_swapped(), _swapped()],
    "later not contiguous": lambda: [torch.arange(6).view(3, 2), _swapped()],
    "channels last": lambda: [torch.ones(1, 3, 2, 2).to(memory_format=torch.channels_last)] * 2,
    "expanded": lambda: [torch.ones(1).expand(3)] * 2,
    "no elements": lambda: [torch.ones(0, 3)] * 2,
    "sparse": lambda: [torch.eye(2).to_sparse()] * 2,
    "meta": lambda: [torch.ones(2, device="meta")] * 2,
    "negated": lambda: [torch.ones(2), torch.ones(2, dtype=torch.complex64).conj().imag],
    "one negated element": lambda: [torch.ones(()), torch.ones(2, dtype=torch.complex64).conj().imag[0]],
    "negated without gaps": lambda: [
        torch.ones(4),
        torch.ones(4, dtype=torch.complex64).conj().imag.as_strided((4,), (1,)),
    ],
    "strings": lambda: ["a", "b"],
    "empty tuple": lambda: [(), ()],
    "empty dict": lambda: [{}, {}],
    "unequal lengths": lambda: [(1, 2), (1,)],
    "unequal lengths of lists": lambda: [[1], [1, 2]],
    "unequal lengths inside": lambda: [{"a": (1, 2)}, {"a": (1,)}],
    "a missing key": lambda: [{"a": 1, "b": 2}, {"a": 1}],
    "a tuple and a list": lambda: [(1, 2), [1, 2]],
    "a dict and an ordered one": lambda: [{"a": 1}, OrderedDict(a=1)],
    "ordered dict": lambda: [OrderedDict(a=1), OrderedDict(a=2)],
    "subclass of tuple": lambda: [_Tuple((1, 2)), _Tuple((3, 4))],
    "two kinds of named tuples": lambda: [Pair(1, 2), Typed(1, 2)],
    "range": lambda: [range(2), range(2)],
    "set": lambda: [{1}],
    "other keys": lambda: [{(1, 2): 1}, {(1, 2): 2}],
    "a bool inside": lambda: [{"a": (1, [True])}, {"a": (1, [False])}],
    "many tensors": lambda: [[torch.ones(1)] * 65],
    "no samples": list,
}


def _outcome(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    try:
        return collate(samples)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", OTHERS)
def test_torch_collates_others(name: str) -> None:
    samples = OTHERS[name]()
    assert native(samples) is None
    assert _native.core.collate(samples, LIMIT) is None
    one, other = _outcome(collation.Collation(), samples), _outcome(default_collate, samples)
    if name in ("sparse", "meta"):
        assert type(one) is type(other)
    elif name == "subclass of tensor":
        assert type(one) is type(other) is _Tensor
    else:
        assert_same(one, other)


def test_torch_collates_what_is_no_list() -> None:
    assert native(((1, 2), (3, 4))) is None  # type: ignore[arg-type]


def test_torch_collates_when_the_user_has_changed_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (int, dict, torch.Tensor):
        with monkeypatch.context() as patched:
            patched.setitem(internals.default_collate_fn_map, cls, lambda batch, *, collate_fn_map: "mine")
            assert native([1, 2]) is None
            assert collation.Collation()([cls()]) == "mine"
    with monkeypatch.context() as patched:
        patched.delitem(internals.default_collate_fn_map, bytes)
        assert native([1, 2]) is None
        patched.setitem(internals.default_collate_fn_map, str, None)
        assert not internals.has_own_collate_fns()
    collation._set_up_native(_native.core)  # one that was deleted comes back in another order
    assert native([1, 2]) is not None


def test_torch_collates_where_a_mode_is_active() -> None:
    with torch.device("meta"):
        assert native([1, 2]) is None
        assert collation.Collation()([1, 2]).is_meta


def test_only_torchs_default_is_replaced() -> None:
    def mine(samples: list[Any]) -> Any:
        return default_collate(samples)

    assert collation.for_worker(mine, in_thread=False) is mine
    assert collation.for_worker(default_collate, in_thread=True) is default_collate
    assert isinstance(collation.for_worker(default_collate, in_thread=False), collation.Collation)


# References


@pytest.mark.parametrize("limit", [0, LIMIT])
def test_nothing_is_kept(limit: int) -> None:
    tensor, number, text = torch.ones(3), 12345678, "text" * 3
    samples = [
        {"key": (tensor, number), "pair": Pair(text, [1.5])},
        {"key": (tensor, number), "pair": Pair(text, [2.5])},
    ]
    flat = [[tensor, number], [tensor, number]]
    wrong = [[tensor, number], [tensor, None]]
    watched = [tensor, number, text, samples, samples[0], samples[1]["key"], Pair, flat[0], wrong[1], None]
    for each in (samples, flat, wrong):
        _native.core.collate(each, limit)
    before = [sys.getrefcount(each) for each in watched]
    blocks, objects = sys.getallocatedblocks(), len(gc.get_objects())
    for _ in range(3000):
        for each in (samples, flat, wrong):
            _native.core.collate(each, limit)
    assert [sys.getrefcount(each) for each in watched] == pytest.approx(before, abs=10)
    assert sys.getallocatedblocks() - blocks < 1000  # each call would leave one, of 9000
    assert len(gc.get_objects()) - objects < 1000


# In a loader


class Items:
    """Some samples of each of several structures, one batch after the other."""

    def __init__(self, makes: list[Make], batch_size: int) -> None:
        self.makes = makes
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.makes) * self.batch_size

    def __getitem__(self, index: int) -> Any:
        return self.makes[index // self.batch_size](index)


MAKES: list[Make] = [
    lambda n: n,
    lambda n: (torch.full((4,), n % 256, dtype=torch.uint8), n),
    lambda n: {"x": torch.ones(20000) * n, "y": torch.ones(2, 3) * n, "z": n / 7, "w": torch.ones(30000) * n},
    lambda n: torch.full((3, 100, 100), n % 256, dtype=torch.uint8),
    lambda n: {"x": [torch.ones(2) * n, "text"], "y": (n, {"z": torch.ones(20000) * n})},
    lambda n: [np.ones(3) * n, n],
]


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("torch was asked")


def _without_torch(worker_id: int) -> None:
    torch.stack = torch.tensor = _refuse


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_of_a_loader_are_torchs() -> None:
    dataset: Any = Items(MAKES, 4)
    batches = list(torchwq.DataLoader(dataset, 4, num_workers=2))
    for number, batch in enumerate(batches):
        assert_same(batch, default_collate([dataset[4 * number + n] for n in range(4)]))
    assert len(batches) == len(MAKES)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_ask_torch_for_plain_samples() -> None:
    dataset: Any = Items(MAKES[:-1], 4)
    assert len(list(torchwq.DataLoader(dataset, 4, num_workers=2, worker_init_fn=_without_torch))) == len(MAKES) - 1


def _count_ints(worker_id: int) -> None:
    internals.default_collate_fn_map[int] = lambda batch, *, collate_fn_map: len(batch)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_uses_the_functions_that_the_user_has_set() -> None:
    dataset: Any = list(range(8))
    assert list(torchwq.DataLoader(dataset, 4, num_workers=2, worker_init_fn=_count_ints)) == [4, 4]


# Slices, which such messages have


def _decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, list[int]], Any]]:
    yield codec.decode
    with monkeypatch.context() as patched:
        patched.setattr(codec, "_decode_plain", None)
        yield codec.decode


def test_slices_arrive_as_with_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{"a": torch.ones(3) * n, "large": torch.ones(20000) * n, "b": n} for n in range(4)]
    message = _native.core.collate(samples, LIMIT)
    block = recycling.by_number[message.numbers[-1]]
    prototypes = set()
    for decode in _decoders(monkeypatch):
        batch = decode(*message.copy())
        assert_same(batch, default_collate(samples))
        assert [each.is_shared() for each in batch.values()] == [False, True, False]
        prototypes.add(id(block.slice_prototypes))
        batch["a"][0] = 7  # both see the same memory
        assert decode(*message.copy())["a"][0].tolist() == [7, 7, 7]
        batch["a"][0] = 0
    assert len(prototypes) == 1  # the twin uses those of the native part


def test_a_block_is_in_use_as_long_as_any_of_its_slices_is() -> None:
    message = _native.core.collate([(torch.ones(3) * n, n) for n in range(4)], LIMIT)
    block = recycling.by_number[message.numbers[0]]
    batch = codec.decode(*message.copy())
    del message
    assert block.in_use()
    view = batch[1][2:]
    del batch
    assert block.in_use()
    array = view.numpy()
    del view
    assert block.in_use()
    del array
    assert not block.in_use()
    assert block.slice_prototypes is not None
    assert not block.slice_prototypes.any_in_use()


def test_slices_of_another_message_do_not_free_the_block() -> None:
    first = _native.core.collate([(torch.ones(3), 1.5)] * 2, LIMIT)
    block = recycling.by_number[first.numbers[0]]
    kept = codec.decode(*first.copy())[0]
    block.new_slice_prototypes("another", [(storages.CODES[torch.float32], 0, (2,), (1,))], [0])
    del first
    assert block.in_use()
    del kept
    assert not block.in_use()
