"""Delayed gradients (DDG) of Huo et al. 2018, "Decoupled Parallel Backpropagation with Convergence
Guarantee": every module but the last updates with a gradient that is K - 1 - k batches old.

The gradient belongs to the activations and to the parameters of the forward pass, as in the paper.
Every module therefore stores, for each batch in flight, its inputs and its parameters, and computes
the forward pass again from them; the result has the same bits as the first pass. The stored arrays
do not depend on the network's intermediate values or on the version of JAX, so that checkpoints
stay readable. Storing the intermediate values instead would save that forward pass, at several
times the memory for a convolutional network.

Memory: module k holds K - k copies of its inputs and of its parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

from dgl_jax.config.registry import METHODS
from dgl_jax.methods.base import MethodKind
from dgl_jax.methods.delayed import Delayed, DelayedOptions


@dataclass(frozen=True)
class Ddg(Delayed):
    """Training rule with delayed gradients at the parameters of the forward pass."""

    stores_params: ClassVar[bool] = True


METHODS.ship(
    ddg=MethodKind(
        lambda options: Ddg(options.encode_gradients),
        DelayedOptions,
        local=False,
        engines=("fused", "pipeline"),
        delayed=True,
    )
)
