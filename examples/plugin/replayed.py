"""A training method with messages that go down: every module but the last learns from a gradient that is a few batches old.

Module k keeps the inputs of its last batches. At tick t it makes the forward pass of batch t, and the update on batch
t - (K - 1 - k), whose gradient has come down one module a tick: its forward pass is made again from the inputs that were kept
(features replay, after Huo et al. 2018; here a tick begins with the updates). For three modules, with f for a forward pass, s for a
step on the loss, and b for an update by a gradient from above:

    tick 0    m0:f0   m1:f0   m2:s0
    tick 1    m1:b0   m0:f1   m1:f1   m2:s1
    tick 2    m0:b0   m1:b1   m0:f2   m1:f2   m2:s2
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from dgl_jax.config import MethodSettings, Settings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import backward_step, forward_step, local_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.methods import MethodKind, Program, TrainStep, composed, register_method
from dgl_jax.methods.base import Ports
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox, Message, Outbox


@dataclass(frozen=True)
class Replayed:
    """Delayed gradients on inputs that were kept; one loss, at the end of the network."""

    sends: ClassVar[bool] = True

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields ticks until the first module, which is the last to learn, has `until` updates; nothing is drained."""
        made, last, ahead = list(counts), len(counts) - 1, max(counts) + len(counts)
        while made[0] < until and not (made[last] >= ahead and stop()):
            # A gradient that was made in an earlier tick has arrived.
            learnt = [Turn(k, made[k], "backward") for k in range(last) if made[k] < made[k + 1]]
            new = made[last]
            seen = (
                [*(Turn(k, new, "forward") for k in range(last)), Turn(last, new)]
                if new < total
                else []
            )
            yield (*learnt, *seen)
            for turn in (*learnt, *seen):
                made[turn.module] += turn.updates()

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns what a turn reads and sends."""
        down: Any = True if k and kind != "forward" else None
        reads = Inbox(above=True) if kind == "backward" else Inbox(below=True)  # type: ignore[arg-type]
        return reads, Outbox(True if kind == "forward" else None, down)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns what a turn of module k does."""
        module, ports, delay = spec.modules[k], Ports(spec, k), len(spec.modules) - 1 - k

        def step(state, inbox, context):
            inputs, _ = ports.receive(inbox.below)
            if k == 0:
                state, _, metrics = local_step(module, spec.optimizer, state, inputs, context)
                return state, Outbox(), metrics
            state, gradient, metrics = loss_step(module, spec.optimizer, state, inputs, context)
            return state, Outbox(below=Message(gradient)), metrics

        def forward(state, inbox, context):
            inputs, _ = ports.receive(inbox.below)
            # Batch b is kept at place b modulo the delay, and learnt from at update b.
            batch = state.extras["seen"]
            outputs, stats = forward_step(module, state, inputs, train=True, number=batch)
            kept = state.extras["inputs"].at[batch % delay].set(inputs)
            state = dataclasses.replace(
                state, batch_stats=stats, extras=state.extras | {"inputs": kept, "seen": batch + 1}
            )
            return state, Outbox(ports.emit(outputs, (), inputs)), {}

        def backward(state, inbox, context):
            inputs = state.extras["inputs"][state.updates % delay]
            # Batch norm has seen this batch: the second pass leaves the running averages alone.
            new, _, gradient = backward_step(
                module, spec.optimizer, state, inputs, inbox.above.payload
            )
            new = dataclasses.replace(new, batch_stats=state.batch_stats)
            return new, Outbox(below=Message(gradient) if k else None), {}

        program = {"step": step, "forward": forward, "backward": backward}[kind]
        program.__name__ = f"{module.name}_{kind}"
        return program

    def fused(self, spec: TrainSpec, turns: Sequence[tuple[int, str]]) -> TrainStep:
        """See `composed`."""
        return composed(spec, turns)

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the inputs that are kept, how many batches have been seen, and the gradients on their way down."""
        delay, shapes = len(spec.modules) - 1 - k, spec.shapes(states)
        if not delay:
            return {}
        inputs, gradient = shapes[k], shapes[k + 1]
        kept = jnp.zeros((delay, *inputs.shape), inputs.dtype)
        above = (Message(jnp.zeros(gradient.shape, gradient.dtype)),)
        return {"inputs": kept, "seen": jnp.zeros((), jnp.int32), "above": above}


@dataclass(frozen=True)
class ReplayedOptions(MethodSettings):
    """None of its own."""

    def check(self, settings: Settings) -> None:
        """Raises UserError where it is asked for what it does not do."""
        for field, value, fit in (
            ("codec.name", settings.codec.name, "identity"),
            ("train.accumulate", settings.train.accumulate, 1),
            ("train.ema", settings.train.ema, 0.0),
            ("model.adapter", settings.model.adapter, "none"),
        ):
            if value != fit:
                raise UserError(f"config.{field}={value}: config.method.name=replayed needs {fit}")


register_method(
    "replayed",
    MethodKind(
        lambda options: Replayed(),
        ReplayedOptions,
        local=False,
        engines=("fused", "pipeline", "serial"),
    ),
)
