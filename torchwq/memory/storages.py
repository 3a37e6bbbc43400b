"""torch's shared storages. The only module that uses private interfaces of torch.

Checked on torch 2.13.0 (CPU). The interfaces, and what happens where one is missing:

* ``UntypedStorage._share_fd_cpu_()`` moves a storage into shared memory in place, unless it is there, and returns the
  size, and the descriptor, which stays torch's. ``UntypedStorage._new_shared_fd_cpu(fd, nbytes)`` maps it in another
  process, with a duplicate of the descriptor. ``torch.multiprocessing.reductions`` uses both for its
  ``file_descriptor`` strategy; without them tensors go through those reductions. For a file that ``torch.from_file``
  has mapped, ``_share_fd_cpu_`` returns -1: ``/proc/self/maps`` tells which file it is, or it is copied.
* torch's multiprocessing calls ``share_memory_``, ``_share_fd_cpu_`` and ``_share_filename_cpu_`` of a storage that it
  passes on. It looks them up at the object, so attributes of the object can replace them.
* ``torch._C._storage_Use_Count(cdata)``: how many owners a storage has. Without it no tensor counts as the only owner,
  torch moves each one into /dev/shm, and no memory is used again.
* ``torch.Tensor.__dlpack_c_exchange_api__`` (since 2.13), ``torch._C.TensorBase.detach``, ``is_neg`` and
  ``requires_grad``: with these the native part looks at tensors and makes them. Without the first one the twins do.
* ``torch._lazy_clone`` and ``Tensor._use_count``: keep the memory that a moved tensor leaves for arrays that point
  into it. Without them such an array must not be used after the move, as after ``share_memory_()``.
* ``torch._neg_view``, ``torch._nested_view_from_buffer``, ``Tensor._nested_tensor_*``, ``Tensor._indices`` and
  ``_values``, ``Tensor._coalesced_``: with these, torch's own reductions take such tensors apart and rebuild them.

Lifetime: a shared storage owns its descriptor and its mapping in each process. A process frees it with the last tensor
on it; the kernel frees the memory when no process maps it and no message has its descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import resource
import sys
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch
import torch.multiprocessing
from torch.multiprocessing import reductions

from .. import _native
from ..errors import ResourceError
from ..transport import descriptors
from . import anonymous

#: Where a tensor is on a storage: the code of its dtype, offset, size, stride.
Geometry = tuple[int, int, tuple[int, ...], tuple[int, ...]]

_private: Any = torch.UntypedStorage

CAN_SHARE_FD: Final = hasattr(_private, "_share_fd_cpu_") and hasattr(_private, "_new_shared_fd_cpu")
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_tensor_use_count: Any = getattr(torch.Tensor, "_use_count", lambda tensor: 1)
#: The owners are the tensor, and the Python object of the storage.
_SOLE_OWNER: Final = 2
_SHM: Final = "/dev/shm"


def share(storage: torch.UntypedStorage) -> int:
    """Move ``storage`` into shared memory in place, with all tensors on it, unless it is there; returns its descriptor.

    The descriptor belongs to the storage; it is -1 if there is none, as for a file that torch has mapped for this
    process alone. Raises ResourceError if no descriptor is free, or if torch would put the storage into a /dev/shm that
    is too small for it (accessing that would end the process with a bus error).
    """
    try:
        if not storage.is_shared():
            descriptors.fill_stdio()  # torch makes a descriptor, and takes any that is free
            _check_room(storage.nbytes())
            _keep_for_arrays(storage)
        fd = int(_private._share_fd_cpu_(storage)[0])
    except RuntimeError as error:
        keep_alive(storage, None)  # it has left no memory
        what = f"torch could not move a storage of {storage.nbytes()} bytes into shared memory"
        raise _resource_error(what, error) from error
    return fd if fd >= 0 else _descriptor_of_file(storage)


def is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether other processes can map its memory. torch says so also of a file mapped for this process alone."""
    try:
        return storage.is_shared() and share(storage) >= 0
    except ResourceError:  # no descriptor is free: sharing it will raise the same
        return True


def _descriptor_of_file(storage: Any) -> int:
    """A descriptor of the file that torch has mapped as ``storage`` (``torch.from_file``), for which it keeps none."""
    found: anonymous.Descriptor | None = getattr(storage, "_torchwq_file", None)
    if found is None:
        storage._torchwq_file = found = anonymous.Descriptor(_open_mapped(storage.data_ptr(), storage.nbytes()))
    return found.fd


