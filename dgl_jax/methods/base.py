"""What training rules share: the way of a batch through a module, the programs of turns, and how they make up a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax

from dgl_jax.codecs import relative_error
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, eval_step
from dgl_jax.registry import Kind
from dgl_jax.schedule import Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import augment_key
from dgl_jax.types import Batch, Context, Inbox, Message, Outbox

# (state, what came in, the context of its examples) -> (state, what goes out, metrics)
Program = Callable[[ModuleState, Inbox, Context], tuple[ModuleState, Outbox, Metrics]]


States = tuple[ModuleState, ...]

# (states of all modules, batch, or None if no turn reads one) -> (states, metrics of each turn)
TrainStep = Callable[[States, Batch | None], tuple[States, tuple[Metrics, ...]]]


@dataclass(frozen=True)
class Ports:
    """Where batches enter module k and leave it: receive, apply the module, hand on.

    Training, feeding, evaluation and export all go this way, so a network answers as it was trained.
    """

    spec: TrainSpec
    k: int

    def receive(self, incoming: Batch | Message | jax.Array | None) -> tuple[jax.Array, Metrics]:
        """Makes the module's inputs of what comes in.

        Args:
          incoming: a Batch to learn from, which is augmented; stored inputs to answer about; or what the module below handed on.

        Returns:
          The inputs; and, if the newest codebook decodes, `codec_drift`: how far they are from what was sent.
        """
        assert incoming is not None, "a turn that reads what comes from below was given nothing"
        if isinstance(incoming, Batch):
            return entrance(self.spec, incoming), {}
        if not isinstance(incoming, Message):
            return self.spec.task.evaluate(incoming), {}
        inputs = self.spec.codec.decode(incoming.codebook, incoming.payload)
        if incoming.newest is None:
            return inputs, {}
        drifted = self.spec.codec.decode(incoming.newest, incoming.payload)
        return drifted, {"codec_drift": relative_error(inputs, drifted)}

    def whole(self, inputs: jax.Array, context: Context, answering: bool = False) -> Context:
        """Returns the context with what the module adds: the first one the image, as the network sees it, if somebody reads it.

        Args:
          answering: of an evaluation, in which objectives read nothing.
        """
        return context | self._added(inputs, self.spec.needs(0, answering))

    def hand_on(
        self, outputs: jax.Array, codebook: Any, inputs: jax.Array, answering: Context | None = None
    ) -> Message:
        """Encodes the module's outputs for the next one.

        Args:
          codebook: of the codec; `()` if it has none.
          inputs: the module's, of which the context may need something above.
          answering: in an evaluation, the whole context of this module.
        """
        if answering is None:
            added = self._added(inputs, self.spec.needs(1))
        else:
            added = {name: answering[name] for name in self.spec.needs(self.k + 1, answering=True)}
        return Message(self.spec.codec.encode(codebook, outputs), codebook, context=added)

    def _added(self, inputs: jax.Array, needs: Sequence[str]) -> Context:
        return {"image": inputs} if self.k == 0 and "image" in needs else {}


def evaluate(
    spec: TrainSpec,
    k: int,
    params: Any,
    batch_stats: Any,
    codebook: Any,
    published: Mapping[str, Any],
    incoming: Message | jax.Array,
) -> tuple[Message | None, jax.Array | None]:
    """Evaluates module k.

    Args:
      codebook: the published one of this module; `()` if the codec has none.
      published: what the module's objective reads of others; {} if nothing.
      incoming: stored inputs for the first module, else what the module below handed on.

    Returns:
      What goes to the next module (None from the last), and what this one answers (None without an answer).
    """
    ports = Ports(spec, k)
    inputs, _ = ports.receive(incoming)
    carried: Context = dict(incoming.context or {}) if isinstance(incoming, Message) else {}
    context = ports.whole(inputs, carried, answering=True)
    outputs, answer = eval_step(spec.modules[k], params, batch_stats, inputs, context, published)
    return None if k == len(spec.modules) - 1 else ports.hand_on(
        outputs, codebook, inputs, context
    ), answer


def entrance(spec: TrainSpec, batch: Batch) -> jax.Array:
    """Makes network inputs of a stored batch: the augmentation of step n is drawn from the seed and n alone."""
    return spec.task.train(augment_key(spec.seed, batch.step), batch.inputs)


class Method(Protocol):
    """A training rule, as pure functions of a `TrainSpec`; a frozen dataclass.

    Attributes:
      sends: messages travel between modules.
    """

    sends: bool

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields the ticks after which every module has `until` updates; ends early once `stop()`, after at least one update each.

        Args:
          counts: updates that the modules have now.
          total: updates that every module will have at the end of training: those that run ahead stop there.
          overlap: modules have devices of their own and work at once.
        """

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns what a turn reads and sends: None for what it does not, any other value for what it does."""

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns what a turn of module k does, for `jax.jit` (donate the state)."""

    def fused(self, spec: TrainSpec, turns: Sequence[tuple[int, str]]) -> TrainStep:
        """Returns the turns (module, kind) of a tick as one function; usually `composed`."""

    def feed(
        self, spec: TrainSpec, k: int, train: bool
    ) -> Callable[[ModuleState, Any, Context], Message]:
        """Returns what a module that is done does in asynchronous engines: it hands on, and updates nothing."""

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns what the method keeps with the fresh state of module k, by name; checkpoints hold it.

        Messages that wait between ticks are kept under `above` and `below`, by where they come from: a tuple, the oldest first. A
        turn reads the oldest; a new one comes in behind, and the oldest goes.
        """


@dataclass(frozen=True)
class MethodKind(Kind):
    """A training rule: `make(options)` returns a `Method`.

    Attributes:
      local: every module carries an objective of its own; else the last one's is the only one.
      engines: names of the engines that run it; None: all.
    """

    local: bool = True
    engines: tuple[str, ...] | None = None


def steps_alone(spec: TrainSpec) -> bool:
    """Returns whether every module's turns are updates on what comes from below, so that a module can be run by itself."""
    first = next(spec.method.schedule([0] * len(spec.modules), 1, 1))
    return spec.method.sends and all(turn.kind == "step" for turn in first)


