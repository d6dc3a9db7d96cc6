"""One update of one module (and its evaluation) as pure functions of state and arrays; no device, engine or codec in sight."""

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
# By name a scalar, or (sum, count) over a batch.
Metrics = dict[str, Any]
# (params, batch_stats, inputs, context, keys) -> (loss, (new batch_stats, outputs, metrics))
LossFunction = Callable[
    [PyTree, PyTree, Array, Context, PyTree], tuple[Array, tuple[PyTree, PyTree, Metrics]]
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
    """Updates a module once on its own loss (Algorithm 1 of Belilovsky et al. 2020, the body of its inner loop).

    Args:
      module, optimizer, accumulate: static; bind them with `functools.partial` before `jax.jit`.
      state: the module's state.
      inputs: activations of the module below, or the images; no gradient leaves through them.
      context: what the objective and the adapter read of the same examples, such as `{"label": label}`.
      published: what the objective reads of other modules, by name.
      accumulate: see `mean_gradient`.

    Returns:
      The new state; the activations for the next module, of the forward pass before the update, detached; and the objective's
      metrics of the batch, each as (sum, count), device scalars: of a classifier `loss` (nats, smoothed as it is minimised) and
      `accuracy`.
    """
    inputs = lax.stop_gradient(inputs)
    rng = rngs.update(state.rng, state.updates)

    gradient, batch_stats, outputs, metrics = mean_gradient(
        _loss(module, published), state.params, state.batch_stats, inputs, context, rng, accumulate
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
) -> tuple[PyTree, PyTree, PyTree, Metrics]:
    """Computes the gradient of a batch's loss on `accumulate` micro-batches, one after the other in the memory of one.

    Without batch norm it is the gradient of the whole batch. Batch norm takes each micro-batch by itself, and the running averages
    see one after the other. Micro-batch i of n has examples i, i + n, i + 2n, ...: where devices share a batch, n must divide the
    share of each, and no example moves.

    Returns:
      The gradient; the new batch_stats; the outputs for all examples, in their order; and the metrics, summed.
    """
    differentiate = jax.value_and_grad(loss_function, has_aux=True)
    gradient, outputs, metrics = None, [], []
    for (x, of_x), own in zip(
        _split((inputs, context), accumulate), _keys(keys, accumulate), strict=True
    ):
        # In any other order what one leaves for its backward pass would wait beside what the next one does.
        at = params if gradient is None else after(params, gradient)
        (_, (batch_stats, y, of_loss)), found = differentiate(at, batch_stats, x, of_x, own)
        gradient = found if gradient is None else jax.tree.map(jnp.add, gradient, found)
        outputs.append(y)
        metrics.append(of_loss)
    if accumulate == 1:
        return gradient, batch_stats, outputs[0], metrics[0]
    gradient = jax.tree.map(lambda x: x / accumulate, gradient)
    return gradient, batch_stats, _join(outputs), jax.tree.map(lambda *x: sum(x), *metrics)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: ModuleState, gradient: Any, batch_stats: Any
) -> ModuleState:
    """The optimizer's update of one module: what every training rule does with its gradient."""
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
) -> tuple[ModuleState, Float[Array, "B ..."], Metrics]:
    """Updates a module once on its own loss, and gives the gradient of its inputs: where a gradient that goes down begins.

    Args:
      module, optimizer, state, inputs, context, published: see `local_step`.

    Returns:
      The new state; the gradient of the loss with respect to the inputs; and the objective's metrics.
    """
    differentiate = jax.value_and_grad(_loss(module, published), argnums=(0, 2), has_aux=True)
    found = differentiate(state.params, state.batch_stats, inputs, context, _whole_batch(state))
    (_, (batch_stats, _, metrics)), (gradient, of_inputs) = found
    return apply_gradient(optimizer, state, gradient, batch_stats), of_inputs, metrics


def backward_step(
    module: LocalModule,
    optimizer: optax.GradientTransformation,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    cotangent: Float[Array, "B ..."],
    context: Context = NOTHING,
) -> tuple[ModuleState, Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Updates the body of a module once by a gradient from above; the forward pass is made here, with the parameters of now.

    Args:
      module, optimizer, state, inputs: see `local_step`.
      cotangent: the gradient of the loss above with respect to the module's outputs.
      context: what the adapter reads.

    Returns:
      The new state, in which the objective has had a gradient of 0; the outputs; and the gradient with respect to the inputs.
    """
    rng = _whole_batch(state)

    def forward(params, inputs):
        return module.apply_body(params, state.batch_stats, inputs, context, train=True, rng=rng)

    outputs, pull, body = jax.vjp(forward, state.params, inputs, has_aux=True)
    gradient, of_inputs = pull(cotangent)
    return (
        apply_gradient(optimizer, state, gradient, {**state.batch_stats, "body": body}),
        outputs,
        of_inputs,
    )


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
    """Makes a module's activations without an update.

    Args:
      context: what the adapter reads.
      train: as an update would make them; else in evaluation's way.
      accumulate: see `mean_gradient`.
      number: of the update that will learn from them, for its random operations; by default the next one.

    Returns:
      The activations, and the module's batch_stats after them.
    """
    rng = rngs.update(state.rng, state.updates if number is None else number)
    batch_stats, parts = state.batch_stats, []
    for (x, of_x), own in zip(
        _split((inputs, context), accumulate), _keys(rng, accumulate), strict=True
    ):
        y, body = module.apply_body(state.params, batch_stats, x, of_x, train=train, rng=own)
        batch_stats = {**batch_stats, "body": body}
        parts.append(y)
    return _join(parts), batch_stats


def eval_step(
    module: LocalModule,
    params: Any,
    batch_stats: Any,
    inputs: Float[Array, "B ..."],
    context: Context = NOTHING,
    published: Mapping[str, Any] = NOTHING,
) -> tuple[Float[Array, "B ..."], Array | None]:
    """Returns activations for the next module and what this one answers (None without an answer), with running statistics."""
    outputs, _ = module.apply_body(params, batch_stats, inputs, context, train=False)
    return outputs, module.predict(params, batch_stats, outputs, published)


def _loss(module: LocalModule, published: Mapping[str, Any]) -> LossFunction:
    def loss_function(params, batch_stats, inputs, context, rng):
        outputs, body = module.apply_body(params, batch_stats, inputs, context, train=True, rng=rng)
        local, own = module.apply_objective(
            params, batch_stats, outputs, context, published, train=True, rng=rng
        )
        return local.loss, ({"body": body, "objective": own}, outputs, local.metrics)

    return loss_function


def _whole_batch(state: ModuleState) -> jax.Array:
    """Returns the key of the next update, of a batch that is not split."""
    return rngs.micro_batch(rngs.update(state.rng, state.updates), 0)


def _split(tree: PyTree, parts: int) -> list[PyTree]:
    """Every `parts`-th example, from the first, from the second, and so on."""
    if parts == 1:
        return [tree]
    rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), tree)
    return [jax.tree.map(lambda x, i=i: x[:, i], rows) for i in range(parts)]


def _join(parts: list[PyTree]) -> PyTree:
    """What was split, in order again."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *parts)


def _keys(keys: PyTree, parts: int) -> list[PyTree]:
    """Returns a key for each micro-batch from the key of an update, or a pytree of them from one of those."""
    return [jax.tree.map(lambda key, i=i: rngs.micro_batch(key, i), keys) for i in range(parts)]
