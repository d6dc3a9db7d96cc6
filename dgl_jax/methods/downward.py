"""Gradients that travel down to the module below, encoded by the codec as activations are.

Module k >= 1 sends the gradient of its loss with respect to its inputs. The state of the codec for
these gradients is `extras["gradient_codec"]` of module k, separate from the state for the
activations that the module sends up. A message waits at module k - 1 in `extras["above"]`, with the
codebook that encoded it, so that it can be decoded whenever the run resumes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax.codecs import encode_and_learn
from dgl_jax.core import rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Message

_STATE = "gradient_codec"


def encode_gradient(
    spec: TrainSpec,
    state: ModuleState,
    number: jax.Array,
    gradient: jax.Array,
    encode: bool = True,
) -> tuple[ModuleState, Message, Metrics]:
    """Encodes a gradient for the module below and updates the codec with it.

    Args:
      spec: description of the run.
      state: state of the sending module.
      number: [] number of gradients that the module sent before.
      gradient: gradient of the loss with respect to the module's inputs, [B, ...].
      encode: False sends the values unchanged.

    Returns:
      The state with the new state of the codec; the message; and the metrics of the codec, whose
      names begin with `gradient_`: `gradient_codec_error` unless the codec is lossless.
    """
    if not encode:
        return state, Message(gradient), {}
    key = rngs.gradient_codec(state.rng, number)
    learned, codebook, payload, metrics = encode_and_learn(
        spec.codec, state.extras.get(_STATE), key, gradient, number
    )
    if _STATE in state.extras:
        state = replace(state, extras=state.extras | {_STATE: learned})
    named = {f"gradient_{name}": value for name, value in metrics.items()}
    return state, Message(payload, codebook), named


def decode_gradient(spec: TrainSpec, message: Message, encode: bool = True) -> jax.Array:
    """Returns the gradient of a message from above, [B, ...].

    Args:
      spec: description of the run.
      message: message that `encode_gradient` returned with the same `encode`.
      encode: False if the message holds the values unchanged.
    """
    gradient: jax.Array = (
        spec.codec.decode(message.codebook, message.payload) if encode else message.payload
    )
    return gradient


def gradient_extras(
    spec: TrainSpec, k: int, states: Sequence[ModuleState], encode: bool = True
) -> dict[str, Any]:
    """Returns the initial state of the codec for gradients and a waiting message of zeros.

    Module 0 sends no gradient and the last module receives none. See `Method.extras`.

    Args:
      spec: description of the run.
      k: index of the module.
      states: states of all modules, or their shapes and dtypes.
      encode: False if gradients are sent unchanged.
    """
    shapes, extras = spec.shapes(states), {}
    if k and encode:
        codec_state = spec.codec.init(shapes[k])
        if jax.tree.leaves(codec_state):
            extras[_STATE] = codec_state
    if k + 1 < len(shapes):
        message = jax.eval_shape(lambda: _first_message(spec, shapes[k + 1], encode))
        extras["above"] = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), message),)
    return extras


def _first_message(spec: TrainSpec, shape: jax.ShapeDtypeStruct, encode: bool) -> Message:
    gradient = jnp.zeros(shape.shape, shape.dtype)
    if not encode:
        return Message(gradient)
    codebook = spec.codec.codebook(spec.codec.init(shape))
    return Message(spec.codec.encode(codebook, gradient), codebook)
