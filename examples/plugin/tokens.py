"""Task with one label per token, together with a data set, a network and a head for it.

The label of a token is the sum of the token and the one two positions earlier, modulo the number of
symbols. The first block cannot see that far.

python launch.py --config=configs/digits.py --workdir=runs/tokens \\
    --config.plugins=examples.plugin --config.data.name=token_sums \\
    --config.task.name=token_labels --config.model.name=token_conv --config.model.head=each_token
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from dgl_jax.config import DataSettings, TaskSettings
from dgl_jax.config.fields import number
from dgl_jax.data import DataKind, DataSet, Examples, Layout, register_data_set
from dgl_jax.models import HeadKind, Network, register_head, register_network
from dgl_jax.tasks import Task, TaskInputs, TaskKind, register_task

SYMBOLS, LENGTH = 8, 16  # index SYMBOLS marks a hidden token


def draw(count: int, seed: int) -> Examples:
    """Generates random token sequences, int32 [N, T], and their labels, int32 [N, T]."""
    tokens = np.random.default_rng(seed).integers(0, SYMBOLS, (count, LENGTH), np.int32)
    return Examples(tokens, (tokens + np.pad(tokens, ((0, 0), (2, 0)))[:, :LENGTH]) % SYMBOLS)


def load(settings: DataSettings) -> DataSet:
    """Returns 4096 training and 500 test sequences."""
    return DataSet(
        "token_sums", tuple(f"sum {k}" for k in range(SYMBOLS)), draw(4096, 0), draw(500, 1)
    )


@dataclass(frozen=True)
class TokenLabels(Task):
    """Classification of tokens [T] with one label each.

    Attributes:
      hidden: share of the tokens that is hidden in training.
    """

    hidden: float = 0.0

    def train(self, key: Key[Array, ""], inputs: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Replaces random tokens by the symbol for hidden ones."""
        return jnp.where(jax.random.bernoulli(key, self.hidden, inputs.shape), SYMBOLS, inputs)


@dataclass(frozen=True)
class TokenOptions(TaskSettings):
    """Options of the task `token_labels`: the share of hidden tokens."""

    hidden: float = number(0.0, 0.0, 1.0)


def make_task(options: TokenOptions, inputs: TaskInputs) -> TokenLabels:
    """Returns the task; raises UserError if the data set has no label per token."""
    fits = len(inputs.example.shape) == 1 and inputs.label == inputs.example.shape
    inputs.require(fits, options.name, "tokens (T,) with one label each")
    return TokenLabels(inputs.example, inputs.label, options.hidden)


class Mix(nn.Module):
    """Residual block of a convolution over three tokens and a linear layer.

    The first block of the network also embeds the tokens.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Shaped[Array, "B T *C"], train: bool) -> Float[Array, "B T F"]:
        x = nn.Embed(SYMBOLS + 1, self.features, dtype=self.dtype)(x) if x.ndim == 2 else x
        y = nn.Conv(2 * self.features, (3,), dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(self.features, dtype=self.dtype)(nn.gelu(y))


class EachToken(nn.Module):
    """Head that applies a linear layer to every token; logits are float32."""

    num_classes: int
    dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], train: bool) -> Float[Array, "B T classes"]:
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


register_data_set(
    "token_sums", DataKind(load, layout=Layout((LENGTH,), "int32", (LENGTH,), SYMBOLS))
)
register_task("token_labels", TaskKind(make_task, TokenOptions))
register_network(
    "token_conv",
    lambda width, classes, dtype: Network((Mix(width, dtype),) * 4, EachToken(classes)),
)
register_head("each_token", HeadKind(EachToken))
