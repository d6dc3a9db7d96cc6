"""From a ConfigDict to frozen, checked dataclasses, once; inner code never sees a ConfigDict.

The dataclasses below, and the options of the registered kinds (`registry.py`), are the whole configuration: their field names are
the names on the command line (`--config.optimizer.learning_rate=0.05`), their defaults the defaults of every file in `configs/`.
Counts of steps are updates per module; a field that counts epochs says so in its name.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dgl_jax import registry
from dgl_jax.errors import UserError
from dgl_jax.fields import ALWAYS, MANY, Applies, check_value, choice, kind_of, number, option
from dgl_jax.registry import Registry, nearest

if (
    TYPE_CHECKING
):  # a library's user, who has no use for configuration files, needs no ml_collections
    from ml_collections import ConfigDict


class Group:
    """A group of fields; a kind's options derive from the group's dataclass."""

    def check(self, settings: "Settings") -> None:
        """Raises UserError if the fields do not fit together, or not to the rest of the settings."""


_IMAGES: Applies = {"task.images": (True,)}


@dataclass(frozen=True)
class DataSettings(Group):
    """Where the examples come from; `mean` and `std` empty: the data set's published ones."""

    name: str = kind_of(registry.DATA_SETS, "digits")
    batch_size: int = number(128, 2, MANY)  # of one example batch norm has no variance
    validation_fraction: float = number(
        0.1, 0.0, 0.9
    )  # of the training examples, stratified; 0: none is held out
    train_examples: int = number(
        0, 0, MANY
    )  # stratified subset of the training examples; 0: all of them
    augment: str = choice("none", "crop_flip", "inception_crop", applies=_IMAGES)
    image_size: int = number(
        0, 0, 4096, applies=_IMAGES
    )  # pixels a side after resizing; 0: as stored, of ImageNet 224
    mean: tuple[float, ...] = option((), _IMAGES)
    std: tuple[float, ...] = option((), _IMAGES)

    def check(self, settings: "Settings") -> None:
        """Raises UserError if mean and deviation are not of as many channels, or a deviation is not above 0."""
        if len(self.mean) != len(self.std):
            raise UserError(
                f"config.data.mean has {len(self.mean)} values and config.data.std {len(self.std)}"
            )
        if any(s <= 0 for s in self.std):
            raise UserError(f"config.data.std={self.std}: every value must be above 0")


@dataclass(frozen=True)
class TaskSettings(Group):
    """What the examples are, and what is asked about them."""

    name: str = kind_of(registry.TASKS, "image_classification")


@dataclass(frozen=True)
class ModelSettings(Group):
    """The network, and how it is cut into modules."""

    name: str = kind_of(registry.NETWORKS, "cnn4")
    width: int = number(64, 1, 65536)  # channels of the first block
    modules: int = number(4, 1, 4096)
    split: str = option(
        "count"
    )  # or flops, time (the slowest module as fast as possible), or first blocks such as "0,2,4"
    head: str = kind_of(
        registry.HEADS, "mlp_sr", applies={"method.local": (True,), "objective.heads": (True,)}
    )  # of every module but the last
    adapter: str = kind_of(registry.ADAPTERS, "none")  # in front of every module
    dtype: str = choice(
        "float32", "bfloat16"
    )  # of the arithmetic; parameters and batch statistics stay float32
    remat: bool = option(
        False, free=True
    )  # recompute each block in the backward pass instead of keeping what is inside it
    ops: str = choice(
        "auto", "xla"
    )  # the fastest of each platform, or XLA's alone, which have all derivatives


@dataclass(frozen=True)
class ObjectiveSettings(Group):
    """What every module minimises."""

    name: str = kind_of(registry.OBJECTIVES, "classifier")


@dataclass(frozen=True)
class MethodSettings(Group):
    """The training rule."""

    name: str = kind_of(registry.METHODS, "dgl")


@dataclass(frozen=True)
class OptimizerSettings(Group):
    """How gradients become updates, the same for all modules."""

    name: str = kind_of(registry.OPTIMIZERS, "sgd")
    learning_rate: float = number(0.1, 0.0, 1e30, exclusive=True)
    weight_decay: float = number(5e-4, 0.0, 1e6)


@dataclass(frozen=True)
class ScheduleSettings(Group):
    """The learning rate over the epochs, the same for all modules: each follows its own update count."""

    name: str = kind_of(registry.SCHEDULES, "constant")
    warmup_epochs: float = number(0.0, 0.0, 1e6)  # linear from 0, in front of any schedule


@dataclass(frozen=True)
class TrainSettings(Group):
    """How long, and on what loss."""

    epochs: float = number(50.0, 0.0, 1e6, free=True)
    steps: int = number(0, 0, MANY, free=True)  # above 0: wins over `epochs`
    accumulate: int = number(
        1, 1, MANY, free=True
    )  # micro-batches of a batch; their mean gradient makes one update
    label_smoothing: float = number(0.0, 0.0, 1.0, free=True)  # in the training loss of every head
    # Decay of the moving average of parameters that is evaluated; 0: none. It decides which arrays a checkpoint holds.
    ema: float = number(0.0, 0.0, 0.999999)


