"""Generates `config.md`, the reference of all configuration fields, from their dataclasses.

    python docs/generate_config.py            # writes docs/config.md
    python docs/generate_config.py --check    # exits with status 1 if the file is out of date

A field is described where it is declared: by its entry in the `Attributes:` section of its class. A
field without a description is an error.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from dgl_jax import config
from dgl_jax.config.fields import MANY, type_of
from dgl_jax.config.registry import Kind, Registry

PAGE = Path(__file__).with_name("config.md")

_HEAD = """\
<!-- Generated: edit the dataclasses that declare the fields, then run `make reference`. -->

# Configuration reference

Every field can be set in a configuration file (`config.optimizer.learning_rate = 0.05`) or on the
command line (`--config.optimizer.learning_rate=0.05`). If a field does not apply to the chosen
kinds, the command line refuses it, and a value from a file is ignored with a line in the log. A
field marked "yes" in the last column may change when a run is resumed.
"""
_COLUMNS = (
    "field",
    "type",
    "values",
    "default",
    "applies to",
    "description",
    "may change on resume",
)


@dataclass(frozen=True)
class Entry:
    """Row of the reference: a field and the kinds that have it.

    Attributes:
      group: name of the configuration group; "" for a field outside the groups.
      field: the declaration.
      owner: class that declares the field.
      kinds: names of the kinds that have the field; empty if all kinds of the group do.
    """

    group: str
    field: dataclasses.Field
    owner: type
    kinds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns the dotted name, as on the command line."""
        return f"{self.group}.{self.field.name}" if self.group else self.field.name


def page() -> str:
    """Returns the text of the reference.

    Raises:
      ValueError: a field has no description; the message names all such fields.
    """
    sections, missing = [_HEAD], []
    for group, cls, entries in groups():
        rows = []
        for entry in entries:
            text = descriptions(entry.owner).get(entry.field.name, "")
            if not text:
                missing.append(f"config.{entry.name} ({entry.owner.__qualname__})")
            rows.append(_row(entry, text))
        intro = f"\n{summary(cls)}\n" if cls is not config.Settings else ""
        sections.append(f"\n## {group}\n{intro}\n" + _table(rows))
    if missing:
        raise ValueError("fields without an entry under `Attributes:`: " + ", ".join(missing))
    return "".join(sections)


def groups() -> Iterator[tuple[str, type, list[Entry]]]:
    """Yields the name, the class and the rows of each section, in the order of `Settings`."""
    for f in dataclasses.fields(config.Settings):
        if f.name in _group_classes():
            yield f.name, _group_classes()[f.name], _entries(f.name, _group_classes()[f.name])
        elif f.compare:  # the others are derived, not set by users
            yield f.name, config.Settings, [Entry("", f, config.Settings)]


@cache
def _group_classes() -> dict[str, type]:
    types = {f.name: type_of(f) for f in dataclasses.fields(config.Settings) if f.compare}
    return {
        name: cls
        for name, cls in types.items()
        if isinstance(cls, type) and issubclass(cls, config.Group)
    }


def _entries(group: str, cls: type) -> list[Entry]:
    """Returns the common fields of a group, then the options of its kinds, each option once."""
    common = {f.name: f for f in dataclasses.fields(cls)}
    entries = [Entry(group, f, cls) for f in common.values()]
    kinds = dict(shipped(common["name"].metadata["kinds"])) if "name" in common else {}
    owners: dict[tuple[str, type], list[str]] = {}
    declared: dict[tuple[str, type], dataclasses.Field] = {}
    for name, kind in kinds.items():
        for f in dataclasses.fields(kind.options) if kind.options else ():
            if f.name not in common:
                key = (f.name, _owner(kind.options, f.name))
                owners.setdefault(key, []).append(name)
                declared[key] = f
    return entries + [Entry(group, f, key[1], tuple(owners[key])) for key, f in declared.items()]


def shipped(kinds: Registry) -> list[tuple[str, Kind]]:
    """Returns the kinds of a registry that the package itself provides."""
    return [(name, kind) for name, kind in kinds.items() if kinds.is_shipped(name)]


def _owner(cls: type, name: str) -> type:
    """Returns the class whose body declares the field."""
    return next(base for base in cls.__mro__ if name in inspect.get_annotations(base))


