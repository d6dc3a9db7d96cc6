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


@kept(256)
def jitted(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> Any:
    """Returns what a turn of module k runs on its devices; it takes over (donates) the state."""
    return jax.jit(
        spec.method.program(spec, k, kind),
        donate_argnums=0,
        out_shardings=exits(spec, k, placement, kind),
    )


@kept(256)
def jitted_feed(spec: TrainSpec, k: int, train: bool, placement: Placement) -> Any:
    """Returns the program of `feed` for the devices of module k."""
    return jax.jit(spec.method.feed(spec, k, train), out_shardings=placement.message(k))


def exits(
    spec: TrainSpec, k: int, placement: Placement, kind: str = "step"
) -> tuple[Any, Any, Any]:
    """Returns where a turn of module k leaves its state, what it sends and its metrics, as shardings."""
    _, sends = spec.method.ports(spec, k, kind)
    outbox = Outbox(*(None if sent is None else placement.message(k) for sent in sends))
    return placement.replicated(k), outbox, placement.replicated(k)