@dataclass(frozen=True)
class EngineSettings(Group):
    """Where and when modules work."""

    name: str = kind_of(registry.ENGINES, "fused")


@dataclass(frozen=True)
class ReplaySettings(Group):
    """The ring of packets at the entrance of every module but the first, in asynchronous engines."""

    size: int = number(50, 1, MANY, applies={"engine.asynchronous": (True,)})  # packets
    rule: str = kind_of(
        registry.RULES, "least_used_latest", applies={"engine.asynchronous": (True,)}
    )
    max_reuse: int = number(
        0, 0, MANY, applies={"engine.asynchronous": (True,)}
    )  # reads a packet allows; 0: any number
    # Where no packet may be read: take the turn later, or lose it.
    at_limit: str = choice(
        "wait", "skip", applies={"engine.asynchronous": (True,), "engine.continuous": (False,)}
    )


@dataclass(frozen=True)
class CodecSettings(Group):
    """What crosses between modules, and what rings hold."""

    name: str = kind_of(registry.CODECS, "identity")


@dataclass(frozen=True)
class CheckpointSettings(Group):
    """When the run is saved."""

    every: int = number(0, 0, MANY, free=True)  # steps; 0: once an epoch
    keep: int = number(
        2, 1, MANY, free=True
    )  # the newest few; the best on validation is kept besides
    # Steps after which a checkpoint holds the rings too; 0: never, resuming is then not exact.
    replay_every: int = number(1, 0, MANY, free=True, applies={"engine.asynchronous": (True,)})


@dataclass(frozen=True)
class EvalSettings(Group):
    """When the run is evaluated on the validation examples, and how."""

    every: int = number(0, 0, MANY, free=True)  # steps; 0: once an epoch
    # Between modules as in training, with the published codebooks; false: activations as they are.
    codec: bool = option(True, free=True, applies={"codec.lossless": (False,)})


@dataclass(frozen=True)
class LogSettings(Group):
    """When training metrics are written, and where to."""

    every: int = number(50, 0, MANY, free=True)  # steps; 0: once an epoch
    tensorboard: bool = option(False, free=True)


@dataclass(frozen=True)
class Settings:
    """A whole configuration. Groups with kinds hold the options of the chosen one.

    Attributes:
      ignored: by dotted name, a line for each field that was set, to another value than its default, and decides nothing here.
      unused: by dotted name, the values that were set of options of other kinds.
    """

    seed: int = number(0, 0, 2**31 - 1)
    plugins: tuple[str, ...] = option(
        (), free=True
    )  # modules to import first: they register kinds of their own
    data: DataSettings = field(default_factory=lambda: options("data"))
    task: TaskSettings = field(default_factory=lambda: options("task"))
    model: ModelSettings = field(default_factory=lambda: options("model"))
    objective: ObjectiveSettings = field(default_factory=lambda: options("objective"))
    method: MethodSettings = field(default_factory=lambda: options("method"))
    optimizer: OptimizerSettings = field(default_factory=lambda: options("optimizer"))
    schedule: ScheduleSettings = field(default_factory=lambda: options("schedule"))
    train: TrainSettings = field(default_factory=lambda: options("train"))
    engine: EngineSettings = field(default_factory=lambda: options("engine"))
    replay: ReplaySettings = field(default_factory=lambda: options("replay"))
    codec: CodecSettings = field(default_factory=lambda: options("codec"))
    checkpoint: CheckpointSettings = field(default_factory=lambda: options("checkpoint"))
    eval: EvalSettings = field(default_factory=lambda: options("eval"))
    log: LogSettings = field(default_factory=lambda: options("log"))
    ignored: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    unused: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts, lists and numbers, as `config.json` holds them."""
        return {
            f.name: json.loads(
                json.dumps(dataclasses.asdict(value) if isinstance(value, Group) else value)
            )  # type: ignore[call-overload]
            for f in dataclasses.fields(self)
            if f.compare
            for value in (getattr(self, f.name),)
        }

    def hash(self) -> str:
        """Returns twelve hexadecimal digits that two runs share if every field is equal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


_GROUPS: dict[str, type[Group]] = {
    f.name: f.type
    for f in dataclasses.fields(Settings)
    if isinstance(f.type, type) and issubclass(f.type, Group)
}
_ALONE = tuple(f for f in dataclasses.fields(Settings) if f.compare and f.name not in _GROUPS)


def default_config(plugins: Sequence[str] = ()) -> "ConfigDict":
    """Returns a ConfigDict of every field with its default, those of all kinds among them: where each file in `configs/` starts.

    Args:
      plugins: modules to import first, whose kinds may have fields of their own; kept as `config.plugins`.
    """
    from ml_collections import ConfigDict

    import_plugins(plugins)
    values: dict[str, Any] = {f.name: f.default for f in _ALONE} | {"plugins": tuple(plugins)}
    return ConfigDict(
        values
        | {group: {f.name: f.default for f in fields_of(group).values()} for group in _GROUPS}
    )


