"""Memory of compiled programs as XLA plans it, and of the messages that the engine holds."""

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import harness
import jax
import jax.numpy as jnp

from dgl_jax import system
from dgl_jax.engines import EngineState, PipelineEngine
from dgl_jax.run.build import make_experiment
from dgl_jax.types import Context, Inbox, Message, Outbox


@dataclass
class Compiled:
    """Bytes of one compiled program.

    Attributes:
      temporary: scratch memory of the program.
      added: outputs that are not in a donated argument: message for the next module and metrics.
      message: the message for the next module, with its context; 0 if there is none.
      state: donated arguments: parameters, batch statistics and optimizer state.
    """

    temporary: int
    added: int
    message: int = 0
    state: int = 0


@dataclass
class Token:
    """Placeholder for a payload, alive as long as the engine holds it."""

    hop: int
    __hash__ = object.__hash__


@dataclass
class Blank:
    """Placeholder for the state of a module."""

    updates: jax.Array = field(default_factory=lambda: jnp.zeros((), jnp.int32))
    extras: ClassVar[dict[str, Any]] = {}


jax.tree_util.register_pytree_node(
    Blank, lambda blank: ((blank.updates,), None), lambda _, leaves: Blank(*leaves)
)


def measure(program: Any, *arguments: Any) -> Compiled:
    """Compiles a program and reads the memory plan of the compiler."""
    # Buffers are planned before machine code is generated. Optimizing that code takes half of the
    # time and does not change the plan.
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    plan = system.program_plan(program.lower(*arguments).compile(compiler_options=options))
    if plan is None:
        raise SystemExit("XLA reports no memory plan on this backend: nothing to measure")
    return Compiled(plan.temporary, plan.outputs - plan.donated, state=plan.donated)


def holdings(modules: int) -> list[tuple[int, list[int]]]:
    """Observes which messages the pipeline engine on one device holds while each program runs.

    Runs the engine's loop with programs that do nothing and send placeholders. Garbage collection
    shows which placeholders the engine still refers to.

    Returns:
      One entry per turn: the module, and the hops whose messages are alive.
    """
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=2,
        model__name="cnn6",
        model__width=1,
        model__modules=modules,
        engine__name="pipeline",
        train__steps=1,
    )
    experiment = make_experiment(settings, jax.devices()[:1])
    assert isinstance(experiment.engine, PipelineEngine)
    alive: weakref.WeakSet[Token] = weakref.WeakSet()
    seen = []

    def program(k: int) -> Any:
        def run(state: Blank, inbox: Inbox, context: Context) -> tuple[Blank, Outbox, dict]:
            seen.append((k, sorted(token.hop for token in alive)))
            if k + 1 == modules:
                return state, Outbox(), {}
            token = Token(k)
            alive.add(token)
            return state, Outbox(Message(token)), {}

        return run

    experiment.engine.programs.update({(k, "step"): program(k) for k in range(modules)})
    state = EngineState(tuple(Blank() for _ in range(modules)))
    for _ in experiment.engine.run(state, experiment.source, 3 * modules):
        pass
    return seen


def pipeline_peak(programs: list[Compiled], held: list[tuple[int, list[int]]]) -> int:
    """Computes the largest sum of a program's bytes and the messages held while it runs."""
    return max(
        programs[k].temporary + programs[k].added + sum(programs[hop].message for hop in hops)
        for k, hops in held
    )
