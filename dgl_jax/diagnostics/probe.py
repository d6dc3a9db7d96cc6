"""Probe of one module: its gradient and its inputs on a batch of the probe set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dgl_jax.codecs import relative_error
from dgl_jax.core import rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import forward_step, local_loss, mean_gradient
from dgl_jax.diagnostics.distances import Sample, project
from dgl_jax.methods.base import Ports
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Message

PyTree = Any


class Parts(NamedTuple):
    """Parts of a module's state that a probe reads.

    Attributes:
      params: as in `ModuleState`.
      batch_stats: as in `ModuleState`.
      codec: state of the module's codec; `()` if it has none.
      published: publications that the module's objective reads.
    """

    params: PyTree
    batch_stats: PyTree
    codec: PyTree
    published: PyTree

    @classmethod
    def of(cls, state: ModuleState) -> "Parts":
        """Returns these parts of a state."""
        published = state.extras.get("published", {})
        return cls(state.params, state.batch_stats, state.extras.get("codec", ()), published)

    def codebook(self, spec: TrainSpec) -> PyTree:
        """Returns the published codebook; `()` if the codec has none."""
        return spec.codec.codebook(self.codec) if jax.tree.leaves(self.codec) else ()


class Probe(NamedTuple):
    """Results of a probe on one batch.

    Attributes:
      payload: encoded activations for the next module.
      codec: state of the codec that has encoded them.
      context: context that travels with them.
      gradient: gradient of the module's objective with respect to its parameters, in float32; None
        without an objective.
      inputs: projections of the module's inputs, [B, p]; None for the first module.
      codec_error: relative error of the payload; None if the codec is lossless, or nothing is sent.
    """

    payload: PyTree
    codec: PyTree
    context: Context
    gradient: PyTree | None
    inputs: Sample | None
    codec_error: jax.Array | None


def probe(
    spec: TrainSpec,
    k: int,
    directions: int,
    in_turn: bool,
    start: bool,
    parts: Parts,
    incoming: Any,
    context: Context,
) -> Probe:
    """Computes the gradient of module k on a batch, and projects what the module reads.

    The forward pass is the one of an update: batch norm uses the statistics of the batch, and
    dropout is active, with the same random numbers at every probe. Inputs are not augmented. The
    module's state stays unchanged.

    Args:
      spec: description of the run.
      k: index of the module.
      directions: number of random directions.
      in_turn: True if the module above trains on the activations of a frozen module, which
        normalizes with its running statistics; the gradient is the one of an update in any case.
      start: True starts the codebook with the outputs, as the first message of a module does.
      parts: the module's parameters, batch statistics, codec and publications.
      incoming: stored inputs for the first module, otherwise the message from the module below.
      context: context of the same examples.
    """
    module, ports = spec.modules[k], Ports(spec, k)
    root = rngs.probe(rngs.root(spec.seed))
    inputs, _ = ports.receive(incoming)
    full, rng = ports.full_context(inputs, context), rngs.module(root, k)
    gradient = None
    if module.objective is None:
        state = ModuleState(parts.params, parts.batch_stats, (), rng, jnp.zeros((), jnp.int32))
        outputs, _ = forward_step(
            module, state, inputs, full, train=True, accumulate=spec.accumulate
        )
    else:
        computed, _, outputs, _ = mean_gradient(
            local_loss(module, parts.published),
            parts.params,
            parts.batch_stats,
            jax.lax.stop_gradient(inputs),
            full,
            rngs.update(rng, 0),
            spec.accumulate,
        )
        gradient = jax.tree.map(lambda x: x.astype(jnp.float32), computed)
    if in_turn:
        outputs, _ = module.apply_body(parts.params, parts.batch_stats, inputs, full, train=False)
    projected = project(inputs, rngs.directions(root, k), directions) if k else None
    if k == len(spec.modules) - 1:
        return Probe((), (), {}, gradient, projected, None)
    if start:
        key, updates = rngs.codec(rng, 0), jnp.zeros((), jnp.int32)
        parts = parts._replace(codec=spec.codec.publish(parts.codec, key, outputs, updates))
    codebook = parts.codebook(spec)
    message: Message = ports.emit(outputs, codebook, inputs)
    error = None
    if spec.method.sends and not spec.codec.lossless:
        error = relative_error(outputs, spec.codec.decode(codebook, message.payload))
    carried = spec.carried(k + 1, context, message.context)
    return Probe(message.payload, parts.codec, carried, gradient, projected, error)
