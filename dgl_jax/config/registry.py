"""Registries of named kinds, one for each configuration field that selects something by name.

The package registers its built-in kinds where they are defined. Users register theirs the same way:

    register_codec("mine", CodecKind(make_mine, MyOptions))

A kind is a frozen dataclass with the factory, the dataclass of its options (the fields of its
configuration group), and its traits, which decide which options apply. No other place in the
package lists names.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dgl_jax.errors import UserError


@dataclass(frozen=True)
class Kind:
    """Registry entry: the factory and the options behind a name.

    Attributes:
      make: factory; the subclass for each registry documents its arguments.
      options: dataclass with the fields of the configuration group under this name, derived from
        the common dataclass of the group; None for the common one.
    """

    make: Callable[..., Any]
    options: type | None = None


AnyKind = TypeVar("AnyKind", bound=Kind)


class Registry(Generic[AnyKind]):
    """Kinds by name, from which a field of the configuration selects one."""

    def __init__(self, field: str, provider: str):
        """Creates an empty registry.

        Args:
          field: dotted name of the configuration field, such as codec.name.
          provider: dotted name of the Python module that registers the built-in kinds. It is
            imported on the first lookup.
        """
        self.field, self._provider = field, provider
        self._kinds: dict[str, AnyKind] = {}
        self._shipped: set[str] = set()

    def register(self, name: str, kind: AnyKind) -> None:
        """Registers a kind, so that the field can select it by this name.

        Registering a name again replaces the earlier kind, unless it is built in.

        Raises:
          UserError: the name belongs to a built-in kind, or the kind has an option that another
            kind declares with a different type or default.
        """
        if name in self._shipped:
            raise UserError(
                f"config.{self.field}={name!r}: dgl_jax already defines this name; choose another"
            )
        fields = {
            f.name: f
            for other, known in self._kinds.items()
            if other != name
            for f in _options(known)
        }
        for f in _options(kind):
            same = fields.get(f.name, f)
            if (f.type, f.default) != (same.type, same.default) and f.name != "name":
                group = self.field.partition(".")[0]
                raise UserError(
                    f"config.{self.field}={name!r}: its option config.{group}.{f.name} has type "
                    f"{f.type} and default {f.default!r}, but another kind declares it with type "
                    f"{same.type} and default {same.default!r}; choose another name for the option"
                )
        self._kinds[name] = kind

    def ship(self, **kinds: AnyKind) -> None:
        """Registers built-in kinds, which users cannot replace."""
        for name, kind in kinds.items():
            self.register(name, kind)
        self._shipped |= set(kinds)

    def __getitem__(self, name: str) -> AnyKind:
        """Returns the kind registered under a name.

        Raises:
          UserError: the name is unknown; the message suggests similar names.
        """
        self._load()
        if name not in self._kinds:
            near = nearest(name, self._kinds)
            hint = (
                ""
                if near.startswith("did")
                else " (if it is your own, config.plugins must list the module that registers it)"
            )
            raise UserError(f"config.{self.field}={name!r}: no such name{hint}; {near}")
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._kinds)

    def items(self) -> list[tuple[str, AnyKind]]:
        """Returns all names with their kinds, in the order of registration."""
        return [(name, self._kinds[name]) for name in self]

    def is_shipped(self, name: str) -> bool:
        """Returns True if the name belongs to a built-in kind."""
        return name in self._shipped

    def _load(self) -> None:
        importlib.import_module(self._provider)


def _options(kind: Kind) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind.options) if kind.options is not None else ()


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns 'did you mean a or b?' for a mistyped name, or all names if none is similar."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"


DATA_SETS: Registry[Any] = Registry("data.name", "dgl_jax.data")
TASKS: Registry[Any] = Registry("task.name", "dgl_jax.tasks")
NETWORKS: Registry[Any] = Registry("model.name", "dgl_jax.models")
HEADS: Registry[Any] = Registry("model.head", "dgl_jax.models")
ADAPTERS: Registry[Any] = Registry("model.adapter", "dgl_jax.models")
OPTIMIZERS: Registry[Any] = Registry("optimizer.name", "dgl_jax.core.optimizer")
SCHEDULES: Registry[Any] = Registry("schedule.name", "dgl_jax.core.optimizer")
OBJECTIVES: Registry[Any] = Registry("objective.name", "dgl_jax.objectives")
METHODS: Registry[Any] = Registry("method.name", "dgl_jax.methods")
ENGINES: Registry[Any] = Registry("engine.name", "dgl_jax.engines")
RULES: Registry[Any] = Registry("replay.rule", "dgl_jax.replay")
CODECS: Registry[Any] = Registry("codec.name", "dgl_jax.codecs")
