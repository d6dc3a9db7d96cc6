"""From settings to all that trains or answers: data, modules, devices, engine. Writes nothing to disk."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import optax

from dgl_jax import system
from dgl_jax.codecs import make_codec
from dgl_jax.config import DataSettings, Settings
from dgl_jax.core.module import make_modules
from dgl_jax.core.optimizer import make_optimizer, make_schedule
from dgl_jax.data import Source, make_source
from dgl_jax.data.info import DatasetInfo
from dgl_jax.engines import Engine
from dgl_jax.engines.base import EngineInputs
from dgl_jax.errors import UserError
from dgl_jax.models import BALANCED, BlockCosts, Network, cuts, make_head, make_network
from dgl_jax.objectives import Objective, ObjectiveInputs
from dgl_jax.profile.flops import Blocks, block_flops
from dgl_jax.profile.timing import block_times
from dgl_jax.registry import ADAPTERS, DATA_SETS, ENGINES, METHODS, OBJECTIVES, TASKS
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import Task, TaskInputs

_LOG = logging.getLogger(__name__)


def known_info(settings: DataSettings) -> DatasetInfo:
    """Returns what is known of a set of images before any is read or downloaded; normalised as if it lay around 0.

    Raises:
      UserError: the set is of the user's own making, or holds no images.
    """
    shape = DATA_SETS[settings.name].shape
    if shape is None:
        raise UserError(
            f"config.data.name={settings.name}: what it holds is known once it is read; plan with images of "
            f"{', '.join(name for name, kind in DATA_SETS.items() if kind.shape)} and config.data.image_size"
        )
    size, channels, classes = shape
    size = settings.image_size or size
    names = tuple(map(str, range(classes)))
    return DatasetInfo(
        settings.name, names, (size, size, channels), (0.0,) * channels, (1.0,) * channels
    )


@dataclass(frozen=True)
class Experiment:
    """A training run, ready to begin.

    Attributes:
      schedule: learning rate by update count.
      total_steps: updates every module will have at the end.
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
    """Builds everything a run needs, and checks that it fits together.

    Args:
      devices: those to use; all that JAX finds by default.
      first_blocks: of each module, where an earlier part of the run has chosen them.
      info: of the data set, as an earlier part of the run found it; its mean and deviation are kept.

    Raises:
      UserError: the data is missing, broken or another than `info` says, or data, network and devices do not fit.
    """
    if settings.ignored:
        _LOG.info("set, and ignored here: %s", "; ".join(settings.ignored.values()))
    devices = devices or jax.devices()
    if DATA_SETS[settings.data.name].shape is not None:
        make_task(
            settings, known_info(settings.data)
        )  # refuses what does not fit before anything is downloaded
    source = make_source(settings.data, settings.seed)
    steps_per_epoch = source.steps_per_epoch
    total_steps = settings.train.steps or round(settings.train.epochs * steps_per_epoch)
    if not 1 <= total_steps < 2**31:
        what = (
            "less than one step"
            if total_steps < 1
            else f"{total_steps} steps, more than can be counted,"
        )
        raise UserError(
            f"config.train.epochs={settings.train.epochs}: {what} of {settings.data.batch_size} examples"
        )
    found = DatasetInfo.of(source)
    if info is not None:
        info.check(found, settings.data)
    info = info or found
    network = make_blocks(settings, info)
    first_blocks = first_blocks or choose_cuts(settings, network, device=devices[0])
    schedule = make_schedule(
        settings.schedule, settings.optimizer.learning_rate, steps_per_epoch, total_steps
    )
    spec = make_spec(settings, info, first_blocks, schedule)
    engine = make_engine(settings, spec, devices, total_steps)
    return Experiment(settings, source, info, spec, engine, schedule, total_steps)


def make_task(settings: Settings, info: DatasetInfo) -> Task:
    """Returns the configured task, for a data set.

    Raises:
      UserError: the task is not one for this data set.
    """
    example = jax.ShapeDtypeStruct(info.example_shape, info.example_dtype)
    given = info.label_shape, len(info.class_names), info.mean, info.std, settings.data.augment
    return TASKS[settings.task.name].make(
        settings.task, TaskInputs(settings.data.name, example, *given)
    )


def make_blocks(settings: Settings, info: DatasetInfo) -> Blocks:
    """Returns the network with the objective that may stand behind each block, before it is cut.

    Raises:
      UserError: there is no such network, or it does not fit the examples.
    """
    task = make_task(settings, info)
    network = _network(settings, info, task)
    objectives = [
        _objective(settings, network, end, len(info.class_names))
        for end in range(1, len(network.blocks) + 1)
    ]
    return Blocks(
        network.blocks, tuple(objectives), task.inputs(settings.data.batch_size), task.label
    )


def _network(settings: Settings, info: DatasetInfo, task: Task) -> Network:
    model = settings.model
    return make_network(
        model.name,
        model.width,
        len(info.class_names),
        task.inputs(1).shape[1:],
        model.dtype,
        model.ops,
    )


