"""Blocks of shared memory: filled whole, mapped copy-on-write, closed when unused, clear when they run out."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.marshalling.support import descriptors
from torchwq import ResourceError, TorchwqError
from torchwq.memory import anonymous
from torchwq.transport.descriptors import resource_error


def read_back(buffers: list[Any]) -> bytes:
    fd = anonymous.fill(buffers)
    try:
        return bytes(anonymous.map_private(fd)[: sum(memoryview(buffer).nbytes for buffer in buffers)])
    finally:
        os.close(fd)


@settings(max_examples=60, deadline=None)
@given(buffers=st.lists(st.binary(max_size=200), max_size=6))
def test_buffers_come_back_in_one_piece(buffers: list[bytes]) -> None:
    assert read_back(list(buffers)) == b"".join(buffers)


def test_buffers_of_any_kind_are_copied() -> None:
    array = np.arange(10, dtype=np.int32)
    buffers = [b"ab", bytearray(b"c"), memoryview(array), b"", memoryview(array.reshape(2, 5)), b"z"]
    assert read_back(buffers) == b"abc" + array.tobytes() * 2 + b"z"


def test_a_buffer_larger_than_one_call_takes_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anonymous, "_MAX_BYTES_PER_CALL", 7)
    assert read_back([b"x" * 100, b"y" * 3, b"z" * 50]) == b"x" * 100 + b"y" * 3 + b"z" * 50


def test_a_short_write_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:3], offset))
    assert read_back([b"0123456789", b"abcdefgh"]) == b"0123456789abcdefgh"


def test_a_mapping_is_writable_and_private() -> None:
    fd = anonymous.fill([b"original"])
    first, second = anonymous.map_private(fd), anonymous.map_private(fd)
    assert not first.readonly
    first[:8] = b"changed!"
    assert bytes(second[:8]) == b"original"
    assert bytes(anonymous.map_private(fd)[:8]) == b"original"
    assert os.pread(fd, 8, 0) == b"original"
    os.close(fd)
    assert bytes(first[:8]) == b"changed!"


def test_an_empty_block_can_be_mapped() -> None:
    assert read_back([]) == b""
    assert read_back([b"", b""]) == b""


def test_a_block_has_no_name_and_starts_as_zeros() -> None:
    fd = anonymous.create(10_000)
    try:
        assert os.fstat(fd).st_size == 10_000
        assert os.fstat(fd).st_nlink == 0
        assert not os.get_inheritable(fd)
        with mmap.mmap(fd, 10_000) as mapping:
            assert mapping[:] == bytes(10_000)
    finally:
        os.close(fd)


def test_without_memfd_an_unlinked_file_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert read_back([b"x" * 5000]) == b"x" * 5000
    fd = anonymous.create()
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_write_closes_the_block_and_says_why(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    before = descriptors()
    with pytest.raises(ResourceError) as caught:
        anonymous.fill([b"x"])
    assert caught.value.errno == number
    assert ("no memory left" if number == errno.ENOSPC else os.strerror(number)) in str(caught.value)
    assert descriptors() == before


def test_anything_else_that_goes_wrong_while_filling_closes_the_block() -> None:
    before = descriptors()
    with pytest.raises(TypeError):
        anonymous.fill([b"x", "not a buffer"])  # type: ignore[list-item]
    assert descriptors() == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE.*ulimit -n"),
        (errno.ENFILE, "file descriptors"),
        (errno.ENOSPC, "memory limit"),
        (errno.ENOMEM, "memory limit"),
        (errno.EFBIG, "memory limit"),
        (errno.EPERM, "Operation not permitted"),
    ],
)
def test_the_error_names_the_limit(number: int, words: str) -> None:
    error = resource_error(OSError(number, "text"))
    assert isinstance(error, OSError)
    assert isinstance(error, TorchwqError)
    assert error.errno == number
    with pytest.raises(ResourceError, match=words):
        raise error


def test_a_size_that_no_block_can_have_is_a_resource_error_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", fail)
    before = descriptors()
    with pytest.raises(ResourceError):
        anonymous.create(1 << 20)
    assert descriptors() == before


def test_descriptors_that_run_out_give_a_clear_error_and_leave_the_process_usable(run_script: Any) -> None:
    done = run_script("""
        import os, resource, warnings
        import numpy as np, torch
        import torchwq
        from torchwq.marshalling import codec

        torch.ones(1) + 1
        array, tensor, viewed = np.ones(100_000), torch.ones(1000), torch.ones(1000)
        view = viewed[1:]
        payload = codec.encode([torch.zeros(3), np.zeros(100_000)], 16000)
        fds = [os.dup(fd) for fd in payload.fds]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        os.close(used)
        fillers = []
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError:
            pass
        def attempt(name, function):
            try:
                function()
            except torchwq.ResourceError as error:
                print(name, isinstance(error, OSError), "|", error)
        attempt("array", lambda: codec.encode_all([array], 16000))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            copies = [codec.decode(codec.encode_all([obj], 16000)[0], []) for obj in ({"t": tensor}, [view])]
        print("warned", [str(warning.message) for warning in caught])
        copies[0]["t"][0], copies[1][0][0] = 5, 5
        print("apart", tensor[0].item(), viewed[1].item(), copies[0]["t"].sum().item(), copies[1][0].shape[0])
        print("reader", codec.decode(payload.data + bytes(8) + bytes([payload.kind]), fds)[0].tolist())
        print("closed", all(not os.path.exists(f"/proc/self/fd/{fd}") for fd in fds))
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        out = codec.encode_all([[array, tensor, view]], 16000)[0]
        data = codec.decode(out.data + bytes(8) + bytes([out.kind]), [os.dup(fd) for fd in out.fds])
        data[1][0] = 7
        data[2][0] = 8
        print(tensor[0].item(), viewed[1].item(), data[0].sum())
    """)
    lines = done.stdout.splitlines()
    named = dict(line.split(" True | ") for line in lines if " | " in line)
    assert named.keys() == {"array"}
    assert "ulimit -n" in named["array"]
    (warned,) = [line for line in lines if line.startswith("warned")]
    assert warned.count("copied instead of shared") == 1
    assert "ulimit -n" in warned
    assert "apart 1.0 1.0 1004.0 999" in lines
    assert "reader [0.0, 0.0, 0.0]" in lines
    assert "closed True" in lines
    assert lines[-1] == "7.0 8.0 100000.0"


def test_memory_that_runs_out_gives_a_clear_error_and_no_bus_error(run_script: Any) -> None:
    done = run_script("""
        import resource
        import numpy as np, torch
        import torchwq
        from torchwq.marshalling import codec

        array, tensor, text = np.zeros(1_000_000), torch.ones(1_000_000), b"x" * 8_000_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for name, obj in (("array", array), ("tensor", tensor), ("bytes", text)):
            try:
                codec.encode_all([obj], 16000)
            except torchwq.ResourceError as error:
                print(name, error)
        print(tensor.sum().item(), tensor.is_shared())
    """)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["array", "tensor", "bytes"]
    assert all("no memory left" in line for line in lines[:3])
    assert lines[3] == "1000000.0 False"


def test_a_descriptor_closes_when_it_is_garbage_and_only_once() -> None:
    before = descriptors()
    held = anonymous.Descriptor(anonymous.create())
    assert len(descriptors() - before) == 1
    held.close()
    assert descriptors() == before
    other = anonymous.create()  # takes the same number
    held.close()
    del held
    assert os.fstat(other)
    given = anonymous.Descriptor(other)
    assert given.detach() == other
    del given
    gc.collect()
    assert os.fstat(other)
    last = anonymous.Descriptor(other)
    del last
    assert descriptors() == before
