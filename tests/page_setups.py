"""Set-ups of the code in the documentation, by the name that a page gives in a mark.

A set-up is a generator: it yields the names that the block is run with, and checks the names that
the block leaves behind. It is called with the code of the block, in an empty directory.
"""

import ast
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np


def plain_loop(code: str) -> Iterator[dict[str, Any]]:
    """Provides one batch of 8x8 images; the loop makes one update per batch, and learns."""
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    assert len([s for s in statements if not isinstance(s, ast.Import | ast.ImportFrom)]) <= 12
    random = np.random.default_rng(0)
    labels = jnp.asarray(random.integers(0, 10, 64), jnp.int32)
    images = jnp.asarray(random.normal(size=(64, 8, 8, 1)), jnp.float32)
    first: dict[str, Any] = {"batches": [(images, labels)]}
    yield first
    assert [int(state.updates) for state in first["states"]] == [1, 1]
    again: dict[str, Any] = {"batches": [(images, labels)] * 30}
    exec(code, again)
    assert again["metrics"]["loss"][0] < 0.5 * first["metrics"]["loss"][0]  # it learns the batch


def short_training(code: str) -> Iterator[dict[str, Any]]:
    """Lets `train_and_evaluate` stop after two updates, whatever the configuration asks for."""
    from dgl_jax import train

    whole = train.train_and_evaluate

    def shortened(config: Any, *arguments: Any, **named: Any) -> Any:
        config.train.steps = 2
        return whole(config, *arguments, **named)

    train.train_and_evaluate = shortened
    names: dict[str, Any] = {}
    yield names
    train.train_and_evaluate = whole
    assert all(module["updates"] == 2 for module in names["summary"].modules)


SETUPS = {setup.__name__: setup for setup in (plain_loop, short_training)}
