"""Values arrive equal, and as the reader's own, whatever their size; encoders survive any failure."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import fractions
import functools
import gc
import os
import pathlib
import pickle
import re
import threading
import tracemalloc
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import torchwq
from torchwq import MarshalError, ResourceError
from torchwq.marshalling import codec, copies
from torchwq.marshalling.attachments import OUT_OF_BAND
from torchwq.marshalling.wire import InBlock, References
from torchwq.memory.message import Message
from torchwq.transport.capabilities import SAME_PROCESS

from . import library
from .support import LIMIT, Peer, descriptors, identical, marshal, received, roundtrip, same

moderate = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
few = settings(moderate, max_examples=30)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**60, max_value=2**300)
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.binary().map(bytearray)
    | st.datetimes()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.uuids()
)
keys = st.integers() | st.text() | st.binary() | st.tuples(st.integers(), st.text())
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(keys, inner, max_size=5)
        | st.sets(keys, max_size=5)
        | st.frozensets(keys, max_size=5)
    ),
    max_leaves=20,
)

#: Sizes at which something changes: the inline limit of a call and of a queue, a pickle frame, the out-of-band limit.
EDGES = sorted(
    {0, 1, 3 << 20}
    | {edge + delta for edge in (LIMIT, OUT_OF_BAND, 32759, 1 << 16) for delta in (-40, -20, -10, -1, 0, 1, 10)}
)


@moderate
@given(obj=nested)
def test_nested_containers_and_scalars_come_out_identical(obj: Any) -> None:
    assert identical(roundtrip(obj), obj)


atoms = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
plain_collections = st.recursive(
    st.lists(atoms, max_size=5)
    | st.lists(atoms, max_size=5).map(tuple)
    | st.dictionaries(st.text(), atoms, max_size=5),
    lambda inner: st.lists(inner | atoms, max_size=4) | st.tuples(inner, atoms) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@moderate
@given(obj=plain_collections)
def test_plain_collections_are_copied_within_a_process_and_pickled_for_others(obj: Any) -> None:
    copy = copies.try_copy(obj)
    assert identical(copy, obj)
    assert not mutable_parts(copy) & mutable_parts(obj)
    data, fds = codec.deliver_local(copy)
    assert codec.decode(data, fds) is copy
    assert identical(codec.decode(*received(codec.for_other_processes(copy, LIMIT))), obj)


def mutable_parts(obj: Any) -> set[int]:
    """Ids of the dicts and lists in ``obj``."""
    found = set() if type(obj) is tuple else {id(obj)}
    for each in obj.values() if type(obj) is dict else obj:
        if type(each) in (dict, list, tuple):
            found |= mutable_parts(each)
    return found


@moderate
@given(obj=nested)
def test_what_stays_in_the_process_comes_out_identical(obj: Any) -> None:
    copy = copies.try_copy(obj)
    payload = codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS) if copy is None else copy
    assert identical(codec.decode(*codec.deliver_local(payload)), obj)


def test_collections_that_must_be_pickled_are_not_copied() -> None:
    class Numbers(list[int]):
        pass

    inner = [1]
    cycle: list[Any] = []
    cycle.append(cycle)
    for obj in (
        [inner, inner],
        {"a": inner, "b": (inner,)},
        cycle,
        Numbers([1]),
        [Numbers([1])],
        [1, 2, {3}],
        (bytearray(b"x"),),
        {(1, 2): 3},
        [{"tensor": torch.zeros(1)}],
        [True, print],
        [[number] for number in range(100)],
        "text",
        5,
    ):
        assert copies.try_copy(obj) is None


def test_a_call_within_a_process_has_the_function_itself_and_copies_of_plain_arguments() -> None:
    argument = [1]
    call = functools.partial(codec.encode_call, peer=SAME_PROCESS)
    for args, extra in (((1, b"x"), None), ((argument,), None), ((), {"a": argument}), ((1,), {})):
        payload = call(os.path.join, args, extra)
        assert payload == (os.path.join, args, extra)
        assert not mutable_parts(payload[1:]) & {id(argument), id(extra)}
        assert codec.decode(*codec.deliver_local(payload)) is payload
    assert type(call(os.path.join, (argument, argument), None)) is bytes
    assert type(call(os.path.join, (argument,), {"a": argument})) is bytes
    assert type(call(lambda: None, (), None)) is not tuple


@pytest.mark.parametrize("obj", [b"x" * 100_000, "x" * 100_000])
def test_long_text_is_not_copied_within_a_process(obj: Any) -> None:
    payload = codec.encode(obj, codec.UNLIMITED, peer=SAME_PROCESS)
    assert codec.decode(*codec.deliver_local(payload)) is obj
    assert codec.decode(*received(codec.for_other_processes(payload, LIMIT))) == obj


BIG = 8 << 20


@pytest.mark.parametrize("obj", [b"x" * BIG, (1, b"x" * BIG), {"a": b"x" * BIG}], ids=lambda obj: type(obj))
def test_many_bytes_are_copied_once_and_into_shared_memory(obj: Any) -> None:
    channel = torchwq.channel()
    channel._core.open_to_processes()
    with torchwq.workqueue() as q:
        for descriptor in q._role.handle_descriptors():  # type: ignore[union-attr]
            descriptor.close()  # as if a process had one
        for write in (functools.partial(codec.encode, limit=LIMIT), q.write, channel.write):
            tracemalloc.start()
            try:
                write(obj)
                assert tracemalloc.get_traced_memory()[1] < BIG / 2
            finally:
                tracemalloc.stop()


@few
@given(obj=nested)
def test_nested_containers_and_scalars_come_back_identical_from_a_worker(peer: Peer, obj: Any) -> None:
    assert identical(peer.echo(obj), obj)


@moderate
@given(obj=nested, limit=st.integers(128, 2000))
def test_any_limit_is_kept_and_changes_nothing(obj: Any, limit: int) -> None:
    assert identical(roundtrip([obj, b"x" * 900, obj], limit), [obj, b"x" * 900, obj])


@pytest.mark.parametrize("kind", [bytes, bytearray, str, np.ndarray])
def test_any_size_comes_out_whole(kind: Any) -> None:
    decoding = ("ascii",) if kind is str else ()
    for size in EDGES:
        content = np.random.default_rng(size).integers(32, 127, size, dtype=np.uint8)
        obj: Any = content if kind is np.ndarray else kind(content.tobytes(), *decoding)
        for limit in (LIMIT, 32759):
            assert identical(roundtrip({"before": 1, "it": obj, "after": [obj]}, limit)["after"][0], obj), size


def test_any_size_comes_back_whole_from_a_worker(peer: Peer) -> None:
    for size in EDGES:
        obj = (os.urandom(size), np.frombuffer(os.urandom(size), np.uint8), bytearray(size))
        assert identical(peer.echo(obj), obj), size


def test_large_content_does_not_go_through_the_message() -> None:
    for obj, kind, blocks in (
        (b"x" * 100_000, InBlock.kind, 1),
        (np.zeros(100_000), References.kind, 1),
        ([np.zeros(9000), b"x" * 40_000, "text" * 10_000], InBlock.kind, 2),
    ):
        payload = marshal(obj)
        assert isinstance(payload, Message)
        assert payload.kind == kind
        assert len(payload.data) < 200
        assert len(payload.fds) == blocks


def test_small_content_is_a_bare_pickle() -> None:
    payload = marshal({"a": [1, 2.0, "three"], "b": np.arange(10)})
    assert isinstance(payload, bytes)
    assert identical(pickle.loads(payload), {"a": [1, 2.0, "three"], "b": np.arange(10)})


def test_a_table_of_very_many_arrays_respects_the_limit_of_a_message() -> None:
    arrays = [np.full(OUT_OF_BAND, index % 251, np.uint8) for index in range(1100)]
    payload = codec.encode(arrays, LIMIT)
    assert isinstance(payload, Message)
    assert len(payload.data) <= LIMIT
    assert identical(codec.decode(*received(payload)), arrays)


def test_very_many_arrays_reach_a_worker(peer: Peer) -> None:
    arrays = [np.full(OUT_OF_BAND, index % 251, np.uint8) for index in range(2200)]
    assert peer.ask(sum_of_firsts, arrays) == sum(index % 251 for index in range(2200))


def sum_of_firsts(arrays: list[Any]) -> int:
    return sum(int(array[0]) for array in arrays)


def test_what_is_one_object_stays_one_and_cycles_stay_cycles() -> None:
    one = [1]
    large = np.zeros(10_000)
    ring: list[Any] = [one, one, large, large]
    ring.append(ring)
    out = roundtrip(ring)
    assert out[0] is out[1]
    assert out[2] is out[3]
    assert out[4] is out


def test_parts_of_a_call_stay_one_object() -> None:
    shared = {"x": np.zeros(10)}
    function, args, extra = codec.decode(*received(codec.encode_call(same, (shared, shared), {"k": shared})))
    assert function is same
    assert args[0] is args[1] is extra["k"]


@pytest.mark.parametrize(
    "obj",
    [
        datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
        decimal.Decimal("NaN"),
        fractions.Fraction(1, 3),
        uuid.UUID(int=5),
        pathlib.PurePosixPath("/a/b"),
        range(3),
        slice(1, None, 2),
        Ellipsis,
        NotImplemented,
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cpu"),
        torch.strided,
        torch.preserve_format,
        np.float16(1.5),
        np.datetime64("2024-01-01"),
        np.dtype([("a", "i4"), ("b", "f8", 2)]),
        ValueError("text", 3),
        int,
        dict[str, int],
        library.plain,
        library.Holder,
    ],
    ids=lambda obj: re.sub(" at 0x[0-9a-f]+", "", repr(obj)),
)
def test_objects_of_many_libraries_come_back_from_a_worker(peer: Peer, obj: Any) -> None:
    out = peer.echo(obj)
    assert type(out) is type(obj)
    assert repr(out) == repr(obj)


# --- numpy -----------------------------------------------------------------------------------------

dtypes = (
    npst.scalar_dtypes()
    | npst.byte_string_dtypes()
    | npst.unicode_string_dtypes()
    | npst.array_dtypes(npst.integer_dtypes() | npst.floating_dtypes(), max_size=3)
)
arrays = npst.arrays(dtypes, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))


def _layouts(array: np.ndarray) -> list[np.ndarray]:
    """The same kind of array, laid out in every way."""
    found = [array, np.asfortranarray(array), array.T]
    if array.ndim:
        found += [array[::-1], np.repeat(array, 2, axis=0)[::2], np.broadcast_to(array, (2, *array.shape))]
    frozen = array.copy()
    frozen.flags.writeable = False
    return [*found, frozen, frozen.T]


@moderate
@given(array=arrays)
def test_arrays_of_any_dtype_and_layout_arrive_writable_and_independent(array: np.ndarray) -> None:
    for source in _layouts(array):
        before = source.tobytes()
        out = roundtrip(source)
        assert identical(out, source)
        assert out.flags.writeable
        assert not np.shares_memory(out, source)
        if source.flags.c_contiguous or source.flags.f_contiguous:
            assert out.flags.c_contiguous == source.flags.c_contiguous
            assert out.flags.f_contiguous == source.flags.f_contiguous
        out[...] = np.zeros((), out.dtype)
        assert source.tobytes() == before


@few
@given(array=arrays)
def test_arrays_come_back_from_a_worker(peer: Peer, array: np.ndarray) -> None:
    sources = _layouts(array)
    for out, source in zip(peer.echo(sources), sources, strict=True):
        assert identical(out, source)
        assert out.flags.writeable


@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f8", "c16", "M8[s]", "U3", "S5", "V7", [("a", "i1"), ("b", "f8")]])
def test_large_arrays_are_mapped_aligned_writable_and_apart_from_their_neighbours(dtype: Any) -> None:
    count = 70_000
    whole = np.zeros(2 * count, dtype)
    whole.view("u1")[:] = np.arange(whole.nbytes, dtype=np.int64) % 47 if dtype != "U3" else 0
    frozen = whole[:count].copy()
    frozen.flags.writeable = False
    sources = [whole[:count], whole[::2], frozen, whole.reshape(2, count).T, whole[::-1]]
    out = roundtrip(sources)
    for index, (array, source) in enumerate(zip(out, sources, strict=True)):
        assert identical(array, source), index
        assert array.flags.writeable
        assert array.ctypes.data % np.dtype(dtype).alignment == 0
    last = out[-1].tobytes()
    out[0][...] = np.zeros((), dtype)
    out[2][...] = np.zeros((), dtype)
    assert identical(out[1], sources[1])
    assert out[-1].tobytes() == last


def test_a_worker_may_write_into_its_array_and_the_owner_does_not_see_it(peer: Peer) -> None:
    for source in (np.zeros(5), np.zeros(100_000), np.broadcast_to(np.zeros(()), 100_000)):
        out = peer.ask(fill_with_seven, source)
        assert (out == 7).all()
        assert not source.any()


def fill_with_seven(array: np.ndarray) -> np.ndarray:
    array[:] = 7
    return array


def test_two_readings_of_one_block_do_not_see_each_other() -> None:
    payload = marshal(np.zeros(100_000))
    first, second = (codec.decode(*received(payload)) for _ in range(2))
    first[:] = 1
    assert not second.any()
    assert not codec.decode(*received(payload)).any()


def test_a_mapped_array_outlives_its_message_and_its_neighbours() -> None:
    first, second = roundtrip([np.full(50_000, 1), np.full(50_000, 2)])
    del second
    gc.collect()
    first += 1
    assert (first == 2).all()


@pytest.mark.parametrize("size", [3, 100_000])
def test_array_subclasses_keep_their_class_and_arrive_writable(size: int, tmp_path: pathlib.Path) -> None:
    np.arange(size, dtype=float).tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", float, "r")
    masked = np.ma.masked_array(np.arange(size), np.arange(size) % 2 == 0)
    record = np.rec.fromarrays([np.arange(size), np.ones(size)], names="a,b")
    for source in (mapped, masked, record):
        out = roundtrip(source)
        assert type(out) is type(source)
        assert out.flags.writeable
        assert out.tolist() == source.tolist()
        assert not np.shares_memory(np.asarray(out), np.asarray(source))


@pytest.mark.parametrize("size", [3, OUT_OF_BAND])
def test_array_subclasses_keep_what_they_have_in_slots_and_attributes(size: int) -> None:
    slotted: Any = np.arange(size).view(library.SlottedArray)
    slotted.note = "a note"
    attributed: Any = np.arange(size).view(library.AttributedArray)
    attributed.unit = attributed.same = ["m"]
    first, second = roundtrip([slotted, attributed])
    assert type(first) is library.SlottedArray
    assert first.note == "a note"
    assert type(second) is library.AttributedArray
    assert second.unit == ["m"]
    assert second.same is second.unit
    assert second.sum() == first.sum() == size * (size - 1) // 2
    assert first.flags.writeable


def test_arrays_of_objects_hold_what_they_held() -> None:
    tensor = torch.zeros(2)
    source = np.array([None, tensor, [np.arange(3)], "text"], dtype=object)
    source.flags.writeable = False
    out = roundtrip(source)
    out[1][0] = 5
    assert tensor.tolist() == [5, 0]
    assert out[2][0].tolist() == [0, 1, 2]
    assert out[3] == "text"
    assert out.flags.writeable


# --- encoders are used again and again ---------------------------------------------------------------


def test_an_encoder_that_failed_does_not_spoil_the_next_message() -> None:
    shared = ["a list that both messages hold"]
    expected = marshal([shared, 1])
    for bad in (threading.Lock(), lambda: shared):
        for _ in range(3):
            with pytest.raises(MarshalError):
                marshal([shared, np.zeros(100_000), torch.ones(2), b"x" * 100_000, bad])
            assert marshal([shared, 1]) == expected
            assert roundtrip([shared, 1]) == [shared, 1]


def test_nothing_of_a_message_is_left_for_the_next() -> None:
    for obj in (b"x" * 100_000, np.zeros(100_000), torch.ones(3), [lambda: 1], "short"):
        marshal(obj)
        assert isinstance(marshal(("plain", 1)), bytes)
        assert roundtrip(("plain", 1)) == ("plain", 1)


class Reentrant:
    """Marshals its content itself, while pickle reduces it."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        content = roundtrip(self.content)
        return Reentrant, (content,)


