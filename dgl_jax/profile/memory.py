"""Memory of the modules' programs, as planned by XLA."""

from dataclasses import dataclass
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.methods.base import oldest, opened, steps_alone
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox, Message, nbytes


@dataclass(frozen=True)
class ProgramMemory:
    """Memory of a module's compiled program in bytes, as planned by XLA.

    Attributes:
      arguments: the module's state, and the message (or batch) that it reads.
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

    Returns:
      One entry per module; None if XLA does not report its plan, or if the method's modules cannot
      run alone.
    """
    if not steps_alone(spec):
        return None
    incoming: Any = spec.batch()
    programs = []
    for k, state in enumerate(spec.abstract_states()):
        if k:
            incoming = Message(spec.hops[k - 1].payload, spec.hops[k - 1].codebook)
        state, mail = opened(state)
        inbox = Inbox(incoming, oldest(mail))
        lowered = jax.jit(spec.method.program(spec, k), donate_argnums=0).lower(
            state, inbox, spec.context(k)
        )
        plan = system.program_plan(lowered.compile())
        if plan is None:
            return None
        message = nbytes((incoming.payload if k else incoming.inputs, spec.context(k)))
        programs.append(
            ProgramMemory(plan.arguments, plan.temporary, plan.outputs - plan.donated, message)
        )
    return programs
