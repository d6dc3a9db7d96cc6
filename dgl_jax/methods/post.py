"""Deliveries between the turns of a tick, and whole ticks as one function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.methods.base import States, TrainStep
from dgl_jax.schedule import Tick
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Inbox, Message, Outbox

# Messages that wait at a module, by the port they arrived at; see `Method.extras`.
Mail = dict[str, tuple[Any, ...]]


def opened(state: ModuleState) -> tuple[ModuleState, Mail]:
    """Splits a state into the state without waiting messages and those messages."""
    mail = {port: state.extras[port] for port in Inbox._fields if port in state.extras}
    rest = {name: value for name, value in state.extras.items() if name not in mail}
    return replace(state, extras=rest) if mail else state, mail


def closed(state: ModuleState, mail: Mail) -> ModuleState:
    """Returns the state with its waiting messages put back; the inverse of `opened`."""
    return replace(state, extras=state.extras | mail) if mail else state


def delivered(mail: Mail, port: str, message: Any) -> Mail:
    """Appends a message to a port's queue and drops the oldest one there."""
    return mail | {port: (*mail[port][1:], message)}


def oldest(mail: Mail) -> Message | None:
    """Returns the oldest message from above, which the next turn reads; None without a queue."""
    return mail["above"][0] if "above" in mail else None


class Post:
    """Delivers messages between the turns of synchronous modules, inside a jit or outside.

    Args:
      spec: description of the run.
      states: states of all modules, including their waiting messages.
      move: `move(k, number, message, context)` returns the message and its context on the devices
        of module k, which reads them. A message from above has no context (None). By default
        nothing is moved.

    Attributes:
      states: states of the modules without waiting messages.
    """

    def __init__(
        self,
        spec: TrainSpec,
        states: States,
        move: Callable[..., tuple[Message, Any]] | None = None,
    ):
        self._spec, self._move = (
            spec,
            move or (lambda k, number, message, context: (message, context)),
        )
        self.states, self._mails = map(list, zip(*map(opened, states), strict=True))
        self._below: dict[int, tuple[Message, Context]] = {}
        self._reads: dict[tuple[int, str], Inbox] = {}  # cache: ports read, by (module, kind)

    def read(
        self, k: int, number: int, kind: str, batch: Callable[[int], Batch]
    ) -> tuple[Inbox, Context]:
        """Returns the inbox and context for a turn of module k on batch `number`.

        Calls `batch(number)` only if the turn takes its input from the source.
        """
        if (reads := self._reads.get((k, kind))) is None:
            reads, _ = self._spec.method.ports(self._spec, k, kind)
            self._reads[k, kind] = reads
        mail = self._mails[k]
        above = None if reads.above is None else mail["above"][0]
        if reads.below is None:
            return Inbox(None, above), {}
        if k == 0:
            incoming = batch(number)
            return Inbox(incoming, above), incoming.context
        message, context = mail["below"][0] if "below" in mail else self._below.pop(k)
        return Inbox(message, above), context

    def send(self, k: int, number: int, context: Context, sent: Outbox) -> None:
        """Delivers the outbox of a turn of module k on batch `number`.

        Args:
          context: context of the batch that the turn has read.
        """
        if sent.above is not None:
            carried = self._spec.carried(k + 1, context, sent.above.context)
            moved = self._move(k + 1, number, sent.above._replace(context=()), carried)
            if "below" in self._mails[k + 1]:
                self._mails[k + 1] = delivered(self._mails[k + 1], "below", moved)
            else:
                self._below[k + 1] = moved
        if sent.below is not None:
            message, _ = self._move(k - 1, number, sent.below, None)
            self._mails[k - 1] = delivered(self._mails[k - 1], "above", message)

    def run(
        self, tick: Tick, programs: Mapping[Any, Any], batch: Callable[[int], Batch]
    ) -> list[Metrics]:
        """Runs the turns of a tick and returns the metrics of each.

        Args:
          tick: the turns, in order.
          programs: programs by (module, kind).
          batch: returns the batch with a number.
        """
        metrics = []
        for k, number, kind in tick:
            inbox, context = self.read(k, number, kind, batch)
            self.states[k], sent, turn_metrics = programs[k, kind](self.states[k], inbox, context)
            self.send(k, number, context, sent)
            metrics.append(turn_metrics)
        return metrics

    def closed(self) -> States:
        """Returns the states of all modules, including their waiting messages."""
        return tuple(map(closed, self.states, self._mails))


def composed(spec: TrainSpec, turns: Sequence[tuple[int, str]], barrier: bool = True) -> TrainStep:
    """Composes the turns of a tick, in order, into one pure function; see `Method.fused`."""
    separate = jax.lax.optimization_barrier if barrier else lambda results: results
    programs = [spec.method.program(spec, *turn) for turn in turns]

    def step(states: States, batch: Batch | None) -> tuple[States, tuple[Metrics, ...]]:
        post, metrics = Post(spec, states), []
        for (k, kind), program in zip(turns, programs, strict=True):
            inbox, context = post.read(k, 0, kind, lambda _: batch)  # type: ignore[arg-type, return-value]
            # With the barrier XLA compiles each turn as it would alone, so `fused` and `pipeline`
            # agree bit for bit. One exception: the CPU compiler removes barriers before its last
            # fusion pass, and then rounds `int8` in front of a layer norm differently (by 1e-7).
            # Keeping the barrier until the end (xla_disable_hlo_passes) costs a sixth of the speed.
            post.states[k], sent, turn_metrics = separate(program(post.states[k], inbox, context))
            post.send(k, 0, context, sent)
            metrics.append(turn_metrics)
        return post.closed(), tuple(metrics)

    return step


@dataclass(frozen=True)
class Composed:
    """Base class of methods whose modules exchange messages.

    Attributes:
      sends: see `Method`.
    """

    sends: ClassVar[bool] = True

    def fused(
        self, spec: TrainSpec, turns: Sequence[tuple[int, str]], barrier: bool = True
    ) -> TrainStep:
        """Composes the turns of a tick into one function; see `composed`."""
        return composed(spec, turns, barrier)
