"""Declares the fields of a configuration, and checks a value against its field."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import field
from functools import cache
from types import MappingProxyType
from typing import Any

from dgl_jax.errors import UserError
from dgl_jax.registry import Registry, nearest

MANY = 2**31 - 1  # update counts are int32 on the devices


# What an option applies to: other fields (`schedule.name`) or traits of the chosen kinds (`engine.asynchronous`), each with the
# values that have a use for the option. All must hold, but for a field that the chosen kind does not have.
Applies = Mapping[str, tuple[Any, ...]]


ALWAYS: Applies = MappingProxyType({})


def option(default: Any, applies: Applies = ALWAYS, free: bool = False, **metadata: Any) -> Any:
    """Declares a field of the configuration.

    Args:
      applies: see `Applies`; always by default. An option of a kind applies wherever that kind is chosen.
      free: it may differ between a run and its resumption, as it changes nothing of what was learnt before.
    """
    return field(default=default, metadata={"applies": applies, "free": free, **metadata})


def choice(default: str, *others: str, **metadata: Any) -> Any:
    """Declares a field that holds one of a few names; see `option`."""
    return option(default, choices=(default, *others), **metadata)


def kind_of(kinds: Registry, default: str, **metadata: Any) -> Any:
    """Declares a field that names a registered kind; see `option`."""
    return option(default, kinds=kinds, **metadata)


def number(
    default: float, minimum: float, maximum: float, exclusive: bool = False, **metadata: Any
) -> Any:
    """Declares a number in [minimum, maximum], or in (minimum, maximum) if `exclusive`; see `option`."""
    return option(default, range=(minimum, maximum, exclusive), **metadata)


def check_value(f: dataclasses.Field, value: Any, name: str) -> Any:
    """Returns a value in the type of its field.

    Args:
      name: what the user calls the field.

    Raises:
      UserError: it is of another type, out of its range, or no such name.
    """
    wanted = type_of(f)
    if typing.get_origin(wanted) is tuple:
        element = typing.get_args(wanted)[0]
        if element is str:
            value = tuple(filter(None, value.split(","))) if isinstance(value, str) else value
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise UserError(f"{name}={value!r}: a tuple of names, such as ('one','other')")
            return tuple(value)
        if not isinstance(value, list | tuple) or not all(_is_number(v, element) for v in value):
            raise UserError(
                f"{name}={value!r}: a tuple of numbers, such as ({element(1)},{element(2)})"
            )
        return tuple(element(v) for v in value)
    if wanted in (int, float):
        if not _is_number(value, wanted):
            raise UserError(
                f"{name}={value!r}: {'a whole number' if wanted is int else 'a number'} is needed"
            )
        value = wanted(value)
    elif not isinstance(value, wanted):
        raise UserError(
            f"{name}={value!r}: a {wanted.__name__} is needed, not a {type(value).__name__}"
        )
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{name}={value!r}: no such name; {nearest(value, choices)}")
    if "kinds" in f.metadata:
        f.metadata["kinds"][value]  # raises where there is none
    if "range" in f.metadata:
        low, high, exclusive = f.metadata["range"]
        if not (low < value < high if exclusive else low <= value <= high):
            kind = f"above {low:g} and below {high:g}" if exclusive else f"between {low} and {high}"
            raise UserError(f"{name}={value!r}: must be {kind}")
    return value


def type_of(f: dataclasses.Field) -> Any:
    """Returns the type itself, of a user's dataclass whose annotations are strings as well."""
    return _evaluated(f.type) if isinstance(f.type, str) else f.type


@cache
def _evaluated(annotation: str) -> Any:
    return eval(annotation, {"Any": Any})  # int, float, bool, str, or a tuple of them


def _is_number(value: Any, wanted: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (wanted is float or float(value).is_integer())


def expand(path: str, name: str) -> str:
    """Returns a path whose leading `~` or `~user` has become the home directory.

    A shell does that only where a word begins: `--workdir=~/runs` comes as it is written.

    Args:
      path: as the user wrote it.
      name: the flag or field that holds it.

    Raises:
      UserError: no such home is known here.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = expanded.partition("/")[0]
        raise UserError(
            f"{name}={path}: the home directory {home} is not known here; write the path in full, or ./{home}"
        )
    return expanded
