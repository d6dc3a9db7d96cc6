"""What a pipeline would do on devices that nobody has rented yet: speed, idle time, traffic, memory, and the timeline.

An event simulation (`timeline.py`) of the engine's own schedule with what each block and head takes in training. Reads no data set.
What it leaves out: the time of codecs and of the augmentation, of reductions inside a device group (a batch cut over g devices is
taken to need 1/g of the time), and whatever slows a device while others work, but for the cores that devices of one host share.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import optax

from dgl_jax import system
from dgl_jax.codecs import make_codec
from dgl_jax.config import CodecSettings, Settings, options
from dgl_jax.core.optimizer import make_optimizer
from dgl_jax.engines.placement import check_batch, layout
from dgl_jax.errors import UserError, require
from dgl_jax.methods import Method
from dgl_jax.models import BlockCosts
from dgl_jax.profile.flops import Blocks, block_flops
from dgl_jax.profile.memory import module_memory
from dgl_jax.profile.table import ModuleCost, aligned, module_costs, table
from dgl_jax.profile.timing import BlockTimes, block_times
from dgl_jax.registry import CODECS, METHODS
from dgl_jax.run.build import choose_cuts, known_info, make_blocks, make_spec
from dgl_jax.run.writers import check_writable
from dgl_jax.spec import TrainSpec
from dgl_jax.tools.timeline import Span, Work, simulate, waiting

_LOG = logging.getLogger(__name__)
_DRAWN = 8  # batches of the picture, besides one a module


def plan_run(
    settings: Settings,
    devices: int | None = None,
    stated: str | None = None,
    bandwidth: float | None = None,
    cores: float | None = None,
    as_json: bool = False,
    output: str | None = None,
    workdir: str | None = None,
) -> str:
    """What `--mode=plan` prints: see `plan`; draws the timeline into `output` (a .png), or `<workdir>/plots/plan.png`.

    Raises:
      UserError: `output` is no .png or cannot be written, or what `plan` raises.
    """
    if output is not None and Path(output).suffix != ".png":
        raise UserError(f"--output={output}: must end in .png, for the timeline of --mode=plan")
    picture = Path(output) if output else Path(workdir) / "plots" / "plan.png" if workdir else None
    if picture:
        require("the picture of --mode=plan", "matplotlib")  # before anything is measured
        check_writable(picture, f"--output={picture}" if output else str(picture))
    found, spans = plan(settings, devices, stated, bandwidth, cores)
    if picture:
        from dgl_jax.run import plots  # matplotlib takes a third of a second to import

        turns = [(span.module, 1e3 * span.begin, 1e3 * span.end) for span in spans]
        batches = 1 + max(span.batch for span in spans)
        subtitle = (
            f"{found['ticks_per_second']:.4g} ticks/s, {found['speedup']:.2f} times one device"
        )
        plots.draw_turns(
            picture, turns, "milliseconds", batches, f"plan of {found['devices']} devices", subtitle
        )
    found |= {"timeline": str(picture) if picture else None}
    return json.dumps(found) if as_json else "\n".join(_text(found))


def plan(
    settings: Settings,
    devices: int | None = None,
    stated: str | None = None,
    bandwidth: float | None = None,
    cores: float | None = None,
) -> tuple[dict[str, Any], list[Span]]:
    """Predicts the pipeline of a configuration, whatever its engine and whatever is in this machine.

    Args:
      devices: how many; by default those of `config.engine.group_sizes`, or one a module.
      stated: milliseconds of each block's part of a local step, as a comma list (heads then take as long an operation as blocks
        do), or a JSON file: the same list, or `block_milliseconds` of an earlier plan. None: measured on the first device here.
      bandwidth: of each hop's link in GB/s; None: packets take no time.
      cores: processors that all the devices share; None: where measured on a CPU those of this process, otherwise (or where
        unknown) any number.

    Returns:
      The numbers, as `--json` prints them, and the turns of the first batches.

    Raises:
      UserError: the data set must be read to be known, or a value does not fit.
    """
    engines = METHODS[settings.method.name].engines
    if engines is not None and "pipeline" not in engines:
        raise UserError(
            f"config.method.name={settings.method.name}: its modules cannot work at once, which --mode=plan is about"
        )
    for flag, value in (("bandwidth", bandwidth), ("cores", cores)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag}={value}: a number above 0 is needed")
    info, device = known_info(settings.data), jax.devices()[0]
    network = make_blocks(settings, info)
    company = 1
    if not stated and device.platform == "cpu":
        usable = system.cpu_count()
        cores, company = (
            cores or usable,
            min(usable or 1, devices or sum(_group_sizes(settings)) or settings.model.modules),
        )
    alike = [1.0] * settings.model.modules
    make_pipeline(
        settings, alike, alike, devices
    )  # refuses what does not fit, before anything is measured

    @cache
    def measured() -> BlockTimes:
        if stated:
            return _stated(stated, network)
        optimizer = make_optimizer(settings.optimizer, optax.constant_schedule(0.0))
        return block_times(network, optimizer, device, company=company)

    spec = make_spec(settings, info, choose_cuts(settings, network, lambda: measured().seconds))
    times = measured()
    starts = [module.first for module in spec.modules]
    ends = [*starts[1:], len(network.blocks)]
    seconds, processor = (
        [of.module(first, end) for first, end in zip(starts, ends)] for of in times
    )
    pipeline, groups = make_pipeline(settings, seconds, processor, devices, bandwidth, cores)
    count = devices or groups[-1][-1] + 1
    codecs = _codecs(pipeline, spec, settings)
    wire = spec.traffic().wire
    rate, busy, spans = pipeline.steady(wire)
    idle = [
        1.0 - next((busy[group[0]] for group in groups if number in group), 0.0)
        for number in range(count)
    ]
    turns = [work.seconds for work in pipeline.works]
    rows = [
        dataclasses.asdict(cost) | {"devices": list(group), "milliseconds": 1e3 * turn}
        for cost, group, turn in zip(module_costs(spec, turns), groups, turns)
    ]
    found = {
        "devices": count,
        "cores": cores,
        "bandwidth": bandwidth,
        "codec": settings.codec.name,
        "codec_sizes": {
            name: getattr(_codec_options(settings, "vq"), name)
            for name in ("dims", "codes", "stages")
        },
        "block_times": "stated" if stated else f"measured on {system.device_kind(device)}",
        "batch_size": spec.batch_size,
        "ticks_per_second": rate,
        "images_per_second": rate * spec.batch_size,
        "speedup": rate * pipeline.alone(seconds),
        "idle": idle,
        "idle_share": sum(idle) / count,
        "modules": rows,
        "codecs": codecs,
        "peak_memory_bytes": _memory(spec, groups, spans, pipeline.ticks_in_flight, count),
        "memory_compiled_for": device.platform,
        "block_milliseconds": {
            name: [1e3 * s for s in row] for name, row in dataclasses.asdict(times.seconds).items()
        },
    }
    return found, pipeline.spans(wire, len(starts) + _DRAWN)


def make_pipeline(
    settings: Settings,
    seconds: Sequence[float],
    processor: Sequence[float],
    devices: int | None = None,
    bandwidth: float | None = None,
    cores: float | None = None,
) -> tuple["Pipeline", list[range]]:
    """The pipeline of modules, and who has which devices.

    Args:
      seconds, processor: of each module's turn on one device, by the wall and of the host's processors.
      devices, bandwidth, cores: see `plan`.
    """
    modules, sizes = len(seconds), _group_sizes(settings)
    groups = layout(devices or sum(sizes) or modules, modules, sizes, seconds)
    check_batch(settings.data.batch_size, list(map(len, groups)), settings.train.accumulate)
    works = [
        Work(g[0], s / len(g), cores=len(g) * used / s)
        for g, s, used in zip(groups, seconds, processor)
    ]
    limits = bandwidth or math.inf, cores or math.inf
    ticks, method = (
        getattr(settings.engine, "ticks_in_flight", 2),
        METHODS[settings.method.name].make(settings.method),
    )
    return Pipeline(tuple(works), settings.data.batch_size, *limits, ticks, method), groups


@dataclass(frozen=True)
class Pipeline:
    """Modules with their devices, and the links between them.

    Attributes:
      works: of each module; `transfer` is filled in by the bytes that a codec sends.
      bandwidth: of each hop's link, GB/s.
      cores: processors that all devices share.
      method: whose schedule it is.
    """

    works: tuple[Work, ...]
    batch_size: int
    bandwidth: float
    cores: float
    ticks_in_flight: int
    method: Method

    def crosses(self) -> list[bool]:
        """Of each hop whether it leads to another device."""
        return [here.device != there.device for here, there in pairwise(self.works)]

    def spans(self, wire: Sequence[float], batches: int) -> list[Span]:
        """The turns of a run of so many batches, with the bytes an image that each hop sends."""
        packets = [
            bytes_ * self.batch_size / (1e9 * self.bandwidth) if c else 0.0
            for bytes_, c in zip(wire, self.crosses())
        ]
        works = [
            dataclasses.replace(work, transfer=t) for work, t in zip(self.works, [*packets, 0.0])
        ]
        ticks = self.method.schedule(
            [0] * len(works), batches, batches, overlap=any(self.crosses())
        )  # as the engine does
        return simulate(ticks, works, self.cores, self.ticks_in_flight)

    def steady(self, wire: Sequence[float]) -> tuple[float, dict[int, float], list[Span]]:
        """Ticks a second and the busy share of each device while the pipe is full, in a long run; and its turns."""
        batches = 8 * len(self.works) + 64
        spans, last = self.spans(wire, batches), len(self.works) - 1
        done = [span.end for span in spans if span.module == last]
        begin, end = (
            done[batches // 4],
            done[3 * batches // 4],
        )  # filling and draining are over, and not begun
        rate = (3 * batches // 4 - batches // 4) / (end - begin)
        # By the length of turns, not by how many there are meanwhile: a module that is hardly faster than the slowest runs ahead
        # for long before it must wait.
        busy = {work.device: 0.0 for work in self.works}
        for k, work in enumerate(self.works):
            turns = [
                span.end - span.begin
                for span in spans
                if span.module == k and batches // 4 <= span.batch < 3 * batches // 4
            ]
            busy[work.device] += rate * sum(turns) / (3 * batches // 4 - batches // 4)
        return rate, {device: min(1.0, share) for device, share in busy.items()}, spans

    def alone(self, seconds: Sequence[float]) -> float:
        """Seconds of a batch on one device, all modules one after the other."""
        return sum(
            s * max(1.0, work.cores * work.seconds / s / self.cores)
            for s, work in zip(seconds, self.works)
        )


def _group_sizes(settings: Settings) -> tuple[int, ...]:
    return getattr(settings.engine, "group_sizes", ())


def _codec_options(settings: Settings, name: str) -> CodecSettings:
    """Returns the options of a codec as they are configured, whatever codec is."""
    given = vars(settings.codec) | {
        n.removeprefix("codec."): v for n, v in settings.unused.items() if n.startswith("codec.")
    }
    having = {f.name for f in dataclasses.fields(CODECS[name].options or CodecSettings)} - {"name"}
    return options("codec", name=name, **{n: v for n, v in given.items() if n in having})


def _codecs(pipeline: Pipeline, spec: TrainSpec, settings: Settings) -> dict[str, Any]:
    """What each codec with the configured sizes sends, hop by hop, and the speed with it; None where it does not fit."""
    found: dict[str, Any] = {}
    for name in CODECS:
        codec = make_codec(_codec_options(settings, name), settings.model.dtype)
        try:
            traffic = dataclasses.replace(spec, codec=codec).traffic()
        except UserError:  # groups of so many channels do not divide them
            found[name] = None
            continue
        rate, _, _ = pipeline.steady(traffic.wire)
        crossing = [
            bytes_ if crosses else 0.0 for bytes_, crosses in zip(traffic.wire, pipeline.crosses())
        ]
        found[name] = {
            "ticks_per_second": rate,
            "bytes_per_image": list(traffic.wire),
            "compression": [raw / wire for raw, wire in zip(traffic.raw, traffic.wire)],
            "megabytes_per_second": [bytes_ * spec.batch_size * rate / 1e6 for bytes_ in crossing],
        }
    return found


def _memory(
    spec: TrainSpec,
    groups: Sequence[range],
    spans: Sequence[Span],
    ticks_in_flight: int,
    devices: int,
) -> list[int | None]:
    """Returns the bytes that each device needs at most; None where XLA does not tell what programs need.

    States and waiting packets of the device's modules, and the largest of their programs.
    """
    sizes = {len(group) for group in groups}
    _LOG.info("compiling the modules' programs, for the memory that they need")
    programs = {
        n: module_memory(dataclasses.replace(spec, batch_size=spec.batch_size // n)) for n in sizes
    }
    held, largest = [0] * devices, [0] * devices
    for k, group in enumerate(groups):
        of_group = programs[len(group)]
        if of_group is None:
            return [None] * devices
        program = of_group[k]
        packets = (
            waiting(spans, k) if k else ticks_in_flight + 1
        )  # batches are put on the device as ticks are dispatched
        for device in group:
            held[device] += program.arguments + (packets - 1) * program.packet
            largest[device] = max(largest[device], program.temporary + program.added)
    return [a + b for a, b in zip(held, largest)]


def _stated(text: str, network: Blocks) -> BlockTimes:
    """The times of `--block_times`."""
    where, count = f"--block_times={text}", len(network.blocks)
    try:
        if Path(text).suffix == ".json":
            given = json.loads(Path(text).read_text(encoding="utf-8"))
            given = given.get("block_milliseconds", given) if isinstance(given, dict) else given
        else:
            given = [float(part) for part in text.split(",")]
        rows = {
            name: [float(t) / 1e3 for t in row]
            for name, row in (given if isinstance(given, dict) else {"all": given}).items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: neither milliseconds such as 1.5,2,3 nor a JSON file of them ({error})"
        ) from error
    if rows.keys() not in ({"all"}, {"first", "inner", "head"}):
        raise UserError(
            f"{where}: holds {', '.join(rows) or 'nothing'}, where first, inner and head are needed"
        )
    if wrong := next(
        (
            name
            for name, row in rows.items()
            if len(row) != count or not all(0 < t < math.inf for t in row)
        ),
        None,
    ):
        times = "" if wrong == "all" else f" of {wrong!r}"
        raise UserError(
            f"{where}: the network has {count} blocks, so {count} times{times} above 0 are needed"
        )
    if "all" in rows:
        operations = block_flops(network)
        per_operation = sum(rows["all"]) / (sum(operations.inner) or 1.0)
        rows = {
            "first": rows["all"],
            "inner": rows["all"],
            "head": [per_operation * head for head in operations.head],
        }
    seconds = BlockCosts(**{name: tuple(row) for name, row in rows.items()})
    return BlockTimes(seconds, seconds)


def _text(found: dict[str, Any]) -> list[str]:
    """The numbers as lines to read."""
    fields = {f.name for f in dataclasses.fields(ModuleCost)}
    rows = [
        ModuleCost(**{name: value for name, value in row.items() if name in fields})
        for row in found["modules"]
    ]
    shared = f", which share {found['cores']:g} cores" if found["cores"] else ""
    link = f"{found['bandwidth']:g} GB/s a link" if found["bandwidth"] else "packets take no time"
    turns = [["module", "ms a turn", "on devices"]]
    turns += [
        [row["name"], f"{row['milliseconds']:.4g}", ", ".join(map(str, row["devices"]))]
        for row in found["modules"]
    ]
    devices = [["device", "idle", "peak memory, MiB"]]
    for number, (idle, memory) in enumerate(zip(found["idle"], found["peak_memory_bytes"])):
        devices.append(
            [
                str(number),
                f"{100 * idle:.0f} %",
                "-" if memory is None else f"{memory / 2**20:,.1f}",
            ]
        )
    hops, sizes = [f"after {row['name']}" for row in found["modules"][:-1]], found["codec_sizes"]
    labels = {
        "int8": f"int8, dims={sizes['dims']}",
        "vq": "vq, " + ", ".join(f"{name}={size}" for name, size in sizes.items()),
    }
    codecs, unfit = [["codec, bytes an image", *hops, "MB/s in all", "ticks/s"]], []
    for name, codec in found["codecs"].items():
        if codec is None:
            unfit.append(
                f"codec {name}: config.codec.dims does not divide the channels of every hop"
            )
            continue
        sent = [f"{bytes_:,.0f}" for bytes_ in codec["bytes_per_image"]]
        codecs.append(
            [
                labels.get(name, name),
                *sent,
                f"{sum(codec['megabytes_per_second']):,.1f}",
                f"{codec['ticks_per_second']:.4g}",
            ]
        )
    parts = [
        [f"{found['devices']} devices{shared}; block times {found['block_times']}; {link}"],
        table(rows),
        aligned(turns),
        [
            f"{found['ticks_per_second']:.4g} ticks/s ({found['images_per_second']:,.0f} images/s), "
            f"{found['speedup']:.2f} times one device; idle {100 * found['idle_share']:.0f} % of the time",
        ],
        [*aligned(devices), f"(memory as compiled for {found['memory_compiled_for']})"],
        [*aligned(codecs), *unfit],
        [f"timeline: {found['timeline']}"] if found["timeline"] else [],
    ]
    return [line for part in parts if part for line in [*part, ""]][:-1]