def import_plugins(names: Sequence[str]) -> None:
    """Imports modules that register kinds.

    Raises:
      UserError: one is not there, or cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"config.plugins={name!r}: no such module; install it, or put its folder on PYTHONPATH"
            ) from error


def make_settings(
    config: "Mapping[str, Any] | ConfigDict", given: Collection[str] = ()
) -> Settings:
    """Checks a configuration and freezes it; a field left out takes its default.

    Args:
      config: nested groups of fields.
      given: dotted names of fields (or groups) that somebody asked for by name: these must apply to the chosen kinds.

    Raises:
      UserError: a field is unknown (with the nearest names), of the wrong type, out of its range, or was given and does not apply.
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
    """Returns one group of a configuration, checked: `options("codec", name="vq", codes=16)`.

    Raises:
      UserError: see `make_settings`; or a field is another kind's.
    """
    unused: dict[str, Any] = {}
    made = _build(group, fields, unused)
    if unused:
        name, value = next(iter(unused.items()))
        raise UserError(
            f"config.{name}={value!r}: does not apply to config.{group}.name={made.name}"
        )
    return made


def check_name(name: str) -> None:
    """Raises UserError where neither a field nor a group of fields has this dotted name; gives the nearest names."""
    names = field_names()
    if name not in names and name not in {n.split(".")[0] for n in names}:
        raise UserError(f"--config.{name}: no such field; {nearest(name, names)}")


def differences(old: Settings, new: Settings) -> list[str]:
    """Returns the fields whose change forbids resuming, each as 'config.a.b (was X, is now Y)'.

    A field may change where one of the two configurations has no use for it: there it decides nothing.
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
            continue  # one form of checkpoint, the same numbers
        was, now = (list(value) if isinstance(value, tuple) else value for value in (was, now))
        changed.append(f"config.{name} (was {was!r}, is now {now!r})")
    return changed


def field_names() -> list[str]:
    """Returns every dotted field name, such as 'optimizer.learning_rate', those of all kinds among them."""
    return [f.name for f in _ALONE] + [
        f"{group}.{name}" for group in _GROUPS for name in fields_of(group)
    ]


def fields_of(group: str) -> dict[str, dataclasses.Field]:
    """Returns the fields of a group by name: the common ones, then those of its kinds."""
    common = {f.name: f for f in dataclasses.fields(_GROUPS[group])}  # type: ignore[arg-type]
    kinds = _kinds(group)
    options = (
        [kind.options for _, kind in kinds.items() if kind.options] if kinds is not None else []
    )
    return common | {
        f.name: f for cls in options for f in dataclasses.fields(cls) if f.name not in common
    }


def _kinds(group: str) -> Registry | None:
    """Returns the registry of the kinds that a group's `name` chooses from."""
    f = next((f for f in dataclasses.fields(_GROUPS[group]) if f.name == "name"), None)  # type: ignore[arg-type]
    return f.metadata["kinds"] if f else None


def _unmet(name: str, settings: Settings) -> tuple[str, list[str]] | None:
    """Returns the first condition that keeps a field of the chosen kinds from applying: a field, and its fitting choices."""
    group, _, leaf = name.rpartition(".")
    f = fields_of(group)[leaf] if group else None
    for other, fitting in (f.metadata["applies"] if f else ALWAYS).items():
        of, _, trait = other.partition(".")
        chosen = getattr(settings, of)
        if trait in fields_of(of):
            if (
                getattr(chosen, trait, fitting[0]) not in fitting
                and _unmet(other, settings) is None
            ):
                return other, list(fitting)
        elif getattr(_kinds(of)[chosen.name], trait) not in fitting:  # type: ignore[index]
            return f"{of}.name", [
                n for n, kind in _kinds(of).items() if getattr(kind, trait) in fitting
            ]  # type: ignore[union-attr]
    return None


def _ignored(settings: Settings, unused: Mapping[str, Any]) -> dict[str, str]:
    """Words what is set and decides nothing: options of other kinds, and fields whose conditions do not hold."""
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
                of, _, which = unmet[0].partition(".")
                chosen = getattr(getattr(settings, of), which)
                lines[name] = (
                    f"config.{name}={value!r}: applies to config.{unmet[0]}={' or '.join(unmet[1])}, not to {chosen}"
                )
    return lines


def _having(group: str, leaf: str) -> list[str]:
    """Returns the kinds of a group that have an option of this name."""
    kinds: Any = _kinds(group)
    return [
        name
        for name, kind in kinds.items()
        if kind.options and leaf in {f.name for f in dataclasses.fields(kind.options)}
    ]


def _build(group: str, config: Any, unused: dict[str, Any]) -> Any:
    """Checks a group and freezes what the chosen kind has a use for; the rest goes to `unused`, checked as well."""
    if not isinstance(config, Mapping) and not hasattr(
        config, "items"
    ):  # a ConfigDict is no Mapping
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
