"""Memory of the modules' programs, as planned by XLA."""

from dataclasses import dataclass
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.methods.base import steps_alone
from dgl_jax.methods.post import oldest, opened
from dgl_jax.profile.compiling import compile_all
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox, Message, nbytes


@dataclass(frozen=True)
class ProgramMemory:
    """Memory of a module's compiled program in bytes, as planned by XLA.

    Attributes:
      arguments: the module's state with its waiting messages, and the message (or batch) that it
        reads.
      temporary: temporary buffers.
      added: outputs that do not reuse the donated state: the message for the next module and the
        metrics.
    """

    arguments: int
    temporary: int
    added: int
    message: (
        int  # size of one message (or batch) at the module's entrance; `arguments` includes one
    )


def module_memory(spec: TrainSpec) -> list[ProgramMemory] | None:
    """Compiles each module's program for the default device, without running it.

    Modules whose programs differ only in names share one compilation, such as several modules of
    equal blocks.

    Returns:
      One entry per module; None if XLA does not report its plan, or if the method's modules cannot
      run alone.
    """
    if not steps_alone(spec):
        return None
    arguments: list[tuple[Any, ...]] = []
    waiting: list[int] = []  # bytes of the messages from above that the program does not read
    for k, state in enumerate(spec.abstract_states()):
        hop = spec.hops[k - 1] if k else None
        incoming: Any = Message(hop.payload, hop.codebook) if hop else spec.batch()
        state, mail = opened(state)
        arguments.append((state, Inbox(incoming, oldest(mail)), spec.context(k)))
        waiting.append(nbytes(mail) - nbytes(oldest(mail) or ()))
    compiled = compile_all(
        (
            jax.jit(spec.method.program(spec, k), donate_argnums=0).lower(*shapes)
            for k, shapes in enumerate(arguments)
        ),
        f"{len(arguments)} modules",
    )
    programs = []
    for program, (_, inbox, context), held in zip(compiled, arguments, waiting):
        plan = system.program_plan(program)
        if plan is None:
            return None
        below = inbox.below
        message = nbytes((below.payload if isinstance(below, Message) else below.inputs, context))
        programs.append(
            ProgramMemory(
                plan.arguments + held, plan.temporary, plan.outputs - plan.donated, message
            )
        )
    return programs
