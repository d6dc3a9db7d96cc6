"""The one jitted function of a module: decode what comes in, step, encode what goes out."""

from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.codecs import relative_error
from dgl_jax.data import augment_key
from dgl_jax.engines.engine import Recipe
from dgl_jax.module import ModuleState
from dgl_jax.packet import Batch, Targets
from dgl_jax.step import Metrics, local_step

# (state, what came in, its targets) -> (state, payload for the next module or None, metrics)
Program = Callable[[ModuleState, Any, Targets], tuple[ModuleState, Any, Metrics]]


def entrance(recipe: Recipe, batch: Batch) -> jax.Array:
    """A stored batch to network inputs: the augmentation of step n is drawn from the seed and n alone."""
    return recipe.preprocess.train(augment_key(recipe.seed, batch.step), batch.images)


def compose(recipe: Recipe, k: int) -> Program:
    """The pure function of module k, ready for `jax.jit` (donate the state).

    The first module takes a Batch, the others the payload of a packet; the last one hands nothing on.
    """
    module, last = recipe.modules[k], len(recipe.modules) - 1

    def program(state: ModuleState, incoming: Any, targets: Targets) -> tuple[ModuleState, Any, Metrics]:
        inputs = entrance(recipe, incoming) if k == 0 else recipe.codec.decode(incoming)
        state, outputs, metrics = local_step(module, recipe.optimizer, state, inputs, targets)
        if k == last:
            return state, None, metrics
        payload = recipe.codec.encode(outputs)
        if not recipe.codec.lossless:
            metrics |= {"codec_error": relative_error(outputs, recipe.codec.decode(payload))}
        return state, payload, metrics

    program.__name__ = module.name
    return program


def feed(recipe: Recipe, k: int, train: bool) -> Callable[[ModuleState, Any], Any]:
    """The pure function of a module that is done: what comes in, to the payload for the next one; nothing is updated.

    `train`: batch norm goes on using the statistics of the batch, as in its updates; otherwise the running ones.
    """
    module = recipe.modules[k]

    def program(state: ModuleState, incoming: Any) -> Any:
        inputs = entrance(recipe, incoming) if k == 0 else recipe.codec.decode(incoming)
        rng = jax.random.fold_in(state.rng, state.updates)
        outputs, _ = module.apply_body(state.params, state.batch_stats, inputs, train=train, rng=rng)
        return recipe.codec.encode(outputs)

    return program
