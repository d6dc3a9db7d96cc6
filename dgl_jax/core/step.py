"""Update and evaluation steps of a single module, as pure functions of its state and arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from dgl_jax.core import rngs
from dgl_jax.core.module import NOTHING, LocalModule, ModuleState
from dgl_jax.objectives import Context
from dgl_jax.ops import after

PyTree = Any
# By name, a scalar or (sum, count) over a batch.
Metrics = dict[str, Any]
# gradient of outputs -> (gradient of params, gradient of inputs)
Pullback = Callable[[Array], tuple[PyTree, Array]]
# (params, batch_stats, inputs, context, keys) -> (loss, (new batch_stats, outputs, metrics))
LossFunction = Callable[
    [PyTree, PyTree, Array, Context, PyTree], tuple[Array, tuple[PyTree, PyTree, PyTree]]
]


def local_step(
    module: LocalModule,
    optimizer: optax.GradientTransformation,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    context: Context,
    *,
    published: Mapping[str, Any] = NOTHING,
    accumulate: int = 1,
) -> tuple[ModuleState, Float[Array, "B ..."], Metrics]:
    """Updates one module with the gradient of its local loss.

    This is the body of the inner loop of Algorithm 1 in Belilovsky et al. 2020. `module`,
    `optimizer` and `accumulate` are static: bind them with `functools.partial` before `jax.jit`.

    Args:
      module: the module to update.
      optimizer: the optimizer that made `state.opt_state`.
      state: the module's state.
      inputs: activations of the module below, or network inputs, [B, ...]; no gradient flows to
        them.
      context: context of the same examples, read by the objective and the adapter, such as
        `{"label": label}`.
      published: publications of other modules that the objective reads, by name.
      accumulate: number of micro-batches, see `mean_gradient`.

    Returns:
      The new state; the activations for the next module, [B, ...], computed before the update and
      detached; and the objective's metrics of the batch as device scalars (sum, count). A
      classifier reports `loss` (in nats, with label smoothing) and `accuracy`.
    """
    inputs = lax.stop_gradient(inputs)
    rng = rngs.update(state.rng, state.updates)

    gradient, batch_stats, outputs, metrics = mean_gradient(
        local_loss(module, published),
        state.params,
        state.batch_stats,
        inputs,
        context,
        rng,
        accumulate,
    )
    return (
        apply_gradient(optimizer, state, gradient, batch_stats),
        lax.stop_gradient(outputs),
        metrics,
    )


def mean_gradient(
    loss_function: LossFunction,
    params: PyTree,
    batch_stats: PyTree,
    inputs: Float[Array, "B ..."],
    context: Context,
    keys: PyTree,
    accumulate: int = 1,
    to_inputs: bool = False,
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Computes the mean gradient of a loss over micro-batches, in the memory of one micro-batch.

    Without batch norm, the result is the gradient of the whole batch. Batch norm normalizes each
    micro-batch separately, and its running averages are updated once per micro-batch. Micro-batch
    i of n holds examples i, i + n, i + 2n and so on, so that no example changes its device if the
    batch is split among devices; n must then divide each device's share.

    Args:
      loss_function: see `LossFunction`.
      params: pytree that the gradient is taken with respect to.
      batch_stats: statistics before the first micro-batch.
      inputs: [B, ...]; B is a multiple of `accumulate`.
      context: context of the same examples.
      keys: key of the update, or a pytree of such keys; micro-batches derive their keys from it.
      accumulate: number of micro-batches.
      to_inputs: True also computes the gradient with respect to the inputs.

    Returns:
      The gradient; the new batch_stats; the outputs for all examples, in their order (with
      `to_inputs` the gradient with respect to the inputs instead); and the metrics, summed over the
      micro-batches.
    """
    differentiate = jax.value_and_grad(loss_function, (0, 2) if to_inputs else 0, has_aux=True)
    gradient, outputs, metrics = None, [], []
    for (part, part_context), part_keys in zip(
        _split((inputs, context), accumulate), _keys(keys, accumulate), strict=True
    ):
        # Force sequential order; otherwise XLA may start the next micro-batch while the residuals
        # of this one are still alive.
        ordered_params = params if gradient is None else after(params, gradient)
        (_, (batch_stats, y, part_metrics)), part_gradient = differentiate(
            ordered_params, batch_stats, part, part_context, part_keys
        )
        if to_inputs:
            part_gradient, y = part_gradient
        if gradient is None:
            gradient = part_gradient
        else:
            gradient = jax.tree.map(jnp.add, gradient, part_gradient)
        outputs.append(y)
        metrics.append(part_metrics)
    if accumulate == 1:
        return gradient, batch_stats, outputs[0], metrics[0]
    gradient = jax.tree.map(lambda x: x / accumulate, gradient)
    joined = _join(outputs) / accumulate if to_inputs else _join(outputs)
    return gradient, batch_stats, joined, jax.tree.map(lambda *x: sum(x), *metrics)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: ModuleState, gradient: Any, batch_stats: Any
) -> ModuleState:
    """Applies the optimizer and increments `updates`; shared by all training rules.

    Args:
      optimizer: the optimizer that made `state.opt_state`.
      state: the module's state.
      gradient: gradient of the loss with respect to `state.params`.
      batch_stats: the new batch statistics.

    Returns:
      The new state.
    """
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        updates=state.updates + 1,
    )


