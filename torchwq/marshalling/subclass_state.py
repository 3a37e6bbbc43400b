"""What a class adds to the objects of a class that travels in a way of its own: attributes and slots.

As ``object.__reduce_ex__`` would have it: what ``__getstate__`` says, where the class has one; else ``__dict__`` and
the slots. It is laid down as the state of the pickled object, which is read after the object is there: so an attribute
may refer back to its object.
"""

from __future__ import annotations

import copyreg
from typing import Any, Final

_object_getstate: Final = getattr(object, "__getstate__", None)  # from Python 3.11 on


def of(obj: Any, base: type) -> Any:
    """The state of ``obj`` beyond what it is as a ``base``; None if there is none."""
    cls = type(obj)
    getstate = getattr(cls, "__getstate__", None)
    if (
        getstate is not None
        and getstate is not _object_getstate
        and getstate is not getattr(base, "__getstate__", None)
    ):
        return obj.__getstate__()
    attributes = getattr(obj, "__dict__", None) or None
    slots = {name: getattr(obj, name) for name in copyreg._slotnames(cls) if hasattr(obj, name)}  # type: ignore[attr-defined]
    if slots:
        return attributes, slots
    return attributes


def reduced(rebuild: Any, args: tuple[Any, ...], obj: Any, base: type) -> tuple[Any, ...]:
    """What ``__reduce__`` returns for ``obj``, which ``rebuild(*args)`` makes again as far as it is a ``base``."""
    state = of(obj, base)
    if state is None:
        return rebuild, args
    own = getattr(type(obj), "__setstate__", None) is not getattr(base, "__setstate__", None)
    return rebuild, args, state, None, None, (_set_as_it_wants if own else put)


def _set_as_it_wants(obj: Any, state: Any) -> None:
    obj.__setstate__(state)


def put(obj: Any, state: Any) -> None:
    """Give ``obj`` what ``of`` has found."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        obj.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(obj, name, value)
