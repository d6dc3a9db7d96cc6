"""The operations that networks are made of. This is the one door: every other file of the folder is private to it.

Each operation takes `ops`, the formulation to use:

- `auto`: the fastest known on the platform that a program is lowered for, with gradients of its own. These are of first order and
  reverse mode only.
- `xla`: what JAX and XLA give, with automatic differentiation: forward mode and higher derivatives work. Slower on a CPU.
"""

from dgl_jax.ops.batch_norm import BatchNorm
from dgl_jax.ops.choice import OPS
from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.pooling import adaptive_avg_pool, max_pool_2x2, max_pool_3x3
from dgl_jax.ops.remat import after, recomputed

__all__ = [
    "OPS",
    "BatchNorm",
    "adaptive_avg_pool",
    "after",
    "conv_general_dilated",
    "max_pool_2x2",
    "max_pool_3x3",
    "recomputed",
]
