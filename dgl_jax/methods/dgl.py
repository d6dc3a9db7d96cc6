"""Decoupled Greedy Learning: what a turn of a module computes, from what comes in to what goes out."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dgl_jax import schedule
from dgl_jax.codecs import relative_error
from dgl_jax.core import ema, rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, forward_step, local_step
from dgl_jax.methods.base import MethodKind, Ports, Program, TrainStep, composed
from dgl_jax.registry import METHODS
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Message, Outbox


def _published(state: ModuleState, message: Message, decay: float) -> ModuleState:
    """Takes in what another module has published: all of it, or as a step of a moving average."""
    old = state.extras["published"]["next_block"]
    # A copy without an average too: the state is given away at the next update, and the message may be read again.
    mix = (
        (lambda old, new: decay * old + (1 - decay) * new)
        if decay
        else lambda old, new: jnp.copy(new)
    )
    new = jax.tree.map(mix, old, message.published)
    return dataclasses.replace(state, extras=state.extras | {"published": {"next_block": new}})


def _first_block(spec: TrainSpec, k: int, state: ModuleState) -> dict[str, Any]:
    """Returns a copy of the variables of a module's first block."""
    name = f"block_{spec.modules[k].first}"
    return jax.tree.map(
        jnp.copy,
        {"params": state.params["body"][name], "batch_stats": state.batch_stats["body"][name]},
    )


def _learn(
    spec: TrainSpec,
    state: ModuleState,
    published: Any,
    key: jax.Array,
    outputs: jax.Array,
    message: Any,
) -> tuple[ModuleState, Metrics]:
    """Lets the codec, in the state `published`, learn from what was enmessage; returns the module's new state, and metrics."""
    codec = spec.codec
    metrics = (
        {}
        if codec.lossless
        else {
            "codec_error": relative_error(outputs, codec.decode(message.codebook, message.payload))
        }
    )
    learnt, health = codec.update(published, key, outputs)
    if "codec" in state.extras:
        state = dataclasses.replace(state, extras=state.extras | {"codec": learnt})
    return state, metrics | health


@dataclass(frozen=True)
class Dgl:
    """Every module updates on its own loss and hands its activations on, detached (Belilovsky et al. 2020, Algorithm 1)."""

    sends: ClassVar[bool] = True

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields a batch a tick, or a pipeline that is filled and drained; see `schedule.py`."""
        return schedule.aligned(counts, until, stop, overlap)

    def ports(self, spec: TrainSpec, k: int, kind: str = "step") -> tuple[Inbox, Outbox]:
        """Returns what a turn reads and sends; parameters go down where an objective reads them."""
        last = k == len(spec.modules) - 1
        reads, sends = ("next_block" in spec.reads(j) or None for j in (k, k - 1))
        return Inbox(True, reads), Outbox(None if last else True, sends)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns what a turn of module k does: decode what comes in, update, encode what goes out.

        The first module takes a Batch, the others a Message; the last one hands nothing on. A module whose first block the one
        below reads sends it down.
        """
        module, ports = spec.modules[k], Ports(spec, k)
        _, sends = self.ports(spec, k)

        def program(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            inputs, of_input = ports.receive(inbox.below)
            updates = state.updates
            if inbox.above is not None:
                state = _published(state, inbox.above, module.objective.decay)  # type: ignore[union-attr]
            state, outputs, metrics = local_step(
                module,
                spec.optimizer,
                state,
                inputs,
                ports.whole(inputs, context),
                published=state.extras.get("published", {}),
                accumulate=spec.accumulate,
            )
            down = (
                Message(published=_first_block(spec, k, state)) if sends.below is not None else None
            )
            if spec.ema:
                state = ema.advance(state, spec.ema)
            metrics |= of_input
            if sends.above is None:
                return state, Outbox(below=down), metrics
            key = rngs.codec(state.rng, updates)
            published = spec.codec.publish(state.extras.get("codec"), key, outputs, updates)
            message = ports.hand_on(outputs, spec.codec.codebook(published), inputs)
            state, of_codec = _learn(spec, state, published, key, outputs, message)
            return state, Outbox(message, down), metrics | of_codec

        program.__name__ = module.name
        return program

    def fused(self, spec: TrainSpec, turns: Sequence[tuple[int, str]]) -> TrainStep:
        """See `composed`."""
        return composed(spec, turns)

    def feed(
        self, spec: TrainSpec, k: int, train: bool
    ) -> Callable[[ModuleState, Any, Context], Message]:
        """Returns what a module that is done does: from what comes in to what goes on; nothing is updated.

        Args:
          train: batch norm goes on using the statistics of the batch, as in its updates; otherwise the running ones.
        """
        module, ports = spec.modules[k], Ports(spec, k)

        def program(state: ModuleState, incoming: Any, context: Context) -> Message:
            inputs, _ = ports.receive(incoming)
            whole = ports.whole(inputs, context)
            outputs, _ = forward_step(
                module, state, inputs, whole, train=train, accumulate=spec.accumulate
            )
            return ports.hand_on(outputs, spec.codebook(state), inputs)

        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the copy of the next module's first block, and the newest two on their way, where an objective reads it.

        Two, so that no module waits for another: in a pipeline, module k + 1 works on batch b - 1 while module k works on batch b,
        which therefore reads what was sent after batch b - 2; the other engines keep to the same.
        """
        if "next_block" not in spec.reads(k):
            return {}
        block = _first_block(spec, k + 1, states[k + 1])
        return {"published": {"next_block": block}, "above": (Message(published=block),) * 2}


METHODS.ship(dgl=MethodKind(lambda options: Dgl()))
