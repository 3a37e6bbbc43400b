"""Objects that need no encoder: scalars, and within one process collections of scalars, which are copied."""

from __future__ import annotations

from typing import Any, Final

#: Types that pickle writes without asking a hook. Most small messages are one such object, or a tuple of them.
SCALARS: Final = frozenset({int, float, str, bool, type(None)})
only_scalars: Final = SCALARS.issuperset
#: ``SCALARS`` does not have bytes, because ``dumps`` would copy long ones before they go into shared memory.
ATOMS: Final = SCALARS | {bytes}
only_atoms: Final = ATOMS.issuperset

#: A copy of such a collection may be a payload within this process.
COLLECTIONS: Final = frozenset({tuple, list, dict})
#: How many collections one object may have. Pickling is faster than copying for more of them.
_MAX_COPIED: Final = 32


def try_copy(obj: Any) -> Any:
    """The payload of ``obj`` within this process: a copy if it consists of dicts, lists, tuples and ``ATOMS``, or None.

    A tuple of atoms is its own copy, since neither can change. The result is also None for objects that pickle faster,
    and for those in which one collection occurs twice: pickling keeps that.
    """
    cls = type(obj)
    if cls is not dict and cls is not list and cls is not tuple:
        return None
    try:
        if cls is tuple and only_atoms(map(type, obj)):
            return obj
        return _copied(obj, set())
    except (TypeError, RecursionError):  # TypeError: the class of some object cannot be hashed
        return None


def _copied(obj: Any, seen: set[int]) -> Any:
    cls = type(obj)
    copy: Any
    places: Any
    if cls is tuple:
        if only_atoms(map(type, obj)):
            return obj
        copy = list(obj)
        places = enumerate(copy)
    elif cls is list:
        copy = obj.copy()  # copy first, because other threads may change it
        places = None if only_atoms(map(type, copy)) else enumerate(copy)
    elif cls is dict:
        copy = obj.copy()
        if not only_atoms(map(type, copy)):
            return None
        places = None if only_atoms(map(type, copy.values())) else copy.items()
    else:
        return None
    if id(obj) in seen or len(seen) >= _MAX_COPIED:
        return None
    seen.add(id(obj))
    if places is not None:
        for place, each in places:
            if type(each) not in ATOMS:
                copy[place] = inner = _copied(each, seen)
                if inner is None:
                    return None
    return tuple(copy) if cls is tuple else copy
