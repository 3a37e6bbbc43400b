"""The table from types to reducers, which say how objects travel. Both encoders ask it for each object they meet.

A reducer gets the encoder and the object, and returns what ``__reduce__`` would, or NotImplemented for pickle's own
way. It may attach to the message

* a descriptor (``encoder.attach_fd``), which the rebuilding function takes with :func:`take_inbound_fd`;
* a block (``encoder.attach_block``), which the rebuilding function finds in :func:`inbound_blocks`;
* within a process an object (``encoder.attach_object``); the rebuilding function gets it from :func:`attached_object`.

Reducers of users get only the object: :func:`register_reducer`. A module of torchwq registers its types when it is
imported; ``encoders`` imports what nothing else does.
"""

from __future__ import annotations

import builtins
import io
import pickle
import threading
import types
from collections.abc import Callable, Container, Sequence
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from ..memory.block import Block
from ..memory.packing import Packing
from ..memory.received_blocks import ReceivedBlocks
from ..transport.capabilities import Capabilities
from . import subclass_state


class Encoder(Protocol):
    #: If not None, only tensors on these blocks travel by reference.
    owned_blocks: Container[Block] | None
    #: What the receiver is capable of.
    peer: Capabilities
    #: If not None, a worker begins with the message; the list keeps alive what must live as long as that worker.
    worker_resources: list[Any] | None

    def attach_fd(self, fd: int, owner: Any) -> int:
        """Send ``fd`` with the message, which keeps ``owner`` alive until then. Returns its index."""

    def attach_block(self, block: Block, storage: Any) -> int:
        """Send a reference to ``block``, whose storage is ``storage``, with the message. Returns its index."""

    @property
    def packing(self) -> Packing:
        """The storages that the message packs into few blocks."""

    @property
    def block_count(self) -> int:
        """The number of blocks to which the message refers so far."""

    def attach_object(self, obj: Any) -> int:
        """Send ``obj`` itself with a message for a peer in this process. Returns its index."""


Reducer = Callable[[Encoder, Any], Any]
T = TypeVar("T")

_exact: dict[type, Reducer] = {}
_by_base: dict[type, Reducer] = {}
_fallback_types: Container[type] = ()
_not_fallback: Container[type] = ()
#: Classes that torchwq refuses to send. A user may register a reducer for them.
_refused: set[type] = set()
#: The reducers of users.
registered: dict[type, Callable[[Any], Any]] = {}
#: Types that pickle writes without asking the hook.
_WITHOUT_HOOK: Final = frozenset(
    {type(None), bool, int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset, pickle.PickleBuffer}
)
#: The types of code, which the encoders send by name or under the closure rule.
_CODE: Final = frozenset({type, types.FunctionType})
_fallback_reducer: Reducer | None = None
#: Functions in the results of reducers that every process can import by name.
rebuilders: set[Any] = set()


def register(cls: type, reducer: Reducer) -> None:
    """Reduce instances of exactly ``cls`` with ``reducer``."""
    _exact[cls] = reducer


def register_reducer(type: type[T], reduce: Callable[[T], tuple[Any, ...] | str]) -> None:
    """Let objects of exactly ``type`` travel as ``reduce`` says: in queues, channels, arguments, results and batches.

    Use it for objects that cannot be pickled, or should not be pickled as they are. Tensors in the result of ``reduce``
    travel by reference, everything else by value. A process that only reads such objects need not register anything.
    A reducer of ``copyreg.pickle`` or ``ForkingPickler.register`` serves where no reducer is registered here.

    Args:
        type: a class. As with ``ForkingPickler.register``, its subclasses are not included; register each of them.
        reduce: takes the object and returns what its ``__reduce__`` would: ``(callable, args)``, where
            ``callable(*args)`` makes the object again, or a longer tuple with a state; or NotImplemented, to let pickle
            decide. The reducer that was registered last counts. torchwq does not call it where it marshals nothing:
            for batches of a loader without workers, or with threads.

    Raises:
        TypeError: ``type`` is not a class, or ``reduce`` cannot be called.
        ValueError: torchwq or pickle always sends objects of this type in its own way: tensors, storages, arrays,
            functions, classes, torchwq's own types, and types such as int, str, tuple and dict.

    Source: ``copyreg.pickle`` and ``multiprocessing.reduction.ForkingPickler.register``.
    """
    if not isinstance(type, builtins.type):
        raise TypeError(f"register_reducer takes a class first, and not {type!r:.80}: pass the object's type")
    if not callable(reduce):
        raise TypeError(
            f"register_reducer takes a function that reduces a {type.__qualname__}, and not {reduce!r:.80}: "
            "pass one that returns (callable, args)"
        )
    name = f"{type.__module__}.{type.__qualname__}".removeprefix("builtins.")
    if type in _WITHOUT_HOOK:
        raise ValueError(f"pickle sends every {name} itself: register a class of your own, that has one or is one")
    if type in _CODE or (type in _exact and type not in registered and type not in _refused):
        raise ValueError(f"torchwq sends every {name} itself: register a class of your own, that has one or is one")

    def reducer(encoder: Encoder, obj: Any) -> Any:
        reduced: Any = reduce(obj)
        if isinstance(reduced, (tuple, str)) or reduced is NotImplemented:
            return reduced
        raise TypeError(
            f"what is registered for {name} has returned {reduced!r:.80}: it must return (callable, args), as "
            "__reduce__ does"
        )

    registered[type] = reduce
    register(type, reducer)


