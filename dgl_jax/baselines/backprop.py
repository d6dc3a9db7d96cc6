"""Back-propagation through the whole network: the row that every table needs.

Same blocks, data, optimizer and loop as the decoupled engines; one loss, at the last module's head, whose gradient goes down
through all modules. The heads of the other modules do not exist.
"""

import jax

from dgl_jax import losses
from dgl_jax.engines.compose import entrance
from dgl_jax.engines.engine import Recipe
from dgl_jax.engines.fused import States, TrainStep
from dgl_jax.packet import Batch
from dgl_jax.step import Metrics, apply_gradient


def backprop_step(recipe: Recipe) -> TrainStep:
    """One update of all modules on the last one's loss, as one pure function."""
    modules = recipe.modules

    def step(states: States, batch: Batch) -> tuple[States, tuple[Metrics, ...]]:
        inputs = entrance(recipe, batch)
        label = batch.targets.label

        def objective(params):
            x, stats = inputs, []
            for module, state, p in zip(modules, states, params, strict=True):
                rng = jax.random.fold_in(state.rng, state.updates)
                x, body = module.apply_body(p, state.batch_stats, x, train=True, rng=rng)
                stats.append({"body": body})
            logits, stats[-1]["head"] = modules[-1].apply_head(params[-1], states[-1].batch_stats, x, train=True, rng=rng)
            return losses.cross_entropy(logits, label), (logits, stats)

        params = [state.params for state in states]
        (loss, (logits, stats)), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        new = [apply_gradient(recipe.optimizer, *args) for args in zip(states, gradients, stats, strict=True)]
        metrics: list[Metrics] = [{} for _ in modules]
        metrics[-1] = {"loss": loss, "accuracy": losses.accuracy(logits, label)}
        return tuple(new), tuple(metrics)

    return step
