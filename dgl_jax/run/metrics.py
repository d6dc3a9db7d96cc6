"""Training metrics, which stay on the devices until they are written; one transfer reads many."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dgl_jax.engines import Report, world
from dgl_jax.engines.transfer import is_here
from dgl_jax.errors import UserError


def read(tree: Any) -> Any:
    """Returns a pytree of device arrays as host values; blocks until they are computed.

    Arrays that live in another process become None.
    """
    return jax.device_get(jax.tree.map(lambda x: x if is_here(x) else None, tree))


class Window:
    """Training metrics since the last record.

    The window is part of every checkpoint, so that the first record of a resumed run covers the
    same steps as in an uninterrupted run.
    """

    def __init__(self, values: list[Any] | None = None):
        # One entry per report: [updates per module, metrics per module].
        self._values = values or []
        self._unread: list[tuple[list[int], tuple[dict[str, Any], ...]]] = []

    def add(self, report: Report) -> None:
        """Stores the metrics of a report without reading them from the devices."""
        self._unread.append((list(report.updates), report.metrics))

    def values(self) -> list[Any]:
        """Returns the content of the window as JSON values, read from the devices in one transfer.

        Returns:
          One entry `[updates, metrics]` per report, oldest first, with one dict of metrics per
          module whose values are `[sum, count]`.

        Raises:
          UserError: a loss is not finite; the message names the module and the step.
        """
        reports = read([metrics for _, metrics in self._unread])
        # By report and module; each process has the metrics of the modules on its devices.
        pairs = [
            [{name: _pair(v) for name, v in values.items()} for values in metrics]
            for metrics in reports
        ]
        exchanged = world.exchange(pairs)
        for (updates, _), *rows in zip(self._unread, *exchanged, strict=True):
            self._values.append([updates, [next(filter(None, r), {}) for r in zip(*rows)]])
        self._unread = []
        for updates, metrics in self._values:
            for k, values in enumerate(metrics):
                total, count = values.get("loss", (0.0, 1.0))
                if not math.isfinite(total):
                    raise diverged(
                        f"the loss of module_{k} is {total / count} at step {updates[k]}"
                    )
        return self._values

    def close(self) -> dict[str, float]:
        """Returns the means over the window as `train/module_0/loss`, ..., and empties the window.

        Metrics whose counts are all 0 are left out.

        Raises:
          UserError: a loss is not finite; the message names the module and the step.
        """
        pairs: dict[str, list[tuple[float, float]]] = {}
        for _, metrics in self.values():
            for k, values in enumerate(metrics):
                for name, value in values.items():
                    pairs.setdefault(f"train/module_{k}/{name}", []).append(value)
        self._values = []
        # A metric may have no examples in a window, such as the error of a first prediction.
        return {
            name: math.fsum(s for s, _ in window) / count
            for name, window in pairs.items()
            if (count := math.fsum(n for _, n in window))
        }


def early_values(early: Mapping[int, Mapping[int, Any]]) -> list[Any]:
    """Returns the metrics of unfinished batches (`Synchronous.early`) as JSON values."""
    rows = [
        [batch, k, {name: _pair(value) for name, value in values.items()}]
        for batch, modules in read(dict(early)).items()
        for k, values in modules.items()
    ]
    # Every process has a row for the same batches and modules; it is empty for modules elsewhere.
    return [
        max(copies, key=lambda row: len(row[2]))
        for copies in zip(*world.exchange(rows), strict=True)
    ]


def early_metrics(rows: Iterable[Any]) -> dict[int, dict[int, Any]]:
    """Returns the metrics by batch and module; the inverse of `early_values`."""
    early: dict[int, dict[int, Any]] = {}
    for batch, k, values in rows:
        early.setdefault(batch, {})[k] = values
    return early


def _pair(value: Any) -> list[float]:
    """Returns `[sum, count]` for a metric that is such a pair or a scalar."""
    return [float(v) for v in value] if isinstance(value, tuple | list) else [float(value), 1.0]


def diverged(reason: str) -> UserError:
    """Returns the error for a run whose values are no longer finite."""
    advice = (
        "a smaller config.optimizer.learning_rate or a warm-up may help "
        "(in another --workdir if this one holds a checkpoint)"
    )
    return UserError(f"training diverged: {reason}; {advice}")
