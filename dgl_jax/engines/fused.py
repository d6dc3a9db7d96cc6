"""All modules in ONE jitted function on one device group: the oracle, and the least dispatch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from dgl_jax.core.kept import kept
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Report,
    Synchronous,
    SynchronousOptions,
    run_ticks,
    updates_of,
)
from dgl_jax.engines.placement import Placement, assign, one_group
from dgl_jax.methods.base import TrainStep
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import Tick, fused, never
from dgl_jax.spec import TrainSpec


@kept(16)
def _jitted(spec: TrainSpec) -> TrainStep:
    return jax.jit(spec.method.fused(spec), donate_argnums=0)


class FusedEngine(Synchronous):
    """Runs one jitted training step for all modules."""

    def __init__(self, spec: TrainSpec, placement: Placement, ticks_in_flight: int = 2):
        self.spec = spec
        self.placement = placement
        self.ticks_in_flight = ticks_in_flight
        self.step = _jitted(spec)

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        states, start = state.modules, updates_of(state)
        batches = source.batches(start)
        modules = len(self.spec.modules)

        def dispatch(tick: Tick) -> list[tuple[Any, Metrics]]:
            nonlocal states
            batch = self.placement.put_batch(next(batches), 0)
            states, metrics = self.step(states, batch)
            return list(zip(tick, metrics, strict=True))

        ticks = fused(modules, start, until, stop)
        yield from run_ticks(ticks, dispatch, self.ticks_in_flight, modules, lambda flight=True: EngineState(states))


def _make(run: EngineInputs, options: SynchronousOptions) -> FusedEngine:
    """Builds the engine on one group: as many devices as the groups of a pipeline would have together."""
    modules = len(run.spec.modules)
    count = assign(run.devices, modules, options.group_sizes).count() if options.group_sizes else len(run.devices)
    return FusedEngine(run.spec, run.checked(one_group(run.devices[:count], modules)), options.ticks_in_flight)


ENGINES.ship(fused=EngineKind(_make, SynchronousOptions, family="synchronous"))
