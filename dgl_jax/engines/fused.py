"""Engine `fused`: one jitted function runs all turns of a tick on one device group.

It needs the fewest dispatches and serves as the reference for the other engines. On accelerators a
dispatch runs many steps, as a loop inside the jitted function (`engine.steps_per_dispatch`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from dgl_jax.config.fields import number, option
from dgl_jax.config.registry import ENGINES
from dgl_jax.core.program_cache import cached_program
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines import world
from dgl_jax.engines.base import (
    EngineInputs,
    EngineKind,
    EngineState,
    Report,
    Snapshot,
    SynchronousOptions,
    counts,
    module_shardings,
)
from dgl_jax.engines.dispatches import Dispatches
from dgl_jax.engines.feed import Feed, Stored, select, stacked_shapes
from dgl_jax.engines.pace import Pace
from dgl_jax.engines.placement import Placement, assign, one_group
from dgl_jax.engines.program import CompilerOptions, Programs, command_buffers, jitted, on_group
from dgl_jax.engines.synchronous import Synchronous, run_ticks
from dgl_jax.methods.base import TrainStep, progress
from dgl_jax.methods.post import Post
from dgl_jax.schedule import Group, Progress, Tick, entering, grouped, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch


@dataclass(frozen=True)
class FusedOptions(SynchronousOptions):
    """Options of the engine `fused`.

    Attributes:
      steps_per_dispatch: steps that the host starts at once, as a loop on the device; 0: 1 on the
        CPU, where such loops are slow, and on accelerators as many as have at most 6e12 operations
        and fit between two log lines.
      barrier: True compiles each module as if it were alone, so that `fused` and `pipeline` agree
        bit for bit on the CPU; False lets XLA join operations of different modules.
      command_buffers: True records the step, with its convolutions and control flow, as CUDA
        graphs; no effect on other platforms. XLA cannot capture every convolution: if the first
        step fails, turn it off.
    """

    steps_per_dispatch: int = number(0, 0, 1024, free=True)
    barrier: bool = option(True, free=True)
    command_buffers: bool = option(False, free=True)


@dataclass(frozen=True)
class StepCompiler:
    """Choices in compiling the functions of one tick and of many ticks.

    Attributes:
      barrier: see `FusedOptions`.
      options: compiler options of `jax.jit`.
      placement: placement whose shardings the returned states have; None leaves them to XLA.
    """

    barrier: bool = True
    options: CompilerOptions = ()
    placement: Placement | None = None

    def jit(self, spec: TrainSpec, function: Callable[..., Any]) -> Any:
        """Returns the jitted function of (states, ...), which donates the states."""
        options, shardings = dict(self.options) or None, None
        if self.placement is not None:
            with jax.transfer_guard("allow"):  # a run builds programs between its steps
                states = enumerate(spec.abstract_states())
            shardings = tuple(module_shardings(k, s, self.placement) for k, s in states), None
        return jax.jit(
            function, donate_argnums=0, compiler_options=options, out_shardings=shardings
        )


@cached_program(64)
def _jitted(
    spec: TrainSpec, turns: tuple[tuple[int, str], ...], compiler: StepCompiler, group: Mesh | None
) -> TrainStep:
    function = on_group(spec.method.fused(spec, turns, compiler.barrier), group)
    step: TrainStep = compiler.jit(spec, function)
    return step


@cached_program(64)
def _jitted_loop(
    spec: TrainSpec, turns: tuple[tuple[int, str], ...], compiler: StepCompiler, group: Mesh | None
) -> Any:
    """Returns the jitted function that repeats a tick for each batch of a stack."""
    step = spec.method.fused(spec, turns, compiler.barrier)

    def loop(states: Any, stored: Stored | None, batches: Batch) -> Any:
        return lax.scan(lambda states, batch: step(states, select(stored, batch)), states, batches)

    return compiler.jit(spec, on_group(loop, group))


def _repeated(spec: TrainSpec) -> frozenset[tuple[tuple[int, str], ...]]:
    """Returns the turns of the ticks that occur again and again in the method's schedule."""
    modules = len(spec.modules)
    steps = 4 * modules + 16  # longer than it takes to fill all modules
    ticks = spec.method.schedule([0] * modules, steps, steps)
    counted = Counter(tuple((turn.module, turn.kind) for turn in tick) for tick in ticks)
    return frozenset(turns for turns, count in counted.items() if count > 2)


