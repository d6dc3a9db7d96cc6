"""The one jitted function of a module: decode what comes in, step, encode what goes out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from dgl_jax.codecs import relative_error
from dgl_jax.core import ema, rngs
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, feed_step, local_step
from dgl_jax.methods.base import MethodKind, Program, States, TrainStep, entrance
from dgl_jax.registry import METHODS
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Message


def module_program(spec: TrainSpec, k: int) -> Program:
    """The pure function of module k, ready for `jax.jit` (donate the state).

    The first module takes a Batch, the others what a packet brings; the last one hands nothing on.
    """
    module, last = spec.modules[k], len(spec.modules) - 1

    def program(state: ModuleState, incoming: Any, context: Context) -> tuple[ModuleState, Message | None, Metrics]:
        inputs, drift = _receive(spec, k, incoming)
        whole = context | _added(spec, k, inputs)
        updates = state.updates
        state, outputs, metrics = local_step(
            module,
            spec.optimizer,
            state,
            inputs,
            whole,
            accumulate=spec.accumulate,
        )
        if spec.ema:
            state = ema.advance(state, spec.ema)
        metrics |= drift
        if k == last:
            return state, None, metrics
        state, coded, of_codec = _hand_on(spec, state, outputs, updates)
        return state, coded._replace(context=_added(spec, k, inputs, above=True)), metrics | of_codec

    program.__name__ = module.name
    return program


def feed_program(spec: TrainSpec, k: int, train: bool) -> Callable[[ModuleState, Any], Message]:
    """The pure function of a module that is done: what comes in, to what goes to the next one; nothing is updated.

    `train`: batch norm goes on using the statistics of the batch, as in its updates; otherwise the running ones.
    """
    module = spec.modules[k]

    def program(state: ModuleState, incoming: Any) -> Message:
        inputs, _ = _receive(spec, k, incoming)
        outputs = feed_step(module, state, inputs, train=train, accumulate=spec.accumulate)
        codebook = spec.codebook(state)
        return Message(spec.codec.encode(codebook, outputs), codebook, context=_added(spec, k, inputs, above=True))

    return program


def _added(spec: TrainSpec, k: int, inputs: jax.Array, above: bool = False) -> Context:
    """Returns what module k adds to the context: the first one the image, as the network sees it, if an objective asks.

    Args:
      above: only what an objective of another module asks for.
    """
    return {"image": inputs} if k == 0 and "image" in spec.needs(int(above)) else {}


def _receive(spec: TrainSpec, k: int, incoming: Any) -> tuple[jax.Array, Metrics]:
    """Inputs of a module, and how far they are from what was sent, where the newest codebook decodes."""
    if k == 0:
        return entrance(spec, incoming), {}
    inputs = spec.codec.decode(incoming.codebook, incoming.payload)
    if incoming.newest is None:
        return inputs, {}
    drifted = spec.codec.decode(incoming.newest, incoming.payload)
    return drifted, {"codec_drift": relative_error(inputs, drifted)}


def _hand_on(spec: TrainSpec, state: ModuleState, outputs: jax.Array, updates: jax.Array) -> tuple[ModuleState, Message, Metrics]:
    """Encodes with the published codebook, and learns from what was encoded."""
    codec = spec.codec
    key = rngs.codec(state.rng, updates)
    learnt = codec.publish(state.extras.get("codec"), key, outputs, updates)
    codebook = codec.codebook(learnt)
    coded = Message(codec.encode(codebook, outputs), codebook)
    metrics = {} if codec.lossless else {"codec_error": relative_error(outputs, codec.decode(codebook, coded.payload))}
    learnt, health = codec.update(learnt, key, outputs)
    if "codec" in state.extras:
        state = dataclasses.replace(state, extras=state.extras | {"codec": learnt})
    return state, coded, metrics | health


def fused_step(spec: TrainSpec) -> TrainStep:
    """The local steps of all modules on one batch, one after the other, as one pure function."""
    programs = [module_program(spec, k) for k in range(len(spec.modules))]

    def step(states: States, batch: Batch) -> tuple[States, tuple[Metrics, ...]]:
        new, metrics = [], []
        incoming: Any = batch
        context = batch.context
        for k, (program, state) in enumerate(zip(programs, states, strict=True), 1):
            state, incoming, of_module = program(state, incoming, context)
            # Each module is compiled as it would be alone, which keeps every bit equal to the pipeline's.
            state, incoming, of_module = jax.lax.optimization_barrier((state, incoming, of_module))
            if incoming is not None:
                context = spec.carried(k, context, incoming.context)
            new.append(state)
            metrics.append(of_module)
        return tuple(new), tuple(metrics)

    return step


@dataclass(frozen=True)
class Dgl:
    """Decoupled Greedy Learning: every module updates on its own loss and hands its activations on, detached."""

    local: ClassVar[bool] = True
    sends: ClassVar[bool] = True

    def fused(self, spec: TrainSpec) -> TrainStep:
        """See `fused_step`."""
        return fused_step(spec)

    def program(self, spec: TrainSpec, k: int) -> Program:
        """See `module_program`."""
        return module_program(spec, k)

    def feed(self, spec: TrainSpec, k: int, train: bool) -> Callable[[ModuleState, Any], Message]:
        """See `feed_program`."""
        return feed_program(spec, k, train)


METHODS.ship(dgl=MethodKind(Dgl))
