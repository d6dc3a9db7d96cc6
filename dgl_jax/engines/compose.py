"""The one jitted function of a module: decode what comes in, step, encode what goes out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dgl_jax import average, rngs
from dgl_jax.codecs import relative_error
from dgl_jax.data import augment_key
from dgl_jax.engines.engine import Recipe
from dgl_jax.kept import kept
from dgl_jax.module import ModuleState
from dgl_jax.packet import Batch, Coded, Targets
from dgl_jax.placement import Placement
from dgl_jax.step import Metrics, feed_step, local_step

# (state, what came in: a Batch or a Coded, its targets) -> (state, what goes to the next module: a Coded or None, metrics)
Program = Callable[[ModuleState, Any, Targets], tuple[ModuleState, Coded | None, Metrics]]


def entrance(recipe: Recipe, batch: Batch) -> jax.Array:
    """A stored batch to network inputs: the augmentation of step n is drawn from the seed and n alone."""
    return recipe.preprocess.train(augment_key(recipe.seed, batch.step), batch.images)


def compose(recipe: Recipe, k: int) -> Program:
    """The pure function of module k, ready for `jax.jit` (donate the state).

    The first module takes a Batch, the others what a packet brings; the last one hands nothing on.
    """
    module, last = recipe.modules[k], len(recipe.modules) - 1

    def program(state: ModuleState, incoming: Any, targets: Targets) -> tuple[ModuleState, Coded | None, Metrics]:
        inputs, drift = _receive(recipe, k, incoming)
        updates = state.updates
        state, outputs, metrics = local_step(
            module,
            recipe.optimizer,
            state,
            inputs,
            targets,
            accumulate=recipe.accumulate,
            label_smoothing=recipe.label_smoothing,
        )
        if recipe.ema:
            state = average.advance(state, recipe.ema)
        metrics |= drift
        if k == last:
            return state, None, metrics
        state, coded, of_codec = _hand_on(recipe, state, outputs, updates)
        return state, coded, metrics | of_codec

    program.__name__ = module.name
    return program


@kept(256)
def jitted(recipe: Recipe, k: int, placement: Placement) -> Any:
    """Returns the program of module k for its devices; it takes over (donates) the state."""
    return jax.jit(compose(recipe, k), donate_argnums=0, out_shardings=exits(placement, k, len(recipe.modules)))


@kept(256)
def jitted_feed(recipe: Recipe, k: int, train: bool, placement: Placement) -> Any:
    """Returns the program of `feed` for the devices of module k."""
    return jax.jit(feed(recipe, k, train), out_shardings=exits(placement, k, len(recipe.modules))[1])


def exits(placement: Placement, k: int, modules: int) -> tuple[Any, Any, Any]:
    """Returns where the program of module k leaves its state, what it hands on and its metrics, as shardings."""
    coded = placement.coded(k) if k + 1 < modules else None
    return placement.replicated(k), coded, placement.replicated(k)


def feed(recipe: Recipe, k: int, train: bool) -> Callable[[ModuleState, Any], Coded]:
    """The pure function of a module that is done: what comes in, to what goes to the next one; nothing is updated.

    `train`: batch norm goes on using the statistics of the batch, as in its updates; otherwise the running ones.
    """
    module = recipe.modules[k]

    def program(state: ModuleState, incoming: Any) -> Coded:
        inputs, _ = _receive(recipe, k, incoming)
        outputs = feed_step(module, state, inputs, train=train, accumulate=recipe.accumulate)
        codebook = recipe.codebook(state)
        return Coded(recipe.codec.encode(codebook, outputs), codebook)

    return program


def _receive(recipe: Recipe, k: int, incoming: Any) -> tuple[jax.Array, Metrics]:
    """Inputs of a module, and how far they are from what was sent, where the newest codebook decodes."""
    if k == 0:
        return entrance(recipe, incoming), {}
    inputs = recipe.codec.decode(incoming.codebook, incoming.payload)
    if incoming.newest is None:
        return inputs, {}
    drifted = recipe.codec.decode(incoming.newest, incoming.payload)
    return drifted, {"codec_drift": relative_error(inputs, drifted)}


def _hand_on(recipe: Recipe, state: ModuleState, outputs: jax.Array, updates: jax.Array) -> tuple[ModuleState, Coded, Metrics]:
    """Encodes with the published codebook, and learns from what was encoded."""
    codec = recipe.codec
    key = rngs.codec(state.rng, updates)
    learnt = codec.publish(state.extras.get("codec"), key, outputs, updates)
    codebook = codec.codebook(learnt)
    coded = Coded(codec.encode(codebook, outputs), codebook)
    metrics = {} if codec.lossless else {"codec_error": relative_error(outputs, codec.decode(codebook, coded.payload))}
    learnt, health = codec.update(learnt, key, outputs)
    if "codec" in state.extras:
        state = dataclasses.replace(state, extras=state.extras | {"codec": learnt})
    return state, coded, metrics | health
