"""Jits the programs of modules for their devices; equal ones are made once."""

from typing import Any

import jax

from dgl_jax.core.kept import kept
from dgl_jax.engines.placement import Placement
from dgl_jax.spec import TrainSpec


@kept(256)
def jitted(spec: TrainSpec, k: int, placement: Placement) -> Any:
    """Returns the program of module k for its devices; it takes over (donates) the state."""
    return jax.jit(spec.method.program(spec, k), donate_argnums=0, out_shardings=exits(placement, k, len(spec.modules)))


@kept(256)
def jitted_feed(spec: TrainSpec, k: int, train: bool, placement: Placement) -> Any:
    """Returns the program of `feed` for the devices of module k."""
    return jax.jit(spec.method.feed(spec, k, train), out_shardings=exits(placement, k, len(spec.modules))[1])


def exits(placement: Placement, k: int, modules: int) -> tuple[Any, Any, Any]:
    """Returns where the program of module k leaves its state, what it hands on and its metrics, as shardings."""
    coded = placement.coded(k) if k + 1 < modules else None
    return placement.replicated(k), coded, placement.replicated(k)
