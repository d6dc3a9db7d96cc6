"""An engine: one program a module, all on one device, each batch all the way through before the next."""

from collections.abc import Callable, Iterator
from typing import Any

from dgl_jax.config import EngineSettings
from dgl_jax.core.step import Metrics
from dgl_jax.data import Source
from dgl_jax.engines import EngineInputs, EngineKind, EngineState, Report, counts, register_engine
from dgl_jax.engines.base import Synchronous, reader, run_ticks
from dgl_jax.engines.placement import Placement, one_group
from dgl_jax.engines.program import Programs, jitted
from dgl_jax.methods.base import closed, delivered, oldest, opened
from dgl_jax.registry import ENGINES
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox


class SerialEngine(Synchronous):
    """Gives the numbers of `fused` with the memory of one module's step at a time."""

    def __init__(self, spec: TrainSpec, placement: Placement, total_steps: int):
        self.spec, self.placement, self.total_steps = spec, placement, total_steps
        self.programs = Programs(lambda turn: jitted(spec, turn[0], placement, turn[1]))

    def run(self, state: EngineState, source: Source, until: int, stop: Callable[[], bool] = never) -> Iterator[Report]:
        """Trains until every module has `until` updates; see `Engine.run`."""
        method, read, below = self.spec.method, reader(source), dict[int, Any]()
        states, mails = map(list, zip(*map(opened, state.modules)))

        def dispatch(tick: Tick) -> list[tuple[Turn, Metrics]]:
            results = []
            for turn in tick:
                k, (reads, _) = turn.module, method.ports(self.spec, turn.module, turn.kind)
                incoming, context = None, {}
                if reads.below is not None and k == 0:
                    incoming = self.placement.put_batch(read(turn.batch), 0)
                    context = incoming.context
                elif reads.below is not None:
                    incoming, context = below.pop(k)
                inbox = Inbox(incoming, oldest(mails[k]) if reads.above is not None else None)
                states[k], sent, metrics = self.programs[k, turn.kind](states[k], inbox, context)
                if sent.above is not None:
                    carried = self.spec.carried(k + 1, context, sent.above.context)
                    below[k + 1] = sent.above._replace(context=()), carried
                if sent.below is not None:
                    mails[k - 1] = delivered(mails[k - 1], "above", sent.below)
                results.append((turn, metrics))
            return results

        made = counts(state)
        ticks = method.schedule(made, until, max(until, self.total_steps), stop)
        end = lambda flight=True: EngineState(tuple(map(closed, states, mails)))  # noqa: E731
        yield from run_ticks(ticks, dispatch, 2, made, end)


def make(inputs: EngineInputs, options: EngineSettings) -> SerialEngine:
    """Returns the engine on the first device."""
    placement = inputs.checked(one_group(inputs.devices[:1], len(inputs.spec.modules)))
    return SerialEngine(inputs.spec, placement, inputs.total_steps)


# Of the family of `fused` and `pipeline`: a run of one goes on under another.
register_engine("serial", EngineKind(make, family=ENGINES["fused"].family))
