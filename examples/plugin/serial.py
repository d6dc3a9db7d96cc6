"""Engine that runs one program per module on a single device, one batch at a time."""

from collections.abc import Callable, Iterator

from dgl_jax.config import EngineSettings
from dgl_jax.config.registry import ENGINES
from dgl_jax.data import Source
from dgl_jax.engines import EngineInputs, EngineKind, EngineState, Report, register_engine
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.engines.program import Programs, jitted
from dgl_jax.engines.synchronous import Synchronous, run_turns
from dgl_jax.schedule import never
from dgl_jax.spec import TrainSpec


class SerialEngine(Synchronous):
    """Engine with the results of `fused` and the memory use of one module's step at a time."""

    ticks_in_flight = 2

    def __init__(self, spec: TrainSpec, placement: Placement, total_steps: int):
        self.spec, self.placement, self.total_steps = spec, placement, total_steps
        self.programs = Programs(lambda turn: jitted(spec, turn[0], placement, turn[1]))

    def run(
        self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never
    ) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        yield from run_turns(self, state, source, until, stop)


def make(inputs: EngineInputs, options: EngineSettings) -> SerialEngine:
    """Returns the engine, placed on the first device."""
    placement = inputs.checked(one_group(inputs.devices[:1], len(inputs.spec.modules)))
    return SerialEngine(inputs.spec, placement, inputs.total_steps)


# Same family as `fused` and `pipeline`: a run of one engine can resume under another.
register_engine("serial", EngineKind(make, family=ENGINES["fused"].family))
