"""Engine `fused`: one jitted function runs all turns of a tick on one device group.

It needs the fewest dispatches and serves as the reference for the other engines.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from dgl_jax.core.program_cache import cached_program
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Report,
    SynchronousOptions,
    counts,
)
from dgl_jax.engines.placement import Placement, assign, one_group
from dgl_jax.engines.program import CompilerOptions, Programs, command_buffers
from dgl_jax.engines.synchronous import Synchronous, reader, run_ticks
from dgl_jax.fields import option
from dgl_jax.methods.base import TrainStep
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import TrainSpec


@dataclass(frozen=True)
class FusedOptions(SynchronousOptions):
    """Options of the engine `fused`.

    Attributes:
      barrier: True compiles each module as it would be alone, so that results equal `pipeline` bit
        for bit; False lets XLA join operations of different modules.
      command_buffers: True records the step, with its convolutions and control flow, as CUDA
        graphs; no effect on other platforms. XLA cannot capture every convolution: if the first
        step fails, turn it off.
    """

    barrier: bool = option(True, free=True)
    command_buffers: bool = option(False, free=True)


@cached_program(64)
def _jitted(
    spec: TrainSpec,
    turns: tuple[tuple[int, str], ...],
    barrier: bool = True,
    compiler_options: CompilerOptions = (),
) -> TrainStep:
    step = spec.method.fused(spec, turns, barrier)
    return jax.jit(step, donate_argnums=0, compiler_options=dict(compiler_options) or None)


class FusedEngine(Synchronous):
    """Synchronous engine that runs all turns of a tick as one jitted function."""

    def __init__(
        self,
        spec: TrainSpec,
        placement: Placement,
        ticks_in_flight: int = 2,
        total_steps: int = 0,
        barrier: bool = True,
        compiler_options: CompilerOptions = (),
    ):
        self.spec = spec
        self.placement = placement
        self.ticks_in_flight, self.total_steps = ticks_in_flight, total_steps
        # The keys are the (module, kind) pairs of a tick's turns.
        self.steps = Programs(lambda turns: _jitted(spec, turns, barrier, compiler_options))

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        states, read = state.modules, reader(source)

        def dispatch(tick: Tick) -> list[tuple[Turn, Metrics]]:
            nonlocal states
            reading_turn = next(
                (turn for turn in tick if turn.module == 0 and turn.kind != "backward"), None
            )
            batch = (
                None
                if reading_turn is None
                else self.placement.put_batch(read(reading_turn.batch), 0)
            )
            states, metrics = self.steps[tuple((turn.module, turn.kind) for turn in tick)](
                states, batch
            )
            return list(zip(tick, metrics, strict=True))

        updates_before = counts(state)
        ticks = self.spec.method.schedule(updates_before, until, max(until, self.total_steps), stop)
        yield from run_ticks(
            ticks,
            dispatch,
            self.ticks_in_flight,
            updates_before,
            lambda flight=True: EngineState(states),
        )


def _make(run: EngineInputs, options: FusedOptions) -> FusedEngine:
    """Builds the engine on one group with as many devices as a pipeline with these options uses."""
    modules = len(run.spec.modules)
    count = (
        assign(run.devices, modules, options.group_sizes).count()
        if options.group_sizes
        else len(run.devices)
    )
    return FusedEngine(
        run.spec,
        run.checked(one_group(run.devices[:count], modules)),
        options.ticks_in_flight,
        run.total_steps,
        options.barrier,
        command_buffers(run.devices[0]) if options.command_buffers else (),
    )


ENGINES.ship(fused=EngineKind(_make, FusedOptions, family="synchronous"))
