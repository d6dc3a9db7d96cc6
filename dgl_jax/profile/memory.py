"""Reads the memory that XLA plans for the programs of modules."""

from dataclasses import dataclass
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.methods.base import oldest, opened, steps_alone
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Inbox, Message, nbytes


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes that the compiled program of a module needs, as XLA plans it.

    Attributes:
      arguments: the module's state, and the packet (or batch) it works on.
      temporary: scratch.
      added: outputs that do not lie in the donated state: the packet for the next module, the metrics.
      packet: of one packet (or batch) at the entrance; one is among the arguments.
    """

    arguments: int
    temporary: int
    added: int
    packet: int


def module_memory(spec: TrainSpec) -> list[ProgramMemory] | None:
    """Compiles the program of each module for the default device; runs nothing.

    None where XLA does not tell its plans, or modules cannot be run by themselves.
    """
    if not steps_alone(spec):
        return None
    incoming: Any = spec.batch()
    found = []
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
        packet = nbytes((incoming.payload if k else incoming.inputs, spec.context(k)))
        found.append(
            ProgramMemory(plan.arguments, plan.temporary, plan.outputs - plan.donated, packet)
        )
    return found
