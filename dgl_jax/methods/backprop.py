"""Back-propagation through the whole network: the row that every table needs.

Same blocks, data, optimizer and loop as the decoupled engines; one loss, at the last module's head, whose gradient goes down
through all modules. The heads of the other modules do not exist.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dgl_jax import schedule
from dgl_jax.core import ema, rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, apply_gradient, mean_gradient
from dgl_jax.methods.base import MethodKind, Ports, States, TrainStep
from dgl_jax.registry import METHODS
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch


@dataclass(frozen=True)
class Backprop:
    """Back-propagation: one loss for all modules, whose gradient goes through all of them at once."""

    sends: ClassVar[bool] = False

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields a batch a tick."""
        return schedule.aligned(counts, until, stop, overlap=False)

    def fused(self, spec: TrainSpec, turns: Sequence[tuple[int, str]]) -> TrainStep:
        """Returns one update of all modules on the last one's loss."""
        modules = spec.modules

        def loss_function(params, batch_stats, inputs, context, keys):
            x, new = inputs, []
            for module, p, stats, key in zip(modules, params, batch_stats, keys, strict=True):
                x, body = module.apply_body(p, stats, x, context, train=True, rng=key)
                new.append({"body": body})
            last = modules[-1]
            local, new[-1]["objective"] = last.apply_objective(
                params[-1], batch_stats[-1], x, context, train=True, rng=keys[-1]
            )
            return local.loss, (new, (), local.metrics)

        def step(states: States, batch: Batch | None) -> tuple[States, tuple[Metrics, ...]]:
            assert batch is not None
            params, stats = (
                [state.params for state in states],
                [state.batch_stats for state in states],
            )
            keys = [rngs.update(state.rng, state.updates) for state in states]
            ports = Ports(spec, 0)
            inputs, _ = ports.receive(batch)
            context = ports.whole(inputs, batch.context)
            gradients, stats, _, of_last = mean_gradient(
                loss_function, params, stats, inputs, context, keys, spec.accumulate
            )
            new = [
                apply_gradient(spec.optimizer, *args)
                for args in zip(states, gradients, stats, strict=True)
            ]
            if spec.ema:
                new = [ema.advance(state, spec.ema) for state in new]
            metrics: list[Metrics] = [{} for _ in modules]
            metrics[-1] = of_last
            return tuple(new), tuple(metrics)

        return step

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns nothing: no message waits."""
        return {}


METHODS.ship(backprop=MethodKind(lambda options: Backprop(), local=False, engines=("fused",)))
