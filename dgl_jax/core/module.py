"""A module of the network: its slice of the blocks (the body), its objective, and the state that training changes."""

import dataclasses
from collections.abc import Mapping, Sequence
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
from dgl_jax.errors import UserError
from dgl_jax.objectives import Classifier, Context, LocalLoss, Objective
from dgl_jax.ops import recomputed

PyTree = Any
NOTHING: dict[str, Any] = {}  # the default of what is only read


@struct.dataclass
class ModuleState:
    """All that an update of one module reads and replaces; a plain pytree.

    Attributes:
      params: {"body": {"block_0": ..., ...}, "objective": ...}; blocks keep their number in the whole network. The body of a module
        with an adapter has "adapter" besides.
      batch_stats: running averages of batch norm, same keys; empty dicts where a block has none.
      opt_state: the optimizer's.
      rng: key of random operations inside the module (dropout) and of its codec; see `rngs.module`.
      updates: how many updates this module has made.
      extras: what others keep with the module by name, such as the codec's codebooks or the moving average of `ema.py`; an
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
    """Consecutive blocks of the network and the objective that gives them a loss of their own. Holds no arrays; hashable.

    Attributes:
      name: "module_0" and so on, the name in metrics and checkpoints.
      first: number of the first block in the whole network.
      blocks: Flax Linen modules called as `block(x, train)`.
      objective: see `objectives.Objective`; None under a method that gives this module none.
      adapter: in front of the blocks, a Flax module called as `adapter(inputs, context, train)` that keeps the shape; None: none.
      remat: compute each block again in the backward pass of an update instead of keeping what is inside it: less memory, and a
        forward pass of the body more.
      ops: how `remat` recomputes, see `dgl_jax.ops`; blocks and head have a field of their own.
    """

    name: str
    first: int
    blocks: tuple[nn.Module, ...]
    objective: Objective | None
    remat: bool = False
    ops: str = "auto"
    adapter: nn.Module | None = None

    def init(
        self,
        key: jax.Array,
        inputs: jax.ShapeDtypeStruct,
        context: Mapping[str, jax.ShapeDtypeStruct],
        following: nn.Module | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Returns fresh (params, batch_stats) for inputs, and a context, of these shapes.

        A block's values depend on `key` and on its number in the network alone: however the network is cut, they are the same.

        Args:
          following: the first block of the next module, where the objective may read its variables.

        Raises:
          UserError: the adapter changes the shape or the type of its inputs.
        """
        params: PyTree = {"body": {}}
        batch_stats: PyTree = {"body": {}}
        x = inputs
        if self.adapter is not None:
            variables = self.adapter.lazy_init(
                rngs.adapter_params(key, self.first), x, context, train=False
            )
            adapted = jax.eval_shape(
                lambda v, x, c: self.adapter.apply(v, x, c, train=False),
                variables,
                x,
                dict(context),
            )  # type: ignore[union-attr]
            if (adapted.shape, adapted.dtype) != (x.shape, x.dtype):
                raise UserError(
                    f"config.model.adapter: that of {self.name} makes {adapted} of {x}; it must keep shape and type"
                )
            params["body"]["adapter"] = variables.get("params", {})
            batch_stats["body"]["adapter"] = variables.get("batch_stats", {})
        for number, block in enumerate(self.blocks, self.first):
            variables = block.lazy_init(rngs.block_params(key, number), x, train=False)
            params["body"][f"block_{number}"] = variables.get("params", {})
            batch_stats["body"][f"block_{number}"] = variables.get("batch_stats", {})
            x = jax.eval_shape(
                lambda v, x, block=block: block.apply(v, x, train=False), variables, x
            )
        if self.objective is not None:
            end = self.first + len(self.blocks)
            published = {}
            if following is not None and "next_block" in self.objective.reads:
                published["next_block"] = jax.eval_shape(
                    lambda: _collected(
                        following.lazy_init(rngs.block_params(key, end), x, train=False)
                    )
                )
            key = rngs.head_params(key, end)
            variables = self.objective.lazy_init(key, x, context, published, train=False)
            params["objective"], batch_stats["objective"] = (
                variables.get("params", {}),
                variables.get("batch_stats", {}),
            )
        return params, batch_stats

    def apply_body(
        self,
        params: PyTree,
        batch_stats: PyTree,
        inputs: Float[Array, "B ..."],
        context: Context = NOTHING,
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        """Inputs to activations; also the new batch_stats of the body (the same ones where not `train`).

        Args:
          context: what the adapter reads of the same examples; without one, nothing is read.
        """
        apply = partial(_apply_again, self.ops) if self.remat and train else _apply_block
        x, stats = inputs, {}
        if self.adapter is not None:
            key = None if rng is None else rngs.adapter(rng)
            of_adapter, running = params["body"]["adapter"], batch_stats["body"]["adapter"]
            x, stats["adapter"] = _apply(
                self.adapter, of_adapter, running, (x, context), train, key
            )
        for number, block in enumerate(self.blocks, self.first):
            name = f"block_{number}"
            key = None if rng is None else rngs.block(rng, number)
            x, stats[name] = apply(
                block, params["body"][name], batch_stats["body"][name], x, train, key
            )
        return x, stats

    def apply_objective(
        self,
        params: PyTree,
        batch_stats: PyTree,
        features: Float[Array, "B ..."],
        context: Context,
        published: Mapping[str, Any] = NOTHING,
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[LocalLoss, PyTree]:
        """Activations to the loss of this module; also the new batch_stats of the objective."""
        assert self.objective is not None, f"{self.name} has no objective"
        key = None if rng is None else rngs.head(rng)
        arguments: Any = (features, context, published)
        return _apply(
            self.objective, params["objective"], batch_stats["objective"], arguments, train, key
        )

    def predict(
        self,
        params: PyTree,
        batch_stats: PyTree,
        features: Float[Array, "B ..."],
        published: Mapping[str, Any] = NOTHING,
    ) -> Array | None:
        """Activations to what the module answers in evaluation; None without an objective, or if it answers nothing."""
        if self.objective is None:
            return None
        variables = {"params": params["objective"], "batch_stats": batch_stats["objective"]}
        answer: Any = self.objective.apply(
            variables, features, published, train=False, method="predict"
        )
        return answer


def _collected(variables: Any) -> dict[str, PyTree]:
    return {name: variables.get(name, {}) for name in ("params", "batch_stats")}


def _apply(
    layer: nn.Module,
    params: PyTree,
    stats: PyTree,
    arguments: tuple[Any, ...],
    train: bool,
    key: jax.Array | None,
) -> tuple[Any, PyTree]:
    variables = {"params": params, "batch_stats": stats}
    if not train:
        return layer.apply(variables, *arguments, train=False), stats
    rngs = None if key is None else {"dropout": key}
    result, updated = layer.apply(
        variables, *arguments, train=True, mutable=["batch_stats"], rngs=rngs
    )
    return result, updated.get("batch_stats", {})


def _apply_block(
    block: nn.Module, params: PyTree, stats: PyTree, x: Array, train: bool, key: jax.Array | None
) -> tuple[Any, PyTree]:
    return _apply(block, params, stats, (x,), train, key)


def _apply_again(
    ops: str,
    block: nn.Module,
    params: PyTree,
    stats: PyTree,
    x: Array,
    train: bool,
    key: jax.Array | None,
) -> tuple[Any, PyTree]:
    def function(params: PyTree, x: Array, others: Any) -> tuple[Any, PyTree]:
        stats, key = others
        return _apply(block, params, stats, (x,), train, key)

    return recomputed(function, ops=ops)(params, x, (stats, key))


def make_modules(
    blocks: Sequence[nn.Module],
    cuts: Sequence[int],
    heads: Sequence[nn.Module | None],
    remat: bool = False,
    ops: str = "auto",
    adapters: Sequence[nn.Module | None] = (),
) -> tuple[LocalModule, ...]:
    """Cuts an ordered list of blocks into modules: module k begins with block `cuts[k]` and carries `heads[k]`.

    Args:
      heads: of each module its objective; or a head, Flax module called as `head(x, train)` that gives logits, whose cross entropy
        is the objective; or None.
      adapters: of each module, see `LocalModule`; by default none has one.
    """
    ends = [*cuts[1:], len(blocks)]
    objectives = [
        head if head is None or isinstance(head, Objective) else Classifier(head) for head in heads
    ]
    parts = zip(cuts, ends, objectives, adapters or [None] * len(objectives), strict=True)
    return tuple(
        LocalModule(f"module_{k}", first, tuple(blocks[first:end]), objective, remat, ops, adapter)
        for k, (first, end, objective, adapter) in enumerate(parts)
    )


def init_states(
    modules: Sequence[LocalModule],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: jax.ShapeDtypeStruct,
    context: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> tuple[ModuleState, ...]:
    """Returns fresh states of all modules, each shaped by the activations of the one before.

    Args:
      inputs: shape and dtype of a batch of network inputs.
      context: shapes and dtypes of what objectives read besides; by default a class label an example, and the inputs as `image`.
    """
    integers = jax.ShapeDtypeStruct(inputs.shape[:1], "int32")
    context = {"label": integers, "id": integers, "image": inputs} if context is None else context
    states = []
    for k, module in enumerate(modules):
        following = modules[k + 1].blocks[0] if k + 1 < len(modules) else None
        params, batch_stats = module.init(key, inputs, context, following)
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


def output_shape(
    module: LocalModule, params: PyTree, batch_stats: PyTree, inputs: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the activations that a module hands on."""
    bare = dataclasses.replace(module, adapter=None)
    outputs, _ = jax.eval_shape(
        lambda p, s, x: bare.apply_body(p, s, x, train=False), params, batch_stats, inputs
    )
    return outputs


def count_parameters(state: ModuleState) -> int:
    """Returns how many trainable numbers a module has, its objective's included."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
