"""Shared parts of the methods whose gradients arrive some batches late.

Only the last module has an objective. Every other module runs a batch forward, stores its inputs,
and updates on the batch later, when its gradient has traveled down. Both orders of turns are shown
for three modules, with f for a forward pass, b for an update by the gradient from above, and s for
the step of the last module on its loss. Each row is a tick, in order from left to right.

`locked_ticks`: every batch passes all modules in one tick. Module k then updates on the batch that
entered K - 1 - k ticks before, with the gradient that the module above sent in the tick before:

    tick 0   m0:f0   m1:f0                   m2:s0
    tick 1   m0:f1   m1:f1           m1:b0   m2:s1
    tick 2   m0:f2   m1:f2   m0:b0   m1:b1   m2:s2

`unlocked_ticks`: activations and gradients cross one hop per tick, so that all modules work on what
the tick before has sent. Module k updates on the batch that it ran forward 2 (K - 1 - k) ticks
before:

    tick 0                           m0:f0
    tick 1                   m1:f0   m0:f1
    tick 2           m2:s0   m1:f1   m0:f2
    tick 3           m1:b0   m2:s1   m1:f2   m0:f3
    tick 4   m0:b0   m1:b1   m2:s2   m1:f3   m0:f4

Nothing is drained between two calls of an engine: stored inputs and waiting messages are part of
the state. Training ends when every module has all its updates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from dgl_jax.config import MethodSettings
from dgl_jax.config.fields import option
from dgl_jax.core import ema, rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import (
    Metrics,
    apply_gradient,
    body_gradient,
    forward_step,
    local_step,
    loss_step,
)
from dgl_jax.methods.base import Ports, Program
from dgl_jax.methods.downward import decode_gradient, encode_gradient, gradient_extras
from dgl_jax.methods.post import Composed
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Message, Outbox

_HISTORY = "history"  # what the forward passes of the last batches stored, on a leading axis
_SEEN = "seen"  # number of batches that the module has run forward


def locked_ticks(
    counts: Sequence[int], until: int, total: int, stop: Callable[[], bool] = never
) -> Iterator[Tick]:
    """Yields ticks in which every batch passes all modules; see `Method.schedule`."""
    made, last = list(counts), len(counts) - 1
    while made[0] < until and not (made[0] > counts[0] and stop()):
        batch = made[last]
        enters = batch < total
        # A gradient is read in the tick after the one in which it was sent.
        tick = (
            *(Turn(k, batch, "forward") for k in range(last) if enters),
            *(Turn(k, made[k], "backward") for k in range(last) if made[k] < made[k + 1]),
            *(Turn(last, batch) for _ in range(enters)),
        )
        yield tick
        for turn in tick:
            made[turn.module] += turn.updates()


def staggered(ticks: Iterator[Tick]) -> Iterator[Tick]:
    """Divides `locked_ticks` so that modules on separate devices work side by side.

    The turns of module k are k ticks behind module 0, and its forward pass and its update are in
    separate ticks. In each tick every other module runs a batch forward and the rest update. Every
    turn reads the same messages and the same state as before.

        tick 2   m2:s0           m0:f1
        tick 3           m1:f1
        tick 4   m2:s1   m1:b0   m0:f2
        tick 5           m1:f2   m0:b0
        tick 6   m2:s2   m1:b1   m0:f3
        tick 7           m1:f3   m0:b1
    """
    waiting: dict[int, list[Turn]] = {}
    number = 0
    for tick in ticks:
        for turn in tick:
            place = number + turn.module + (turn.kind == "backward")
            waiting.setdefault(place, []).append(turn)
        for place in (number, number + 1):
            if place in waiting:
                yield tuple(waiting.pop(place))
        number += 2
    for place in sorted(waiting):
        yield tuple(waiting[place])


def unlocked_ticks(
    counts: Sequence[int], until: int, total: int, stop: Callable[[], bool] = never
) -> Iterator[Tick]:
    """Yields ticks in which messages cross one hop; see `Method.schedule`."""
    made, last = list(counts), len(counts) - 1
    # With equal counts nothing is in flight: the run begins, or it has been extended.
    flies = len(set(made)) > 1
    sent = [min(total, made[last] + last - k) if flies else made[k] for k in range(last)]
    while made[0] < until and not (made[0] > counts[0] and stop()):
        available = [total, *sent]  # batches that have reached each module
        tick = (
            *(Turn(k, made[k], "backward") for k in range(last) if made[k] < made[k + 1]),
            *(Turn(last, made[last]) for _ in range(made[last] < available[last])),
            *(Turn(k, sent[k], "forward") for k in reversed(range(last)) if sent[k] < available[k]),
        )
        yield tick
        for turn in tick:
            (made if turn.updates() else sent)[turn.module] += 1


@dataclass(frozen=True)
class DelayedOptions(MethodSettings):
    """Options that all methods with delayed gradients have.

    Attributes:
      encode_gradients: True encodes gradients with `config.codec` too; False sends them unchanged.
    """

    encode_gradients: bool = option(True)


@dataclass(frozen=True)
class Delayed(Composed):
    """Base class of the training rules with delayed gradients.

    Attributes:
      encode_gradients: see `DelayedOptions`.
      first_rate: factor of the first module's learning rate, unless that is the only module.
      shrink: factor of each gradient that arrives from above.
      unlocked: activations wait one tick at each hop (`unlocked_ticks`).
      stores_params: gradients are computed with the parameters of the forward pass, which are
        stored with its inputs, and not with the current ones.
    """

    encode_gradients: bool = True
    first_rate: float = 1.0
    shrink: float = 1.0
    unlocked: ClassVar[bool] = False
    stores_params: ClassVar[bool] = False

    def stored(self, modules: int, k: int) -> int:
        """Returns the number of batches that module k stores.

        These are 2 (K - 1 - k) if unlocked. Otherwise they are K - k, one more than the delay,
        because the forward pass of the newest batch precedes the update on the oldest one.
        """
        return 2 * (modules - 1 - k) if self.unlocked else modules - k

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields ticks until the first module, which lags the most, has `until` updates."""
        if self.unlocked:
            return unlocked_ticks(counts, until, total, stop)
        ticks = locked_ticks(counts, until, total, stop)
        return staggered(ticks) if overlap else ticks

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns the ports that a turn reads from and sends to."""
        used: Any = True
        reads = Inbox(above=used) if kind == "backward" else Inbox(below=used)
        if kind == "forward":
            return reads, Outbox(above=used)
        return reads, Outbox(below=used if k else None)

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn of module k."""
        make = {"step": self._step, "forward": self._forward, "backward": self._backward}[kind]
        program = make(spec, k)
        program.__name__ = f"{spec.modules[k].name}_{kind}"
        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the history of a module, the codec of its gradients, and messages in flight."""
        extras = gradient_extras(spec, k, states, self.encode_gradients)
        if k and self.unlocked:
            hop = _shapes_of_hop(spec, k, states)
            extras["below"] = (_zeros((hop, spec.context(k))),)
        if k == len(spec.modules) - 1:
            return extras
        entry = {"inputs": spec.shapes(states)[k], "context": self._adapter_context(spec, k)}
        if self.stores_params:
            entry["variables"] = (states[k].params, states[k].batch_stats)
        size = self.stored(len(spec.modules), k)
        history = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), entry)
        return extras | {_HISTORY: history, _SEEN: jnp.zeros((), jnp.int32)}

    def _step(self, spec: TrainSpec, k: int) -> Program:
        """Returns the program of the last module, which updates on its loss."""
        module, ports, optimizer = spec.modules[k], Ports(spec, k), self._optimizer(spec, k)

        def step(state, inbox, context):
            inputs, input_metrics = ports.receive(inbox.below)
            context, number = ports.full_context(inputs, context), state.updates
            update = loss_step if k else local_step
            state, gradient, metrics = update(
                module, optimizer, state, inputs, context, accumulate=spec.accumulate
            )
            state, sent, down_metrics = self._updated(spec, k, state, number, gradient)
            return state, sent, metrics | input_metrics | down_metrics

        return step

    def _forward(self, spec: TrainSpec, k: int) -> Program:
        """Returns the program that runs a batch forward and stores its inputs."""
        module, ports = spec.modules[k], Ports(spec, k)
        names, size = self._adapter_context(spec, k), self.stored(len(spec.modules), k)

        def forward(state, inbox, context):
            inputs, metrics = ports.receive(inbox.below)
            context, number = ports.full_context(inputs, context), state.extras[_SEEN]
            outputs, batch_stats = forward_step(
                module,
                state,
                inputs,
                context,
                train=True,
                accumulate=spec.accumulate,
                number=number,
            )
            entry = {"inputs": inputs, "context": {name: context[name] for name in names}}
            if self.stores_params:
                entry["variables"] = (state.params, state.batch_stats)
            history = jax.tree.map(
                lambda stored, new: stored.at[number % size].set(new),
                state.extras[_HISTORY],
                entry,
            )
            state, message, codec_metrics = ports.send(state, number, outputs, inputs)
            extras = state.extras | {_HISTORY: history, _SEEN: number + 1}
            state = replace(state, batch_stats=batch_stats, extras=extras)
            return state, Outbox(above=message), metrics | codec_metrics

        return forward

    def _backward(self, spec: TrainSpec, k: int) -> Program:
        """Returns the program of an update with a gradient from above."""
        module, ports, optimizer = spec.modules[k], Ports(spec, k), self._optimizer(spec, k)
        size = self.stored(len(spec.modules), k)

        def backward(state, inbox, context):
            number = state.updates  # batch b is used by update number b
            entry = jax.tree.map(lambda stored: stored[number % size], state.extras[_HISTORY])
            gradient = decode_gradient(spec, inbox.above, self.encode_gradients)
            if self.shrink != 1.0:
                gradient = gradient * jnp.asarray(self.shrink, gradient.dtype)
            gradient, inputs_gradient = body_gradient(
                module,
                entry.get("variables", (state.params, state.batch_stats)),
                entry["inputs"],
                gradient,
                ports.full_context(entry["inputs"], entry["context"]),
                rngs.update(state.rng, number),
                spec.accumulate,
            )
            # The forward pass of this batch has already updated the running averages.
            state = apply_gradient(optimizer, state, gradient, state.batch_stats)
            return self._updated(spec, k, state, number, inputs_gradient)

        return backward

    def _updated(
        self, spec: TrainSpec, k: int, state: ModuleState, number: jax.Array, gradient: jax.Array
    ) -> tuple[ModuleState, Outbox, Metrics]:
        """Completes an update: advances the EMA and sends the gradient of the inputs down."""
        sent, metrics = Outbox(), Metrics()
        if k:
            state, message, metrics = encode_gradient(
                spec, state, number, gradient, self.encode_gradients
            )
            sent = Outbox(below=message)
        if spec.ema:
            state = ema.advance(state, spec.ema)
        return state, sent, metrics

    def _optimizer(self, spec: TrainSpec, k: int) -> optax.GradientTransformation:
        if k or self.first_rate == 1.0 or len(spec.modules) == 1:
            return spec.optimizer

        def update(gradient, opt_state, params=None):
            updates, opt_state = spec.optimizer.update(gradient, opt_state, params)
            return jax.tree.map(lambda x: x * self.first_rate, updates), opt_state

        return optax.GradientTransformation(spec.optimizer.init, update)

    def _adapter_context(self, spec: TrainSpec, k: int) -> Context:
        """Returns shapes and dtypes of the context that the second forward pass reads."""
        adapter = spec.modules[k].adapter
        # The image of the first module is its inputs.
        names = () if adapter is None else [n for n in adapter.needs if k or n != "image"]
        shapes = spec.context(k)
        return {name: shapes[name] for name in names}


def _shapes_of_hop(spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> Message:
    """Returns shapes and dtypes of the message with activations that arrives at module k."""
    codebook = jax.eval_shape(spec.codebook, states[k - 1])
    payload = jax.eval_shape(spec.codec.encode, codebook, spec.shapes(states)[k])
    return Message(payload, codebook)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