def _objective(
    settings: Settings,
    network: Network,
    end: int,
    classes: int,
    k: int | None = None,
    modules: int | None = None,
) -> Objective | None:
    """Returns the objective of a module that ends in front of block `end`; None under a method that gives it none."""
    model, last = settings.model, end == len(network.blocks)
    if not last and not METHODS[settings.method.name].local:
        return None
    # The classifier of the network is the head of the last module.
    head = network.classifier if last else make_head(model.head, classes, model.dtype, model.ops)
    inputs = ObjectiveInputs(
        k, modules, network.blocks, end, classes, head, model.dtype, settings.train.label_smoothing
    )
    return OBJECTIVES[settings.objective.name].make(settings.objective, inputs)


def choose_cuts(
    settings: Settings,
    network: Blocks,
    times: Callable[[], BlockCosts] | None = None,
    device: jax.Device | None = None,
) -> tuple[int, ...]:
    """Returns the first block of each module, by `config.model.split`.

    Args:
      times: what blocks take, where that is known; else a split by time measures it.
      device: to measure on; the first one by default.

    Raises:
      UserError: the split does not fit the network.
    """
    model = settings.model

    def costs() -> BlockCosts:
        if model.split == "flops":
            return block_flops(network)
        if times is not None:
            return times()
        where = device or jax.devices()[0]
        _LOG.info(
            "config.model.split=time: measuring every block and head on %s %d",
            system.device_kind(where),
            where.id,
        )
        return block_times(
            network, make_optimizer(settings.optimizer, optax.constant_schedule(0.0)), where
        ).seconds

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
    """Returns what is trained, and how.

    Args:
      first_blocks: of each module, see `choose_cuts`.
      schedule: of the learning rate; without one the spec can restore and evaluate, not train.

    Raises:
      UserError: the method sends nothing that a codec could encode, or the adapter asks for what is not there.
    """
    model, task = settings.model, make_task(settings, info)
    network = _network(settings, info, task)
    method = METHODS[settings.method.name].make(settings.method)
    if not method.sends and settings.codec.name != "identity":
        raise UserError(
            f"config.codec.name={settings.codec.name}: config.method.name={settings.method.name} sends nothing between modules; "
            "use identity"
        )
    ends, classes, count = (
        [*first_blocks[1:], len(network.blocks)],
        len(info.class_names),
        len(first_blocks),
    )
    objectives = [
        _objective(settings, network, end, classes, k, count) for k, end in enumerate(ends)
    ]
    adapters = [ADAPTERS[model.adapter].make(k, model.dtype) for k in range(count)]
    if wrong := next(
        (name for adapter in adapters if adapter for name in adapter.needs if name != "image"), None
    ):
        raise UserError(
            f"config.model.adapter={model.adapter}: needs {wrong!r}, and an evaluation has nothing but 'image'"
        )
    return TrainSpec(
        modules=make_modules(
            network.blocks, first_blocks, objectives, model.remat, model.ops, adapters
        ),
        method=method,
        optimizer=make_optimizer(settings.optimizer, schedule or optax.constant_schedule(0.0)),
        task=task,
        codec=make_codec(settings.codec, model.dtype),
        seed=settings.seed,
        batch_size=settings.data.batch_size,
        decode=getattr(settings.codec, "decode", "sent"),
        accumulate=settings.train.accumulate,
        ema=settings.train.ema,
    )


def make_engine(
    settings: Settings, spec: TrainSpec, devices: Sequence[jax.Device], total_steps: int
) -> Engine:
    """Returns the configured engine on these devices.

    Raises:
      UserError: it does not run the method, or the devices do not fit.
    """
    name, engines = settings.engine.name, METHODS[settings.method.name].engines
    if engines is not None and name not in engines:
        raise UserError(
            f"config.engine.name={name}: config.method.name={settings.method.name} runs under {' or '.join(engines)}"
        )
    return ENGINES[name].make(
        EngineInputs(spec, devices, settings.replay, total_steps), settings.engine
    )


def remarks(experiment: Experiment) -> list[str]:
    """Lists what this run will do that its user may not expect."""
    settings, steps = experiment.settings, experiment.source.steps_per_epoch
    told = []
    if len(experiment.info.class_names) == 1:
        told.append(
            f"{experiment.info.name}: there is a single class: every answer is right, and nothing is learnt"
        )
    save, evaluate = settings.checkpoint.every or steps, settings.eval.every or steps
    if not experiment.source.examples("validation"):
        told.append(
            "no examples are held out for validation (config.data.validation_fraction): no checkpoint will be the best"
        )
    elif save < experiment.total_steps <= math.lcm(save, evaluate):
        told.append(
            f"checkpoints (every {save} steps) and evaluations (every {evaluate}) meet at the last step alone: "
            "only that checkpoint can be the best; let config.checkpoint.every be a multiple of config.eval.every"
        )
    return told
