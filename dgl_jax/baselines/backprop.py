"""Back-propagation through the whole network: the row that every table needs.

Same blocks, data, optimizer and loop as the decoupled engines; one loss, at the last module's head, whose gradient goes down
through all modules. The heads of the other modules do not exist.
"""

from dgl_jax import average, losses, rngs
from dgl_jax.engines.compose import entrance
from dgl_jax.engines.engine import Recipe
from dgl_jax.engines.fused import States, TrainStep
from dgl_jax.packet import Batch
from dgl_jax.step import Metrics, apply_gradient, mean_gradient


def backprop_step(recipe: Recipe) -> TrainStep:
    """One update of all modules on the last one's loss, as one pure function."""
    modules = recipe.modules

    def objective(params, batch_stats, inputs, targets, keys):
        x, new = inputs, []
        for module, p, stats, key in zip(modules, params, batch_stats, keys, strict=True):
            x, body = module.apply_body(p, stats, x, train=True, rng=key)
            new.append({"body": body})
        logits, new[-1]["head"] = modules[-1].apply_head(params[-1], batch_stats[-1], x, train=True, rng=keys[-1])
        return losses.cross_entropy(logits, targets.label, recipe.label_smoothing), (new, (), logits)

    def step(states: States, batch: Batch) -> tuple[States, tuple[Metrics, ...]]:
        params, stats = [state.params for state in states], [state.batch_stats for state in states]
        keys = [rngs.update(state.rng, state.updates) for state in states]
        gradients, stats, _, of_last = mean_gradient(
            objective, params, stats, entrance(recipe, batch), batch.targets, keys, recipe.accumulate
        )
        new = [apply_gradient(recipe.optimizer, *args) for args in zip(states, gradients, stats, strict=True)]
        if recipe.ema:
            new = [average.advance(state, recipe.ema) for state in new]
        metrics: list[Metrics] = [{} for _ in modules]
        metrics[-1] = of_last
        return tuple(new), tuple(metrics)

    return step
