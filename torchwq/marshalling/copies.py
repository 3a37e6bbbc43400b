"""What needs no encoder: scalars, and within one process collections of them, which are copied instead of pickled."""

from __future__ import annotations

from typing import Any, Final

#: What needs no hook: such an object, or a tuple of them, is most of what small messages are.
SCALARS: Final = frozenset({int, float, str, bool, type(None)})
only_scalars: Final = SCALARS.issuperset
#: The same and bytes, which are often long, and go into shared memory at once then: ``dumps`` would copy them first.
ATOMS: Final = SCALARS | {bytes}
only_atoms: Final = ATOMS.issuperset

#: Collections of them may be their own payload within this process: see ``copied``.
COLLECTIONS: Final = frozenset({tuple, list, dict})
#: How many dicts, lists and tuples in one object are copied so: pickling looks at more of them in less time.
_MAX_COPIED: Final = 32


def try_copy(obj: Any) -> Any:
    """``obj``'s payload within this process, if it is dicts, lists and tuples of ``ATOMS``: a copy of it, not pickled.

    A tuple of nothing else is its own: it cannot change, and nor can what is in it, so nobody can tell it from a copy.
    None for whatever else, and where pickling would not be dearer, or would keep what is in there twice the same.
    """
    cls = type(obj)
    if cls is not dict and cls is not list and cls is not tuple:
        return None
    try:
        return _copied(obj, set())
    except (TypeError, RecursionError):  # the class of some class cannot be hashed
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
        copy = obj.copy()  # before anything is looked at, for other threads may change it
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
