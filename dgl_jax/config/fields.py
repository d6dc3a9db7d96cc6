"""Declarations of configuration fields, and the check of a value against its field."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from types import MappingProxyType
from typing import Any

from dgl_jax.config.registry import Registry, nearest
from dgl_jax.errors import UserError

MANY = 2**31 - 1  # update counts are int32 on the devices


# Conditions under which an option applies: names of other fields (`schedule.name`) or of traits of
# the chosen kinds (`engine.asynchronous`), each with the values that use the option. All conditions
# must hold; one on a field that the chosen kind does not have is ignored.
Applies = Mapping[str, Sequence[Any]]


ALWAYS: Applies = MappingProxyType({})


class _Least(int):
    def __str__(self) -> str:
        return f"{int(self)} or more"


class Minimum(tuple[int]):
    """Numbers from a least one on, as the values of a condition; the tuple has the least one."""

    def __contains__(self, number: Any) -> bool:
        return bool(number >= self[0])


class Having(Sequence[str]):
    """Names of the kinds that have a trait, as the values of a condition."""

    def __init__(self, kinds: Registry, trait: str):
        self._kinds, self._trait = kinds, trait

    def __getitem__(self, index: Any) -> Any:
        return [name for name, kind in self._kinds.items() if getattr(kind, self._trait)][index]

    def __len__(self) -> int:
        return len(self[:])


# Condition of what a single module has no use for.
SEVERAL: Applies = MappingProxyType({"model.modules": Minimum((_Least(2),))})


def option(default: Any, applies: Applies = ALWAYS, free: bool = False, **metadata: Any) -> Any:
    """Declares a field of the configuration.

    Args:
      default: default value.
      applies: conditions under which the option applies, see `Applies`; by default it always does.
        An option of a kind applies only if that kind is chosen.
      free: True if the value may change when a run is resumed, because it does not affect the
        updates made before.
      metadata: further metadata of the dataclass field.
    """
    return field(default=default, metadata={"applies": applies, "free": free, **metadata})


def choice(default: str, *others: str, **metadata: Any) -> Any:
    """Declares a field that accepts one of a few names; see `option`."""
    return option(default, choices=(default, *others), **metadata)


def kind_of(kinds: Registry, default: str, **metadata: Any) -> Any:
    """Declares a field that names a registered kind; see `option`."""
    return option(default, kinds=kinds, **metadata)


def number(
    default: float, minimum: float, maximum: float, exclusive: bool = False, **metadata: Any
) -> Any:
    """Declares a number in [minimum, maximum], or in (minimum, maximum) if `exclusive`.

    See `option` for the other arguments.
    """
    return option(default, range=(minimum, maximum, exclusive), **metadata)


def check_value(f: dataclasses.Field, value: Any, name: str) -> Any:
    """Returns a value converted to the type of its field.

    Args:
      f: field with its type and metadata.
      value: value to check.
      name: name of the field in error messages.

    Raises:
      UserError: the value has the wrong type, is out of range, or is not a known name.
    """
    wanted = type_of(f)
    if typing.get_origin(wanted) is tuple:
        element = typing.get_args(wanted)[0]
        if element is str:
            value = tuple(filter(None, value.split(","))) if isinstance(value, str) else value
            if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
                raise UserError(
                    f"{name}={value!r}: must be a tuple of names, such as ('one','other')"
                )
            return tuple(value)
        if not isinstance(value, list | tuple) or not all(_is_number(v, element) for v in value):
            raise UserError(
                f"{name}={value!r}: must be a tuple of numbers, such as ({element(1)},{element(2)})"
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
        f.metadata["kinds"][value]  # raises UserError for an unknown name
    if "range" in f.metadata:
        low, high, exclusive = f.metadata["range"]
        if not (low < value < high if exclusive else low <= value <= high):
            kind = f"above {low:g} and below {high:g}" if exclusive else f"between {low} and {high}"
            raise UserError(f"{name}={value!r}: must be {kind}")
    return value


def type_of(f: dataclasses.Field) -> Any:
    """Returns the type of a field, evaluated if the annotation is a string."""
    return _evaluated(f.type) if isinstance(f.type, str) else f.type


@cache
def _evaluated(annotation: str) -> Any:
    return eval(annotation, {"Any": Any})  # int, float, bool, str, or a tuple of them


def _is_number(value: Any, wanted: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and (wanted is float or float(value).is_integer())
    except OverflowError:  # an integer of hundreds of digits
        return False


def expand(path: str, name: str) -> str:
    """Expands a leading `~` or `~user` of a path to the home directory.

    A shell expands `~` only at the start of a word, so `--workdir=~/runs` arrives unexpanded.

    Args:
      path: path as the user wrote it.
      name: flag or field that holds the path, for the error message.

    Raises:
      UserError: the home directory is unknown.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = expanded.partition("/")[0]
        raise UserError(
            f"{name}={path}: the home directory {home} is not known here; write the path in full, "
            f"or ./{home}"
        )
    return expanded
