"""Features replay (after Huo et al. 2018): a training method with gradients a few batches late.

Module k stores the inputs of its last batches. At tick t it runs the forward pass of batch t and
updates on batch t - (K - 1 - k), whose gradient has traveled down one module per tick. For that
update it repeats the forward pass from the stored inputs. Unlike in the paper, a tick begins with
the updates. Three modules, with f for a forward pass, s for a step on the loss, and b for an update
by a gradient from above:

    tick 0    m0:f0   m1:f0   m2:s0
    tick 1    m1:b0   m0:f1   m1:f1   m2:s1
    tick 2    m0:b0   m1:b1   m0:f2   m1:f2   m2:s2
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dgl_jax.config import MethodSettings, Settings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import backward_step, forward_step, local_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.methods import Composed, MethodKind, Program, register_method
from dgl_jax.methods.base import Ports
from dgl_jax.schedule import Tick, Turn, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox, Message, Outbox


@dataclass(frozen=True)
class Replayed(Composed):
    """Training rule with delayed gradients on stored inputs and one loss at the last module."""

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields ticks until the first module, which lags the most, has `until` updates.

        Messages in flight are not drained; they are part of the checkpointed state.
        """
        made, last, ahead = list(counts), len(counts) - 1, max(counts) + len(counts)
        while made[0] < until and not (made[last] >= ahead and stop()):
            # A module updates only on a gradient that was sent in an earlier tick.
            backward_turns = [
                Turn(k, made[k], "backward") for k in range(last) if made[k] < made[k + 1]
            ]
            new = made[last]
            forward_turns = (
                [*(Turn(k, new, "forward") for k in range(last)), Turn(last, new)]
                if new < total
                else []
            )
            yield (*backward_turns, *forward_turns)
            for turn in (*backward_turns, *forward_turns):
                made[turn.module] += turn.updates()

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns the ports that a turn reads from and sends to."""
        down: Any = True if k and kind != "forward" else None
        reads = Inbox(above=True) if kind == "backward" else Inbox(below=True)  # type: ignore[arg-type]
        return reads, Outbox(True if kind == "forward" else None, down)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn of module k."""
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
            # Batch b is stored at index b modulo the delay and used by update number b.
            batch = state.extras["seen"]
            outputs, stats = forward_step(module, state, inputs, train=True, number=batch)
            stored = state.extras["inputs"].at[batch % delay].set(inputs)
            state = dataclasses.replace(
                state,
                batch_stats=stats,
                extras=state.extras | {"inputs": stored, "seen": batch + 1},
            )
            return state, Outbox(ports.emit(outputs, (), inputs)), {}

        def backward(state, inbox, context):
            inputs = state.extras["inputs"][state.updates % delay]
            # The first pass has already updated the running averages with this batch.
            new, _, gradient = backward_step(
                module, spec.optimizer, state, inputs, inbox.above.payload
            )
            new = dataclasses.replace(new, batch_stats=state.batch_stats)
            return new, Outbox(below=Message(gradient) if k else None), {}

        program = {"step": step, "forward": forward, "backward": backward}[kind]
        program.__name__ = f"{module.name}_{kind}"
        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the stored inputs, the number of batches seen, and the gradient in flight."""
        delay, shapes = len(spec.modules) - 1 - k, spec.shapes(states)
        if not delay:
            return {}
        inputs, gradient = shapes[k], shapes[k + 1]
        stored = jnp.zeros((delay, *inputs.shape), inputs.dtype)
        above = (Message(jnp.zeros(gradient.shape, gradient.dtype)),)
        return {"inputs": stored, "seen": jnp.zeros((), jnp.int32), "above": above}


@dataclass(frozen=True)
class ReplayedOptions(MethodSettings):
    """Options of the method `replayed`; it adds no field, only a check."""

    def check(self, settings: Settings) -> None:
        """Raises UserError if a setting is not supported by this method."""
        for field, value, required in (
            ("codec.name", settings.codec.name, "identity"),
            ("train.accumulate", settings.train.accumulate, 1),
            ("train.ema", settings.train.ema, 0.0),
            ("model.adapter", settings.model.adapter, "none"),
        ):
            if value != required:
                raise UserError(
                    f"config.{field}={value}: config.method.name=replayed requires {required}"
                )


register_method(
    "replayed",
    MethodKind(
        lambda options: Replayed(),
        ReplayedOptions,
        local=False,
        engines=("fused", "pipeline", "serial"),
    ),
)