def loss_step(
    module: LocalModule,
    optimizer: optax.GradientTransformation,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    context: Context,
    *,
    published: Mapping[str, Any] = NOTHING,
    accumulate: int = 1,
) -> tuple[ModuleState, Float[Array, "B ..."], Metrics]:
    """Updates one module with its local loss and returns the gradient for the module below.

    Takes the same arguments as `local_step`.

    Returns:
      The new state; the gradient of the loss with respect to the inputs, [B, ...]; and the
      objective's metrics.
    """
    gradient, batch_stats, inputs_gradient, metrics = mean_gradient(
        local_loss(module, published),
        state.params,
        state.batch_stats,
        inputs,
        context,
        rngs.update(state.rng, state.updates),
        accumulate,
        to_inputs=True,
    )
    return apply_gradient(optimizer, state, gradient, batch_stats), inputs_gradient, metrics


def backward_step(
    module: LocalModule,
    optimizer: optax.GradientTransformation,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    cotangent: Float[Array, "B ..."],
    context: Context = NOTHING,
) -> tuple[ModuleState, Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Updates the body of one module with a gradient from the module above.

    The forward pass is computed here, with the current parameters.

    Args:
      module: see `local_step`.
      optimizer: see `local_step`.
      state: see `local_step`.
      inputs: see `local_step`.
      cotangent: gradient of the loss above with respect to this module's activations, [B, ...].
      context: context of the same examples, read by the adapter only.

    Returns:
      The new state, whose objective received a gradient of 0; the activations; and the gradient
      with respect to the inputs.
    """
    outputs, pull, batch_stats = body_pullback(module, state, inputs, context)
    gradient, inputs_gradient = pull(cotangent)
    return apply_gradient(optimizer, state, gradient, batch_stats), outputs, inputs_gradient


def body_pullback(
    module: LocalModule,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    context: Context = NOTHING,
) -> tuple[Float[Array, "B ..."], Pullback, PyTree]:
    """Computes a module's activations in training and the function that takes their gradient back.

    Args:
      module: see `local_step`.
      state: see `local_step`.
      inputs: see `local_step`.
      context: context of the same examples, read by the adapter only.

    Returns:
      The activations, [B, ...]; a function from the gradient of a loss with respect to them to the
      gradients with respect to the parameters and to the inputs; and the new batch_stats of the
      module.
    """
    rng = _whole_batch_key(state)

    def forward(params, inputs):
        return module.apply_body(params, state.batch_stats, inputs, context, train=True, rng=rng)

    outputs, pull, body_stats = jax.vjp(forward, state.params, inputs, has_aux=True)
    return outputs, pull, {**state.batch_stats, "body": body_stats}


def forward_step(
    module: LocalModule,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    context: Context = NOTHING,
    *,
    train: bool,
    accumulate: int = 1,
    number: Int[Any, ""] | None = None,
) -> tuple[Float[Array, "B ..."], PyTree]:
    """Computes a module's activations without an update.

    Args:
      module: the module to apply.
      state: the module's state.
      inputs: activations of the module below, or network inputs, [B, ...].
      context: context of the same examples, read by the adapter only.
      train: normalize with the statistics of the batch, as an update does; otherwise with the
        running averages.
      accumulate: number of micro-batches, see `mean_gradient`.
      number: index of the update that will use these activations, which selects the random keys;
        by default the next update.

    Returns:
      The activations, [B, ...], and the new batch_stats of the module.
    """
    rng = rngs.update(state.rng, state.updates if number is None else number)
    batch_stats, outputs = state.batch_stats, []
    for (part, part_context), part_key in zip(
        _split((inputs, context), accumulate), _keys(rng, accumulate), strict=True
    ):
        y, body_stats = module.apply_body(
            state.params, batch_stats, part, part_context, train=train, rng=part_key
        )
        batch_stats = {**batch_stats, "body": body_stats}
        outputs.append(y)
    return _join(outputs), batch_stats


def body_gradient(
    module: LocalModule,
    variables: tuple[PyTree, PyTree],
    inputs: Float[Array, "B ..."],
    cotangent: Float[Array, "B ..."],
    context: Context,
    rng: Array,
    accumulate: int = 1,
) -> tuple[PyTree, Float[Array, "B ..."]]:
    """Computes the gradients of one module from the gradient of its activations, without an update.

    Args:
      module: the module, which has no objective.
      variables: (params, batch_stats) of the forward pass, which is computed here.
      inputs: inputs of the forward pass, [B, ...].
      cotangent: gradient of a loss with respect to the activations, [B, ...].
      context: context of the same examples, read by the adapter only.
      rng: key of the update that the activations were computed for, see `rngs.update`.
      accumulate: number of micro-batches, see `mean_gradient`.

    Returns:
      The gradient with respect to the parameters, summed over the micro-batches, and the gradient
      with respect to the inputs, [B, ...].
    """
    params, batch_stats = variables
    gradient, pulled = None, []
    for (part, part_context, part_cotangent), key in zip(
        _split((inputs, context, cotangent), accumulate), _keys(rng, accumulate), strict=True
    ):

        def forward(params, inputs, context=part_context, key=key):
            y, _ = module.apply_body(params, batch_stats, inputs, context, train=True, rng=key)
            return y

        _, pull = jax.vjp(forward, params if gradient is None else after(params, gradient), part)
        part_gradient, inputs_gradient = pull(part_cotangent)
        gradient = (
            part_gradient if gradient is None else jax.tree.map(jnp.add, gradient, part_gradient)
        )
        pulled.append(inputs_gradient)
    return gradient, _join(pulled)


def eval_step(
    module: LocalModule,
    params: Any,
    batch_stats: Any,
    inputs: Float[Array, "B ..."],
    context: Context = NOTHING,
    published: Mapping[str, Any] = NOTHING,
) -> tuple[Float[Array, "B ..."], Array | None]:
    """Computes a module's activations and predictions with the running statistics.

    Args:
      module: the module to apply.
      params: as in `ModuleState`.
      batch_stats: as in `ModuleState`.
      inputs: activations of the module below, or network inputs, [B, ...].
      context: context of the same examples, read by the adapter only.
      published: publications of other modules that the objective reads, by name.

    Returns:
      The activations for the next module, [B, ...], and the predictions, see `LocalModule.predict`.
    """
    outputs, _, collected = module.apply_body_and_collect(
        params, batch_stats, inputs, context, train=False
    )
    return outputs, module.predict(params, batch_stats, outputs, {**published, **collected})


def local_loss(module: LocalModule, published: Mapping[str, Any]) -> LossFunction:
    """Returns the local loss of a module in training, with the publications that it reads."""

    def loss_function(params, batch_stats, inputs, context, rng):
        outputs, body_stats, collected = module.apply_body_and_collect(
            params, batch_stats, inputs, context, train=True, rng=rng
        )
        read = {**published, **collected}
        local, objective_stats = module.apply_objective(
            params, batch_stats, outputs, context, read, train=True, rng=rng
        )
        new_stats = {"body": body_stats, "objective": objective_stats}
        return local.loss, (new_stats, outputs, local.metrics)

    return loss_function


def _whole_batch_key(state: ModuleState) -> jax.Array:
    """Returns the key of the next update for a batch that is not split."""
    return rngs.micro_batch(rngs.update(state.rng, state.updates), 0)


def _split(tree: PyTree, parts: int) -> list[PyTree]:
    """Returns micro-batches; number i holds examples i, i + parts, i + 2 parts and so on."""
    if parts == 1:
        return [tree]
    rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), tree)
    return [jax.tree.map(lambda x, i=i: x[:, i], rows) for i in range(parts)]


def _join(parts: list[PyTree]) -> PyTree:
    """Undoes `_split`: returns one tree with all examples in their original order."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts)


def _keys(keys: PyTree, parts: int) -> list[PyTree]:
    """Derives the keys of all micro-batches from the key (or the pytree of keys) of an update."""
    return [jax.tree.map(lambda key, i=i: rngs.micro_batch(key, i), keys) for i in range(parts)]
