"""From a ConfigDict to frozen, checked dataclasses, once; inner code never sees a ConfigDict.

The dataclasses below are the whole configuration: their field names are the names on the command line
(`--config.optimizer.learning_rate=0.05`), their defaults the defaults of every file in `configs/`. Counts of steps are updates per
module; a field that counts epochs says so in its name.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dgl_jax.errors import UserError

if TYPE_CHECKING:  # a library's user, who has no use for configuration files, needs no ml_collections
    from ml_collections import ConfigDict

# What differs freely between a run and its resumption: none of these changes what was learnt up to the checkpoint. (Another
# length does change what a cosine will do from there on: the run says so when it goes on.)
FREE_ON_RESUME = (
    "train.*",
    "checkpoint.*",
    "eval.*",
    "log.*",
    "model.remat",
    "data.dir",
    "data.manual_dir",
    "data.workers",
    "engine.group_sizes",
    "engine.ticks_in_flight",
    "engine.restart_workers",
    "engine.watchdog_seconds",
)
# But for what decides which arrays a checkpoint holds.
FIXED_ON_RESUME = ("train.ema",)
# Engines that share one checkpoint form and give the same numbers.
INTERCHANGEABLE_ENGINES = ("fused", "pipeline")

_type: Callable[[dataclasses.Field], Any] = attrgetter("type")  # the type itself, as this file's annotations are no strings
_MANY = 2**31 - 1  # update counts are int32 on the devices


# What an option applies to: fields that choose a kind, each with the choices that have a use for the option. All must hold, but for
# a field that does not apply itself.
Applies = Mapping[str, tuple[str, ...]]
_ALWAYS: Applies = MappingProxyType({})
_ASYNCHRONOUS: Applies = {"engine.name": ("simulated", "threads")}
_SIMULATED: Applies = {"engine.name": ("simulated",)}
_THREADS: Applies = {"engine.name": ("threads",)}
_SYNCHRONOUS: Applies = {"engine.name": ("fused", "pipeline", "backprop")}
_PLACED: Applies = {"engine.name": ("fused", "pipeline", "threads", "backprop")}
_LOCAL: Applies = {"engine.name": ("fused", "pipeline", "simulated", "threads")}
_LOSSY: Applies = {"codec.name": ("bf16", "int8", "vq")}
_GROUPS: Applies = {"codec.name": ("int8", "vq")}
_VQ: Applies = {"codec.name": ("vq",)}
_SGD: Applies = {"optimizer.name": ("sgd",)}
_STEP: Applies = {"schedule.name": ("step",)}
_STORED: Applies = {"data.name": ("digits", "cifar10", "cifar100", "imagenet", "imagenette", "folder")}
_FETCHED: Applies = {"data.name": ("cifar10", "cifar100", "imagenet", "imagenette")}
_DECODED: Applies = {"data.name": ("imagenet", "imagenette")}


def _option(default: Any, applies: Applies, **metadata: Any) -> Any:
    return field(default=default, metadata={"applies": applies, **metadata})


def _choice(default: str, *others: str, applies: Applies = _ALWAYS) -> Any:
    return _option(default, applies, choices=(default, *others))


def _number(default: float, minimum: float, maximum: float, exclusive: bool = False, applies: Applies = _ALWAYS) -> Any:
    """Declares a number in [minimum, maximum], or in (minimum, maximum) where `exclusive`."""
    return _option(default, applies, range=(minimum, maximum, exclusive))


@dataclass(frozen=True)
class DataSettings:
    """Where the images come from. `dir` empty: the project's own cache; `mean` and `std` empty: the data set's published ones."""

    name: str = _choice("digits", "cifar10", "cifar100", "imagenet", "imagenette", "folder", "synthetic")
    dir: str = _option("", _STORED)
    manual_dir: str = _option("", _FETCHED)  # archives fetched by hand; empty: <dir>/downloads/manual
    # Processes that decode images of sets too large for memory; 0: threads of this one.
    workers: int = _number(0, 0, 1024, applies=_DECODED)
    batch_size: int = _number(128, 2, _MANY)  # of one image batch norm has no variance
    validation_fraction: float = _number(0.1, 0.0, 0.9)  # of the training images, stratified; 0: none is held out
    train_examples: int = _number(0, 0, _MANY)  # stratified subset of the training images; 0: all of them
    augment: str = _choice("none", "crop_flip", "inception_crop")
    image_size: int = _number(0, 0, 4096)  # pixels a side after resizing; 0: as stored, of ImageNet 224
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelSettings:
    name: str = "cnn4"  # a network of `dgl_jax.models`, or one that `dgl_jax.models.register` has added
    width: int = _number(64, 1, 65536)  # channels of the first block
    modules: int = _number(4, 1, 4096)
    split: str = "count"  # or flops, time (the slowest module as fast as possible), or first blocks such as "0,2,4"
    head: str = _choice("mlp_sr", "mlp", "cnn", "linear", applies=_LOCAL)  # of every module but the last
    dtype: str = _choice("float32", "bfloat16")  # of the arithmetic; parameters and batch statistics stay float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping what is inside it
    ops: str = _choice("auto", "xla")  # the fastest of each platform, or XLA's alone, which have all derivatives


@dataclass(frozen=True)
class OptimizerSettings:
    name: str = _choice("sgd", "adam")
    learning_rate: float = _number(0.1, 0.0, 1e30, exclusive=True)
    momentum: float = _number(0.9, 0.0, 1.0, applies=_SGD)
    nesterov: bool = _option(False, _SGD)
    weight_decay: float = _number(5e-4, 0.0, 1e6)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the epochs, the same for all modules: each follows its own update count."""

    name: str = _choice("constant", "step", "cosine")
    # Epochs after which the rate is multiplied by `factor`.
    boundaries: tuple[float, ...] = _option((15.0, 30.0, 45.0), _STEP)
    factor: float = _number(0.2, 0.0, 1.0, applies=_STEP)
    warmup_epochs: float = _number(0.0, 0.0, 1e6)  # linear from 0, in front of any schedule


