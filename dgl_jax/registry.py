"""Maps the names in a configuration to what they stand for: one registry for each field that chooses by name.

The package registers its own kinds where they are defined, and users register theirs in the same way:

    register_codec("mine", CodecKind(make_mine, MyOptions))

A kind is a frozen dataclass that holds the factory, the dataclass of its options (the fields of its configuration group), and its
traits, which decide what applies to it. Nothing else in the package lists names.
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
    """What a name stands for.

    Attributes:
      make: the factory; each registry's own class of kinds says how it is called.
      options: dataclass of the group's fields under this name, derived from the group's common one; None: the common one.
    """

    make: Callable[..., Any]
    options: type | None = None


AnyKind = TypeVar("AnyKind", bound=Kind)


class Registry(Generic[AnyKind]):
    """The kinds that a field of the configuration chooses from."""

    def __init__(self, field: str, room: str):
        """Begins empty.

        Args:
          field: the dotted name of the field, such as codec.name.
          room: the module that registers the package's own kinds; it is imported at the first look.
        """
        self.field, self._room = field, room
        self._kinds: dict[str, AnyKind] = {}
        self._own: set[str] = set()

    def register(self, name: str, kind: AnyKind) -> None:
        """Adds a kind: from here on the field chooses it by this name.

        Registering a name again replaces a kind of the user's.

        Raises:
          UserError: the package has a kind of this name, or an option has the name of another kind's option and another type or
            default.
        """
        if name in self._own:
            raise UserError(
                f"config.{self.field}={name!r}: the package has one of this name; choose another"
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
                    f"config.{self.field}={name!r}: its option config.{group}.{f.name} is {f.type} with the default "
                    f"{f.default!r}, and another kind's is {same.type} with {same.default!r}; choose another name for it"
                )
        self._kinds[name] = kind

    def ship(self, **kinds: AnyKind) -> None:
        """Registers kinds of the package itself, which nobody may replace."""
        for name, kind in kinds.items():
            self.register(name, kind)
        self._own |= set(kinds)

    def __getitem__(self, name: str) -> AnyKind:
        """Returns the kind of that name.

        Raises:
          UserError: there is none; gives the nearest names.
        """
        self._load()
        if name not in self._kinds:
            near = nearest(name, self._kinds)
            own = (
                ""
                if near.startswith("did")
                else " (one of your own is registered by a module that config.plugins names)"
            )
            raise UserError(f"config.{self.field}={name!r}: no such name{own}; {near}")
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._kinds)

    def items(self) -> list[tuple[str, AnyKind]]:
        """Returns all names with their kinds, in the order of registration."""
        return [(name, self._kinds[name]) for name in self]

    def is_shipped(self, name: str) -> bool:
        """Tells whether a kind is the package's own."""
        return name in self._own

    def _load(self) -> None:
        importlib.import_module(self._room)


def _options(kind: Kind) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind.options) if kind.options is not None else ()


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns 'did you mean a or b?' for a mistyped name, or the whole list if nothing is near."""
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
