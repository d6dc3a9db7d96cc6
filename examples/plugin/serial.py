"""An engine: one program a module, all on one device, each batch all the way through before the next."""

from collections.abc import Callable, Iterator
from typing import Any

from dgl_jax.config import EngineSettings
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines import EngineInputs, EngineKind, EngineState, Report, register_engine, updates_of
from dgl_jax.engines.base import Synchronous, run_ticks
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.engines.program import jitted
from dgl_jax.schedule import Tick, fused, never
from dgl_jax.spec import TrainSpec


class SerialEngine(Synchronous):
    """Gives the numbers of `fused` with the memory of one module's step at a time."""

    def __init__(self, spec: TrainSpec, placement: Placement):
        self.spec, self.placement = spec, placement
        self.programs = [jitted(spec, k, placement) for k in range(len(spec.modules))]

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        states, start = list(state.modules), updates_of(state)
        batches = source.batches(start)

        def dispatch(tick: Tick) -> list[tuple[Any, Metrics]]:
            incoming: Any = self.placement.put_batch(next(batches), 0)
            context, results = incoming.context, []
            for turn in tick:
                states[turn.module], incoming, metrics = self.programs[turn.module](states[turn.module], incoming, context)
                if incoming is not None:
                    context = self.spec.carried(turn.module + 1, context, incoming.context)
                    incoming = incoming._replace(context=())
                results.append((turn, metrics))
            return results

        ticks = fused(len(states), start, until, stop)
        yield from run_ticks(ticks, dispatch, 2, len(states), lambda flight=True: EngineState(tuple(states)))


def make(inputs: EngineInputs, options: EngineSettings) -> SerialEngine:
    """Returns the engine on the first device."""
    return SerialEngine(inputs.spec, inputs.checked(one_group(inputs.devices[:1], len(inputs.spec.modules))))


# Of the family of `fused` and `pipeline`: a run of one goes on under another.
register_engine("serial", EngineKind(make, family="synchronous"))
