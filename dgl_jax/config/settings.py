"""Conversion of a configuration to frozen, checked dataclasses.

`make_settings` converts a ConfigDict once; inner code never sees a ConfigDict. `Settings` and the
options of the registered kinds (`registry.py`) are the whole configuration.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dgl_jax.config import groups
from dgl_jax.config.fields import ALWAYS, check_value, number, option
from dgl_jax.config.registry import Registry, nearest
from dgl_jax.errors import UserError

# Library users without configuration files do not need ml_collections.
if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclass(frozen=True)
class Settings:
    """Complete configuration of a run.

    Besides the fields below it has one attribute per group. A group whose `name` chooses a
    registered kind holds the options of that kind.

    Attributes:
      seed: seed of the initial parameters, the order of the examples and all other random choices.
      plugins: Python modules to import first, which register further kinds.
      ignored: maps the dotted name of each field that was set to a non-default value but has no
        effect here to one line that explains why.
      unused: maps the dotted names of options that belong to kinds not chosen to the values that
        were set.
    """

    seed: int = number(0, 0, 2**31 - 1)
    plugins: tuple[str, ...] = option((), free=True)
    data: groups.DataSettings = field(default_factory=lambda: options("data"))
    task: groups.TaskSettings = field(default_factory=lambda: options("task"))
    model: groups.ModelSettings = field(default_factory=lambda: options("model"))
    objective: groups.ObjectiveSettings = field(default_factory=lambda: options("objective"))
    method: groups.MethodSettings = field(default_factory=lambda: options("method"))
    optimizer: groups.OptimizerSettings = field(default_factory=lambda: options("optimizer"))
    schedule: groups.ScheduleSettings = field(default_factory=lambda: options("schedule"))
    train: groups.TrainSettings = field(default_factory=lambda: options("train"))
    engine: groups.EngineSettings = field(default_factory=lambda: options("engine"))
    replay: groups.ReplaySettings = field(default_factory=lambda: options("replay"))
    codec: groups.CodecSettings = field(default_factory=lambda: options("codec"))
    checkpoint: groups.CheckpointSettings = field(default_factory=lambda: options("checkpoint"))
    eval: groups.EvalSettings = field(default_factory=lambda: options("eval"))
    log: groups.LogSettings = field(default_factory=lambda: options("log"))
    diagnostics: groups.DiagnosticsSettings = field(default_factory=lambda: options("diagnostics"))
    ignored: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    unused: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Converts the settings to nested dicts, lists and numbers, as stored in `config.json`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return json.loads(json.dumps(values, default=dataclasses.asdict))

    def hash(self) -> str:
        """Returns twelve hexadecimal digits that are equal for runs with equal fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


_GROUPS: dict[str, type[groups.Group]] = {
    f.name: f.type
    for f in dataclasses.fields(Settings)
    if isinstance(f.type, type) and issubclass(f.type, groups.Group)
}
# The fields outside of any group, such as `seed`.
_ALONE = tuple(f for f in dataclasses.fields(Settings) if f.compare and f.name not in _GROUPS)


def default_config(plugins: Sequence[str] = ()) -> "ConfigDict":
    """Returns a ConfigDict of all fields with their defaults, including the options of all kinds.

    Each file in `configs/` starts from it.

    Args:
      plugins: Python modules to import first, which may register kinds with further options; stored
        as `config.plugins`.
    """
    from ml_collections import ConfigDict

    import_plugins(plugins)
    values: dict[str, Any] = {f.name: f.default for f in _ALONE} | {"plugins": tuple(plugins)}
    return ConfigDict(
        values
        | {group: {f.name: f.default for f in fields_of(group).values()} for group in _GROUPS}
    )


