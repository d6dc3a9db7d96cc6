"""Model of a pipeline for `--mode=plan`: modules on devices and the links between them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax

from dgl_jax.config import Settings
from dgl_jax.config.registry import METHODS
from dgl_jax.engines.placement import check_batch, layout
from dgl_jax.methods import Method
from dgl_jax.objectives import Exchange
from dgl_jax.profile.flops import forward_flops
from dgl_jax.profile.turn_timing import CodecCost
from dgl_jax.spec import TrainSpec
from dgl_jax.tools.timeline import Span, Work, simulate
from dgl_jax.types import nbytes


@dataclass(frozen=True)
class Link:
    """Speed of the links between devices.

    Attributes:
      bandwidth: of each link, in GB/s; may be infinite.
      latency: seconds that a message travels, one way, in addition to the time of its bytes.
      message_cost: seconds for which a host is busy with each message that it sends or receives,
        and which each round of an all-reduce takes longer.
    """

    bandwidth: float = math.inf
    latency: float = 0.0
    message_cost: float = 0.0

    def seconds(self, bytes_: float) -> float:
        """Returns the seconds for which bytes occupy a link."""
        return bytes_ / (1e9 * self.bandwidth)


@dataclass(frozen=True)
class Reduction:
    """Sums over the devices of a group in each turn of a module that updates it.

    Attributes:
      bytes_: of the gradients.
      times: number of all-reduces.
      gathered: bytes of each array of which all devices get a whole copy.
    """

    bytes_: float = 0.0
    times: int = 0
    gathered: tuple[int, ...] = ()

    def seconds(self, devices: int, link: Link) -> float:
        """Returns the duration on a ring of devices.

        In each of 2 (g - 1) rounds of an all-reduce, or g - 1 rounds of an all-gather, every device
        sends one part in g to its neighbor.
        """
        parts = 2 * self.bytes_ + sum(self.gathered)
        messages = 2 * self.times + len(self.gathered)
        each = link.latency + link.message_cost
        return (devices - 1) * (link.seconds(parts / devices) + messages * each)


def reductions(spec: TrainSpec, each_array: bool = False) -> list[Reduction]:
    """Returns what a group of devices exchanges in each module of a run.

    XLA joins the gradients of a module into one all-reduce. Batch norm needs two more, for the
    statistics of the whole batch and their gradients; an objective states what it needs.

    Args:
      spec: the training run.
      each_array: True counts every array, as XLA's collectives on the CPU send them.
    """
    sums, features = [], spec.inputs()
    for module, state in zip(spec.modules, spec.abstract_states()):
        for block in module.blocks:
            _, features = forward_flops(block, features.shape, features.dtype)
        exchange = module.objective.exchange(features) if module.objective else Exchange()
        arrays = len(jax.tree.leaves(state.params))
        statistics = len(jax.tree.leaves(state.batch_stats))  # a mean and a variance per batch norm
        times = arrays + 2 * statistics if each_array else 1 + statistics
        bytes_, times = nbytes(state.params) + sum(exchange.summed), times + len(exchange.summed)
        sums.append(Reduction(bytes_, times, exchange.gathered))
    return sums


def make_pipeline(
    settings: Settings,
    seconds: Sequence[float],
    processor: Sequence[float],
    devices: int | None = None,
    link: Link = Link(),
    cores: float | None = None,
    sums: Sequence[Reduction] = (),
) -> tuple["Pipeline", list[range]]:
    """Builds the model of a pipeline and assigns devices to its modules.

    Args:
      settings: configuration; its network, method and engine decide the schedule.
      seconds: wall time of each module's turn on one device.
      processor: processor seconds of the host that each of these turns uses.
      devices: number of devices, see `plan`.
      link: speed of all links.
      cores: processors that all devices share, see `plan`.
      sums: what the devices of each module add up; empty: nothing.

    Returns:
      The pipeline, and the devices of each module.

    Raises:
      UserError: if the devices or the batch cannot be divided as configured.
    """
    modules, sizes = len(seconds), group_sizes(settings)
    groups = layout(devices or sum(sizes) or modules, modules, sizes, seconds)
    check_batch(settings.data.batch_size, list(map(len, groups)), settings.train.accumulate)
    # The devices of a group share each turn: it takes less wall time but the same processor time.
    works = []
    for group, turn, used, each in zip(
        groups, seconds, processor, sums or [Reduction()] * modules, strict=True
    ):
        alone, reduction = turn / len(group), each.seconds(len(group), link)
        works.append(Work(group[0], alone, cores=used / (alone + reduction), reduction=reduction))
    limits = link, cores or math.inf
    ticks, method = (
        getattr(settings.engine, "ticks_in_flight", 2),
        METHODS[settings.method.name].make(settings.method),
    )
    return Pipeline(tuple(works), settings.data.batch_size, *limits, ticks, method), groups


@dataclass(frozen=True)
class Pipeline:
    """Model of modules on their devices and of the links between them.

    Attributes:
      works: one entry per module. The times of messages are ignored: they are computed from the
        bytes sent.
      batch_size: examples per batch.
      link: speed of the link of each hop.
      cores: processors that all devices share; may be infinite.
      ticks_in_flight: how many ticks the host runs ahead of the devices.
      method: the training method, which defines the schedule.
      waiting_above: messages from above that wait at each module, see `timeline.simulate`.
    """

    works: tuple[Work, ...]
    batch_size: int
    link: Link
    cores: float
    ticks_in_flight: int
    method: Method
    waiting_above: tuple[int, ...] = ()

    def with_codec(self, costs: Sequence[CodecCost], groups: Sequence[range]) -> "Pipeline":
        """Returns the pipeline whose turns include the work of a codec.

        Args:
          costs: cost of the codec in each module's turn.
          groups: devices of each module.
        """
        works = []
        for work, cost, group in zip(self.works, costs, groups, strict=True):
            more = cost.on(len(group))
            processor = work.cores * (work.seconds + work.reduction) + more.processor
            seconds = work.seconds + more.seconds
            reduction = work.reduction + _sums(cost).seconds(len(group), self.link)
            cores = processor / (seconds + reduction)
            works.append(
                dataclasses.replace(work, seconds=seconds, cores=cores, reduction=reduction)
            )
        return dataclasses.replace(self, works=tuple(works))

    def crosses(self) -> list[bool]:
        """Returns, per hop, True if it leads to another device."""
        return [here.device != there.device for here, there in pairwise(self.works)]

    def spans(self, wire: Sequence[float], batches: int, down: Sequence[float] = ()) -> list[Span]:
        """Simulates a run from its first batch.

        Args:
          wire: bytes per image that cross each hop.
          batches: length of the run.
          down: the part of `wire` that travels down; empty if nothing does.

        Returns:
          All turns, in the order in which they end.
        """

        works, link = list(self.works), self.link
        messages = [0] * len(works)  # that the host of each module sends and receives per turn
        for k, (both, crosses) in enumerate(zip(wire, self.crosses())):
            below = down[k] if down else 0.0
            works[k] = dataclasses.replace(
                works[k],
                transfer=link.seconds((both - below) * self.batch_size) if crosses else 0.0,
                transfer_down=link.seconds(below * self.batch_size) if crosses else 0.0,
                latency=link.latency if crosses else 0.0,
            )
            for end in (k, k + 1):
                messages[end] += crosses * (2 if below else 1)
        works = [
            dataclasses.replace(work, host=count * link.message_cost)
            for work, count in zip(works, messages)
        ]
        works[-1] = dataclasses.replace(works[-1], transfer=0.0)
        ticks = self.method.schedule(
            [0] * len(works), batches, batches, overlap=any(self.crosses())
        )
        # Hosts tell each other through the first of them.
        notice = 2 * link.latency if any(self.crosses()) else 0.0
        return simulate(ticks, works, self.cores, self.ticks_in_flight, self.waiting_above, notice)

    def steady(
        self, wire: Sequence[float], down: Sequence[float] = ()
    ) -> tuple[float, dict[int, float], list[Span]]:
        """Measures the middle half of a long simulated run, while the pipeline is full.

        Args:
          wire: bytes per image that cross each hop.
          down: the part of `wire` that travels down; empty if nothing does.

        Returns:
          Ticks per second, the busy share of each device, and all turns of the run.
        """
        batches = 8 * len(self.works) + 64
        spans, last = self.spans(wire, batches, down), len(self.works) - 1
        done = [span.end for span in spans if span.module == last]
        begin, end = (done[batches // 4], done[3 * batches // 4])
        rate = (3 * batches // 4 - batches // 4) / (end - begin)
        # Computed from the mean length of a turn, not from the turns between `begin` and `end`: a
        # module hardly faster than the slowest one runs ahead for a long time before it must wait.
        busy = {work.device: 0.0 for work in self.works}
        for k, work in enumerate(self.works):
            turns = [
                span.end - span.begin
                for span in spans
                if span.module == k and batches // 4 <= span.batch < 3 * batches // 4
            ]
            busy[work.device] += rate * sum(turns) / (3 * batches // 4 - batches // 4)
        return rate, {device: min(1.0, share) for device, share in busy.items()}, spans

    def alone(
        self, seconds: Sequence[float], processor: Sequence[float], codec: Sequence[CodecCost]
    ) -> float:
        """Returns the seconds per batch if all modules run one after the other on one device.

        See `fused_rate` for the arguments.
        """
        added = [cost.on(1) for cost in codec]
        return sum(
            max(turn + more.seconds, (used + more.processor) / self.cores)
            for turn, used, more in zip(seconds, processor, added, strict=True)
        )


def fused_rate(
    seconds: Sequence[float],
    processor: Sequence[float],
    sums: Sequence[Reduction],
    devices: int,
    link: Link = Link(),
    cores: float | None = None,
    codec: Sequence[CodecCost] = (),
) -> float:
    """Returns the ticks per second of the engine `fused`, which splits each batch over all devices.

    Args:
      seconds: wall time of each module's turn on one device.
      processor: processor seconds of the host that each of these turns uses.
      sums: what all devices add up for each module.
      devices: number of devices.
      link: speed of the links of the ring.
      cores: processors that all devices share; None: no limit.
      codec: cost of the codec in the turn of each module; empty: none.
    """
    tick, limit, nothing = 0.0, cores or math.inf, [CodecCost()] * len(seconds)
    for turn, used, each, cost in zip(seconds, processor, sums, codec or nothing, strict=True):
        more = cost.on(devices)
        tick += max(turn / devices + more.seconds, (used + more.processor) / limit)
        tick += each.seconds(devices, link) + _sums(cost).seconds(devices, link)
    return 1.0 / tick


def _sums(cost: CodecCost) -> Reduction:
    """Returns what the devices of a group exchange because of the codec."""
    return Reduction(4.0 * cost.sums, cost.sums, cost.gathered)


def waiting_above(spec: TrainSpec) -> tuple[int, ...]:
    """Returns how many messages from above wait at each module whose steps read them, else 0."""
    return tuple(
        len(state.extras["above"]) if spec.method.ports(spec, k, "step")[0].above else 0
        for k, state in enumerate(spec.abstract_states())
    )


def group_sizes(settings: Settings) -> tuple[int, ...]:
    """Returns the configured number of devices per module; empty if none is configured."""
    return getattr(settings.engine, "group_sizes", ())
