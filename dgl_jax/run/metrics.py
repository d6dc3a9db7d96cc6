"""Metrics are device scalars until somebody needs them: one function reads them, late, many at a time."""

import math
from typing import Any

import jax

from dgl_jax.engines import Report
from dgl_jax.errors import UserError


def read(tree: Any) -> Any:
    """Device arrays to host values, blocking until they are computed; None for arrays that live in another process."""
    return jax.device_get(jax.tree.map(lambda x: x if _is_here(x) else None, tree))


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


class Window:
    """The training metrics since the last record; part of a checkpoint, so that a resumed record is the same."""

    def __init__(self, values: list[Any] | None = None):
        self._values = (
            values or []
        )  # of each report: [updates of each module, metrics of each module]
        self._unread: list[tuple[list[int], tuple[dict[str, Any], ...]]] = []

    def add(self, report: Report) -> None:
        """Takes a report's metrics without reading them."""
        self._unread.append((list(report.updates), report.metrics))

    def values(self) -> list[Any]:
        """[updates, metrics as [sum, count]] of every report in the window, oldest first, as JSON values, read in one go.

        Raises:
          UserError: a loss is not finite; names the module and the step.
        """
        metrics = read([of_modules for _, of_modules in self._unread])
        for (updates, _), of_modules in zip(self._unread, metrics):
            self._values.append(
                [
                    updates,
                    [{name: _pair(v) for name, v in of_module.items()} for of_module in of_modules],
                ]
            )
        self._unread = []
        for updates, of_modules in self._values:
            for k, of_module in enumerate(of_modules):
                total, count = of_module.get("loss", (0.0, 1.0))
                if not math.isfinite(total):
                    raise diverged(
                        f"the loss of module_{k} is {total / count} at step {updates[k]}"
                    )
        return self._values

    def close(self) -> dict[str, float]:
        """Means over the window as `train/module_0/loss` and so on; empties it."""
        pairs: dict[str, list[tuple[float, float]]] = {}
        for _, of_modules in self.values():
            for k, of_module in enumerate(of_modules):
                for name, value in of_module.items():
                    pairs.setdefault(f"train/module_{k}/{name}", []).append(value)
        self._values = []
        return {
            name: math.fsum(s for s, _ in found) / math.fsum(n for _, n in found)
            for name, found in pairs.items()
        }


def _pair(value: Any) -> list[float]:
    """Returns [sum, count] of a metric, which is such a pair or a scalar."""
    return [float(v) for v in value] if isinstance(value, tuple | list) else [float(value), 1.0]


def diverged(what: str) -> UserError:
    """The error of a run whose numbers are no longer finite."""
    advice = "a smaller config.optimizer.learning_rate or a warm-up may help (in another --workdir once this holds a checkpoint)"
    return UserError(f"training diverged: {what}; {advice}")
