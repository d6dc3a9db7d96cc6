"""Group d: each switch of the configuration alone, in turns with the defaults in one process."""

from functools import partial
from typing import Any

import jax

from benchmarks.accelerator.measuring import cnn6, compare
from benchmarks.accelerator.rows import Figures, Job, Row, Size, Skipped
from dgl_jax.config import field_names

# Every pair is measured alone against the defaults.
SWITCHES: tuple[tuple[str, Any], ...] = (
    ("data.on_device", "on"),
    ("data.on_device", "off"),
    ("engine.steps_per_dispatch", 0),  # chosen by the engine
    ("engine.steps_per_dispatch", 1),
    ("engine.steps_per_dispatch", 8),
    ("engine.steps_per_dispatch", 32),
    ("optimizer.flat", True),
    ("engine.barrier", False),
    ("model.logits", "model"),
    ("model.pointwise", "dot"),
    ("model.ops", "joint"),
    ("engine.command_buffers", True),  # last: the one that may break the process
)
_LONGEST = ("engine.steps_per_dispatch", 32)


def rows(size: Size) -> list[Row]:
    """Returns the rows of this group."""
    usual, large = size.batches
    ranks = {("dgl", usual): 1, ("backprop", usual): 3, ("dgl", large): 4, ("backprop", large): 4}
    result = []
    for (method, batch), rank in ranks.items():
        for name, value in (("", None), *SWITCHES):
            setting = f"{name}={value}" if name else "defaults"
            result.append(
                Row(
                    f"{method}, batch {batch}: {setting}",
                    "d",
                    partial(_switched, method, batch, name, value),
                    cost=30,
                    process=f"switches {method} {batch}",
                    rank=rank,
                )
            )
    return result


def _switched(method: str, batch: int, name: str, value: Any, job: Job) -> Figures:
    if name and name not in field_names():
        raise Skipped("no such field")
    if (name, value) == _LONGEST and jax.default_backend() == "cpu":
        raise Skipped("loops of convolutions take too long on a CPU")
    baseline = cnn6(job.size, batch, method__name=method)
    changed = {name: value} if name else {}
    return compare(job, dict(baseline) | changed, baseline) | {"settings": str(changed)}
