"""The native part and its twins give the same bytes, the same objects and the same words in the reference table."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import torchwq
from torchwq import _native
from torchwq.marshalling import codec
from torchwq.marshalling.codec import CALL_LIMIT, decode, encode
from torchwq.memory import counts, ref_table, storages
from torchwq.memory.counts import FIRST_GENERATION, GENERATIONS, LENGTH, ROWS, STRIDE, USED_SLOTS, PythonCounts
from torchwq.memory.message import Message
from torchwq.transport.trailer import trailer

pytestmark = pytest.mark.skipif(_native.core is None, reason=f"no native part: {_native.status.reason}")


# Counting


class Table:
    """A reference table of its own."""

    def __init__(self) -> None:
        fd = ref_table.create()
        self.mapping = mmap.mmap(fd, 8 * LENGTH)
        os.close(fd)
        self.words = memoryview(self.mapping).cast("Q")
        self.words[FIRST_GENERATION] = 5


@pytest.fixture(scope="module")
def tables() -> tuple[Table, Table]:
    return Table(), Table()


def _words(table: Table, row: int, slots: int) -> list[int]:
    return [
        table.words[counts.first_index(slot) + STRIDE * row + word] for slot in range(slots) for word in (0, 1)
    ] + list(table.words[: FIRST_GENERATION + 1])


@pytest.mark.parametrize("slots", [3, 40, 100], ids="{} processes".format)
def test_counts_and_states_are_those_of_the_twin(tables: tuple[Table, Table], slots: int) -> None:
    alive: set[int] = set()
    makers: tuple[Callable[..., Any], Callable[..., Any]] = (PythonCounts, counts.native_counts)
    sides = [
        [make(table.mapping, slot, alive.__contains__) for slot in range(slots)]
        for make, table in zip(makers, tables, strict=True)
    ]
    dice = random.Random(slots)
    row = slots  # another one in each run
    for table in tables:
        table.words[USED_SLOTS] = slots
    states = set()
    for _ in range(3000):
        if dice.random() < 0.02:
            generation = dice.choice([6, 7, 0xFFFFFFFF])
            for table in tables:
                table.words[GENERATIONS + row] = generation
        number = dice.choice([6, 7, 0xFFFFFFFF]) << 32 | row
        slot = dice.randrange(slots)
        alive.symmetric_difference_update({dice.randrange(slots)})
        name, *args = dice.choice(
            [
                ("count_sent", number),
                ("count_received", number, dice.choice([0, 0, counts.IN_USE])),
                ("clear_flag", number, counts.IN_USE),
                ("set_flag", number, dice.choice([counts.IN_USE, counts.IN_USE, counts.ESCAPED])),
                ("clear_flag", number, counts.ESCAPED),
                ("is_current", number),
            ]
        )
        assert getattr(sides[0][slot], name)(*args) == getattr(sides[1][slot], name)(*args)
        assert _words(tables[0], row, slots) == _words(tables[1], row, slots)
        found = [side[slot].state(number) for side in sides]
        assert found[0] == found[1], (name, args)
        states.add(found[0])
    assert states >= {counts.IN_USE, counts.ESCAPED, counts.IN_FLIGHT}


@pytest.mark.parametrize("make", [PythonCounts, counts.native_counts])
def test_a_number_with_a_row_that_is_none_changes_nothing(tables: tuple[Table, Table], make: Any) -> None:
    mine = make(tables[0].mapping, 1, lambda slot: True)
    before = bytes(tables[0].mapping[: 8 * (GENERATIONS + ROWS)])
    for number in (counts.UNTRACKED, ROWS, 7 << 32 | ROWS, 2**64 - 2):
        mine.count_sent(number)
        mine.count_received(number, counts.IN_USE)
        mine.set_flag(number, counts.ESCAPED)
        mine.clear_flag(number, counts.IN_USE)
        assert not mine.is_current(number)
        assert mine.state(number) == counts.IN_FLIGHT
    assert before == tables[0].mapping[: 8 * (GENERATIONS + ROWS)]


def test_a_full_count_begins_anew_on_both_sides(tables: tuple[Table, Table]) -> None:
    row = 200
    for table, make in zip(tables, (PythonCounts, counts.native_counts), strict=True):
        mine = make(table.mapping, 0, lambda slot: True)
        table.words[GENERATIONS + row] = 9
        table.words[counts.first_index(0) + STRIDE * row] = 9 << 32 | 0xFFFFFFFC
        mine.count_sent(9 << 32 | row)
    assert _words(tables[0], row, 1) == _words(tables[1], row, 1)


# Objects without tensors

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-3, 70_000)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.sampled_from(["x" * 255, "y" * 256, "é" * 128, b"z" * 256, 2**31, -(2**31) - 1, -(2**55), 2**55])
)
objects = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(
            st.text(max_size=5) | st.integers(-(2**40), 2**40) | st.tuples(st.booleans()), inner, max_size=5
        )
    ),
    max_leaves=30,
)


@given(objects)
@settings(max_examples=200, deadline=None)
def test_objects_of_builtin_types_have_the_bytes_of_the_twin(obj: Any) -> None:
    assert _native.core.encode_plain(obj, CALL_LIMIT) == twin_encode(obj) == pickle.dumps(obj, 5)
    data = pickle.dumps(obj, 5)
    assert repr(_native.core.decode_plain(data, [])) == repr(obj)
    assert repr(_native.core.decode_plain(data + trailer(7, 0), [])) == repr(obj)


@given(objects, objects)
@settings(max_examples=100, deadline=None)
def test_an_object_that_is_there_twice_stays_one(first: Any, second: Any) -> None:
    pair = (first, second)
    obj = [first, pair, {"pair": pair, "first": first}, [pair, first]]
    data = _native.core.encode_plain(obj, CALL_LIMIT)
    assert data == pickle.dumps(obj, 5)
    arrived = _native.core.decode_plain(data, [])
    assert repr(arrived) == repr(obj)
    assert arrived[1] is arrived[2]["pair"] is arrived[3][0]
    if first is not None and first.__class__ in (list, dict):
        assert arrived[0] is arrived[1][0] is arrived[2]["first"] is arrived[3][1]


def test_a_list_that_has_itself_in_it_arrives_so() -> None:
    obj: list[Any] = [1]
    obj.append(obj)
    data = _native.core.encode_plain(obj, CALL_LIMIT)
    assert data == pickle.dumps(obj, 5)
    arrived = _native.core.decode_plain(data, [])
    assert arrived[1] is arrived
    in_tuple: tuple[Any, ...] = ([],)
    in_tuple[0].append(in_tuple)
    assert _native.core.encode_plain(in_tuple, CALL_LIMIT) is None
    arrived = _native.core.decode_plain(twin_encode(in_tuple), [])
    assert arrived[0][0] is arrived


@pytest.mark.parametrize("size", [0, 1, 2, 999, 1000, 1001, 2500])
def test_long_collections_have_the_bytes_of_the_twin(size: int) -> None:
    for obj in ([7] * size, dict.fromkeys(range(size)), (None,) * size):
        data = _native.core.encode_plain(obj, CALL_LIMIT)
        assert data == pickle.dumps(obj, 5)
        assert _native.core.decode_plain(data, []) == obj


@given(objects, st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_gives_what_pickle_gives(obj: Any, data: st.DataObject) -> None:
    pickled = bytearray(pickle.dumps(obj, 5))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(2, max(2, len(pickled) - 1)))
        pickled[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    if not pickled.endswith(b"."):
        pickled += b"."
    # Such a place in the memo makes pickle allocate, and touch, all places below it: up to 64 GiB.
    assume(all(int.from_bytes(pickled[at + 1 : at + 5], "little") < 1 << 20 for at in _places(pickled, b"r")))
    assert _outcome(_native.core.decode_plain, bytes(pickled), []) == _outcome(pickle.loads, bytes(pickled))


def _places(data: bytearray, opcode: bytes) -> list[int]:
    return [at for at, byte in enumerate(data) if byte == opcode[0]]


def _outcome(function: Any, *args: Any) -> str:
    try:
        return repr(function(*args))
    except Exception as error:
        return type(error).__name__


def twin_encode(obj: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec, "_encode_plain", None)
        return encode(obj, CALL_LIMIT, **options)


def twin_decode(data: bytes, fds: list[int]) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec, "_decode_plain", None)
        return decode(data, fds)


class Sub(int):
    pass


@pytest.mark.parametrize(
    "obj",
    [
        Sub(3),
        {1, 2},
        [Sub(3)],
        {"a": object},
        b"x" * 20_000,
        ["y" * 20_000],
        [[[[[[[[[[1]]]]]]]]]],
        [300] * 6000,
        2**63,
        "half of a pair: \ud800",
        [f"string {number}" for number in range(129)],
    ],
    ids=lambda obj: repr(obj)[:20],
)
def test_what_is_not_of_builtin_types_or_large_or_deep_is_the_twins(obj: Any) -> None:
    assert _native.core.encode_plain(obj, CALL_LIMIT) is None


# Tensors


def _is_known(dtype: torch.dtype) -> bool:
    plain = dtype.is_floating_point or dtype in storages.INTEGERS
    return plain and _native.core is not None and _native.core.look(torch.empty(1, dtype=dtype)) is not None


DTYPES = [dtype for dtype in storages.DTYPES if _is_known(dtype)]
dtypes = st.sampled_from(DTYPES or [torch.float32])


def test_all_usual_dtypes_are_known() -> None:
    usual = storages.INTEGERS | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    assert usual <= set(DTYPES)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    sizes = draw(st.lists(st.integers(1, 5), max_size=4))
    tensor = torch.zeros(sizes, dtype=draw(dtypes))
    raw = tensor.view(torch.uint8) if sizes else tensor.reshape(1).view(torch.uint8)
    raw.copy_(torch.randint(0, 2, raw.shape, dtype=torch.uint8))
    tensor = tensor.transpose(0, 1) if len(sizes) > 1 and draw(st.booleans()) else tensor
    return tensor.clone()  # alone owns its memory, in the same layout


@st.composite
def collections(draw: Any) -> Any:
    made = draw(st.lists(tensors(), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["one", "list", "tuple", "dict"]))
    if kind == "one":
        return made[0]
    if kind == "dict":
        return {f"key {index}": each for index, each in enumerate(made)}
    return made if kind == "list" else tuple(made)


def _each(obj: Any) -> list[torch.Tensor]:
    if isinstance(obj, torch.Tensor):
        return [obj]
    return list(obj.values()) if isinstance(obj, dict) else list(obj)


@given(collections())
@settings(max_examples=100, deadline=None)
def test_tensors_have_the_bytes_of_the_twin_and_arrive_as_from_it(obj: Any) -> None:
    by_twin = twin_encode(obj)  # this moves the tensors, and makes the shape
    natively = _native.core.encode_plain(obj, CALL_LIMIT)
    assert isinstance(by_twin, Message)
    assert isinstance(natively, Message)
    for name in ("data", "kind", "only_blocks", "nbytes"):
        assert getattr(by_twin, name) == getattr(natively, name), name
    assert list(by_twin.fds) == list(natively.fds)
    assert list(by_twin.numbers) == list(natively.numbers)
    arrived = [decoder(*natively.copy()) for decoder in (twin_decode, _native.core.decode_plain)]
    for each in arrived:
        assert type(each) is type(obj)
        for one, other in zip(_each(each), _each(obj), strict=True):
            assert (one.stride(), one.dtype, one.data_ptr()) == (other.stride(), other.dtype, other.data_ptr())
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
            assert one.is_shared()
            assert not one.requires_grad
    if isinstance(obj, dict):
        assert list(arrived[0]) == list(arrived[1]) == list(obj)


CASES: dict[str, Callable[[], Any]] = {
    "requires grad": lambda: torch.ones(2, requires_grad=True),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "conj": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "neg": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(2).to_sparse(),
    "empty": lambda: torch.empty(0),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a view": lambda: torch.arange(6.0)[2:],
    "one tensor twice": lambda: [torch.ones(3)] * 2,
    "views of one": lambda: list(torch.arange(6.0).view(2, 3)),
    "a key that is no str": lambda: {1: torch.ones(2)},
    "not only tensors": lambda: [torch.ones(2), 1],
    "too many": lambda: [torch.ones(2) for _ in range(65)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_plain_tensor_is_the_twins(name: str) -> None:
    obj = CASES[name]()
    for _ in range(2):
        assert _native.core.encode_plain(obj, CALL_LIMIT) is None
        twin_encode(obj)  # afterwards it is shared, where it can be


def test_a_fresh_tensor_moves_into_a_free_block_of_the_pool() -> None:
    encode(torch.ones(33), CALL_LIMIT)  # makes a block and a shape
    before = torchwq.memory_stats()
    fresh = torch.arange(33.0)
    address = fresh.data_ptr()
    message = _native.core.encode_plain(fresh, CALL_LIMIT)
    assert message is not None
    assert fresh.data_ptr() != address
    assert fresh.is_shared()
    assert fresh.tolist() == list(range(33))
    assert torchwq.memory_stats().blocks == before.blocks


@pytest.mark.parametrize("kind", ["with views", "with an array", "inference", "large", "in shared memory"])
def test_a_tensor_that_cannot_simply_move_is_the_twins(kind: str) -> None:
    encode(torch.ones(33), CALL_LIMIT)
    if kind == "inference":
        with torch.inference_mode():
            tensor = torch.ones(33)
    else:
        tensor = torch.ones(33 if kind != "large" else 100_000)
    view = tensor[:] if kind == "with views" else tensor.numpy() if kind == "with an array" else None
    if kind == "in shared memory":
        tensor.share_memory_()
    address = tensor.data_ptr()
    assert _native.core.encode_plain(tensor, CALL_LIMIT) is None
    assert tensor.data_ptr() == address
    del view


def test_threads_that_write_the_same_fresh_tensors_move_each_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    encode(torch.ones(40), CALL_LIMIT)
    with ThreadPoolExecutor(4) as pool:
        for turn in range(300):
            tensor = torch.full((40,), float(turn))
            found = list(pool.map(lambda t: encode(t, CALL_LIMIT), [tensor] * 4))
            assert len({each.numbers[0] for each in found}) == 1
            assert tensor.tolist() == [turn] * 40


INTEROP = """
    import os, sys
    import torch, torchwq

    def echo(queue):
        from torchwq import _native
        queue.write(_native.status.active)
        while (question := queue.read()) is not None:
            queue.write(question)

    owner, workers = sys.argv[1:]
    os.environ["TORCHWQ_NATIVE"] = workers
    queue = torchwq.workqueue()
    job = torchwq.map(1, echo, queue)
    assert bool(torchwq.native) == (owner == "1")
    assert queue.read() == (workers == "1")
    kept = torch.arange(5)
    for turn in range(100):
        fresh = {"a": torch.full((3, 4), float(turn)), "b": kept.clone()}
        for obj in (turn, (turn, "x"), kept, fresh, [1, {"c": torch.ones(2)}]):
            queue.write(obj)
        assert queue.read() == turn and queue.read() == (turn, "x")
        assert queue.read().data_ptr() == kept.data_ptr()
        back = queue.read()
        assert back["a"].sum() == 12 * turn and back["b"].tolist() == kept.tolist()
        assert queue.read()[1]["c"].tolist() == [1, 1]
    queue.write(None)
    job.join()
    assert torchwq.memory_stats().blocks < 40
    print("done")