@dataclass(frozen=True)
class TrainSettings:
    epochs: float = _number(50.0, 0.0, 1e6)
    steps: int = _number(0, 0, _MANY)  # above 0: wins over `epochs`
    accumulate: int = _number(1, 1, _MANY)  # micro-batches that a batch is split into; their mean gradient makes one update
    label_smoothing: float = _number(0.0, 0.0, 1.0)  # in the training loss of every head
    ema: float = _number(0.0, 0.0, 0.999999)  # decay of the moving average of parameters that is evaluated; 0: none


@dataclass(frozen=True)
class EngineSettings:
    name: str = _choice("fused", "pipeline", "simulated", "threads", "backprop")
    group_sizes: tuple[int, ...] = _option((), _PLACED)  # devices of each module; empty: as equal as the devices allow
    ticks_in_flight: int = _number(2, 1, 64, applies=_SYNCHRONOUS)  # how far the host runs ahead of the devices
    slowdown: tuple[float, ...] = _option((), {**_ASYNCHRONOUS, "engine.order": ("random",)})  # of each module, at least 1
    order: str = _choice("random", "ordered", applies=_SIMULATED)  # drawn in proportion to 1 / slowdown, or one after the other
    finished: str = _choice("train", "eval", applies=_ASYNCHRONOUS)  # batch norm of a module that is done and only feeds
    restart_workers: bool = _option(False, _THREADS)  # a module that fails goes on from its newest checkpoint
    watchdog_seconds: float = _number(600.0, 0.0, 1e9, applies=_THREADS)  # without progress, then it is reported; 0: never


@dataclass(frozen=True)
class ReplaySettings:
    """The ring of packets at the entrance of every module but the first, in asynchronous engines."""

    size: int = _number(50, 1, _MANY, applies=_ASYNCHRONOUS)  # packets
    rule: str = _choice("least_used_latest", "fifo", "uniform", "released", applies=_ASYNCHRONOUS)
    max_reuse: int = _number(0, 0, _MANY, applies=_ASYNCHRONOUS)  # reads a packet allows; 0: any number
    # Where no packet may be read: take the turn later, or lose it.
    at_limit: str = _choice("wait", "skip", applies=_SIMULATED)


