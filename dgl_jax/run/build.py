"""Construction of a run from its settings: data, network, modules, engine. Writes no files."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import optax

from dgl_jax import system
from dgl_jax.codecs import make_codec
from dgl_jax.config import Settings
from dgl_jax.config.registry import DATA_SETS, ENGINES, METHODS
from dgl_jax.core.module import make_modules
from dgl_jax.core.optimizer import make_optimizer, make_schedule
from dgl_jax.data import Source, StoredSource
from dgl_jax.data.info import DatasetInfo
from dgl_jax.engines import Engine, world
from dgl_jax.engines.base import EngineInputs
from dgl_jax.engines.feed import Residence
from dgl_jax.errors import UserError
from dgl_jax.models import BALANCED, BlockCosts, cuts
from dgl_jax.objectives import Classifier, Transport
from dgl_jax.profile.flops import Blocks, block_flops
from dgl_jax.profile.timing import block_times
from dgl_jax.run.due import Due
from dgl_jax.run.hosts import open_source, share_source
from dgl_jax.run.parts import (
    adapters,
    check_residuals,
    known_info,
    make_blocks,
    make_task,
    make_whole,
    objective,
)
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A training run that is ready to start.

    Attributes:
      settings: configuration of the run.
      source: batches of the data set.
      info: description of the data set that is stored in every checkpoint.
      spec: device-independent description of the training.
      engine: engine that runs the modules on their devices.
      schedule: learning rate as a function of the update count.
      total_steps: number of updates that every module has at the end.
    """

    settings: Settings
    source: Source
    info: DatasetInfo
    spec: TrainSpec
    engine: Engine
    schedule: optax.Schedule
    total_steps: int


def make_experiment(
    settings: Settings,
    devices: Sequence[jax.Device] | None = None,
    first_blocks: Sequence[int] = (),
    info: DatasetInfo | None = None,
) -> Experiment:
    """Builds all parts of a run and checks that they fit together.

    Args:
      settings: configuration of the run.
      devices: devices to use; by default all that JAX finds.
      first_blocks: index of the first block of each module, if an earlier part of the run has
        chosen the cuts; by default they are chosen now.
      info: description of the data set from an earlier part of the run. Its mean and standard
        deviation are used in place of the ones measured now.

    Returns:
      The experiment.

    Raises:
      UserError: the data are missing, damaged or differ from `info`, or data, network and devices
        do not fit together.
    """
    # A number of steps is there to replace the epochs of a configuration file.
    if ignored := [text for name, text in settings.ignored.items() if name != "train.epochs"]:
        _LOG.info("set but ignored: %s", "; ".join(ignored))
    devices = devices or jax.devices()
    kind = DATA_SETS[settings.data.name]
    if kind.layout is not None:
        # Report a task that does not fit the data set before anything is downloaded.
        make_task(settings, known_info(settings.data))
    source = open_source(settings)
    if settings.data.on_device == "on" and not isinstance(source, StoredSource):
        raise UserError(
            f"config.data.on_device=on: config.data.name={settings.data.name} decodes its examples "
            "when they are needed; use auto or off"
        )
    steps_per_epoch = source.steps_per_epoch
    total_steps = settings.train.steps or round(settings.train.epochs * steps_per_epoch)
    if not 1 <= total_steps < 2**31:
        # The update counts are int32.
        text = (
            "less than one step"
            if total_steps < 1
            else f"{total_steps} steps (the limit is {2**31 - 1})"
        )
        raise UserError(
            f"config.train.epochs={settings.train.epochs}: {text} of "
            f"{settings.data.batch_size} examples"
        )
    if not settings.train.steps:  # options that depend on the steps were checked without them
        length = dataclasses.replace(settings.train, steps=total_steps)
        settings.method.check(dataclasses.replace(settings, train=length))
    source_info = DatasetInfo.of(source)
    if info is not None:
        info.check(source_info, settings.data)
    info = info or source_info
    network = make_blocks(settings, info)
    # One process decides: times differ from one process to the next.
    first_blocks = first_blocks or tuple(
        world.from_first(lambda: choose_cuts(settings, network, device=devices[0]))
    )
    schedule = make_schedule(
        settings.schedule, settings.optimizer.learning_rate, steps_per_epoch, total_steps
    )
    spec = make_spec(settings, info, first_blocks, schedule)
    if len(spec.modules) == 1:
        _log_idle(settings, spec)
    due = Due.of(settings, steps_per_epoch, total_steps)
    engine = make_engine(settings, spec, devices, total_steps, due)
    source = share_source(settings, source, engine)
    spec.abstract_states()  # parts that do not fit together are reported before a file is written
    return Experiment(settings, source, info, spec, engine, schedule, total_steps)


def _log_idle(settings: Settings, spec: TrainSpec) -> None:
    """Logs a local loss without an effect: the single module minimizes the classifier's loss."""
    name = settings.objective.name
    objective = spec.modules[0].objective
    if isinstance(objective, Transport):
        objective = objective.inner
    if isinstance(objective, Classifier) and name != "classifier":
        _LOG.info("no effect with a single module: config.objective.name=%s", name)


