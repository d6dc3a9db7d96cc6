"""Vectors of a batch from which a codebook learns.

Axes in shapes: B examples, P positions, C channels.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

from dgl_jax.core import rngs

_FEWEST = 1024  # vectors to draw from a large batch even if fewer are wanted


def rows_of(x: Shaped[Array, "..."]) -> Float[Array, "B P C"]:
    """Reshapes activations to float32 rows [examples, positions, channels].

    Loops run over positions, because examples may be split over devices. Activations with fewer
    than three axes count as one example.
    """
    x = x.astype(jnp.float32)
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def draw(
    key: Array, rows: Float[Array, "B P C"], wanted: int, whole: bool = False
) -> Float[Array, "B p C"]:
    """Subsamples about `wanted` vectors (0: all) at random positions common to all examples.

    A batch with several times as many examples gives one vector for every second, third, ... of
    them.

    Every device of a group receives all the vectors that were drawn. It then computes the same
    codebook as the others, instead of waiting for them at every sum and every chosen entry.

    Args:
      key: random key.
      rows: [B, P, C] vectors.
      wanted: number of vectors.
      whole: True if every device of a group has all of `rows`.
    """
    if not wanted:
        return rows
    examples, positions, _ = rows.shape
    if (most := examples // max(wanted, _FEWEST)) > 1:
        stride = max(n for n in range(1, most + 1) if examples % n == 0)
        rows = rows.reshape(-1, stride, *rows.shape[1:])[:, 0]
    count = -(-wanted // examples)
    if count < positions:
        chosen = rngs.below(jax.random.bits(key, (count,), jnp.uint32), positions)
        rows = jnp.take(rows, chosen, axis=1)
    return rows if whole else _on_every_device(rows)


def _on_every_device(rows: Array) -> Array:
    """Copies an array to all devices of the group that `engines.program.on_group` announces."""
    mesh = jax.sharding.get_abstract_mesh()
    announced = mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return jax.lax.with_sharding_constraint(rows, PartitionSpec()) if announced else rows