@dataclass(frozen=True)
class CodecSettings:
    """What crosses between modules, and what rings hold."""

    name: str = _choice("identity", "bf16", "int8", "vq")
    dims: int = _number(8, 1, 65536, applies=_GROUPS)  # channels a group
    codes: int = _number(256, 1, 65536, applies=_VQ)  # entries of a group's codebook
    stages: int = _number(1, 1, 64, applies=_VQ)  # each codes what the ones before left over, with as many bits again
    start: str = _choice("kmeans++", "sample", applies=_VQ)  # from the first batch
    rule: str = _choice("ema", "minibatch", applies=_VQ)  # a moving average, or mini-batch k-means
    decay: float = _number(0.9, 0.0, 1.0, applies=_VQ)  # of the moving averages
    # Weight of an entry's old value, in units of the mean count.
    smoothing: float = _number(1e-5, 0.0, 1.0, applies={**_VQ, "codec.rule": ("ema",)})
    restart: float = _number(0.01, 0.0, 1.0, applies=_VQ)  # an entry used less than this share of the mean begins anew
    samples: int = _number(8, 0, _MANY, applies=_VQ)  # vectors a code that an update looks at; 0: all of the batch
    # Steps; 0: so that codebooks take under a tenth of the codes' bytes.
    codebook_every: int = _number(0, 0, _MANY, applies=_VQ)
    # With the codebook a packet was encoded with when it entered the ring, or the newest.
    decode: str = _choice("sent", "latest", applies={**_VQ, **_ASYNCHRONOUS})


@dataclass(frozen=True)
class CheckpointSettings:
    every: int = _number(0, 0, _MANY)  # steps; 0: once an epoch
    keep: int = _number(2, 1, _MANY)  # the newest few; the best on validation is kept besides
    # Steps after which a checkpoint holds the rings too; 0: never, resuming is then not exact.
    replay_every: int = _number(1, 0, _MANY, applies=_ASYNCHRONOUS)


@dataclass(frozen=True)
class EvalSettings:
    every: int = _number(0, 0, _MANY)  # steps; 0: once an epoch
    # Between modules as in training, with the published codebooks; false: activations as they are.
    codec: bool = _option(True, _LOSSY)


@dataclass(frozen=True)
class LogSettings:
    every: int = _number(50, 0, _MANY)  # steps; 0: once an epoch
    tensorboard: bool = False


