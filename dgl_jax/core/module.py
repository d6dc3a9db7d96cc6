"""Module of the network: its slice of the blocks (the body), its objective, and its state."""

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
from dgl_jax.core.apply import apply_layer, apply_recomputed
from dgl_jax.core.orthogonal import ADAPTER, BLOCK, OBJECTIVE, orthogonal
from dgl_jax.core.program_cache import cached_program
from dgl_jax.errors import UserError
from dgl_jax.objectives import Classifier, Context, LocalLoss, Objective

PyTree = Any
NOTHING: dict[str, Any] = {}  # default of mapping arguments; never modified


@struct.dataclass
class ModuleState:
    """State of one module: the values that an update reads and replaces, as a plain pytree.

    Attributes:
      params: {"body": {"block_0": ..., ...}, "objective": ...}; blocks keep their index in the
        whole network. The body of a module with an adapter also has "adapter".
      batch_stats: running averages of batch norm with the same keys; empty dicts for parts without
        batch norm.
      opt_state: state of the optimizer.
      rng: key for random operations inside the module (dropout) and for its codec; see
        `rngs.module`.
      updates: number of updates that this module has made.
      extras: auxiliary state owned by other components, keyed by owner, such as the codec's
        codebooks ("codec") or the moving average ("ema"). Updates of the module pass it through
        unchanged.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    rng: jax.Array
    updates: Int[Array, ""]
    extras: dict[str, PyTree] = struct.field(default_factory=dict)


@dataclass(frozen=True)
class LocalModule:
    """Description of a module: consecutive blocks of the network and a local objective.

    Holds no arrays and is hashable.

    Attributes:
      name: "module_0" and so on; used in metrics and checkpoints.
      first: index of the first block in the whole network.
      blocks: Flax Linen modules called as `block(x, train)`.
      objective: see `objectives.Objective`; None if the method gives this module no objective.
      remat: if True, the backward pass of an update recomputes each block instead of storing the
        intermediate values inside it: less memory for one more forward pass of the body.
      ops: how `remat` recomputes, see `dgl_jax.ops`. Blocks and heads have an `ops` field too.
      adapter: Flax module in front of the blocks, called as `adapter(inputs, context, train)`,
        which keeps the shape and dtype of the inputs; None for no adapter.
      gain: factor of orthogonal initial weights; 0 keeps the initial weights of each layer.
    """

    name: str
    first: int
    blocks: tuple[nn.Module, ...]
    objective: Objective | None
    remat: bool = False
    ops: str = "auto"
    adapter: nn.Module | None = None
    gain: float = 0.0

    def init(
        self,
        key: jax.Array,
        inputs: jax.ShapeDtypeStruct,
        context: Mapping[str, jax.ShapeDtypeStruct],
        following: nn.Module | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Initializes the parameters and batch statistics of the module.

        The initial values of a block depend only on `key` and on its index in the network, so they
        are the same for every way of cutting the network.

        Args:
          key: root key of the run, see `rngs.root`.
          inputs: shape and dtype of the module's inputs, [B, ...].
          context: shapes and dtypes of the context.
          following: first block of the next module, for an objective that reads its variables.

        Returns:
          (params, batch_stats) as in `ModuleState`.

        Raises:
          UserError: the adapter changes the shape or the dtype of its inputs.
        """
        params: PyTree = {"body": {}}
        batch_stats: PyTree = {"body": {}}
        intermediates: dict[str, PyTree] = {}
        x = inputs
        adapter = self.adapter
        if adapter is not None:
            variables = adapter.lazy_init(
                rngs.adapter_params(key, self.first), x, context, train=False
            )
            adapted = jax.eval_shape(
                lambda v, x, c: adapter.apply(v, x, c, train=False), variables, x, dict(context)
            )
            if (adapted.shape, adapted.dtype) != (x.shape, x.dtype):
                raise UserError(
                    f"config.model.adapter: the adapter of {self.name} turns {x} into {adapted}; "
                    "it must keep shape and dtype"
                )
            params["body"]["adapter"] = self._initial(variables, key, ADAPTER, self.first)
            batch_stats["body"]["adapter"] = variables.get("batch_stats", {})
        for number, block in enumerate(self.blocks, self.first):
            variables = block.lazy_init(rngs.block_params(key, number), x, train=False)
            block_params = self._initial(variables, key, BLOCK, number)
            block_stats = variables.get("batch_stats", {})
            params["body"][f"block_{number}"] = block_params
            batch_stats["body"][f"block_{number}"] = block_stats
            x, _, intermediates[f"block_{number}"] = jax.eval_shape(
                lambda p, s, x, block=block: apply_layer(
                    block, p, s, (x,), False, None, self.collects
                ),
                block_params,
                block_stats,
                x,
            )
        if self.objective is not None:
            end = self.first + len(self.blocks)
            published: dict[str, Any] = {}
            if self.collects:
                published["intermediates"] = intermediates
            if following is not None and "next_block" in self.objective.reads:
                published["next_block"] = published_block(following, rngs.block_params(key, end), x)
            variables = self.objective.lazy_init(
                rngs.head_params(key, end), x, context, published, train=False
            )
            params["objective"] = self._initial(variables, key, OBJECTIVE, end)
            batch_stats["objective"] = variables.get("batch_stats", {})
        return params, batch_stats

    def _initial(self, variables: Any, key: jax.Array, part: int, number: int) -> PyTree:
        params = variables.get("params", {})
        return orthogonal(params, key, part, number, self.gain) if self.gain else params

    @property
    def collects(self) -> bool:
        """Returns whether the objective reads values that the blocks sow."""
        return self.objective is not None and "intermediates" in self.objective.reads

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
        """Computes the module's activations; see `apply_body_and_collect`."""
        outputs, stats, _ = self.apply_body_and_collect(
            params, batch_stats, inputs, context, train=train, rng=rng
        )
        return outputs, stats

    def apply_body_and_collect(
        self,
        params: PyTree,
        batch_stats: PyTree,
        inputs: Float[Array, "B ..."],
        context: Context = NOTHING,
        *,
        train: bool,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree, dict[str, PyTree]]:
        """Computes the module's activations, and collects what its objective reads of the blocks.

        Args:
          params: as in `ModuleState`.
          batch_stats: as in `ModuleState`.
          inputs: activations of the module below, or network inputs, [B, ...].
          context: context of the same examples, read by the adapter only.
          train: normalize with the statistics of the batch and update the running averages.
          rng: key of this forward pass, see `rngs.micro_batch`; None if nothing in it is random.

        Returns:
          The activations, [B, ...]; the new batch_stats of the body (unchanged if not `train`); and
          {"intermediates": sown values by block} if the objective reads them, otherwise {}.
        """
        apply = partial(apply_recomputed, self.ops) if self.remat and train else apply_layer
        x, stats, intermediates = inputs, {}, {}
        if self.adapter is not None:
            key = None if rng is None else rngs.adapter(rng)
            adapter_params = params["body"]["adapter"]
            adapter_stats = batch_stats["body"]["adapter"]
            x, stats["adapter"], _ = apply_layer(
                self.adapter, adapter_params, adapter_stats, (x, context), train, key
            )
        for number, block in enumerate(self.blocks, self.first):
            name = f"block_{number}"
            key = None if rng is None else rngs.block(rng, number)
            block_params, block_stats = params["body"][name], batch_stats["body"][name]
            x, stats[name], intermediates[name] = apply(
                block, block_params, block_stats, (x,), train, key, self.collects
            )
        return x, stats, {"intermediates": intermediates} if self.collects else {}

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
        """Computes the loss of this module, which must have an objective.

        Args:
          params: as in `ModuleState`.
          batch_stats: as in `ModuleState`.
          features: activations of this module, [B, ...].
          context: context of the same examples.
          published: what the objective reads besides, by name; see `Objective.reads`.
          train: as for `apply_body`.
          rng: as for `apply_body`.

        Returns:
          The loss and the new batch_stats of the objective.
        """
        assert self.objective is not None, f"{self.name} has no objective"
        key = None if rng is None else rngs.head(rng)
        arguments: Any = (features, context, published)
        loss, stats, _ = apply_layer(
            self.objective, params["objective"], batch_stats["objective"], arguments, train, key
        )
        return loss, stats

    def predict(
        self,
        params: PyTree,
        batch_stats: PyTree,
        features: Float[Array, "B ..."],
        published: Mapping[str, Any] = NOTHING,
    ) -> Array | None:
        """Computes the module's predictions, such as logits, from its activations in evaluation.

        Args:
          params: as in `ModuleState`.
          batch_stats: as in `ModuleState`.
          features: activations of this module, [B, ...].
          published: what the objective reads besides, by name; see `Objective.reads`.

        Returns:
          The predictions; None if the module has no objective, or one that predicts nothing.
        """
        if self.objective is None:
            return None
        variables = {"params": params["objective"], "batch_stats": batch_stats["objective"]}
        predictions: Any = self.objective.apply(
            variables, features, published, train=False, method="predict"
        )
        return predictions


