"""What training rules share: the entrance of a network, and the types of their programs."""

from collections.abc import Callable
from typing import Any

import jax

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks.image_classification import augment_key
from dgl_jax.types import Batch, Message, Targets

# (state, what came in: a Batch or a Message, its targets) -> (state, what goes to the next module: a Message or None, metrics)
Program = Callable[[ModuleState, Any, Targets], tuple[ModuleState, Message | None, Metrics]]


def entrance(spec: TrainSpec, batch: Batch) -> jax.Array:
    """A stored batch to network inputs: the augmentation of step n is drawn from the seed and n alone."""
    return spec.preprocess.train(augment_key(spec.seed, batch.step), batch.images)


States = tuple[ModuleState, ...]


# (states of all modules, batch) -> (states, metrics of each module)
TrainStep = Callable[[States, Batch], tuple[States, tuple[Metrics, ...]]]
