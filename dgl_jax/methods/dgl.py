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
from dgl_jax.methods.base import MethodKind, Ports, Program, States, TrainStep
from dgl_jax.registry import METHODS
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Context, Message


def module_program(spec: TrainSpec, k: int) -> Program:
    """Returns the pure function of module k, ready for `jax.jit` (donate the state).

    The first module takes a Batch, the others what a packet brings; the last one hands nothing on.
    """
    module, ports = spec.modules[k], Ports(spec, k)

    def program(state: ModuleState, incoming: Any, context: Context) -> tuple[ModuleState, Message | None, Metrics]:
        inputs, of_input = ports.receive(incoming)
        whole = context | ports.added(inputs)
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
        metrics |= of_input
        if k == len(spec.modules) - 1:
            return state, None, metrics
        key = rngs.codec(state.rng, updates)
        published = spec.codec.publish(state.extras.get("codec"), key, outputs, updates)
        coded = ports.hand_on(outputs, spec.codec.codebook(published), inputs)
        state, of_codec = _learn(spec, state, published, key, outputs, coded)
        return state, coded, metrics | of_codec

    program.__name__ = module.name
    return program


def _learn(
    spec: TrainSpec, state: ModuleState, published: Any, key: jax.Array, outputs: jax.Array, coded: Any
) -> tuple[ModuleState, Metrics]:
    """Lets the codec, in the state `published`, learn from what was encoded; returns the module's new state, and metrics."""
    codec = spec.codec
    metrics = {} if codec.lossless else {"codec_error": relative_error(outputs, codec.decode(coded.codebook, coded.payload))}
    learnt, health = codec.update(published, key, outputs)
    if "codec" in state.extras:
        state = dataclasses.replace(state, extras=state.extras | {"codec": learnt})
    return state, metrics | health


def feed_program(spec: TrainSpec, k: int, train: bool) -> Callable[[ModuleState, Any], Message]:
    """Returns the pure function of a module that is done: from what comes in to what goes on; nothing is updated.

    `train`: batch norm goes on using the statistics of the batch, as in its updates; otherwise the running ones.
    """
    module, ports = spec.modules[k], Ports(spec, k)

    def program(state: ModuleState, incoming: Any) -> Message:
        inputs, _ = ports.receive(incoming)
        outputs = feed_step(module, state, inputs, train=train, accumulate=spec.accumulate)
        return ports.hand_on(outputs, spec.codebook(state), inputs)

    return program


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