def published_block(block: nn.Module, key: jax.Array, x: jax.ShapeDtypeStruct) -> dict[str, PyTree]:
    """Returns shapes and dtypes of the publication `next_block`; see `Objective.reads`."""
    variables = jax.eval_shape(lambda: block.lazy_init(key, x, train=False))
    return {name: variables.get(name, {}) for name in ("params", "batch_stats")}


def make_modules(
    blocks: Sequence[nn.Module],
    cuts: Sequence[int],
    heads: Sequence[nn.Module | None],
    remat: bool = False,
    ops: str = "auto",
    adapters: Sequence[nn.Module | None] = (),
    gain: float = 0.0,
) -> tuple[LocalModule, ...]:
    """Cuts an ordered list of blocks into modules.

    Args:
      blocks: all blocks of the network, Flax Linen modules called as `block(x, train)`.
      cuts: index of the first block of each module; the first entry is 0.
      heads: one entry per module: an objective; a head, that is a Flax module called as
        `head(x, train)` that returns logits, which is trained with cross entropy; or None.
      remat: see `LocalModule`.
      ops: see `LocalModule`.
      adapters: one entry per module, see `LocalModule`; empty for no adapters.
      gain: see `LocalModule`.

    Returns:
      The modules, named "module_0" and so on.
    """
    ends = [*cuts[1:], len(blocks)]
    objectives = [
        head if head is None or isinstance(head, Objective) else Classifier(head) for head in heads
    ]
    parts = zip(cuts, ends, objectives, adapters or [None] * len(objectives), strict=True)
    return tuple(
        LocalModule(
            f"module_{k}", first, tuple(blocks[first:end]), objective, remat, ops, adapter, gain
        )
        for k, (first, end, objective, adapter) in enumerate(parts)
    )


def init_states(
    modules: Sequence[LocalModule],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: jax.ShapeDtypeStruct,
    context: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> tuple[ModuleState, ...]:
    """Returns fresh states of all modules, each shaped by the activations of the module below.

    Args:
      modules: all modules of the network, in order.
      optimizer: initializes `opt_state`.
      key: root key of the run, see `rngs.root`.
      inputs: shape and dtype of a batch of network inputs, [B, ...].
      context: shapes and dtypes of the context that objectives read; by default `label` and `id`
        ([B], int32), and the network inputs as `image`.
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
    """Returns shape and dtype of the activations that a module sends to the next one."""
    # The adapter needs a context, which is not at hand here, and changes neither shape nor dtype.
    forward = _forward(dataclasses.replace(module, adapter=None))
    return jax.eval_shape(forward, params, batch_stats, inputs)[0]


@cached_program(256)
def _forward(module: LocalModule) -> Any:
    """Returns the jitted forward pass of the body, so that JAX traces equal calls only once."""
    return jax.jit(partial(module.apply_body, train=False))


def count_parameters(state: ModuleState) -> int:
    """Returns the number of trainable parameters of a module, including its objective."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