"""


@pytest.mark.parametrize(("owner", "workers"), [("1", "0"), ("0", "1"), ("0", "0")])
def test_a_native_owner_talks_to_a_twin_worker_and_the_other_way_round(
    owner: str, workers: str, run_script: Any
) -> None:
    run_script(INTEROP, owner, workers, fresh=True, env={"TORCHWQ_NATIVE": owner})


CHANNELS = """
    import os, sys
    import torch, torchwq

    def forward(source, sink, counts):
        import torchwq
        counts.write(bool(torchwq.native))
        for item in source:
            sink.write(item)
        sink.close()
        counts.write(source.statistics().read, sink.statistics().written)

    owner, workers = sys.argv[1:]
    os.environ["TORCHWQ_NATIVE"] = workers
    source, sink, counts = torchwq.channel(), torchwq.channel(), torchwq.channel()
    job = torchwq.map(1, forward, source, sink, counts)
    assert counts.read()[1] == (workers == "1")
    kept = torch.arange(5)
    items = [None, (1, "x"), {"a": [1.5, b"y"]}, "z" * 40_000, 2**70, kept, [kept, (2,)]]
    for turn in range(200):
        for item in items[: 5 if turn < 100 else None]:  # the first tensor comes late
            assert source.write(item) is torchwq.ChannelState.OPEN
    source.close()
    assert source.write(1) is not torchwq.ChannelState.OPEN
    came = list(sink)
    job.join()
    assert len(came) == 500 + 700
    assert counts.read()[1] == counts.read()[1] == len(came)
    assert all(each == items[at % 5] for at, each in enumerate(came[:500]))
    assert came[505].data_ptr() == kept.data_ptr() == came[506][0].data_ptr()
    # Of a backlog that the worker leaves behind, this process writes on what comes after the first item.
    assert sink.statistics().read - sink.statistics().written == len(came)
    assert sink.read() == (torchwq.ChannelState.DRAINED, None)
    print("done")
