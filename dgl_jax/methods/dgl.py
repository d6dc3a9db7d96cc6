"""Decoupled Greedy Learning (DGL): the program of a module's turn, from its inbox to its outbox."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dgl_jax import schedule
from dgl_jax.config.registry import METHODS
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, forward_step, local_step
from dgl_jax.methods.base import MethodKind, Ports, Program
from dgl_jax.methods.post import Composed
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Message, Outbox


def _published(state: ModuleState, message: Message, decay: float) -> ModuleState:
    """Updates the stored copy of a publication: replaces it, or advances its moving average.

    Does neither if the message repeats a publication that has been read before.
    """
    old, new = state.extras["published"], message.published
    is_new = new["version"] > old["version"]

    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        # The result is a copy even without an average: the next update donates the state, but the
        # message may be read again after that.
        return jnp.where(is_new, decay * old + (1 - decay) * new if decay else new, old)

    return dataclasses.replace(
        state,
        extras=state.extras
        | {
            "published": jax.tree.map(mix, old, new)
            | {"version": jnp.maximum(old["version"], new["version"])}
        },
    )


def _first_block(spec: TrainSpec, k: int, state: ModuleState) -> dict[str, Any]:
    """Returns a copy of the first block of module k, as a publication.

    Its version is the number of updates that the module has made.
    """
    name = f"block_{spec.modules[k].first}"
    block = {"params": state.params["body"][name], "batch_stats": state.batch_stats["body"][name]}
    return jax.tree.map(jnp.copy, {"next_block": block, "version": state.updates})


def _publish(spec: TrainSpec, k: int, state: ModuleState) -> tuple[ModuleState, dict[str, Any]]:
    """Returns the newest publication of module k, after an update, and the state that holds it."""
    new = _first_block(spec, k, state)
    if "publication" not in state.extras:
        return state, new
    # The update that the publication follows is the one with this index.
    is_due = (state.updates - 1) % spec.refresh(k - 1) == 0
    new = jax.tree.map(
        lambda old, new: jnp.where(is_due, new, old), state.extras["publication"], new
    )
    state = dataclasses.replace(state, extras=state.extras | {"publication": new})
    return state, jax.tree.map(jnp.copy, new)


@dataclass(frozen=True)
class Dgl(Composed):
    """Training rule of Belilovsky et al. 2020, Algorithm 1: each module minimizes its own loss.

    A module sends its activations to the next one without a gradient path back.
    """

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields one batch per tick, or with `overlap` a pipeline that fills and drains."""
        return schedule.aligned(counts, until, stop, overlap)

    def ports(self, spec: TrainSpec, k: int, kind: str = "step") -> tuple[Inbox, Outbox]:
        """Returns the ports of a turn; parameters travel down if the objective below reads them."""
        last = k == len(spec.modules) - 1
        reads, sends = ("next_block" in spec.reads(j) or None for j in (k, k - 1))
        return Inbox(True, reads), Outbox(None if last else True, sends)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn of module k: decode the input, update, encode the output.

        The first module takes a Batch as input, the others a Message. The last module sends no
        activations. A module sends its first block down if the objective below reads it.
        """
        module, ports = spec.modules[k], Ports(spec, k)
        _, sends = self.ports(spec, k)

        def program(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            inputs, input_metrics = ports.receive(inbox.below)
            updates = state.updates
            if inbox.above is not None:
                state = _published(state, inbox.above, module.objective.decay)  # type: ignore[union-attr]
                age = updates - state.extras["published"]["version"]
                input_metrics |= {"copy_age": age.astype(jnp.float32)}
            state, outputs, metrics = local_step(
                module,
                spec.optimizer,
                state,
                inputs,
                ports.full_context(inputs, context),
                published=state.extras.get("published", {}),
                accumulate=spec.accumulate,
            )
            down = None
            if sends.below is not None:
                state, publication = _publish(spec, k, state)
                down = Message(published=publication)
            if spec.ema:
                state = ema.advance(state, spec.ema)
            metrics |= input_metrics
            if sends.above is None:
                return state, Outbox(below=down), metrics
            state, message, codec_metrics = ports.send(state, updates, outputs, inputs)
            return state, Outbox(message, down), metrics | codec_metrics

        program.__name__ = module.name
        return program

    def feed(
        self, spec: TrainSpec, k: int, train: bool
    ) -> Callable[[ModuleState, Any, Context], Message]:
        """Returns the forward-only program of a finished module that still feeds the next one.

        Args:
          train: True if batch norm keeps using the statistics of the batch, as in updates;
            otherwise it uses the running statistics.
        """
        module, ports = spec.modules[k], Ports(spec, k)

        def program(state: ModuleState, incoming: Any, context: Context) -> Message:
            inputs, _ = ports.receive(incoming)
            full_context = ports.full_context(inputs, context)
            outputs, _ = forward_step(
                module, state, inputs, full_context, train=train, accumulate=spec.accumulate
            )
            return ports.emit(outputs, spec.codebook(state), inputs)

        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the copy of the next module's first block and two messages with it in flight.

        Both exist only if the objective of module k reads that block. A module that publishes its
        own block less often than it updates holds its newest publication, which every message
        repeats. With two messages in flight
        no module waits for another: in a pipeline, module k + 1 works on batch b - 1 while module k
        works on batch b, so module k reads the message that was sent after batch b - 2. The other
        engines use the same delay.
        """
        extras: dict[str, Any] = {}
        if k and spec.refresh(k - 1) > 1:
            extras["publication"] = _first_block(spec, k, states[k])
        if spec.refresh(k):
            block = _first_block(spec, k + 1, states[k + 1])
            extras |= {"published": block, "above": (Message(published=block),) * 2}
        return extras


METHODS.ship(dgl=MethodKind(lambda options: Dgl()))
