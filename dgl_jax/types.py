"""Common data types: batches from the source, and messages between neighboring modules."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Shaped

# Label that does not count: of padded tokens, and of the examples that pad the last batch of an
# evaluation, which also have it as their id.
PADDING = -1

AnyArray = jax.Array | np.ndarray


# Per-example arrays, by name, that travel with the activations. `id` is always present: the index
# of the example in its split. `label` and others travel only as far as an objective reads them.
Context = dict[str, AnyArray]


class Batch(NamedTuple):
    """Batch of B examples as the source yields it, in host arrays.

    Attributes:
      inputs: inputs as stored, [B, ...]; images are uint8 with channels last, [B, H, W, C].
      context: see `Context`.
      step: index of the batch in the run, from which the augmentation derives its key.
    """

    inputs: Shaped[AnyArray, "B ..."]
    context: Context
    step: Int[AnyArray, ""]


@dataclass(frozen=True)
class Header:
    """Host-side description of a message to the module above; never enters a jitted function.

    Attributes:
      sequence: index of the batch that the message was computed from.
      updates: the producer's update count when it sent the message.
      codebook: version of the producer's codebook that encoded the payload; 0 if the codec has no
        codebook.
    """

    sequence: int
    updates: int
    codebook: int = 0


class Message(NamedTuple):
    """Message that crosses a hop: activations upward; gradients or parameters downward.

    Jitted functions take and return messages; the header is kept apart.

    Attributes:
      payload: pytree of arrays [B, ...]; upward it is encoded by the codec.
      codebook: the codebook that encoded the payload. It is sent when a new one is published, not
        with every message.
      newest: the newest codebook, if that one should decode the payload; otherwise None.
      context: see `Context`. A message from a ring holds all of it, a message from a program only
        what the producer adds.
      published: pytree of arrays that belong to no example, such as parameters.
    """

    payload: Any = ()
    codebook: Any = ()
    newest: Any = None
    context: Any = ()
    published: Any = ()


class Inbox(NamedTuple):
    """Input of a module's turn, by the direction it comes from; None if nothing is read.

    Inbox and outbox are the four ports of a program:

                  module k + 1
        Outbox.above ^    | Inbox.above
                     |    v
                   module k
         Inbox.below ^    | Outbox.below
                     |    v
             module k - 1, or the source
    """

    below: Batch | Message | None = None
    above: Message | None = None


class Outbox(NamedTuple):
    """Output of a module's turn, by the direction it is sent to; None if nothing is sent."""

    above: Message | None = None
    below: Message | None = None


def nbytes(tree: Any) -> int:
    """Returns the total size in bytes of all arrays (or `ShapeDtypeStruct`s) in a pytree."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