def import_plugins(names: Sequence[str]) -> None:
    """Imports Python modules that register kinds.

    Args:
      names: dotted names of the modules.

    Raises:
      UserError: a module does not exist.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"config.plugins={name!r}: no such module; install it, or put its folder on "
                "PYTHONPATH"
            ) from error


def make_settings(
    config: "Mapping[str, Any] | ConfigDict", given: Collection[str] = ()
) -> Settings:
    """Checks a configuration and freezes it; missing fields take their defaults.

    Args:
      config: nested groups of fields.
      given: dotted names of fields (or names of groups) that the user set on the command line.
        These must apply to the chosen kinds; other fields that do not apply are only listed in
        `Settings.ignored`.

    Raises:
      UserError: a field is unknown (the message lists similar names), has the wrong type, is out
        of its range, or is in `given` and does not apply.
    """
    for name in config:
        if name not in _GROUPS and name not in {f.name for f in _ALONE}:
            raise UserError(f"config.{name}: no such field; {nearest(name, field_names())}")
    plugins = next(f for f in _ALONE if f.name == "plugins")
    import_plugins(check_value(plugins, config.get("plugins", ()), "config.plugins"))
    values: dict[str, Any] = {
        f.name: check_value(f, config[f.name], f"config.{f.name}")
        for f in _ALONE
        if f.name in config
    }
    unused: dict[str, Any] = {}
    for group in _GROUPS:
        values[group] = _build(group, config.get(group, {}), unused)
    settings = Settings(**values)
    settings = dataclasses.replace(settings, ignored=_ignored(settings, unused), unused=unused)
    for name, reason in settings.ignored.items():
        if name in given or name.split(".")[0] in given:
            raise UserError(reason)
    for group in _GROUPS:
        getattr(settings, group).check(settings)
    return settings


def options(group: str, **fields: Any) -> Any:
    """Builds and checks one group, such as `options("codec", name="vq", codes=16)`.

    Args:
      group: name of the group.
      **fields: values of its fields; missing ones take their defaults.

    Returns:
      An instance of the chosen kind's options, or of the group's dataclass.

    Raises:
      UserError: see `make_settings`; or a field belongs to a kind that is not chosen.
    """
    unused: dict[str, Any] = {}
    result = _build(group, fields, unused)
    if unused:
        name, value = next(iter(unused.items()))
        raise UserError(
            f"config.{name}={value!r}: does not apply to config.{group}.name={result.name}"
        )
    return result


def check_name(name: str) -> None:
    """Raises UserError, with similar names, if there is no field or group of this dotted name."""
    names = field_names()
    if name not in names and name not in {n.split(".")[0] for n in names}:
        raise UserError(f"--config.{name}: no such field; {nearest(name, names)}")


def differences(old: Settings, new: Settings) -> list[str]:
    """Lists the fields whose change forbids resuming, each as 'config.a.b (was X, is now Y)'.

    A field may change if it has no effect in one of the two configurations.

    Args:
      old: settings of the existing run.
      new: settings of its resumption.
    """
    changed = []
    for name in sorted(field_names()):
        group, _, leaf = name.rpartition(".")
        f = fields_of(group)[leaf] if group else next(f for f in _ALONE if f.name == leaf)
        sides = [getattr(settings, group) if group else settings for settings in (old, new)]
        if f.metadata["free"] or not all(hasattr(side, leaf) for side in sides):
            continue
        was, now = (getattr(side, leaf) for side in sides)
        if was == now or any(_unmet(name, settings) for settings in (old, new)):
            continue
        kinds = f.metadata.get("kinds")
        if (
            kinds is not None
            and (family := getattr(kinds[was], "family", None))
            and family == getattr(kinds[now], "family", None)
        ):
            continue  # kinds of one family share their checkpoints and compute the same numbers
        was, now = (list(value) if isinstance(value, tuple) else value for value in (was, now))
        changed.append(f"config.{name} (was {was!r}, is now {now!r})")
    return changed


def field_names() -> list[str]:
    """Lists the dotted names of all fields, such as 'optimizer.learning_rate', and all options."""
    return [f.name for f in _ALONE] + [
        f"{group}.{name}" for group in _GROUPS for name in fields_of(group)
    ]


def values_of(settings: Settings, effective: bool = False) -> dict[str, Any]:
    """Returns the values of all fields that the chosen kinds have, by dotted name.

    Args:
      settings: the settings.
      effective: True leaves out fields that have no effect together with the others.
    """
    values = {}
    for name in field_names():
        group, _, leaf = name.rpartition(".")
        owner = getattr(settings, group) if group else settings
        if hasattr(owner, leaf) and not (effective and _unmet(name, settings)):
            values[name] = getattr(owner, leaf)
    return values


def fields_of(group: str) -> dict[str, dataclasses.Field]:
    """Returns the fields of a group by name: the common ones, then the options of its kinds."""
    common = {f.name: f for f in dataclasses.fields(_GROUPS[group])}  # type: ignore[arg-type]
    kinds = _kinds(group)
    classes = (
        [kind.options for _, kind in kinds.items() if kind.options] if kinds is not None else []
    )
    return common | {
        f.name: f for cls in classes for f in dataclasses.fields(cls) if f.name not in common
    }


def _kinds(group: str) -> Registry | None:
    """Returns the registry that a group's field `name` chooses from; None without such a field."""
    f = next((f for f in dataclasses.fields(_GROUPS[group]) if f.name == "name"), None)  # type: ignore[arg-type]
    return f.metadata["kinds"] if f else None


