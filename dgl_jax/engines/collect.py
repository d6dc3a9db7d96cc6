"""Collection of the metrics of turns, from which synchronous engines make their reports."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dgl_jax.core.step import Metrics
from dgl_jax.engines.base import Report, Snapshot
from dgl_jax.methods.base import progress
from dgl_jax.schedule import Tick, Turn

# (turns of a tick, metrics of each turn) -> reports of what the tick has completed
Collect = Callable[[Tick, Sequence[Metrics]], Iterator[Report]]


def collector(engine: Any, counts: Sequence[int], snapshot: Snapshot) -> Collect:
    """Returns the function that reports what each finished tick has completed.

    A report covers a batch once all modules have updated on it. If the method defines `progress`,
    there is one for each update.

    Args:
      engine: synchronous engine, whose `early` holds the metrics of batches between two modules.
      counts: updates that each module has made before the run.
      snapshot: the snapshot function of the reports.
    """
    if progress(engine.spec.method, counts) is None:
        return _by_batch(engine, counts, snapshot)
    return _by_update(engine.spec.method, counts, snapshot)


def _by_batch(engine: Any, counts: Sequence[int], snapshot: Snapshot) -> Collect:
    made = list(counts)
    # With equal counts no batch is between two modules.
    collected = {
        batch: dict(metrics)
        for batch, metrics in engine.early.items()
        if min(counts) <= batch and len(set(counts)) > 1
    }
    engine.early = collected

    def collect(tick: Tick, metrics: Sequence[Metrics]) -> Iterator[Report]:
        for turn, turn_metrics in zip(tick, metrics, strict=True):
            batch_metrics = collected.setdefault(turn.batch, {})
            batch_metrics[turn.module] = batch_metrics.get(turn.module, {}) | turn_metrics
            if turn.updates():
                made[turn.module] = turn.batch + 1
        for batch in sorted(b for b in collected if b < min(made)):
            report_metrics = _in_order(collected.pop(batch), len(counts))
            yield Report((batch + 1,) * len(counts), report_metrics, snapshot, step=batch + 1)

    return collect


def _by_update(method: Any, counts: Sequence[int], snapshot: Snapshot) -> Collect:
    collected: dict[int, dict[int, Metrics]] = {}
    made = list(counts)

    def collect(tick: Tick, metrics: Sequence[Metrics]) -> Iterator[Report]:
        for turn, turn_metrics in zip(tick, metrics, strict=True):
            collected.setdefault(turn.batch, {})[turn.module] = turn_metrics
        for turn in filter(Turn.updates, tick):
            made[turn.module] += 1
            report_metrics = _in_order(collected.pop(turn.batch), len(counts))
            step = method.progress(made).step
            yield Report(tuple(made), report_metrics, snapshot, step=step, module=turn.module)

    return collect


def _in_order(metrics: dict[int, Metrics], modules: int) -> tuple[Metrics, ...]:
    return tuple(metrics.get(k, {}) for k in range(modules))