class FusedEngine(Synchronous):
    """Synchronous engine that runs all turns of a tick as one jitted function.

    Attributes:
      steps: jitted functions of one tick, `(states, batch) -> (states, metrics)`, by the
        (module, kind) pairs of the turns.
      loops: jitted functions of many ticks, `(states, stored, batches) -> (states, metrics)`, with
        a leading axis over the ticks in `batches` and `metrics`.
      turns: jitted programs by (module, kind). They run the few ticks with other turns at the
        beginning and end of a method with delays: compiling a function for each of these ticks
        would take longer than running them.
    """

    def __init__(
        self,
        spec: TrainSpec,
        placement: Placement,
        ticks_in_flight: int = 2,
        total_steps: int = 0,
        dispatches: Dispatches | None = None,
        compiler: StepCompiler | None = None,
    ):
        self.spec = spec
        self.placement = placement
        self.ticks_in_flight, self.total_steps = ticks_in_flight, total_steps
        self.dispatches, compiler = dispatches or Dispatches(), compiler or StepCompiler()
        # Without these shardings XLA might split a history of batches over the devices. The second
        # step would then be another program than the first one, and so would the first step of a
        # resumed run, which rounds differently.
        stored = {name for state in spec.abstract_states() for name in state.extras}
        if world.count() > 1 or (placement.count() > 1 and stored - {"codec", "ema"}):
            compiler = replace(compiler, placement=placement)
        self._prepared: set[tuple[tuple[int, str], ...]] = set()
        self._whole = _repeated(spec)
        self.turns = Programs(lambda turn: jitted(spec, turn[0], placement, turn[1]))
        group = placement.groups[0] if placement.count() > 1 else None
        self.steps = Programs(lambda turns: _jitted(spec, turns, compiler, group))
        self.loops = Programs(lambda turns: _jitted_loop(spec, turns, compiler, group))

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until step `until`; see `Engine.run`."""
        states, feed = state.modules, self.feed(source)

        def dispatch(group: Group) -> Sequence[Metrics]:
            nonlocal states
            turns = tuple((turn.module, turn.kind) for turn in group[0])
            first = entering(group[0])
            if len(group) > 1:
                assert first is not None
                if turns not in self._prepared:
                    self._prepare(turns, states, feed)
                batches = feed.batches(first.batch, len(group))
                states, metrics = self.loops[turns](states, feed.stored, batches)
            elif turns in self._whole:
                batch = None if first is None else feed.batch(first.batch)
                states, metrics = self.steps[turns](states, batch)
            else:
                post = Post(self.spec, states)
                metrics = post.run(group[0], self.turns, feed.batch)
                states = post.closed()
            return metrics

        updates_before = counts(state)
        pace = Pace(self.placement, self.ticks_in_flight, stop)
        made = list(updates_before)

        def ticks(stop: Callable[[], bool]) -> Iterator[Tick]:
            for tick in self.spec.method.schedule(
                updates_before, until, max(until, self.total_steps), stop
            ):
                yield tick
                for turn in tick:
                    made[turn.module] += turn.updates()

        def size_at(batch: int) -> int:
            begin = progress(self.spec.method, made) or Progress(batch)
            return self.dispatches.size(begin.made, until, begin.per_step)

        groups = grouped(ticks, size_at, pace.stop)
        final: Snapshot = lambda flight=True: EngineState(states)  # noqa: E731
        yield from run_ticks(self, groups, dispatch, updates_before, final, pace)

    def _prepare(self, turns: tuple[tuple[int, str], ...], states: Any, feed: Feed) -> None:
        """Compiles the functions of one and of many ticks with these turns, at the same time.

        Otherwise one of them would be compiled in the middle of the training.
        """
        batch, count = self.placement.batch_shapes(self.spec.batch()), self.dispatches.steps
        with ThreadPoolExecutor(2) as threads:
            single = threads.submit(lambda: self.steps[turns].lower(states, batch).compile())
            resident = feed.stored is not None
            stack = stacked_shapes(batch, count, self.placement, resident)
            self.loops[turns].lower(states, feed.stored, stack).compile()
            single.result()
        self._prepared.add(turns)


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
        Dispatches.of(run, options.steps_per_dispatch),
        StepCompiler(
            options.barrier, command_buffers(run.devices[0]) if options.command_buffers else ()
        ),
    )


ENGINES.ship(fused=EngineKind(_make, FusedOptions, family="synchronous", distributed=True))
