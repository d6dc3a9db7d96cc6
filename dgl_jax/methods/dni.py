"""Decoupled neural interfaces: modules that train on synthetic gradients (Jaderberg et al. 2017).

Behind every module but the last, a synthesizer S predicts the gradient of the last module's loss
with respect to the activations, so that the module can update before the modules above have seen
the batch. On batch b, module k with activations h and batch size B does the following:

    1. S learns from batch b - 1: its target is B times the gradient that module k + 1 has sent.
    2. The module updates with S(h) / B in place of the gradient of its activations.
    3. It sends h up, and the gradient with respect to its inputs that follows from S(h) / B, down.

The last module updates with its loss and sends the true gradient down. All gradients of batch b are
computed with the parameters before their updates on batch b, and S learns from the batch just
before it is used again. The result equals one joint update of all parts at the end of each batch,
except that the last update of the synthesizers of a run waits in its final checkpoint.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dgl_jax import schedule
from dgl_jax.config import Settings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import METHODS
from dgl_jax.core import ema, rngs
from dgl_jax.core.apply import apply_layer
from dgl_jax.core.module import ModuleState
from dgl_jax.core.program_cache import cached_program
from dgl_jax.core.step import (
    Metrics,
    apply_gradient,
    body_pullback,
    eval_step,
    local_step,
    loss_step,
)
from dgl_jax.errors import UserError
from dgl_jax.methods.base import MethodKind, Ports, Program
from dgl_jax.methods.delayed import DelayedOptions
from dgl_jax.methods.downward import decode_gradient, encode_gradient, gradient_extras
from dgl_jax.methods.post import Composed
from dgl_jax.models import Synthesizer, with_choices
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Message, Outbox

PyTree = Any


@dataclass(frozen=True)
class Dni(Composed):
    """Training rule with synthetic gradients and a single loss, at the last module.

    Attributes:
      synthesizer: Flax module called as `synthesizer(activations, targets, train)`, see
        `models.Synthesizer`. Each module below the last one has its own parameters for it.
      optimizer: optimizer of the synthesizers.
      conditional: True passes the one-hot label to the synthesizers (the method `cdni`).
      encode_gradients: True encodes the messages that travel down with the codec, as those that
        travel up; False sends them unchanged.
    """

    synthesizer: nn.Module
    optimizer: optax.GradientTransformation
    conditional: bool = False
    encode_gradients: bool = True

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields one batch per tick, or with `overlap` the schedule `staggered`."""
        return schedule.aligned(counts, until, stop, overlap, schedule.staggered)

    def ports(self, spec: TrainSpec, k: int, kind: str = "step") -> tuple[Inbox, Outbox]:
        """Returns the ports of a turn: activations travel up and gradients travel down."""
        above: Any = None if k == len(spec.modules) - 1 else True
        below: Any = True if k else None
        return Inbox(True, above), Outbox(above, below)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn of module k, which the docstring of this file describes."""
        module, ports = spec.modules[k], Ports(spec, k)
        layer = self._layer(spec, k)

        def sent_down(
            state: ModuleState, updates: jax.Array, gradient: jax.Array
        ) -> tuple[ModuleState, Message | None, Metrics]:
            if k == 0:
                return state, None, {}
            return encode_gradient(spec, state, updates, gradient, self.encode_gradients)

        def lower(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            assert inbox.above is not None
            inputs, metrics = ports.receive(inbox.below)
            extras, updates = state.extras, state.updates
            gradient_above = decode_gradient(spec, inbox.above, self.encode_gradients)
            new, errors = self._regressed(
                layer, extras["synthesizer"], extras["pending"], gradient_above
            )
            # Nothing is pending before the first update.
            pending = updates > 0
            synthesizer = jax.tree.map(
                lambda new, old: jnp.where(pending, new, old), new, extras["synthesizer"]
            )
            errors = jax.tree.map(lambda x: jnp.where(pending, x, 0.0), errors)

            outputs, pull, batch_stats = body_pullback(
                module, state, inputs, ports.full_context(inputs, context)
            )
            outputs = lax.stop_gradient(outputs)
            seen = {"activations": outputs}
            if self.conditional:
                classes = extras["pending"]["targets"].shape[-1]
                seen["targets"] = jax.nn.one_hot(context["label"], classes, dtype=jnp.float32)
            prediction, stats = self._predicted(layer, synthesizer["params"], synthesizer, seen)
            gradient, gradient_below = pull((prediction / len(outputs)).astype(outputs.dtype))
            state = apply_gradient(spec.optimizer, state, gradient, batch_stats)
            kept = {"synthesizer": synthesizer | {"batch_stats": stats}, "pending": seen}
            state = dataclasses.replace(state, extras=state.extras | kept)
            state, down, down_metrics = sent_down(state, updates, gradient_below)
            if spec.ema:
                state = ema.advance(state, spec.ema)
            state, up, up_metrics = ports.send(state, updates, outputs, inputs)
            return state, Outbox(up, down), metrics | errors | down_metrics | up_metrics

        def last(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            inputs, metrics = ports.receive(inbox.below)
            context, updates, down = ports.full_context(inputs, context), state.updates, None
            if k:
                state, gradient, losses = loss_step(module, spec.optimizer, state, inputs, context)
                state, down, down_metrics = sent_down(state, updates, gradient)
                losses |= down_metrics
            else:
                state, _, losses = local_step(module, spec.optimizer, state, inputs, context)
            if spec.ema:
                state = ema.advance(state, spec.ema)
            return state, Outbox(below=down), metrics | losses

        program = last if k == len(spec.modules) - 1 else lower
        program.__name__ = module.name
        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the synthesizer and its optimizer state, and what its next regression reads.

        This is the batch that the module has seen last, and the gradient of it that waits at the
        module. The last module has none of these.
        """
        extras = gradient_extras(spec, k, states, self.encode_gradients)
        if k == len(spec.modules) - 1:
            return extras
        activations = spec.shapes(states)[k + 1]
        seen: dict[str, Any] = {"activations": activations}
        if self.conditional:
            label = spec.context(0)["label"]
            seen["targets"] = jax.ShapeDtypeStruct(
                (*label.shape, _classes(spec, k, states)), "float32"
            )
        variables = self._layer(spec, k).lazy_init(
            rngs.synthesizer_params(states[k].rng), activations, seen.get("targets"), train=False
        )
        params = variables.get("params", {})
        synthesizer = {
            "params": params,
            "batch_stats": variables.get("batch_stats", {}),
            "opt_state": self.optimizer.init(params),
        }
        pending = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)
        return extras | {"synthesizer": synthesizer, "pending": pending}

    def _layer(self, spec: TrainSpec, k: int) -> nn.Module:
        return with_choices(self.synthesizer, ops=spec.modules[k].ops)

    def _predicted(
        self, layer: nn.Module, params: PyTree, synthesizer: PyTree, seen: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """Returns the prediction of B times the gradient, float32, and the new batch_stats."""
        arguments = (seen["activations"], seen.get("targets"))
        prediction, stats, _ = apply_layer(
            layer, params, synthesizer["batch_stats"], arguments, True, None
        )
        return prediction, stats

    def _regressed(
        self, layer: nn.Module, synthesizer: PyTree, seen: PyTree, gradient_above: jax.Array
    ) -> tuple[PyTree, Metrics]:
        """Updates a synthesizer on a batch whose gradient has arrived; see `Dni`.

        The loss is the squared error, summed over the values of an example and averaged over the
        examples.

        Returns:
          The new synthesizer, and metrics: `synthesizer_loss`, and the error relative to the sum of
          squares of the target as `synthesizer_error`.
        """
        size = len(gradient_above)
        target = size * gradient_above.astype(jnp.float32)

        def loss_function(params: PyTree) -> tuple[jax.Array, PyTree]:
            prediction, stats = self._predicted(layer, params, synthesizer, seen)
            return jnp.sum(jnp.square(prediction - target)) / size, stats

        params = synthesizer["params"]
        (loss, stats), gradient = jax.value_and_grad(loss_function, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(gradient, synthesizer["opt_state"], params)
        new = {
            "params": optax.apply_updates(params, updates),
            "batch_stats": stats,
            "opt_state": opt_state,
        }
        return new, {
            "synthesizer_loss": (loss * size, jnp.float32(size)),
            "synthesizer_error": (loss * size, jnp.sum(jnp.square(target))),
        }


def _classes(spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> int:
    """Returns the number of classes that the last module predicts.

    Raises:
      UserError: the last module predicts no classes, or labels do not reach module k.
    """
    module, state = spec.modules[-1], states[-1]
    _, logits = jax.eval_shape(
        lambda *arguments: eval_step(module, *arguments),
        *(state.params, state.batch_stats, spec.shapes(states)[-1], {"image": spec.inputs()}),
    )
    if logits is None or "label" not in spec.needs(k):
        raise UserError(
            "config.method.name=cdni: needs an objective that reads labels and predicts classes, "
            "such as config.objective.name=classifier; dni needs no labels"
        )
    return int(logits.shape[-1])


@dataclass(frozen=True)
class DniOptions(DelayedOptions):
    """Options of the methods `dni` and `cdni`.

    Attributes:
      synthesizer_learning_rate: learning rate of the synthesizers' optimizer, which is Adam; it is
        constant.
      synthesizer_channels: channels of a synthesizer's hidden layers; 0 for as many as the
        activations have.
      synthesizer_layers: layers of a synthesizer.
      synthesizer_kernel: height and width of a synthesizer's convolutions, an odd number.
    """

    synthesizer_learning_rate: float = number(1e-4, 0.0, 1e30, exclusive=True)
    synthesizer_channels: int = number(0, 0, 2**16)
    synthesizer_layers: int = number(3, 1, 100)
    synthesizer_kernel: int = number(5, 1, 99)

    def check(self, settings: Settings) -> None:
        """Raises UserError if a setting does not fit the method."""
        if settings.train.accumulate != 1:
            raise UserError(
                f"config.train.accumulate={settings.train.accumulate}: config.method.name="
                f"{self.name} cannot split a batch, because its synthesizers learn from whole "
                "batches; use 1"
            )
        if self.synthesizer_kernel % 2 == 0:
            raise UserError(
                f"config.method.synthesizer_kernel={self.synthesizer_kernel}: must be odd, so that "
                f"maps keep their size; {self.synthesizer_kernel + 1} would do"
            )


def _make(options: DniOptions) -> Dni:
    synthesizer = Synthesizer(
        options.synthesizer_channels, options.synthesizer_layers, options.synthesizer_kernel
    )
    optimizer, conditional = _adam(options.synthesizer_learning_rate), options.name == "cdni"
    return Dni(synthesizer, optimizer, conditional, options.encode_gradients)


@cached_program(32)
def _adam(learning_rate: float) -> optax.GradientTransformation:
    """Returns the same object for the same rate, so that equal runs share their programs."""
    return optax.adam(learning_rate)


_KIND = MethodKind(_make, DniOptions, local=False, engines=("fused", "pipeline"))
METHODS.ship(dni=_KIND, cdni=_KIND)