class ReentrantReader:
    """Reads another message while pickle rebuilds it."""

    def __init__(self, payload: Any) -> None:
        self.payload = payload

    def __getstate__(self) -> Any:
        return {"message": None}

    def __setstate__(self, state: Any) -> None:
        self.read = codec.decode(*received(_inner[-1]))


_inner: list[Any] = []


def test_marshalling_may_marshal() -> None:
    tensor = torch.zeros(2)
    obj = [Reentrant([1, b"y" * 50_000]), tensor, Reentrant(Reentrant(np.arange(20_000))), b"x" * 50_000, tensor]
    out = roundtrip(obj)
    assert out[0].content == [1, b"y" * 50_000]
    assert (out[2].content.content == np.arange(20_000)).all()
    assert out[3] == b"x" * 50_000
    assert out[4] is out[1]
    out[1][0] = 3
    assert tensor[0] == 3


def test_a_failure_in_marshalling_within_marshalling_spoils_neither() -> None:
    with pytest.raises(MarshalError, match="lock"):
        marshal([1, Reentrant(threading.Lock())])
    assert roundtrip([1, Reentrant([2])])[1].content == [2]


def test_unmarshalling_may_unmarshal() -> None:
    inner, before, after = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    _inner.append(marshal([inner, np.zeros(20_000)]))
    try:
        out = roundtrip([before, ReentrantReader(None), after])
    finally:
        _inner.clear()
    assert out[0].tolist() == [1, 1]
    assert out[2].tolist() == [2, 2]
    out[1].read[0][0] = 9
    assert inner[0] == 9


