"""Operations that networks are built from; import them from this package, its files are private.

Each operation takes `ops`, the formulation to use:

- `auto`: the fastest on the platform that a program is lowered for. Its custom gradients support
  reverse mode and first derivatives only.
- `xla`: the operations of JAX and XLA with automatic differentiation. Forward mode and higher
  derivatives work; slower on a CPU.
- `joint`: as `auto`, but batch norm takes its sums in pairs: fewer kernels on a GPU.
"""

from dgl_jax.ops.batch_norm import BatchNorm
from dgl_jax.ops.choice import OPS
from dgl_jax.ops.conv import conv_general_dilated
from dgl_jax.ops.pooling import (
    adaptive_avg_pool,
    avg_pool_windows,
    max_pool_2x2,
    max_pool_3x3,
    max_pool_windows,
)
from dgl_jax.ops.remat import after, recomputed

__all__ = [
    "OPS",
    "BatchNorm",
    "adaptive_avg_pool",
    "after",
    "avg_pool_windows",
    "conv_general_dilated",
    "max_pool_2x2",
    "max_pool_3x3",
    "max_pool_windows",
    "recomputed",
]
