"""One update of one module (and its evaluation) as pure functions of state and arrays; no device, engine or codec in sight."""

import dataclasses
from typing import Any

import jax
import optax
from jax import lax
from jaxtyping import Array, Float

from dgl_jax import losses
from dgl_jax.module import LocalModule, ModuleState
from dgl_jax.packet import Targets

Metrics = dict[str, Array]


def local_step(
    module: LocalModule,
    optimizer: optax.GradientTransformation,
    state: ModuleState,
    inputs: Float[Array, "B ..."],
    targets: Targets,
) -> tuple[ModuleState, Float[Array, "B ..."], Metrics]:
    """One update of a module on its own loss (Algorithm 1 of Belilovsky et al. 2020, the body of its inner loop).

    Args:
      module, optimizer: static; bind them with `functools.partial` before `jax.jit`.
      state: the module's state.
      inputs: activations of the module below, or the images; no gradient leaves through them.
      targets: labels of the same examples.

    Returns:
      The new state; the activations for the next module, of the forward pass before the update, detached; and the batch's
      `loss` (nats) and `accuracy` (fraction) as device scalars.
    """
    inputs = lax.stop_gradient(inputs)
    rng = jax.random.fold_in(state.rng, state.updates)

    def objective(params):
        outputs, logits, batch_stats = module.apply(params, state.batch_stats, inputs, train=True, rng=rng)
        return losses.cross_entropy(logits, targets.label), (outputs, logits, batch_stats)

    (loss, (outputs, logits, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    state = apply_gradient(optimizer, state, gradient, batch_stats)
    metrics = {"loss": loss, "accuracy": losses.accuracy(logits, targets.label)}
    return state, lax.stop_gradient(outputs), metrics


def apply_gradient(optimizer: optax.GradientTransformation, state: ModuleState, gradient: Any, batch_stats: Any) -> ModuleState:
    """The optimizer's update of one module: what every training rule does with its gradient."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        updates=state.updates + 1,
    )


def eval_step(
    module: LocalModule, params: Any, batch_stats: Any, inputs: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "B C"] | None]:
    """Activations for the next module and logits of the own head (None without one), with running batch statistics."""
    outputs, _ = module.apply_body(params, batch_stats, inputs, train=False)
    if module.head is None:
        return outputs, None
    logits, _ = module.apply_head(params, batch_stats, outputs, train=False)
    return outputs, logits
