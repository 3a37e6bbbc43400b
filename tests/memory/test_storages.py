"""torch's shared storages: moved once, in place, into memory without a name where that can be."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.marshalling.support import descriptors, mapping_at, roundtrip
from torchwq import ResourceError
from torchwq.memory import sharing, storages


def share(tensor: torch.Tensor) -> None:
    assert sharing.share(tensor) is not None


def small_shm(monkeypatch: pytest.MonkeyPatch, free: int) -> list[str]:
    asked: list[str] = []

    def statvfs(path: Any) -> Any:
        asked.append(str(path))
        return SimpleNamespace(f_bavail=free // 512, f_frsize=512, f_bfree=10**9, f_bsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return asked


def test_a_private_tensor_with_views_that_does_not_fit_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = small_shm(monkeypatch, 4096)
    tensor = torch.ones(10_000)
    view = tensor[5:]
    for obj in (tensor, view, {"x": [view]}):
        with pytest.raises(ResourceError) as caught:
            roundtrip(obj)
        message = str(caught.value)
        assert "40000 bytes" in message
        assert "/dev/shm, which has 4096 bytes left" in message
        assert "--shm-size" in message
        assert "clone()" in message
    assert set(asked) == {"/dev/shm"}
    assert not tensor.is_shared()
    assert view.sum() == 9995


def test_the_remedy_of_the_message_works(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shm(monkeypatch, 0)
    tensor = torch.ones(10_000)
    view = tensor[5:]
    copy = view.clone()
    roundtrip(copy)[0] = 3
    assert copy[0] == 3
    assert view[0] == 1


def test_what_just_fits_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(1024)
    view = tensor[1:]
    small_shm(monkeypatch, 4096 - 512)
    with pytest.raises(ResourceError):
        roundtrip(view)
    small_shm(monkeypatch, 4096)
    roundtrip(view)[0] = 5
    assert tensor[1] == 5


def test_only_a_private_tensor_with_views_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.ones(1000)
    view_of_shared = shared.share_memory_()[1:]
    small_shm(monkeypatch, 0)
    alone = torch.ones(1000)
    parameter = torch.nn.Parameter(torch.ones(1000))
    for tensor in (shared, view_of_shared, alone, parameter, torch.empty(0)):
        out = roundtrip(tensor)
        assert out.shape == tensor.shape
        assert tensor.numel() == 0 or tensor.is_shared()


def test_a_system_without_dev_shm_is_not_asked_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs(path: Any) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    tensor = torch.ones(100)
    view = tensor[1:]
    roundtrip(view)[0] = 4
    assert tensor[1] == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(5000),
        lambda: torch.ones(70, 70).t(),
        lambda: torch.ones(5000)[10:],
        lambda: torch.nn.Parameter(torch.ones(5000)),
        lambda: torch.ones(5000, dtype=torch.bfloat16),
        lambda: torch.tensor(1.0),
    ],
    ids=["plain", "transposed", "temporary view", "Parameter", "bf16", "0-d"],
)
def test_a_tensor_that_alone_owns_its_storage_moves_into_memory_without_a_name(make: Any) -> None:
    tensor = make()
    before = (tensor.tolist(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes())
    identity = id(tensor)
    alone = tensor._base is None
    share(tensor)
    assert tensor.is_shared()
    assert ("memfd:torchwq" in (mapping_at(tensor.data_ptr()) or "")) == alone
    after = (tensor.tolist(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes())
    assert after == before
    assert id(tensor) == identity


def test_a_tensor_with_views_is_left_to_torch() -> None:
    tensor = torch.ones(100)
    view = tensor[1:]
    share(tensor)
    assert "memfd:torchwq" not in (mapping_at(tensor.data_ptr()) or "")
    assert tensor.is_shared()
    assert view.is_shared()
    assert view.data_ptr() == tensor.data_ptr() + 4


def test_without_torchs_use_count_every_storage_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "CAN_RECYCLE", False)
    tensor = torch.ones(100)
    share(tensor)
    assert "memfd:torchwq" not in (mapping_at(tensor.data_ptr()) or "")
    roundtrip(tensor)[0] = 2
    assert tensor[0] == 2


def test_moving_twice_does_nothing_the_second_time() -> None:
    tensor = torch.ones(100)
    share(tensor)
    place = tensor.data_ptr()
    share(tensor)
    assert storages.share(tensor.untyped_storage()) >= 0
    assert tensor.data_ptr() == place


def test_a_failed_move_leaves_the_tensor_and_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fallocate(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    before = descriptors()
    tensor = torch.arange(100.0)
    with pytest.raises(ResourceError, match="no memory left"):
        roundtrip(tensor)
    assert not tensor.is_shared()
    assert tensor.tolist() == list(range(100))
    assert descriptors() == before


def test_a_system_without_fallocate_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    tensor = torch.arange(100.0)
    roundtrip(tensor)[0] = 7
    assert tensor.tolist() == [7, *range(1, 100)]


def test_shared_memory_that_cannot_be_mapped_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int) -> None:
        raise RuntimeError("unable to mmap 1000 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(storages, "_private", SimpleNamespace(_new_shared_fd_cpu=fail))
    with pytest.raises(ResourceError, match=r"1000 bytes could not be mapped.*Cannot allocate memory"):
        storages.open_shared(0, 1000)


def test_an_opened_storage_does_not_need_the_descriptor_it_came_by() -> None:
    tensor = torch.arange(10.0)
    share(tensor)
    fd, nbytes = storages.share(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
    copy = os.dup(fd)
    storage = storages.open_shared(copy, nbytes)
    os.close(copy)
    other = torch.empty(0).set_(storage)
    tensor[3] = 33
    assert other.tolist() == tensor.tolist()


def test_shared_memory_goes_back_with_its_last_tensor() -> None:
    before = descriptors()
    tensor = torch.ones(1_000_000)
    out = roundtrip(tensor)
    place = out.data_ptr()
    del tensor
    assert out.sum() == 1_000_000
    del out
    assert descriptors() == before  # which gives back what is kept for use again
    line = mapping_at(place)
    assert line is None or "torchwq" not in line
