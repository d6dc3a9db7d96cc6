"""The vocabulary: what the source yields (Batch) and what crosses between neighbouring modules (Message)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Shaped

PADDING = -1  # label and id of an example that only fills up a batch of an evaluation

AnyArray = jax.Array | np.ndarray


# What belongs to each example and travels with its activations: by name, arrays with a row for each. `id` is always there (the
# example's index in its split, which follows the activations end to end), `label` and others only as far as an objective asks.
Context = dict[str, AnyArray]


class Batch(NamedTuple):
    """B examples as the source yields them: host arrays, inputs as stored (of images uint8, channels last)."""

    inputs: Shaped[AnyArray, "B ..."]
    context: Context
    step: Int[AnyArray, ""]  # which batch of the run this is; the augmentation is drawn from it


@dataclass(frozen=True)
class Header:
    """Host-side description of a message that goes up; never enters a jit."""

    sequence: int  # number of the batch that the message was made from
    updates: int  # the producer's update count when it made the message
    codebook: int = 0  # which publication of the producer's codebook it was encoded with, where the codec has one


class Message(NamedTuple):
    """What crosses a hop, up (activations) or down (gradients, parameters); goes into and out of jitted functions."""

    payload: Any = ()  # a pytree of arrays with a row for each example, on the way up as the codec made it
    codebook: Any = ()  # the one it was encoded with; travels when a new one is published, not with every packet
    newest: Any = None  # the newest one, where that is to decode instead
    context: Any = ()  # of its examples, a dict: out of a ring all of it, out of a program what the producer adds
    published: Any = ()  # what belongs to no example, such as parameters: a pytree of arrays


class Inbox(NamedTuple):
    """What a turn of a module reads, by where it comes from; None: nothing."""

    below: Batch | Message | None = None
    above: Message | None = None


class Outbox(NamedTuple):
    """What a turn of a module sends, by where it goes; None: nothing."""

    above: Message | None = None
    below: Message | None = None


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shape structures) in a pytree."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