def register_family(base: type, reducer: Reducer) -> None:
    """Reduce instances of ``base`` and its subclasses with ``reducer``, where their class has no reducer of its own."""
    _by_base[base] = reducer


def register_fallback(registry: Container[type], but: Container[type], reducer: Reducer) -> None:
    """Reduce instances of classes in ``registry``, but not in ``but``, for which this table has no reducer."""
    global _fallback_types, _not_fallback, _fallback_reducer
    _fallback_types, _not_fallback, _fallback_reducer = registry, but, reducer


def lookup(cls: type) -> Reducer | None:
    reducer = _exact.get(cls)
    if reducer is None:
        if cls in _fallback_types and cls not in _not_fallback:
            return _fallback_reducer
        for base in cls.__mro__:
            if base in _by_base:
                return _by_base[base]
    return reducer


_inbound = threading.local()


class InboundMessage:
    """What this thread is unpickling: a message's descriptors and blocks, or the objects of a local message."""

    __slots__ = ("_outer", "fds", "objects", "original_tensors", "received_blocks")

    def __init__(
        self,
        fds: list[int],
        received_blocks: ReceivedBlocks | None,
        objects: Sequence[Any] = (),
        original_tensors: bool = False,
    ) -> None:
        self.fds = fds
        self.received_blocks = received_blocks
        self.objects = objects
        self.original_tensors = original_tensors

    def __enter__(self) -> InboundMessage:
        self._outer = getattr(_inbound, "message", None)
        _inbound.message = self
        return self

    def __exit__(self, *exc: object) -> None:
        _inbound.message = self._outer


def inbound_blocks() -> ReceivedBlocks:
    """The blocks of the message being unpickled."""
    received_blocks: ReceivedBlocks = _inbound.message.received_blocks
    return received_blocks


def attached_object(index: int) -> Any:
    """The object that is attached under this index to the local message being unpickled."""
    return _inbound.message.objects[index]


def is_local_message() -> bool:
    """Whether a local message is being unpickled, and not one from another process."""
    return bool(_inbound.message.objects)


def wants_original_tensors() -> bool:
    """Whether the local message is being unpickled only to send its tensors elsewhere."""
    return bool(_inbound.message.original_tensors)


def take_inbound_fd(index: int) -> int:
    """A descriptor of the message being unpickled. The caller owns it."""
    fds = _inbound.message.fds
    fd, fds[index] = fds[index], -1
    return int(fd)


def _reduce_array(encoder: Encoder, array: np.ndarray[Any, Any]) -> Any:
    """Send a copy of a read-only array, so that it arrives writable, as all other arrays do."""
    if array.flags.writeable or array.dtype.hasobject:
        return NotImplemented
    return array.copy(order="K").__reduce_ex__(5)


_PICKLING_METHODS: Final = ("__reduce__", "__reduce_ex__", "__setstate__")


def _reduce_array_subclass(encoder: Encoder, array: np.ndarray[Any, Any]) -> Any:
    """Send the attributes of an array's subclass, which numpy drops, unless the class pickles itself."""
    cls = type(array)
    own = any(getattr(cls, name) is not getattr(np.ndarray, name) for name in _PICKLING_METHODS)
    if own or isinstance(array, np.memmap) or cls.__module__.partition(".")[0] == "numpy":
        return NotImplemented
    return subclass_state.reduced(_as_subclass, (array.view(np.ndarray), cls), array, np.ndarray)


def _as_subclass(array: np.ndarray[Any, Any], cls: Any) -> Any:
    return array.view(cls)


def _refuse_file(encoder: Encoder, file: Any) -> Any:
    raise TypeError(f"an open file ({getattr(file, 'name', file)!r}) cannot be sent: send its path")


def _refuse_generator(encoder: Encoder, generator: Any) -> Any:
    raise TypeError("a generator cannot be sent: send the generator function and its arguments")


register(np.ndarray, _reduce_array)
register_family(np.ndarray, _reduce_array_subclass)
register(types.GeneratorType, _refuse_generator)
for _file in (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO):
    register(_file, _refuse_file)
    _refused.add(_file)
_refused.add(types.GeneratorType)
