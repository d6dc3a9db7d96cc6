"""A program's bytes as XLA's compiler plans them, and what the engine holds besides."""

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
      temporary: scratch that the program allocates for itself.
      added: outputs that do not lie in a donated argument: the packet for the next module, and the metrics.
      packet: the payload among them.
      state: what is donated: parameters, batch statistics, the optimizer's state.
    """

    temporary: int
    added: int
    packet: int = 0
    state: int = 0


@dataclass
class Token:
    """Stands for a payload: alive as long as the engine holds it."""

    hop: int
    __hash__ = object.__hash__


@dataclass
class Blank:
    """Stands for a module's state."""

    updates: jax.Array = field(default_factory=lambda: jnp.zeros((), jnp.int32))
    extras: ClassVar[dict[str, Any]] = {}


jax.tree_util.register_pytree_node(
    Blank, lambda blank: ((blank.updates,), None), lambda _, leaves: Blank(*leaves)
)


def measure(program: Any, *arguments: Any) -> Compiled:
    """Compiles and reads the compiler's plan."""
    # Buffers are planned before machine code is made: optimising that takes half of the time and changes no byte of the plan.
    options = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    plan = system.program_plan(program.lower(*arguments).compile(compiler_options=options))
    if plan is None:
        raise SystemExit("XLA tells no memory plan on this backend: nothing to measure")
    return Compiled(plan.temporary, plan.outputs - plan.donated, state=plan.donated)


def holdings(modules: int) -> list[tuple[int, list[int]]]:
    """What the pipeline engine on one device holds while each program runs: (module, hops whose packets are alive).

    The engine's own loop runs, on programs that do nothing; garbage collection says which packets it still refers to.
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
    made = make_experiment(settings, jax.devices()[:1])
    assert isinstance(made.engine, PipelineEngine)
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

    made.engine.programs.update({(k, "step"): program(k) for k in range(modules)})
    for _ in made.engine.run(
        EngineState(tuple(Blank() for _ in range(modules))), made.source, 3 * modules
    ):
        pass
    return seen


def pipeline_peak(programs: list[Compiled], held: list[tuple[int, list[int]]]) -> int:
    """The largest sum of a program's own bytes and of the packets that wait meanwhile, its input included."""
    return max(
        programs[k].temporary + programs[k].added + sum(programs[hop].packet for hop in hops)
        for k, hops in held
    )
