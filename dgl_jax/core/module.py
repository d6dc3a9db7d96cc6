"""A module of the network: its slice of the blocks (the body), its head, and the state that training changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from dgl_jax.core import rngs
from dgl_jax.ops import recomputed

PyTree = Any


@struct.dataclass
class ModuleState:
    """All that an update of one module reads and replaces; a plain pytree.

    Attributes:
      params: {"body": {"block_0": ..., ...}, "head": ...}; blocks keep their number in the whole network.
      batch_stats: running averages of batch norm, same keys; empty dicts where a block has none.
      opt_state: the optimizer's.
      rng: key of random operations inside the module (dropout) and of its codec; see `rngs.module`.
      updates: how many updates this module has made.
      extras: what others keep with the module by name, such as the codec's codebooks or the moving average of `average.py`; an
        update of the module leaves it alone.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    rng: jax.Array
    updates: Int[Array, ""]
    extras: dict[str, PyTree] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class LocalModule:
    """Consecutive blocks of the network and the head that gives them a loss of their own. Holds no arrays; hashable.

    Attributes:
      name: "module_0" and so on, the name in metrics and checkpoints.
      first: number of the first block in the whole network.
      blocks: Flax Linen modules called as `block(x, train)`.
      head: Flax Linen module called as `head(x, train)` that gives logits; None where a baseline trains none.
      remat: compute each block again in the backward pass of an update instead of keeping what is inside it: less memory, and a
        forward pass of the body more.
      ops: how `remat` recomputes, see `dgl_jax.ops`; blocks and head have a field of their own.
    """

    name: str
    first: int
    blocks: tuple[nn.Module, ...]
    head: nn.Module | None
    remat: bool = False
    ops: str = "auto"

    def init(self, key: jax.Array, inputs: jax.ShapeDtypeStruct) -> tuple[PyTree, PyTree]:
        """Fresh (params, batch_stats) for inputs of this shape.

        A block's values depend on `key` and on its number in the network alone: however the network is cut, they are the same.
        """
        params: PyTree = {"body": {}}
        batch_stats: PyTree = {"body": {}}
        x = inputs
        for number, block in enumerate(self.blocks, self.first):
            variables = block.lazy_init(rngs.block_params(key, number), x, train=False)
            params["body"][f"block_{number}"] = variables.get("params", {})
            batch_stats["body"][f"block_{number}"] = variables.get("batch_stats", {})
            x = jax.eval_shape(lambda v, x, block=block: block.apply(v, x, train=False), variables, x)
        if self.head is not None:
            below = self.first + len(self.blocks)
            variables = self.head.lazy_init(rngs.head_params(key, below), x, train=False)
            params["head"], batch_stats["head"] = variables["params"], variables.get("batch_stats", {})
        return params, batch_stats

    def apply_body(
        self,
        params: PyTree,
        batch_stats: PyTree,
        inputs: Float[Array, "B ..."],
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        """Inputs to activations; also the new batch_stats of the body (the same ones where not `train`)."""
        apply = partial(_apply_again, self.ops) if self.remat and train else _apply
        x, stats = inputs, {}
        for number, block in enumerate(self.blocks, self.first):
            name = f"block_{number}"
            key = None if rng is None else rngs.block(rng, number)
            x, stats[name] = apply(block, params["body"][name], batch_stats["body"][name], x, train, key)
        return x, stats

    def apply_head(
        self,
        params: PyTree,
        batch_stats: PyTree,
        activations: Float[Array, "B ..."],
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B C"], PyTree]:
        """Activations to logits; also the new batch_stats of the head."""
        assert self.head is not None, f"{self.name} has no head"
        key = None if rng is None else rngs.head(rng)
        return _apply(self.head, params["head"], batch_stats["head"], activations, train, key)

    def apply(
        self,
        params: PyTree,
        batch_stats: PyTree,
        inputs: Float[Array, "B ..."],
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B ..."], Float[Array, "B C"], PyTree]:
        """Inputs to (activations for the next module, logits of the own head, new batch_stats)."""
        outputs, body = self.apply_body(params, batch_stats, inputs, train=train, rng=rng)
        logits, head = self.apply_head(params, batch_stats, outputs, train=train, rng=rng)
        return outputs, logits, {"body": body, "head": head}


def _apply(block: nn.Module, params: PyTree, stats: PyTree, x: Array, train: bool, key: jax.Array | None) -> tuple[Any, PyTree]:
    variables = {"params": params, "batch_stats": stats}
    if not train:
        return block.apply(variables, x, train=False), stats
    rngs = None if key is None else {"dropout": key}
    x, updated = block.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
    return x, updated.get("batch_stats", {})


def _apply_again(
    ops: str, block: nn.Module, params: PyTree, stats: PyTree, x: Array, train: bool, key: jax.Array | None
) -> tuple[Any, PyTree]:
    def function(params: PyTree, x: Array, others: Any) -> tuple[Any, PyTree]:
        stats, key = others
        return _apply(block, params, stats, x, train, key)

    return recomputed(function, ops=ops)(params, x, (stats, key))


def make_modules(
    blocks: Sequence[nn.Module], cuts: Sequence[int], heads: Sequence[nn.Module | None], remat: bool = False, ops: str = "auto"
) -> tuple[LocalModule, ...]:
    """Cuts an ordered list of blocks into modules: module k begins with block `cuts[k]` and carries `heads[k]`."""
    ends = [*cuts[1:], len(blocks)]
    return tuple(
        LocalModule(f"module_{k}", first, tuple(blocks[first:end]), head, remat, ops)
        for k, (first, end, head) in enumerate(zip(cuts, ends, heads, strict=True))
    )


def init_states(
    modules: Sequence[LocalModule],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: jax.ShapeDtypeStruct,
) -> tuple[ModuleState, ...]:
    """Fresh states of all modules, each shaped by the activations of the one before.

    Args:
      inputs: shape and dtype of a batch of network inputs.
    """
    states = []
    for k, module in enumerate(modules):
        params, batch_stats = module.init(key, inputs)
        states.append(
            ModuleState(
                params=params,
                batch_stats=batch_stats,
                opt_state=optimizer.init(params),
                rng=rngs.module(key, k),
                updates=jnp.zeros((), jnp.int32),
            )
        )
        inputs = output_shape(module, params, batch_stats, inputs)
    return tuple(states)


def output_shape(module: LocalModule, params: PyTree, batch_stats: PyTree, inputs: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the activations that a module hands on."""
    outputs, _ = jax.eval_shape(lambda p, s, x: module.apply_body(p, s, x, train=False), params, batch_stats, inputs)
    return outputs


def count_parameters(state: ModuleState) -> int:
    """Trainable numbers of a module, head included."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
