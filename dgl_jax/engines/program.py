"""Jits the programs of modules for their devices; equal ones are made once."""

from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.core.kept import kept
from dgl_jax.engines.placement import Placement
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Outbox


class Programs(dict[Any, Any]):
    """Programs by the turns that run them, each made when it is first asked for."""

    def __init__(self, make: Callable[[Any], Any]):
        super().__init__()
        self._make = make

    def __missing__(self, turn: Any) -> Any:
        program = self[turn] = self._make(turn)
        return program


def compiler_options() -> dict[str, str] | None:
    """Returns the options for programs whose numbers must not depend on what they are compiled with.

    On the CPU XLA takes barriers out before it fuses, and would round what one module decodes in another way where a second module
    stands in the same program. With them it fuses each as it does alone.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else None


@kept(256)
def jitted(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> Any:
    """Returns what a turn of module k runs on its devices; it takes over (donates) the state."""
    program, exit = spec.method.program(spec, k, kind), exits(spec, k, placement, kind)
    return jax.jit(program, donate_argnums=0, out_shardings=exit, compiler_options=compiler_options())


@kept(256)
def jitted_feed(spec: TrainSpec, k: int, train: bool, placement: Placement) -> Any:
    """Returns the program of `feed` for the devices of module k."""
    return jax.jit(spec.method.feed(spec, k, train), out_shardings=placement.message(k))


def exits(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> tuple[Any, Any, Any]:
    """Returns where a turn of module k leaves its state, what it sends and its metrics, as shardings."""
    _, sends = spec.method.ports(spec, k, kind)
    outbox = Outbox(*(None if sent is None else placement.message(k) for sent in sends))
    return placement.replicated(k), outbox, placement.replicated(k)