def _unmet(name: str, settings: Settings) -> tuple[str, list[str]] | None:
    """Finds the first condition (`fields.Applies`) because of which a field does not apply.

    Args:
      name: dotted name of a field that the chosen kinds have.
      settings: decide whether the conditions hold.

    Returns:
      The dotted name of the field to change and the values with which `name` applies; None if all
      conditions hold.
    """
    group, _, leaf = name.rpartition(".")
    f = fields_of(group)[leaf] if group else None
    for condition, fitting in (f.metadata["applies"] if f else ALWAYS).items():
        other_group, _, trait = condition.partition(".")
        chosen = getattr(settings, other_group)
        # A condition names either another field or a trait of the kind chosen in another group. A
        # field that does not itself apply imposes no condition.
        if trait in fields_of(other_group):
            if (
                getattr(chosen, trait, fitting[0]) not in fitting
                and _unmet(condition, settings) is None
            ):
                return condition, list(fitting)
            continue
        kinds: Any = _kinds(other_group)
        if getattr(kinds[chosen.name], trait) not in fitting:
            names = [n for n, kind in kinds.items() if getattr(kind, trait) in fitting]
            return f"{other_group}.name", names
    return None


def _ignored(settings: Settings, unused: Mapping[str, Any]) -> dict[str, str]:
    """Explains each field that is set but has no effect, see `Settings.ignored`.

    These are options of kinds that are not chosen, and fields whose conditions do not hold.
    """
    lines = {}
    for group in _GROUPS:
        for leaf, f in fields_of(group).items():
            name = f"{group}.{leaf}"
            value = (
                unused[name]
                if name in unused
                else getattr(getattr(settings, group), leaf, f.default)
            )
            unmet = None
            if value != f.default:
                unmet = (
                    (f"{group}.name", _having(group, leaf))
                    if name in unused
                    else _unmet(name, settings)
                )
            if unmet:
                condition, fitting = unmet
                other_group, _, other_leaf = condition.partition(".")
                chosen = getattr(getattr(settings, other_group), other_leaf)
                lines[name] = (
                    f"config.{name}={value!r}: applies to config.{condition}="
                    f"{' or '.join(map(str, fitting))}, not to {chosen}"
                )
    return lines


def _having(group: str, leaf: str) -> list[str]:
    """Lists the kinds of a group that have an option of this name."""
    kinds: Any = _kinds(group)
    return [
        name
        for name, kind in kinds.items()
        if kind.options and leaf in {f.name for f in dataclasses.fields(kind.options)}
    ]


def _build(group: str, config: Any, unused: dict[str, Any]) -> Any:
    """Checks a group and builds the options of the chosen kind.

    Options of other kinds are checked as well and are moved to `unused`.
    """
    # A ConfigDict is not a Mapping, hence the second test.
    if not isinstance(config, Mapping) and not hasattr(config, "items"):
        raise UserError(f"config.{group}={config!r}: a group of fields, not a value")
    fields, cls, values = fields_of(group), _GROUPS[group], {}
    for name in config:
        if name not in fields:
            raise UserError(
                f"config.{group}.{name}: no such field; {nearest(f'{group}.{name}', field_names())}"
            )
        values[name] = check_value(fields[name], config[name], f"config.{group}.{name}")
    kinds = _kinds(group)
    if kinds is not None:
        chosen = values.get("name", fields["name"].default)
        cls = kinds[chosen].options or cls
        used = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unused |= {f"{group}.{name}": values.pop(name) for name in [*values] if name not in used}
    return cls(**values)