def test_threads_marshal_at_the_same_time() -> None:
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        barrier.wait()
        for step in range(40):
            tensor = torch.full((3,), float(number))
            array = np.full(9000, number)
            text = f"{number}-{step}"
            out = roundtrip([text, tensor, array, b"%d" % number * 20_000, {"f": lambda x: x}])
            assert out[0] == text
            assert out[1].tolist() == [number] * 3
            assert (out[2] == number).all()
            assert out[3] == b"%d" % number * 20_000
            with pytest.raises(MarshalError, match=r"args\[0\]\['lock'\]"):
                marshal({"tensor": tensor, "lock": threading.Lock()})

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, number) for number in range(6)]:
            done.result()


# --- descriptors -----------------------------------------------------------------------------------


class FailsOnArrival:
    def __setstate__(self, state: Any) -> None:
        raise OSError("not here")

    def __getstate__(self) -> Any:
        return {"x": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3),
        lambda: np.zeros(100_000),
        lambda: [torch.ones(1) for _ in range(600)],
        lambda: [torch.ones(1), np.zeros(100_000), b"x" * 100_000],
        lambda: [torch.ones(1), FailsOnArrival()],
        lambda: [torch.ones(1), np.zeros(100_000), FailsOnArrival()],
        lambda: [FailsOnArrival(), *(torch.ones(1) for _ in range(600))],
    ],
    ids=["tensor", "array", "bundle", "mixed", "tensor-fails", "block-fails", "bundle-fails"],
)
def test_no_descriptor_is_left_once_a_message_has_been_read_and_dropped(make: Any) -> None:
    before = descriptors()
    gc.disable()  # no cycle may hold one
    try:
        try:
            roundtrip(make())
        except OSError as error:
            error.__traceback__ = None
        assert descriptors() == before
    finally:
        gc.enable()


