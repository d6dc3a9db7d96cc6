"""Jitted programs of modules, cached so that equal programs are compiled once."""

from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.core.program_cache import cached_program
from dgl_jax.engines.placement import Placement
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Outbox


class Programs(dict[Any, Any]):
    """Dict of programs by turn, which builds each program when it is first looked up."""

    def __init__(self, make: Callable[[Any], Any]):
        super().__init__()
        self._make = make

    def __missing__(self, turn: Any) -> Any:
        program = self[turn] = self._make(turn)
        return program


@cached_program(256)
def jitted(spec: TrainSpec, k: int, placement: Placement, kind: str = "step") -> Any:
    """Returns the jitted program that a turn of module k runs on its devices; it donates the state.

    Args:
      spec: device-independent description of the training run.
      k: index of the module.
      placement: device group of each module.
      kind: kind of the turn, such as "step" or "backward".
    """
    return jax.jit(
        spec.method.program(spec, k, kind),
        donate_argnums=0,
        out_shardings=_output_shardings(spec, k, placement, kind),
    )


@cached_program(256)
def jitted_feed(spec: TrainSpec, k: int, train: bool, placement: Placement) -> Any:
    """Returns the jitted forward-only program of module k, for turns after its last update.

    Args:
      spec: device-independent description of the training run.
      k: index of the module.
      train: if true, batch norm normalizes with batch statistics, otherwise with the running ones.
      placement: device group of each module.
    """
    return jax.jit(spec.method.feed(spec, k, train), out_shardings=placement.message(k))


def _output_shardings(
    spec: TrainSpec, k: int, placement: Placement, kind: str = "step"
) -> tuple[Any, Any, Any]:
    """Returns the shardings of the state, the outbox and the metrics of a turn of module k."""
    _, sends = spec.method.ports(spec, k, kind)
    outbox = Outbox(*(None if sent is None else placement.message(k) for sent in sends))
    return placement.replicated(k), outbox, placement.replicated(k)