def descriptions(cls: type) -> dict[str, str]:
    """Returns the description of each field that a class declares, as one sentence on one line."""
    return {name: _sentence(text) for name, text in _attributes(cls).items() if text.strip()}


def _attributes(cls: type) -> dict[str, str]:
    """Parses the `Attributes:` section of a docstring; an entry may name several fields."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    section = re.search(r"^Attributes:\n((?:(?:[ \t]+.*)?\n?)*)", text, re.M)
    sentences: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent(section[1]).splitlines() if section else ():
        if entry := re.match(r"([\w`]+(?:, [\w`]+)*)(?: \([^)]*\))?:\s*(.*)", line):
            names = [name.strip("`") for name in entry[1].split(", ")]
            sentences |= dict.fromkeys(names, entry[2])
        elif line.strip():
            sentences |= {name: f"{sentences[name]} {line.strip()}" for name in names}
    return sentences


def summary(cls: type) -> str:
    """Returns the first paragraph of a class's docstring, without "Group `name`:" in front."""
    text = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return _sentence(re.sub(r"^Group `\w+`:", "", text))


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def _row(entry: Entry, text: str) -> tuple[str, ...]:
    f = entry.field
    return (
        f"`{entry.name}`",
        type_name(type_of(f)),
        values(f),
        f"`{literal(f.default)}`",
        conditions(entry),
        text,
        "yes" if f.metadata["free"] else _exchangeable(f) or "no",
    )


def _exchangeable(f: Any) -> str:
    """Returns which kinds of a field a resumed run may exchange, because they are one family."""
    families: dict[str, list[str]] = {}
    for name, kind in shipped(f.metadata["kinds"]) if "kinds" in f.metadata else ():
        if family := getattr(kind, "family", ""):
            families.setdefault(family, []).append(f"`{name}`")
    return "; ".join(f"between {' and '.join(names)}" for names in families.values())


def type_name(wanted: Any) -> str:
    """Returns a type in words, such as "tuple of int"."""
    if typing.get_origin(wanted) is tuple:
        return f"tuple of {typing.get_args(wanted)[0].__name__}"
    return wanted.__name__


def literal(value: Any) -> str:
    """Returns a value in the form that a configuration file has it in."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def values(f: dataclasses.Field) -> str:
    """Returns the range or the choices of a field."""
    if "kinds" in f.metadata:
        return ", ".join(f"`{name}`" for name, _ in shipped(f.metadata["kinds"]))
    if "choices" in f.metadata:
        return ", ".join(f"`{name}`" for name in f.metadata["choices"])
    if "range" not in f.metadata:
        return "`True`, `False`" if type_of(f) is bool else "any"
    low, high, exclusive = f.metadata["range"]
    if high >= min(MANY, 1e9):
        return f"{'above' if exclusive else 'at least'} {low:g}"
    return f"above {low:g}, below {high:,g}" if exclusive else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else repr(value)


def conditions(entry: Entry) -> str:
    """Returns the kinds that a field applies to, and the further conditions on other fields."""
    fitting: dict[str, list[Any]] = {}
    if entry.kinds:
        fitting[f"{entry.group}.name"] = list(entry.kinds)
    for other, chosen in entry.field.metadata["applies"].items():
        group, _, trait = other.partition(".")
        if trait in config.fields_of(group):
            fitting[other] = list(chosen)
        else:
            kinds = shipped(config.fields_of(group)["name"].metadata["kinds"])
            before = fitting.get(f"{group}.name", [name for name, _ in kinds])
            fit = [name for name, kind in kinds if getattr(kind, trait) in chosen]
            if len(fit) < len(kinds):
                fitting[f"{group}.name"] = [name for name in before if name in fit]
    return " and ".join(_any_of(name, values) for name, values in fitting.items()) or "all"


def _any_of(name: str, fitting: typing.Iterable[Any]) -> str:
    return f"`{name}`: " + ", ".join(f"`{value}`" for value in fitting)


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main(arguments: list[str]) -> int:
    """Writes the page, or checks it; returns the exit status."""
    text = page()
    if arguments == ["--check"]:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not current:
            print(f"{PAGE.name} is out of date: run `make reference`", file=sys.stderr)
        return int(not current)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