def test_no_descriptor_is_left_by_a_message_that_could_not_be_made() -> None:
    before = descriptors()
    with pytest.raises(MarshalError) as caught:
        marshal([[torch.ones(1) for _ in range(300)], np.zeros(100_000), threading.Lock()])
    del caught
    gc.collect()
    assert descriptors() == before


def test_a_discarded_message_closes_its_descriptors() -> None:
    before = descriptors()
    payload = marshal([torch.ones(1), np.zeros(100_000)])
    data, fds = received(payload)
    assert len(fds) == 2
    codec.discard(data, fds)
    del payload
    assert descriptors() == before


def test_a_message_with_more_descriptors_than_one_can_carry_comes_back_from_a_worker(peer: Peer) -> None:
    tensors = [torch.full((1,), float(index)) for index in range(600)]
    out = peer.echo([tensors, np.arange(50_000)])
    assert [tensor.item() for tensor in out[0]] == list(range(600))
    out[0][599][0] = -1
    assert tensors[599].item() == -1


# --- errors ----------------------------------------------------------------------------------------


class Raises:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class TooLarge:
    def __reduce__(self) -> Any:
        raise MemoryError


@pytest.mark.parametrize("error", [MemoryError("none left"), ResourceError(24, "descriptors"), KeyboardInterrupt()])
def test_an_error_that_is_not_about_the_object_comes_out_as_it_is(error: BaseException) -> None:
    for attempt in (
        lambda: codec.encode_all([1, [Raises(error)]], LIMIT),
        lambda: codec.encode_call(same, ([Raises(error)],), None),
    ):
        with pytest.raises(type(error)) as caught:
            attempt()
        assert caught.value is error