def _open_mapped(address: int, nbytes: int) -> int:
    """Open the file whose shared mapping is at ``address``; -1 if it has been deleted, or is not mapped from its start.

    The kernel gives the path that the mapped file has now, so this is not another file that has replaced it.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            lines = [line.rstrip("\n") for line in maps if line.startswith(f"{address:x}-")]
    except OSError:
        return -1
    for line in lines:
        _, mode, offset, _, _, *path = line.split(None, 5)
        if mode != "rw-s" or int(offset, 16) or not path or path[0].endswith(" (deleted)") or "\\012" in path[0]:
            continue
        try:
            fd = descriptors.open_file(path[0], os.O_RDWR)
        except ResourceError:
            raise
        except OSError:
            continue
        if os.fstat(fd).st_size >= nbytes:
            return fd
        os.close(fd)
    return -1


def _keep_for_arrays(storage: torch.UntypedStorage) -> None:
    """Keep the memory that ``storage`` is about to leave as long as the storage, if arrays may point into it.

    An array made by ``tensor.numpy()`` keeps only the storage alive, and torch would free the memory under it. A lazy
    clone owns that memory, too. The memory of ``torch.from_numpy`` has no lazy clone, but another owner.
    """
    if storage.resizable() or _lazy_clone is None:
        return  # no array was ever made of it
    try:
        keep_alive(storage, _lazy_clone(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)))
    except RuntimeError:
        pass


def keep_alive(storage: Any, memory: Any) -> None:
    """Keep ``memory`` as long as ``storage``: torch keeps a storage's Python object for as long as the storage."""
    storage._torchwq_left_memory = memory


def _resource_error(what: str, error: RuntimeError) -> ResourceError:
    """Which limit torch has run into: only the text of its error tells."""
    text = str(error)
    if "Too many open files" in text or "file descriptor" in text:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ResourceError(
            errno.EMFILE,
            f"{what}: each one takes a file descriptor, and this process may have {soft} open (RLIMIT_NOFILE). "
            f"Raise it with `ulimit -n`, or keep fewer shared tensors at a time",
        )
    if "Cannot allocate memory" in text:
        return ResourceError(
            errno.ENOMEM,
            f"{what}: {text}. The limit is that of the address space (RLIMIT_AS, `ulimit -v`), of the number of memory "
            f"mappings (vm.max_map_count), or memory itself",
        )
    return ResourceError(0, f"{what}: {text}")


def _check_room(nbytes: int) -> None:
    try:
        stat = os.statvfs(_SHM)
    except OSError:
        return
    free = stat.f_bavail * stat.f_frsize
    if nbytes > free:
        raise ResourceError(
            0,
            f"a tensor of {nbytes} bytes that has views must be moved into {_SHM}, which has {free} bytes left: "
            f"enlarge it (docker: --shm-size), or write a tensor that alone owns its memory, e.g. tensor.clone()",
        )


def open_shared(fd: int, nbytes: int) -> torch.UntypedStorage:
    """The shared storage behind a descriptor from another process. The caller keeps and closes ``fd``."""
    try:
        storage: torch.UntypedStorage = _private._new_shared_fd_cpu(fd, nbytes)
    except RuntimeError as error:
        raise _resource_error(f"a shared tensor of {nbytes} bytes could not be mapped", error) from error
    return storage


