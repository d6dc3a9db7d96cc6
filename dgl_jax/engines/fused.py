"""All modules in ONE jitted function on one device group: the oracle, and the least dispatch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from dgl_jax.data import Source
from dgl_jax.engines.compose import compose
from dgl_jax.engines.engine import EngineState, Recipe, Report, Synchronous, Traffic, place_modules, run_ticks, updates_of
from dgl_jax.engines.turns import Tick, fused, never
from dgl_jax.kept import kept
from dgl_jax.module import ModuleState
from dgl_jax.packet import Batch
from dgl_jax.placement import Placement, put
from dgl_jax.step import Metrics

States = tuple[ModuleState, ...]
# (states of all modules, batch) -> (states, metrics of each module)
TrainStep = Callable[[States, Batch], tuple[States, tuple[Metrics, ...]]]


def fused_step(recipe: Recipe) -> TrainStep:
    """The local steps of all modules on one batch, one after the other, as one pure function."""
    programs = [compose(recipe, k) for k in range(len(recipe.modules))]

    def step(states: States, batch: Batch) -> tuple[States, tuple[Metrics, ...]]:
        new, metrics = [], []
        incoming: Any = batch
        for program, state in zip(programs, states, strict=True):
            state, incoming, of_module = program(state, incoming, batch.targets)
            # Each module is compiled as it would be alone, which keeps every bit equal to the pipeline's.
            state, incoming, of_module = jax.lax.optimization_barrier((state, incoming, of_module))
            new.append(state)
            metrics.append(of_module)
        return tuple(new), tuple(metrics)

    return step


@kept(16)
def _jitted(make_step: Callable[[Recipe], TrainStep], recipe: Recipe) -> TrainStep:
    return jax.jit(make_step(recipe), donate_argnums=0)


class FusedEngine(Synchronous):
    """Runs one jitted training step for all modules; `make_step` lets a baseline bring a step of its own."""

    def __init__(
        self,
        recipe: Recipe,
        placement: Placement,
        ticks_in_flight: int = 2,
        make_step: Callable[[Recipe], TrainStep] = fused_step,
    ):
        self.recipe = recipe
        self.placement = placement
        self.ticks_in_flight = ticks_in_flight
        self.step = _jitted(make_step, recipe)

    def traffic(self) -> Traffic:
        """Nothing crosses devices here: what the encoded arrays weigh. No hop where all modules have one loss."""
        return self.recipe.traffic() if all(module.head for module in self.recipe.modules) else Traffic((), (), ())

    def init(self) -> EngineState:
        """Fresh state on its devices."""
        return self.place(EngineState(self.recipe.init()))

    def place(self, state: EngineState) -> EngineState:
        """A state on this engine's devices."""
        return place_modules(state.modules, self.placement, put)

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        states, start = state.modules, updates_of(state)
        batches = source.batches(start)
        modules = len(self.recipe.modules)

        def dispatch(tick: Tick) -> list[tuple[Any, Metrics]]:
            nonlocal states
            batch = self.placement.put_batch(next(batches), 0)
            states, metrics = self.step(states, batch)
            return list(zip(tick, metrics, strict=True))

        ticks = fused(modules, start, until, stop)
        yield from run_ticks(ticks, dispatch, self.ticks_in_flight, modules, lambda flight=True: EngineState(states))