@pytest.mark.parametrize(
    "encode",
    [
        codec.encode_all,
        functools.partial(codec.encode_one, root="obj"),
        functools.partial(codec.encode_result, root="obj"),
    ],
)
def test_what_does_not_fit_into_memory_is_freed_with_the_error(encode: Any) -> None:
    obj = [TooLarge()]
    freed = weakref.ref(obj[0])
    gc.disable()
    try:
        with contextlib.suppress(MemoryError):
            encode([obj], LIMIT)
        obj.clear()
        assert freed() is None
    finally:
        gc.enable()


def test_the_cause_of_a_marshal_error_is_the_original_error() -> None:
    original = ZeroDivisionError("original")
    with pytest.raises(MarshalError, match="ZeroDivisionError: original") as caught:
        marshal([Raises(original)])
    assert caught.value.__cause__ is original
    assert isinstance(caught.value, TypeError)


def test_too_deep_an_object_is_a_marshal_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    try:
        with pytest.raises(MarshalError, match=r"(?i)recursion"):
            marshal(deep)
    finally:
        while deep:
            deep = deep.pop()


def test_nothing_is_sent_if_one_of_several_cannot_be(peer: Peer) -> None:
    before = peer.queue.statistics().written
    with pytest.raises(MarshalError, match=r"args\[1\]\['lock'\]") as caught:
        peer.queue.write(1, {"lock": threading.Lock()}, 2)
    assert isinstance(caught.value, TypeError)
    assert peer.queue.statistics().written == before
    assert peer.echo("still in step") == "still in step"


def test_an_object_whose_class_travels_by_value_is_reduced_once() -> None:
    class Counted:
        reduced = 0

        def __reduce__(self) -> Any:
            type(self).reduced += 1
            return type(self), ()

    Counted.__module__ = "__main__"
    for obj in (Counted(), [1, {"a": Counted()}]):
        Counted.reduced = 0
        codec.encode(obj, 1 << 20)
        assert Counted.reduced == 1