"""


@pytest.mark.parametrize(("owner", "workers"), [("1", "1"), ("1", "0"), ("0", "1"), ("0", "0")])
def test_channels_between_both_carry_and_count_the_same(owner: str, workers: str, run_script: Any) -> None:
    run_script(CHANNELS, owner, workers, fresh=True, env={"TORCHWQ_NATIVE": owner})


def test_a_word_that_is_given_up_is_not_written_any_more() -> None:
    from torchwq.peers.shared_words import SharedWords

    words = SharedWords(1, 2, 3)
    view, word = words.words[4:5], words.native_word(4)
    for _ in range(3):
        word()
    assert view[0] == 3
    words.close()
    with pytest.raises(ValueError, match="given up"):
        word()
    assert view[0] == 3


def test_a_word_that_is_garbage_is_not_written_any_more() -> None:
    memory = ctypes.c_uint64()
    word = _native.core.SharedWord(ctypes.addressof(memory), memory)
    clear = ctypes.pythonapi.PyType_GetSlot
    clear.restype, clear.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_int]
    tp_clear = 51  # the collector calls it, and then other code may still have the word
    ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object)(clear(type(word), tp_clear))(word)
    with pytest.raises(ValueError, match="given up"):
        word()
    assert not memory.value


def test_the_layout_of_both_is_the_same() -> None:
    with pytest.raises(ValueError, match="no reference table"):
        _native.core.Counts(4096, LENGTH + 1, 0, bool)
    with pytest.raises(ValueError, match="no reference table"):
        _native.core.Counts(4096, LENGTH, counts.SLOTS, bool)


def test_the_native_part_is_off_if_the_environment_says_so() -> None:
    script = "import torchwq; print(bool(torchwq.native), torchwq.native.reason)"
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TORCHWQ_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.startswith("False TORCHWQ_NATIVE=0")
