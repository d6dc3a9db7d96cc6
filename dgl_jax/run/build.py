"""From settings to all that trains or answers: data, modules, devices, engine. Writes nothing to disk."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import optax

from dgl_jax import system
from dgl_jax.codecs import make_codec
from dgl_jax.config import CodecSettings, DataSettings, Settings, not_applicable
from dgl_jax.core.module import make_modules
from dgl_jax.core.optimizer import make_optimizer, make_schedule
from dgl_jax.data import SHAPES, Preprocess, Source, make_source
from dgl_jax.data.info import DatasetInfo
from dgl_jax.engines import Engine, FusedEngine, PipelineEngine, SimulatedEngine, ThreadsEngine, ring_forms
from dgl_jax.engines.placement import assign, check_batch, one_group
from dgl_jax.errors import UserError
from dgl_jax.methods.backprop import backprop_step
from dgl_jax.models import BALANCED, BlockCosts, Network, check_network, cuts, make_head, make_network
from dgl_jax.profile.flops import block_flops, module_flops
from dgl_jax.profile.timing import block_times
from dgl_jax.replay import check_memory
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)

# Engines that train no head but the last module's.
ONE_LOSS = ("backprop",)


def known_info(settings: DataSettings) -> DatasetInfo:
    """What is known of a data set before anything is read or downloaded; normalised as if it lay around 0.

    Raises:
      UserError: the set is of the user's own making.
    """
    if settings.name not in SHAPES:
        raise UserError(
            f"config.data.name={settings.name}: what it holds is known once it is read; plan with one of "
            f"{', '.join(SHAPES)} and config.data.image_size"
        )
    size, channels, classes = SHAPES[settings.name]
    size = settings.image_size or size
    names = tuple(map(str, range(classes)))
    return DatasetInfo(settings.name, names, (size, size, channels), (0.0,) * channels, (1.0,) * channels)


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
    if unused := not_applicable(settings):
        _LOG.info("set, and ignored here: %s", "; ".join(unused.values()))
    # Both before the data, which may take long to come.
    check_network(settings.model.name)
    devices = devices or jax.devices()
    source = make_source(settings.data, settings.seed)
    steps_per_epoch = source.steps_per_epoch
    total_steps = settings.train.steps or round(settings.train.epochs * steps_per_epoch)
    if not 1 <= total_steps < 2**31:
        what = "less than one step" if total_steps < 1 else f"{total_steps} steps, more than can be counted,"
        raise UserError(f"config.train.epochs={settings.train.epochs}: {what} of {settings.data.batch_size} images")
    schedule = make_schedule(settings.schedule, settings.optimizer.learning_rate, steps_per_epoch, total_steps)
    found = DatasetInfo.of(source)
    if info is not None:
        info.check(found, settings.data)
    info = info or found
    first_blocks = first_blocks or choose_cuts(settings, info, device=devices[0])
    spec = make_spec(settings, info, schedule, first_blocks)
    engine = make_engine(settings, spec, devices, total_steps)
    return Experiment(settings, source, info, spec, engine, schedule, total_steps)


def make_spec(
    settings: Settings, info: DatasetInfo, schedule: optax.Schedule | None = None, first_blocks: Sequence[int] = ()
) -> TrainSpec:
    """What is learnt; without a schedule the spec can restore and evaluate, not train.

    `first_blocks` of each module are those that were chosen when the run began; without them they are chosen here.
    """
    model, network = settings.model, _network(settings, info)
    starts = first_blocks or choose_cuts(settings, info)
    trained = settings.engine.name not in ONE_LOSS
    if not trained and settings.codec.name != "identity":
        raise UserError(
            f"config.codec.name={settings.codec.name}: config.engine.name={settings.engine.name} sends nothing between modules; "
            "use identity"
        )
    heads = [make_head(model.head, len(info.class_names), model.dtype) if trained else None for _ in starts[:-1]]
    return TrainSpec(
        modules=make_modules(network.blocks, starts, [*heads, network.classifier], model.remat),
        optimizer=make_optimizer(settings.optimizer, schedule or optax.constant_schedule(0.0)),
        preprocess=Preprocess(settings.data.augment, info.mean, info.std),
        codec=make_codec(settings.codec, model.dtype),
        seed=settings.seed,
        batch_size=settings.data.batch_size,
        image_shape=info.image_shape,
        decode=settings.codec.decode,
        accumulate=settings.train.accumulate,
        label_smoothing=settings.train.label_smoothing,
        ema=settings.train.ema,
    )


def _network(settings: Settings, info: DatasetInfo) -> Network:
    model = settings.model
    return make_network(model.name, model.width, len(info.class_names), info.image_shape, model.dtype)


def every_block(settings: Settings, info: DatasetInfo) -> TrainSpec:
    """The spec with one block a module: what the costs of blocks are counted and measured on. Packets go as they are."""
    identity = dataclasses.replace(settings, codec=CodecSettings())  # others may not fit where nobody cuts
    return make_spec(identity, info, first_blocks=range(len(_network(settings, info).blocks)))


def choose_cuts(
    settings: Settings,
    info: DatasetInfo,
    times: Callable[[], BlockCosts] | None = None,
    device: jax.Device | None = None,
) -> tuple[int, ...]:
    """The first block of each module, by `config.model.split`.

    Args:
      times: what blocks take, where that is known; else a split by time measures it.
      device: to measure on; the first one by default.

    Raises:
      UserError: the split does not fit the network.
    """
    model = settings.model

    def costs() -> BlockCosts:
        if model.split == "flops":
            return block_flops(every_block(settings, info))
        if times is not None:
            return times()
        where = device or jax.devices()[0]
        _LOG.info("config.model.split=time: measuring every block and head on %s %d", system.device_kind(where), where.id)
        return block_times(every_block(settings, info), where).seconds

    starts = cuts(model.split, len(_network(settings, info).blocks), model.modules, costs)
    if model.split in BALANCED:
        _LOG.info("config.model.split=%s: the modules begin at blocks %s", model.split, ",".join(map(str, starts)))
    return starts


def make_engine(settings: Settings, spec: TrainSpec, devices: Sequence[jax.Device], total_steps: int) -> Engine:
    """The configured engine on these devices: a new one is one new file and one line here."""
    chosen, modules = settings.engine, len(spec.modules)
    if chosen.name in ("simulated", "threads"):
        size, forms = settings.replay.size, ring_forms(spec)
        sizes = ", ".join(f"{form.nbytes(size) / 2**20:.1f}" for form in forms)
        _LOG.info("rings of %d packets will take %s MiB of host memory", size, sizes)
        check_memory(forms, size)
        if chosen.name == "simulated":
            placement = one_group(devices[:1], modules)
            check_batch(spec.batch_size, placement.sizes(), spec.accumulate)
            return SimulatedEngine(spec, placement, total_steps, chosen, settings.replay)
    if chosen.name in ("pipeline", "threads"):
        costs = [body + head for body, head in module_flops(spec)] if not chosen.group_sizes and len(devices) < modules else ()
        placement = assign(devices, modules, chosen.group_sizes, costs)
        check_batch(spec.batch_size, placement.sizes(), spec.accumulate)
        if chosen.name == "threads":
            return ThreadsEngine(spec, placement, chosen, settings.replay)
        return PipelineEngine(spec, placement, chosen.ticks_in_flight)
    # One group: as many devices as the groups of a pipeline would have together.
    count = assign(devices, modules, chosen.group_sizes).count() if chosen.group_sizes else len(devices)
    placement = one_group(devices[:count], modules)
    check_batch(spec.batch_size, placement.sizes(), spec.accumulate)
    if chosen.name == "backprop":
        return FusedEngine(spec, placement, chosen.ticks_in_flight, backprop_step)
    return FusedEngine(spec, placement, chosen.ticks_in_flight)


def remarks(experiment: Experiment) -> list[str]:
    """Lists what this run will do that its user may not expect."""
    settings, steps = experiment.settings, experiment.source.steps_per_epoch
    told = []
    if len(experiment.info.class_names) == 1:
        told.append(f"{experiment.info.name}: there is a single class: every answer is right, and nothing is learnt")
    save, evaluate = settings.checkpoint.every or steps, settings.eval.every or steps
    if not experiment.source.examples("validation"):
        told.append("no images are held out for validation (config.data.validation_fraction): no checkpoint will be the best")
    elif save < experiment.total_steps <= math.lcm(save, evaluate):
        told.append(
            f"checkpoints (every {save} steps) and evaluations (every {evaluate}) meet at the last step alone: "
            "only that checkpoint can be the best; let config.checkpoint.every be a multiple of config.eval.every"
        )
    return told
