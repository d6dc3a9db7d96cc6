"""What training rules share: the entrance of a network, and the types of their programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.registry import Kind
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks.image_classification import augment_key
from dgl_jax.types import Batch, Context, Message

# (state, what came in: a Batch or a Message, the context of its examples) -> (state, a Message to the next module or None, metrics)
Program = Callable[[ModuleState, Any, Context], tuple[ModuleState, Message | None, Metrics]]


def entrance(spec: TrainSpec, batch: Batch) -> jax.Array:
    """A stored batch to network inputs: the augmentation of step n is drawn from the seed and n alone."""
    return spec.preprocess.train(augment_key(spec.seed, batch.step), batch.images)


States = tuple[ModuleState, ...]


# (states of all modules, batch) -> (states, metrics of each module)
TrainStep = Callable[[States, Batch], tuple[States, tuple[Metrics, ...]]]


class Method(Protocol):
    """A training rule, as pure functions of a `TrainSpec`; a frozen dataclass.

    Attributes:
      local: every module carries an objective of its own; else the last one's is the only one.
      sends: messages travel between modules.
    """

    local: bool
    sends: bool

    def fused(self, spec: TrainSpec) -> TrainStep:
        """Returns one update of all modules on one batch."""

    def program(self, spec: TrainSpec, k: int) -> Program:
        """Returns one update of module k on what comes in, for `jax.jit` (donate the state)."""

    def feed(self, spec: TrainSpec, k: int, train: bool) -> Callable[[ModuleState, Any], Message]:
        """Returns what a module that is done does: it hands on, and updates nothing."""


@dataclass(frozen=True)
class MethodKind(Kind):
    """A training rule: `make()` returns a `Method`.

    Attributes:
      local: every module carries an objective of its own; see `Method`.
      engines: names of the engines that run it; None: all.
    """

    local: bool = True
    engines: tuple[str, ...] | None = None
