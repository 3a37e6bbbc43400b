"""Classes of msgspec, whose metaclass is C code that needs all fields at once.

Checked with msgspec 0.18 to 0.22, which is imported only for such a class.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

from . import definitions

_OPTIONS = (
    *("frozen", "eq", "order", "array_like", "gc", "repr_omit_defaults", "omit_defaults", "forbid_unknown_fields"),
    *("weakref", "dict", "cache_hash", "tag", "tag_field"),
)
_KEPT = frozenset({"__doc__", "__module__", "__annotations__", "__orig_bases__", "__parameters__"})


def is_struct(cls: type) -> bool:
    return type(cls).__module__ == "msgspec._core"


def reduce(cls: Any, token: str, attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Reduce the class, and remove from ``attributes`` those that its metaclass makes."""
    for name, value in list(attributes.items()):
        of_metaclass = name in cls.__struct_fields__ or (name.startswith("__") and name not in _KEPT)
        if of_metaclass and not isinstance(value, (types.FunctionType, property, staticmethod, classmethod)):
            del attributes[name]
    msgspec = importlib.import_module("msgspec")
    own = vars(cls).get("__annotations__", {})
    fields = []
    for field in msgspec.structs.fields(cls):
        if field.name in own:
            given = {
                key: value
                for key in ("default", "default_factory")
                if (value := getattr(field, key)) is not msgspec.NODEFAULT
            }
            fields.append((field.name, field.type, {**given, "name": field.encode_name}))
    options = {name: getattr(cls.__struct_config__, name) for name in _OPTIONS}
    return make, (token, cls.__name__, cls.__qualname__, cls.__module__, cls.__bases__, fields, options)


def make(
    token: str, name: str, qualname: str, module: str, bases: Any, fields: list[Any], options: dict[str, Any]
) -> Any:
    known = definitions.find(token)
    if known is not None:
        return known
    msgspec = importlib.import_module("msgspec")
    made = msgspec.defstruct(
        name,
        [(each, kind, msgspec.field(**given)) for each, kind, given in fields],
        bases=bases,
        module=module,
        namespace={"__qualname__": qualname},
        **options,
    )
    return definitions.add_received(token, made)
