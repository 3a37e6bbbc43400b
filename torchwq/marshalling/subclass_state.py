"""The state that a subclass adds to objects of a class with its own reducer: attributes and slots.

As in ``object.__reduce_ex__``, the state is the result of the class's ``__getstate__``, or else ``__dict__`` and the
slots. It travels as the state of the pickled object, which pickle reads when the object exists: so an attribute may
refer back to its object.
"""

from __future__ import annotations

import copyreg
from typing import Any, Final

_object_getstate: Final = getattr(object, "__getstate__", None)  # from Python 3.11 on


def of(obj: Any, base: type) -> Any:
    """The state of ``obj`` that a ``base`` does not have; None if there is none."""
    cls = type(obj)
    getstate = getattr(cls, "__getstate__", None)
    if (
        getstate is not None
        and getstate is not _object_getstate
        and getstate is not getattr(base, "__getstate__", None)
    ):
        return obj.__getstate__()
    attributes = getattr(obj, "__dict__", None) or None
    slots = slots_of(obj)
    return (attributes, slots) if slots else attributes


def slots_of(obj: Any) -> dict[str, Any]:
    """The slots that ``obj`` has set, by name."""
    names = copyreg._slotnames(type(obj))  # type: ignore[attr-defined]
    return {name: getattr(obj, name) for name in names if hasattr(obj, name)}


def reduced(rebuild: Any, args: tuple[Any, ...], obj: Any, base: type) -> tuple[Any, ...]:
    """The result of ``__reduce__`` for ``obj``. ``rebuild(*args)`` makes it again without its state."""
    state = of(obj, base)
    if state is None:
        return rebuild, args
    own = getattr(type(obj), "__setstate__", None) is not getattr(base, "__setstate__", None)
    return rebuild, args, state, None, None, (_call_setstate if own else put)


def _call_setstate(obj: Any, state: Any) -> None:
    obj.__setstate__(state)


def put(obj: Any, state: Any) -> None:
    """Give ``obj`` the state that ``of`` has returned."""
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        obj.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(obj, name, value)