@dataclass(frozen=True)
class Settings:
    seed: int = _number(0, 0, 2**31 - 1)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    codec: CodecSettings = field(default_factory=CodecSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, lists and numbers, as `config.json` holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def hash(self) -> str:
        """Twelve hexadecimal digits that two runs share when every field is equal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


def default_config() -> "ConfigDict":
    """A ConfigDict of every field with its default: where each file in `configs/` starts."""

    from ml_collections import ConfigDict

    def unwrap(cls: type) -> dict[str, Any]:
        values = {}
        for f in dataclasses.fields(cls):
            values[f.name] = unwrap(_type(f)) if dataclasses.is_dataclass(_type(f)) else f.default
        return values

    return ConfigDict(unwrap(Settings))


def make_settings(config: "Mapping[str, Any] | ConfigDict", given: Collection[str] = ()) -> Settings:
    """Checks a configuration and freezes it; a field left out takes its default.

    Args:
      config: nested groups of fields.
      given: dotted names of fields (or groups) that somebody asked for by name: these must apply to the chosen kinds.

    Raises:
      UserError: a field is unknown (with the nearest names), of the wrong type, out of its range, or was given and does not apply.
    """
    settings = _build(Settings, config, "")
    for name, reason in not_applicable(settings).items():
        if name in given or name.split(".")[0] in given:
            raise UserError(reason)
    schedule = settings.schedule
    if list(schedule.boundaries) != sorted(set(schedule.boundaries)) or any(not 0 < b <= 1e6 for b in schedule.boundaries):
        raise UserError(
            f"config.schedule.boundaries={schedule.boundaries}: epochs must be positive and increasing, and below a million"
        )
    if len(settings.data.mean) != len(settings.data.std):
        raise UserError(f"config.data.mean has {len(settings.data.mean)} values and config.data.std {len(settings.data.std)}")
    if any(s <= 0 for s in settings.data.std):
        raise UserError(f"config.data.std={settings.data.std}: every value must be above 0")
    slowdown = settings.engine.slowdown
    if slowdown and (len(slowdown) != settings.model.modules or min(slowdown) < 1):
        raise UserError(f"config.engine.slowdown={slowdown}: one factor of at least 1 for each of {settings.model.modules} modules")
    if any(n < 1 for n in settings.engine.group_sizes):
        raise UserError(f"config.engine.group_sizes={settings.engine.group_sizes}: every module needs at least one device")
    return settings


def not_applicable(settings: Settings) -> dict[str, str]:
    """Returns the fields that are set, to another value than their default, and that nothing chosen here has a use for.

    Returns:
      By dotted name, one line each: the value, and what the field applies to.
    """
    values, defaults = (dict(_flatten(dataclasses.asdict(s))) for s in (settings, Settings()))
    return {
        name: f"config.{name}={value!r}: applies to config.{unmet[0]}={' or '.join(unmet[1])}, not to {values[unmet[0]]}"
        for name, value in values.items()
        if value != defaults[name] and (unmet := _unmet(name, values))
    }


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """' Did you mean a, b?' for a mistyped name, or the whole list where nothing is near."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}"


def check_name(name: str) -> None:
    """Raises UserError where neither a field nor a group of fields has this dotted name; gives the nearest names."""
    names = field_names()
    if name not in names and name not in {n.split(".")[0] for n in names}:
        raise UserError(f"--config.{name}: no such field; {nearest(name, names)}")


def differences(old: Mapping[str, Any], new: Settings) -> list[str]:
    """Returns the fields whose change forbids resuming, each as 'config.a.b (was X, is now Y)'.

    A field may change where one of the two configurations has no use for it: there it decides nothing.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new.to_dict()))
    # A field that the older run did not know had its default then.
    before = dict(_flatten(Settings().to_dict())) | before
    changed = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        free = name in FREE_ON_RESUME or (f"{name.split('.')[0]}.*" in FREE_ON_RESUME and name not in FIXED_ON_RESUME)
        swapped = name == "engine.name" and {was, now} <= set(INTERCHANGEABLE_ENGINES)
        used = all(_unmet(name, values) is None for values in (before, after))
        if was != now and used and not free and not swapped:
            changed.append(f"config.{name} (was {was!r}, is now {now!r})")
    return changed


def field_names() -> list[str]:
    """Returns every dotted field name, such as 'optimizer.learning_rate'."""
    return [name for name, _ in _leaves()]


def _leaves(cls: type = Settings, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(_type(f)):
            yield from _leaves(_type(f), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def _unmet(name: str, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Returns the first condition that keeps a field from applying to flat `values`: a field and its fitting choices."""
    for kind, fitting in _CONDITIONS.get(name, {}).items():
        if values[kind] not in fitting and _unmet(kind, values) is None:
            return kind, fitting
    return None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _build(cls: type, config: Any, prefix: str) -> Any:
    if not isinstance(config, Mapping) and not hasattr(config, "items"):  # a ConfigDict is no Mapping
        raise UserError(f"config.{prefix[:-1]}={config!r}: a group of fields, not a value")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in config:
        if name not in fields:
            near = nearest(prefix + name, field_names())
            raise UserError(f"config.{prefix}{name}: no such field; {near}")
    values = {}
    for name, f in fields.items():
        if name not in config:
            continue
        if dataclasses.is_dataclass(_type(f)):
            values[name] = _build(_type(f), config[name], f"{prefix}{name}.")
        else:
            values[name] = _check(f, config[name], f"config.{prefix}{name}")
    return cls(**values)


def _check(f: dataclasses.Field, value: Any, name: str) -> Any:
    wanted = _type(f)
    if typing.get_origin(wanted) is tuple:
        element = typing.get_args(wanted)[0]
        if not isinstance(value, list | tuple) or not all(_is_number(v, element) for v in value):
            raise UserError(f"{name}={value!r}: a tuple of numbers, such as ({element(1)},{element(2)})")
        return tuple(element(v) for v in value)
    if wanted in (int, float):
        if not _is_number(value, wanted):
            raise UserError(f"{name}={value!r}: {'a whole number' if wanted is int else 'a number'} is needed")
        value = wanted(value)
    elif not isinstance(value, wanted):
        raise UserError(f"{name}={value!r}: a {wanted.__name__} is needed, not a {type(value).__name__}")
    choices = f.metadata.get("choices")
    if choices and value not in choices:
        raise UserError(f"{name}={value!r}: no such name; {nearest(value, choices)}")
    if "range" in f.metadata:
        low, high, exclusive = f.metadata["range"]
        if not (low < value < high if exclusive else low <= value <= high):
            kind = f"above {low:g} and below {high:g}" if exclusive else f"between {low} and {high}"
            raise UserError(f"{name}={value!r}: must be {kind}")
    return value


_CONDITIONS: dict[str, Applies] = {name: f.metadata.get("applies", _ALWAYS) for name, f in _leaves()}


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
        raise UserError(f"{name}={path}: the home directory {home} is not known here; write the path in full, or ./{home}")
    return expanded
