"""The README's snippets, run as they stand."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from runs import small_config

from dgl_jax.export import export_run
from dgl_jax.train import train_and_evaluate

README = Path(__file__).parent.parent / "README.md"


def snippet(word: str) -> str:
    """The Python block that holds the word."""
    (found,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
        if word in block
    ]
    return found


@pytest.mark.slow
def test_two_modules_in_a_plain_loop():
    random = np.random.default_rng(0)
    labels = jnp.asarray(random.integers(0, 10, 64), jnp.int32)
    images = jnp.asarray(random.normal(size=(64, 8, 8, 1)), jnp.float32)
    code = snippet("local_step")
    lines = [
        line
        for line in code.splitlines()
        if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 12
    first: dict = {"batches": [(images, labels)]}
    exec(code, first)
    assert [int(state.updates) for state in first["states"]] == [1, 1]
    again: dict = {"batches": [(images, labels)] * 30}
    exec(code, again)
    assert again["metrics"]["loss"][0] < 0.5 * first["metrics"]["loss"][0]  # it learns the batch


@pytest.mark.slow
def test_an_export_is_read_back(tmp_path, monkeypatch):
    workdir = tmp_path / "runs" / "digits"
    train_and_evaluate(small_config(train__steps=1), workdir)
    export_run(workdir)
    monkeypatch.chdir(tmp_path)
    names: dict = {"images": np.zeros((3, 8, 8, 3), np.uint8)}
    exec(snippet("load_exported"), names)
    assert len(names["logits"]) == 2
    assert len(names["labels"]) == 3
    assert set(names["labels"]) <= {f"pattern_{k}" for k in range(10)}


@pytest.mark.slow
def test_the_quantiser_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 4, 16)), jnp.float32)
    names: dict = {"x": x}
    exec(snippet("vq.encode"), names)
    assert names["codes"].shape == (16, 4, 4, 2)
    assert names["codes"].dtype == jnp.uint8
    assert names["restored"].shape == x.shape
    assert set(names["health"]) == {"perplexity", "dead", "skipped"}