# Messages that wait at a module, by where they come from; see `Method.extras`.
Mail = dict[str, tuple[Any, ...]]


def opened(state: ModuleState) -> tuple[ModuleState, Mail]:
    """Parts a state from the messages that wait in it."""
    mail = {port: state.extras[port] for port in Inbox._fields if port in state.extras}
    rest = {name: value for name, value in state.extras.items() if name not in mail}
    return replace(state, extras=rest) if mail else state, mail


def closed(state: ModuleState, mail: Mail) -> ModuleState:
    """Returns the state with its messages: undoes `opened`."""
    return replace(state, extras=state.extras | mail) if mail else state


def delivered(mail: Mail, port: str, message: Any) -> Mail:
    """Returns the mail with a new message in place of the oldest from there."""
    return mail | {port: (*mail[port][1:], message)}


def oldest(mail: Mail) -> Message | None:
    """Returns what a turn reads of the messages from above."""
    return mail["above"][0] if "above" in mail else None


class Post:
    """Carries what the turns of synchronous modules send to the turns that read it, inside a jit or outside.

    Args:
      states: of all modules, with the messages that wait in them.
      move: `move(k, number, message, context)` returns a message and its context on the devices of module k, which reads them;
        what comes from above has no context (None). By default nothing has to move.

    Attributes:
      states: of the modules, without messages.
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
        self._reads: dict[tuple[int, str], Inbox] = {}  # of the turns so far

    def read(
        self, k: int, number: int, kind: str, batch: Callable[[int], Batch]
    ) -> tuple[Inbox, Context]:
        """Returns what a turn of module k on batch `number` reads; asks for that batch if it reads one."""
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
        """Takes what a turn of module k on batch `number` sends; `context` is what it has read."""
        if sent.above is not None:
            carried = self._spec.carried(k + 1, context, sent.above.context)
            packet = self._move(k + 1, number, sent.above._replace(context=()), carried)
            if "below" in self._mails[k + 1]:
                self._mails[k + 1] = delivered(self._mails[k + 1], "below", packet)
            else:
                self._below[k + 1] = packet
        if sent.below is not None:
            message, _ = self._move(k - 1, number, sent.below, None)
            self._mails[k - 1] = delivered(self._mails[k - 1], "above", message)

    def closed(self) -> States:
        """Returns the states with the messages that wait."""
        return tuple(map(closed, self.states, self._mails))


def composed(spec: TrainSpec, turns: Sequence[tuple[int, str]]) -> TrainStep:
    """Returns the turns of a tick, one after the other, as one pure function."""
    programs = [spec.method.program(spec, *turn) for turn in turns]

    def step(states: States, batch: Batch | None) -> tuple[States, tuple[Metrics, ...]]:
        post, metrics = Post(spec, states), []
        for (k, kind), program in zip(turns, programs, strict=True):
            inbox, context = post.read(k, 0, kind, lambda _: batch)  # type: ignore[arg-type, return-value]
            # Each turn is compiled as it would be alone, which keeps every bit equal to the pipeline's.
            # But for what the CPU's compiler fuses once it has taken the barrier out: `int8` in front of a layer norm is rounded
            # otherwise, by 1e-7. To keep the barrier until then (xla_disable_hlo_passes) costs a sixth of the speed.
            post.states[k], sent, of_turn = jax.lax.optimization_barrier(
                program(post.states[k], inbox, context)
            )
            post.send(k, 0, context, sent)
            metrics.append(of_turn)
        return post.closed(), tuple(metrics)

    return step
