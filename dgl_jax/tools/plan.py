"""Predicts speed, idle time, traffic, memory and timeline of a pipeline on any devices.

The prediction is an event simulation (`timeline.py`) of the engine's schedule, using the training
time of each block and head and, if these are measured, of the augmentation and of the codec at each
hop. A batch split over g devices takes 1/g of the time, plus the sum of the gradients over the
group. No data set is read. Contention is modeled for the cores of a shared host only.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.codecs import Codec, make_codec
from dgl_jax.config import CodecSettings, Settings, options
from dgl_jax.config.registry import CODECS, METHODS
from dgl_jax.core.optimizer import make_optimizer
from dgl_jax.errors import UserError, require
from dgl_jax.profile.memory import ProgramMemory, module_memory
from dgl_jax.profile.table import module_costs
from dgl_jax.profile.timing import BlockTimes, Elapsed, block_times
from dgl_jax.profile.turn_timing import CodecCost, augmentation_time, codec_costs
from dgl_jax.run.build import choose_cuts, make_spec
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.run.writers import check_writable
from dgl_jax.spec import MessageSpec, TrainSpec
from dgl_jax.tools.pipeline import (
    Link,
    Pipeline,
    fused_rate,
    group_sizes,
    make_pipeline,
    reductions,
    waiting_above,
)
from dgl_jax.tools.plan_text import plan_lines
from dgl_jax.tools.stated_times import stated_times
from dgl_jax.tools.timeline import Span, waiting

_LOG = logging.getLogger(__name__)
_NOTHING = Elapsed(0.0, 0.0)
_DRAWN = 8  # batches in the picture, in addition to one per module


def plan_run(
    settings: Settings,
    devices: int | None = None,
    stated: str | None = None,
    bandwidth: float | None = None,
    cores: float | None = None,
    as_json: bool = False,
    output: str | None = None,
    workdir: str | None = None,
    latency: float = 0.0,
    message_cost: float = 0.0,
) -> str:
    """Makes a plan, draws its timeline and returns the text that `--mode=plan` prints.

    Args:
      settings: configuration to plan for.
      devices: see `plan`.
      stated: see `plan`.
      bandwidth: see `plan`.
      cores: see `plan`.
      as_json: returns JSON instead of tables.
      output: picture of the timeline (a .png file); default `<workdir>/plots/plan.png`.
      workdir: folder of a run; without it and `output` no picture is drawn.
      latency: see `plan`.
      message_cost: see `plan`.

    Returns:
      Tables or JSON, without a line end.

    Raises:
      UserError: if `output` does not end in .png or cannot be written, or `plan` raises it.
    """
    if output is not None and Path(output).suffix != ".png":
        raise UserError(f"--output={output}: must end in .png, for the timeline of --mode=plan")
    picture = Path(output) if output else Path(workdir) / "plots" / "plan.png" if workdir else None
    if picture:
        require("the picture of --mode=plan", "matplotlib")  # before anything is measured
        check_writable(picture, f"--output={picture}" if output else str(picture))
    numbers, spans = plan(settings, devices, stated, bandwidth, cores, latency, message_cost)
    if picture:
        from dgl_jax.run import plots  # matplotlib takes a third of a second to import

        turns = [(span.module, 1e3 * span.begin, 1e3 * span.end) for span in spans]
        batches = 1 + max(span.batch for span in spans)
        subtitle = (
            f"{numbers['ticks_per_second']:.4g} ticks/s, {numbers['speedup']:.2f} times one device"
        )
        title = f"plan of {numbers['devices']} devices"
        plots.draw_turns(picture, turns, "milliseconds", batches, title, subtitle)
    numbers |= {"timeline": str(picture) if picture else None}
    return json.dumps(numbers) if as_json else "\n".join(plan_lines(numbers))


def plan(
    settings: Settings,
    devices: int | None = None,
    stated: str | None = None,
    bandwidth: float | None = None,
    cores: float | None = None,
    latency: float = 0.0,
    message_cost: float = 0.0,
) -> tuple[dict[str, Any], list[Span]]:
    """Predicts how the network of a configuration trains as a pipeline.

    Any engine may be configured, and this machine need not have the devices.

    Args:
      settings: configuration to plan for.
      devices: number of devices; default: the sum of `config.engine.group_sizes`, or one per
        module.
      stated: milliseconds of each block in a local step, as a comma-separated list (the time of
        heads then follows from their number of operations), or a JSON file with the same list or
        with `block_milliseconds` of an earlier plan. None: measured on the first device here.
        Augmentation and codecs are measured too then; otherwise only what groups exchange counts.
      bandwidth: of the link of each hop in GB/s; None: messages take no time.
      cores: processors that all devices share. None: the processors of this process if the times
        are measured on a CPU, otherwise (or if unknown) no limit.
      latency: milliseconds that every message travels, one way.
      message_cost: milliseconds for which a host is busy with each message.

    Returns:
      The numbers that `--json` prints, and the turns of the first batches.

    Raises:
      UserError: if the data set's shape is not known without reading it, or a value does not fit.
    """
    engines = METHODS[settings.method.name].engines
    if engines is not None and "pipeline" not in engines:
        raise UserError(
            f"config.method.name={settings.method.name}: --mode=plan predicts pipelines, "
            "but the modules of this method cannot work at the same time"
        )
    if METHODS[settings.method.name].in_turn:
        raise UserError(
            f"config.method.name={settings.method.name}: --mode=plan predicts the steady state of "
            "a pipeline, but this method trains one module after the other, each at another speed; "
            "plan with config.method.name=dgl, or measure it with --mode=bench"
        )
    for flag, value in (("bandwidth", bandwidth), ("cores", cores)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag}={value}: a number above 0 is needed")
    for flag, value in (("latency", latency), ("message_cost", message_cost)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{flag}={value}: a number of milliseconds, 0 or above, is needed")
    link = Link(bandwidth or math.inf, latency / 1e3, message_cost / 1e3)
    info, device = known_info(settings.data), jax.devices()[0]
    network = make_blocks(settings, info)
    concurrency = 1
    if not stated and device.platform == "cpu":
        usable = system.cpu_count()
        cores, concurrency = (
            cores or usable,
            min(usable or 1, devices or sum(group_sizes(settings)) or settings.model.modules),
        )
    # Checks devices and batch before the measurement, which takes much longer.
    equal = [1.0] * settings.model.modules
    _, groups = make_pipeline(settings, equal, equal, devices)
    known = stated_times(stated, network, settings.model.modules) if stated else None

    def measured(meanwhile: Callable[[], object] = lambda: None) -> BlockTimes:
        nonlocal known
        if known is None:
            optimizer = make_optimizer(settings.optimizer)
            known = block_times(
                network, optimizer, device, concurrency=concurrency, meanwhile=meanwhile
            )
        return known

    @cache
    def programs(parts: int) -> list[ProgramMemory] | None:
        return module_memory(dataclasses.replace(spec, batch_size=spec.batch_size // parts))

    spec = make_spec(settings, info, choose_cuts(settings, network, lambda: measured().seconds))
    network = network.ending(spec.modules)
    known = stated_times(stated, network, settings.model.modules) if stated else known
    # Unless the cuts depend on the times, the modules compile together with the blocks.
    times = measured(lambda: [programs(len(group)) for group in groups])
    starts = [module.first for module in spec.modules]
    seconds, processor = (costs.modules(starts) for costs in times)
    augmentation, coding = _NOTHING, {name: [CodecCost()] * len(starts) for name in CODECS}
    if not stated:
        augmentation = augmentation_time(spec, device, concurrency=concurrency)
    seconds[0] += augmentation.seconds
    processor[0] += augmentation.processor
    sums = reductions(spec, each_array=not stated and device.platform == "cpu")
    pipeline, groups = make_pipeline(settings, seconds, processor, devices, link, cores, sums)
    pipeline = dataclasses.replace(pipeline, waiting_above=waiting_above(spec))
    count = devices or groups[-1][-1] + 1
    traffic, specs = spec.traffic(), _with_codecs(spec, settings)
    for name in specs:
        try:
            on = None if stated else device
            coding[name] = codec_costs(specs[name], on, concurrency=concurrency)
        except Exception as error:
            if name == settings.codec.name:
                raise
            _LOG.warning("codec %s: not measured, taken as free (%s)", name, error)
    pipelines = {name: pipeline.with_codec(coding[name], groups) for name in specs}
    codecs = {
        name: _codec(pipelines[name], specs[name]) if name in specs else None for name in CODECS
    }
    pipeline, mine = pipelines[settings.codec.name], coding[settings.codec.name]
    rate, busy, spans = pipeline.steady(traffic.wire, traffic.down)
    # `busy` has an entry for the first device of each group; the others work just as long.
    idle = [
        1.0 - next((busy[group[0]] for group in groups if number in group), 0.0)
        for number in range(count)
    ]
    turns = [work.seconds + work.reduction for work in pipeline.works]
    rows = [
        dataclasses.asdict(cost)
        | {"devices": list(group), "milliseconds": 1e3 * turn}
        | {"reduction_milliseconds": 1e3 * work.reduction}
        | {"codec_milliseconds": 1e3 * codec.on(len(group)).seconds}
        for cost, group, turn, work, codec in zip(
            module_costs(spec, turns), groups, turns, pipeline.works, mine
        )
    ]
    for k, row in enumerate(rows):
        alone = 0.0 if k else 1e3 * augmentation.seconds
        row["augmentation_milliseconds"] = alone / len(row["devices"])
    fused = None
    if (engines is None or "fused" in engines) and spec.batch_size % count == 0:
        fused = fused_rate(seconds, processor, sums, count, link, cores, mine)
    numbers = {
        "devices": count,
        "cores": cores,
        "bandwidth": bandwidth,
        "latency": latency,
        "message_cost": message_cost,
        "codec": settings.codec.name,
        "codec_sizes": {
            name: getattr(_codec_options(settings, "vq"), name)
            for name in ("dims", "codes", "stages")
        },
        "block_times": "stated" if stated else f"measured on {system.device_kind(device)}",
        "batch_size": spec.batch_size,
        "ticks_per_second": rate,
        "images_per_second": rate * spec.batch_size,
        "speedup": rate * pipeline.alone(seconds, processor, mine),
        "fused_ticks_per_second": fused,
        "idle": idle,
        "idle_share": sum(idle) / count,
        "modules": rows,
        "codecs": codecs,
        "peak_memory_bytes": _memory(programs, groups, spans, pipeline.ticks_in_flight, count),
        "memory_compiled_for": device.platform,
        "block_milliseconds": {
            "first": [1e3 * s for s in times.seconds.first],
            "inner": [1e3 * s for s in times.seconds.inner],
            "heads": [[1e3 * s for s in row] for row in times.seconds.heads],
        },
    }
    return numbers, pipeline.spans(traffic.wire, len(starts) + _DRAWN, traffic.down)


def _codec_options(settings: Settings, name: str) -> CodecSettings:
    """Returns the configured options of a codec, which need not be the configured codec."""
    given = vars(settings.codec) | {
        n.removeprefix("codec."): v for n, v in settings.unused.items() if n.startswith("codec.")
    }
    fields = {f.name for f in dataclasses.fields(CODECS[name].options or CodecSettings)} - {"name"}
    return options("codec", name=name, **{n: v for n, v in given.items() if n in fields})


def _with_codecs(spec: TrainSpec, settings: Settings) -> dict[str, TrainSpec]:
    """Returns the spec with every codec that fits its messages, by the name of the codec."""
    specs = {}
    for name in CODECS:
        codec = make_codec(_codec_options(settings, name), settings.model.dtype)
        with suppress(UserError):  # config.codec.dims does not divide the channels of a hop
            specs[name] = _with_codec(spec, codec)
    return specs


def _codec(pipeline: Pipeline, spec: TrainSpec) -> dict[str, Any]:
    """Computes the traffic per hop and the speed with the codec of a spec."""
    traffic = spec.traffic()
    rate, _, _ = pipeline.steady(traffic.wire, traffic.down)
    crossing = [
        bytes_ if crosses else 0.0 for bytes_, crosses in zip(traffic.wire, pipeline.crosses())
    ]
    return {
        "ticks_per_second": rate,
        "bytes_per_image": list(traffic.wire),
        "compression": [raw / wire for raw, wire in zip(traffic.raw, traffic.wire)],
        "megabytes_per_second": [bytes_ * spec.batch_size * rate / 1e6 for bytes_ in crossing],
    }


def _with_codec(spec: TrainSpec, codec: Codec) -> TrainSpec:
    """Returns the spec with another codec, whose messages encode the known activations.

    Without them, computing the messages would trace the whole network again.
    """
    other = dataclasses.replace(spec, codec=codec)
    hops = []
    for hop in spec.hops:
        x = hop.activations
        codebook = jax.eval_shape(lambda x=x: codec.codebook(codec.init(x)))
        payload = jax.eval_shape(codec.encode, codebook, x)
        down = hop.down
        if getattr(spec.method, "encode_gradients", False):
            down = hop.down._replace(payload=payload, codebook=codebook)
        hops.append(MessageSpec(x, payload, codebook, codec.period(x), down, hop.refresh))
    vars(other)["hops"] = tuple(hops)  # the value of the cached property
    return other


def _memory(
    programs: Callable[[int], list[ProgramMemory] | None],
    groups: Sequence[range],
    spans: Sequence[Span],
    ticks_in_flight: int,
    devices: int,
) -> list[int | None]:
    """Computes the peak memory of each device in bytes; None if XLA does not report a memory plan.

    A device holds the states and waiting messages of all its modules, plus the scratch memory and
    outputs of one program at a time.

    Args:
      programs: returns the modules' programs, given the number of devices that share a batch.
      groups: devices of each module.
      spans: turns of the first batches.
      ticks_in_flight: ticks that the host dispatches ahead.
      devices: number of devices.
    """
    held, largest = [0] * devices, [0] * devices
    for k, group in enumerate(groups):
        group_programs = programs(len(group))
        if group_programs is None:
            return [None] * devices
        program = group_programs[k]
        # Batches for module 0 are put on its device when their tick is dispatched.
        messages = waiting(spans, k) if k else ticks_in_flight + 1
        for device in group:
            held[device] += program.arguments + (messages - 1) * program.message
            largest[device] = max(largest[device], program.temporary + program.added)
    return [a + b for a, b in zip(held, largest)]
