"""What a finished run says of itself in `summary.json`."""

import dataclasses
import importlib.util
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgl_jax import __version__

_LOG = logging.getLogger(__name__)


_ASYNCHRONOUS = ("staleness", "reuse", "ring_bytes")


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds; accuracies are fractions, null for heads that were not trained."""

    engine: str
    method: str
    config_hash: str
    seed: int
    epochs: float
    steps: int
    modules: list[dict[str, Any]]
    ensemble_accuracy: float | None
    images_per_second: float | None
    wire_bytes_per_image: list[float]
    raw_bytes_per_image: list[float]
    wire: str
    codebook_share: list[float]  # of the bytes on the wire
    codec_error: list[float]
    wall_seconds: float
    dataset: str
    versions: dict[str, str]
    cpu_threads: int | None = (
        None  # of XLA's pool, which decide how sums are rounded; None: of an accelerator, or unknown
    )
    staleness: list[float] | None = (
        None  # asynchronous engines: mean age of the packets read, in updates of their producer
    )
    reuse: list[float] | None = None  # and reads a packet, one entry a module
    ring_bytes: list[int] | None = (
        None  # held by the ring at each module's entrance, codebooks included
    )

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it: what only asynchronous engines have is left out elsewhere."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if v is not None or k not in _ASYNCHRONOUS
        }


def read_summary(workdir: Path) -> Summary | None:
    """Reads `summary.json`; one that cannot be read counts as none."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = Summary(**json.loads(path.read_text(encoding="utf-8")))
        numbers = (
            summary.epochs,
            summary.steps,
            *(module["updates"] for module in summary.modules),
        )
        if all(isinstance(number, int | float) for number in numbers):
            return summary
        reason = "its numbers are none"
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error)
    _LOG.warning("%s cannot be read (%s): the run is tested again", path, reason.splitlines()[0])
    return None


# Those that decide the numbers of a run, by their names in pip.
_RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the version of this package and of each library that decides a run's numbers, by their names in pip.

    A library without metadata (a source tree on the path) answers with its `__version__`, or as "unknown".
    """
    return {"dgl_jax": __version__} | {name: _version(name) for name in _RECORDED}


def _version(name: str) -> str:
    try:
        found = importlib.metadata.version(name)
    except Exception:  # not installed, or its metadata are damaged, in one of many ways
        found = None
    return str(
        found or getattr(sys.modules.get(name.replace("-", ".")), "__version__", None) or "unknown"
    )
