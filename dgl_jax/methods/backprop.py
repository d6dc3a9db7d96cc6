"""Backpropagation through the whole network, the baseline for every comparison.

Blocks, data, optimizer and training loop are the same as for decoupled training, but gradients flow
down through all modules. Only the last module has a head and a loss, unless the method is
`deep_supervision`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dgl_jax import schedule
from dgl_jax.config.registry import METHODS
from dgl_jax.core import ema, rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, apply_gradient, mean_gradient
from dgl_jax.methods.base import MethodKind, Ports, States, TrainStep
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch


@dataclass(frozen=True)
class Backprop:
    """Backpropagation through all modules in one program.

    It minimizes the loss of the last module plus `weight` times the sum of the losses of the other
    modules that have an objective.

    Attributes:
      weight: factor of the other modules' losses.
    """

    weight: float = 0.0
    sends: ClassVar[bool] = False

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields one batch per tick."""
        return schedule.aligned(counts, until, stop, overlap=False)

    def fused(
        self, spec: TrainSpec, turns: Sequence[tuple[int, str]], barrier: bool = True
    ) -> TrainStep:
        """Returns the function that updates all modules on the loss of the whole network.

        It has no turns for a `barrier` to separate.
        """
        modules = spec.modules

        def loss_function(params, batch_stats, inputs, context, keys):
            x, losses, new = inputs, [], []
            metrics: list[Metrics] = []
            for module, p, stats, key in zip(modules, params, batch_stats, keys, strict=True):
                x, body, collected = module.apply_body_and_collect(
                    p, stats, x, context, train=True, rng=key
                )
                new.append({"body": body})
                metrics.append({})
                if module.objective is not None:
                    local, new[-1]["objective"] = module.apply_objective(
                        p, stats, x, context, collected, train=True, rng=key
                    )
                    losses.append(local.loss)
                    metrics[-1] = local.metrics
            loss = losses.pop()
            for other in losses:
                loss += self.weight * other
            return loss, (new, (), metrics)

        def step(states: States, batch: Batch | None) -> tuple[States, tuple[Metrics, ...]]:
            assert batch is not None
            params, stats = (
                [state.params for state in states],
                [state.batch_stats for state in states],
            )
            keys = [rngs.update(state.rng, state.updates) for state in states]
            ports = Ports(spec, 0)
            inputs, _ = ports.receive(batch)
            context = ports.full_context(inputs, batch.context)
            gradients, stats, _, metrics = mean_gradient(
                loss_function, params, stats, inputs, context, keys, spec.accumulate
            )
            new = [
                apply_gradient(spec.optimizer, *args)
                for args in zip(states, gradients, stats, strict=True)
            ]
            if spec.ema:
                new = [ema.advance(state, spec.ema) for state in new]
            return tuple(new), tuple(metrics)

        return step

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns an empty dict, because no message waits between ticks."""
        return {}


METHODS.ship(backprop=MethodKind(lambda options: Backprop(), local=False, engines=("fused",)))