def choose_cuts(
    settings: Settings,
    network: Blocks,
    times: Callable[[], BlockCosts] | None = None,
    device: jax.Device | None = None,
) -> tuple[int, ...]:
    """Returns the index of the first block of each module, as `config.model.split` asks.

    Args:
      settings: configuration of the run.
      network: the uncut network with its objectives, see `make_blocks`.
      times: returns known running times of the blocks; by default a split by time measures them.
      device: device to measure on; the first one by default.

    Raises:
      UserError: the split does not fit the network.
    """
    model = settings.model

    def costs() -> BlockCosts:
        if model.split == "flops":
            return block_flops(network)
        if times is not None:
            return times()
        measured_on = device or jax.devices()[0]
        _LOG.info(
            "config.model.split=time: measuring every block and head on %s %d",
            system.device_kind(measured_on),
            measured_on.id,
        )
        return block_times(network, make_optimizer(settings.optimizer), measured_on).seconds

    starts = cuts(model.split, len(network.blocks), model.modules, costs)
    if model.split in BALANCED:
        _LOG.info(
            "config.model.split=%s: the modules begin at blocks %s",
            model.split,
            ",".join(map(str, starts)),
        )
    return starts


def make_spec(
    settings: Settings,
    info: DatasetInfo,
    first_blocks: Sequence[int],
    schedule: optax.Schedule | None = None,
) -> TrainSpec:
    """Returns the device-independent description of a training run.

    Args:
      settings: configuration of the run.
      info: description of its data set.
      first_blocks: index of the first block of each module, see `choose_cuts`.
      schedule: learning-rate schedule. Without one the spec can restore and evaluate but not train.

    Raises:
      UserError: a codec is set although the method sends no messages, the input adapter needs an
        array that evaluation does not provide, or the method does not support a part of the run.
    """
    model, task = settings.model, make_task(settings, info)
    network = make_whole(settings, info, task)
    check_residuals(settings, network, task.inputs(settings.data.batch_size))
    method = METHODS[settings.method.name].make(settings.method)
    if not method.sends and settings.codec.name != "identity":
        raise UserError(
            f"config.codec.name={settings.codec.name}: config.method.name={settings.method.name} "
            "sends nothing between modules; use identity"
        )
    ends, count = [*first_blocks[1:], len(network.blocks)], len(first_blocks)
    objectives = [objective(settings, network, info, end, k, count) for k, end in enumerate(ends)]
    spec = TrainSpec(
        modules=make_modules(
            *(network.blocks, first_blocks, objectives, model.remat, model.ops),
            adapters=adapters(settings, count),
            gain=model.init_gain if model.init == "orthogonal" else 0.0,
        ),
        method=method,
        optimizer=make_optimizer(settings.optimizer, schedule),
        task=task,
        codec=make_codec(settings.codec, model.dtype),
        seed=settings.seed,
        batch_size=settings.data.batch_size,
        decode=getattr(settings.codec, "decode", "sent"),
        accumulate=settings.train.accumulate,
        ema=settings.train.ema,
    )
    if hasattr(method, "check"):
        method.check(spec)
    return spec


def make_engine(
    settings: Settings,
    spec: TrainSpec,
    devices: Sequence[jax.Device],
    total_steps: int,
    due: Due | None = None,
) -> Engine:
    """Returns the configured engine.

    Args:
      settings: configuration of the run.
      spec: description of the training.
      devices: devices that the engine may use.
      total_steps: number of updates that every module has at the end.
      due: steps at which the run logs, evaluates and saves; by default only at the end.

    Raises:
      UserError: the engine does not support the method, or the devices do not fit the modules.
    """
    name, engines = settings.engine.name, METHODS[settings.method.name].engines
    if engines is not None and name not in engines:
        raise UserError(
            f"config.engine.name={name}: config.method.name={settings.method.name} runs under "
            f"{' or '.join(engines)}"
        )
    inputs = EngineInputs(
        *(spec, devices, settings.replay, total_steps),
        log_every=due.log_every if due else 0,
        every=(due.evaluate_every, due.save_every) if due else (),
    )
    if world.count() > 1 and not ENGINES[name].distributed:
        able = ", ".join(other for other, kind in ENGINES.items() if kind.distributed)
        raise UserError(f"config.engine.name={name}: runs in one process; with several, use {able}")
    if world.count() > 1 and settings.data.on_device == "on":
        raise UserError(
            "config.data.on_device=on: would copy all examples to every process; with several "
            "processes, use auto or off"
        )
    engine: Engine = ENGINES[name].make(inputs, settings.engine)
    engine.residence = Residence(settings.data.on_device if world.count() == 1 else "off")
    return engine


def remarks(experiment: Experiment) -> list[str]:
    """Returns warnings about consequences of the settings that the user may not expect."""
    settings, steps = experiment.settings, experiment.source.steps_per_epoch
    warnings = settings.objective.remarks(settings, len(experiment.info.class_names))
    if len(experiment.info.class_names) == 1:
        warnings.append(
            f"{experiment.info.name}: has a single class, so every prediction is correct and "
            "nothing is learned"
        )
    save, evaluate = settings.checkpoint.every or steps, settings.eval.every or steps
    if not experiment.source.examples("validation"):
        warnings.append(
            "no examples are held out for validation (config.data.validation_fraction): "
            "no checkpoint will be the best"
        )
    elif save < experiment.total_steps <= math.lcm(save, evaluate):
        warnings.append(
            f"checkpoints (every {save} steps) and evaluations (every {evaluate}) coincide only at "
            "the last step, so only that checkpoint can be the best; make config.checkpoint.every "
            "a multiple of config.eval.every"
        )
    return warnings