def is_sole_owner(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether only ``tensor`` owns the private ``storage``, so that moving the tensor moves everything.

    The caller has one reference to the storage; any other counts as an owner.
    """
    return (
        CAN_RECYCLE
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_inference()
        and _use_count(storage._cdata) <= _SOLE_OWNER
        and sys.getrefcount(storage) <= _SOLE_REFERENCES
    )


def _count_sole_references(tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
    return sys.getrefcount(storage)


def _sole_references() -> int:
    """How many references ``is_sole_owner`` counts if only its caller has one."""
    tensor = torch.empty(1, dtype=torch.uint8, device="cpu")
    storage = tensor.untyped_storage()
    return _count_sole_references(tensor, storage)


_SOLE_REFERENCES: Final = _sole_references()


def move(tensor: torch.Tensor, prototype: torch.Tensor, storage: torch.UntypedStorage, address: int) -> Any:
    """Copy ``storage`` to ``address``, and move ``tensor`` to where ``prototype`` is, which is on that memory.

    The values stay the same, so to autograd this is no change. Returns the memory that must live as long as the tensor.
    """
    ctypes.memmove(address, storage.data_ptr(), storage.nbytes())
    pointed_into = _tensor_use_count(tensor) > 1  # by an owner in C++, such as DLPack
    tensor.data = prototype
    return storage if pointed_into else None


def owners(storage: torch.UntypedStorage) -> tuple[int, int]:
    """How many owners a storage has, in C++ and in Python. Both numbers include the caller."""
    return _use_count(storage._cdata), sys.getrefcount(storage)


class _Probe:
    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage


def _count_idle() -> tuple[int, int, int]:
    """``owners(some.storage)`` if only ``some`` has it; and how many references, if there is a tensor, too."""
    probe = _Probe(torch.UntypedStorage(8))
    alone = owners(probe.storage)
    tensor = torch.empty((0,), dtype=torch.uint8, device="cpu").set_(probe.storage)
    with_tensor = owners(probe.storage)
    del tensor
    return alone[0], alone[1], with_tensor[1]


#: Whether this torch tells that a storage is idle, so that its memory can be used again.
CAN_RECYCLE: Final = CAN_SHARE_FD and _use_count is not None
IDLE_OWNERS, IDLE_REFERENCES, IDLE_REFERENCES_WITH_TENSOR = _count_idle() if CAN_RECYCLE else (0, 0, 0)

#: The dtypes of this torch, in the same order in every process.
DTYPES: Final = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
INTEGERS: Final = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES)}


def key(storage: torch.UntypedStorage) -> int:
    """Stands for the storage where owners are counted."""
    return int(storage._cdata)


def _set_up_native(core: Any) -> None:
    """Let the native part know this torch."""
    base: Any = torch._C.TensorBase
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    some = torch.empty(0, device="cpu")
    methods = base.detach.__get__(some), base.is_neg.__get__(some)
    if core.set_torch(torch.Tensor, *methods, base.requires_grad, _use_count, table):
        for code, dtype in enumerate(DTYPES):
            if dtype.is_floating_point or dtype in INTEGERS:
                with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
                    core.learn_dtype(torch.empty(1, dtype=dtype, device="cpu"), code)


def set_up_native_move(core: Any, *parts: Any) -> None:
    """Let the native part move tensors. ``parts``: what ``sharing`` and ``pool`` know of them."""
    base: Any = torch._C.TensorBase
    use_count = getattr(base, "_use_count", None)
    if use_count is None:
        return
    functions = (
        base.untyped_storage,
        _private.is_shared,
        _private.nbytes,
        _private.data_ptr,
        base.is_inference,
    )
    if core.set_move((*functions, use_count, _private._cdata, base.data), *parts):
        core.calibrate_move(torch.empty(1, dtype=torch.uint8, device="cpu"))


if _native.core is not None and CAN_RECYCLE:
    _set_up_native(_native.core)


def geometry(tensor: torch.Tensor) -> Geometry:
    """The geometry of a dense tensor, as ``place`` takes it."""
    offset: Any = tensor.storage_offset()
    return CODES[tensor.dtype], offset, tensor.size(), tensor.stride()


def bytes_geometry(nbytes: int) -> Geometry:
    """The geometry of a tensor of all bytes of a storage."""
    return CODES[torch.uint8], 0, (nbytes,), (1,)


def bytes_of(geometry: Geometry) -> int:
    """How many bytes a tensor of this geometry spans from its first to its last element."""
    code, _, size, stride = geometry
    return (1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))) * DTYPES[code].itemsize


def span(tensor: torch.Tensor) -> int:
    """How many elements of its storage a dense tensor spans from its first to its last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def place(
    storage: torch.UntypedStorage, code: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A new tensor on ``storage``, even in inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return place(storage, code, offset, size, stride)
    tensor = torch.empty((0,), dtype=DTYPES[code], device="cpu")
    return tensor.set_(storage, offset, size, stride)


def memory(storage: torch.UntypedStorage) -> memoryview:
    """The memory of ``storage``, which must outlive the view."""
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def lasting_memory(storage: torch.UntypedStorage) -> memoryview:
    """The memory of ``storage``, which lives as long as the view does."""
    array: Any = place(storage, *bytes_geometry(storage.nbytes())).numpy()
    return memoryview(array)


#: The method of ``torch.UntypedStorage`` calls this under a lock, for which a finalizer or a signal handler of the same
#: thread would wait. A storage that is shared already does not need the lock (torch 2.1 to 2.13).
_share_fd: Any = getattr(torch._C.StorageBase, "_share_fd_cpu_", torch.UntypedStorage._share_fd_cpu_)


def descriptor(storage: torch.UntypedStorage) -> int:
    """The descriptor of a storage that is shared already. It belongs to the storage."""
    return int(_share_fd(storage)[0])


def hook_torch_sharing(storage: Any, tell: Callable[[bool], None]) -> None:
    """Call ``tell(moves)`` before torch passes on a shared ``storage``; ``moves``: before that, torch moves it.

    A reducer in multiprocessing's table would not do: torch's ``init_reductions`` replaces it, and other code calls
    torch's reducers directly.
    """
    reference = weakref.ref(storage)  # no cycle
    storage._share_fd_cpu_ = functools.partial(_share_and_tell, reference, "_share_fd_cpu_", tell, False)
    storage._share_filename_cpu_ = functools.partial(_share_and_tell, reference, "_share_filename_cpu_", tell, True)
    storage.share_memory_ = functools.partial(_share_memory, reference)


def keep_reducer_registered(cls: type, reducer: Callable[[Any], Any]) -> None:
    """Register a reducer with torch's multiprocessing, and again whenever torch registers its own again.

    ``torch.multiprocessing.reductions.init_reductions`` does that (torch 2.1 to 2.13). A reference to it from before
    this module was imported undoes the registration.
    """
    init: Callable[[], None] = reductions.init_reductions

    @functools.wraps(init)
    def init_reductions() -> None:
        init()
        ForkingPickler.register(cls, reducer)

    ForkingPickler.register(cls, reducer)
    module: Any
    for module in (reductions, torch.multiprocessing):
        if getattr(module, "init_reductions", None) is init:
            module.init_reductions = init_reductions


def unhook_torch_sharing(storage: Any) -> None:
    """Undo ``hook_torch_sharing``."""
    for name in ("_share_fd_cpu_", "_share_filename_cpu_", "share_memory_"):
        storage.__dict__.pop(name, None)


def _share_and_tell(
    reference: weakref.ref[Any], name: str, tell: Callable[[bool], None], moves: bool, *args: Any, **kwargs: Any
) -> Any:
    storage = reference()
    tell(moves)
    return getattr(_private, name)(storage, *args, **kwargs)


def _share_memory(reference: weakref.ref[Any], *args: Any, **kwargs: Any) -> Any:
    """The storage is shared already. Only the strategy that gives it a name passes it on."""
    storage = reference()
    if torch.multiprocessing.get_sharing_strategy() != "file_system":
        return storage
    return _private.share_memory_(storage, *args, **kwargs)


def map_private(fd: int, nbytes: int) -> tuple[Any, memoryview]:
    """Map shared memory copy-on-write: the mapping, which lives as long as anything uses the bytes, and the bytes."""
    path = f"/proc/self/fd/{fd}"
    if not os.path.exists(path):
        view = anonymous.map_private(fd, nbytes)
        return view.obj, view
    try:  # mmap would hold a descriptor for as long as the array lives
        storage: Any = torch.UntypedStorage.from_file(path, shared=False, nbytes=nbytes)
    except RuntimeError as error:
        raise _resource_error(f"{nbytes} bytes could not be mapped", error) from error
    return storage, lasting_memory(storage)


def nested_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffer, sizes, strides and offsets of a nested tensor of the strided layout."""
    private: Any = tensor
    sizes, strides = private._nested_tensor_size(), private._nested_tensor_strides()
    return private.values(), sizes, strides, private._nested_tensor_storage_offsets()


def nested_from(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The nested tensor whose ``nested_parts`` these are; a view of the buffer, not a copy."""
    return torch._nested_view_from_buffer(*parts)


def sparse_parts(tensor: torch.Tensor) -> tuple[list[torch.Tensor], bool]:
    """The dense tensors that make up a sparse one, and whether it is coalesced (COO only)."""
    private: Any = tensor
    if tensor.layout is torch.sparse_coo:
        return [private._indices(), private._values()], tensor.is_coalesced()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()], False
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()], False


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with the neg bit flipped."""
    return torch._neg_view(tensor)
