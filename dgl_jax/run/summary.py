"""Summary of a finished run, stored as `summary.json`."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgl_jax import __version__

_LOG = logging.getLogger(__name__)

_ASYNCHRONOUS = ("staleness", "reuse", "ring_bytes")


@dataclass(frozen=True)
class Summary:
    """Content of `summary.json`.

    Accuracies are fractions, and None for heads that were not trained. Lists have one entry per
    hop, except for `modules`, `staleness`, `reuse` and `ring_bytes`, which have one per module.

    Attributes:
      engine: name of the engine.
      method: name of the training method.
      config_hash: hash of the settings.
      seed: seed of the run.
      epochs: number of epochs trained.
      steps: updates per module.
      modules: name, parameter count, device ids, update count and accuracies of each module.
      ensemble_accuracy: test accuracy of all heads together.
      images_per_second: training throughput, without compilation, evaluation and checkpoints.
      wire_bytes_per_image: bytes per image that cross each hop, in both directions together.
      raw_bytes_per_image: the same without a codec.
      wire: "measured" if messages crossed devices, otherwise "simulated".
      wire_bytes_down_per_image: the part of `wire_bytes_per_image` that travels down; empty if
        nothing does.
      codebook_share: share of the codebooks in the bytes on the wire.
      codec_error: newest relative reconstruction error of the codec.
      wall_seconds: duration of the run, including the parts before a resume.
      dataset: name of the data set.
      versions: library versions, see `versions`.
      cpu_threads: size of XLA's thread pool, which decides how sums are rounded; None if unknown
        or on an accelerator.
      peak_memory_bytes: most bytes that were ever in use, by device such as "gpu:0"; None if no
        device tells. Like the next field it is a peak of the process that ended the run.
      peak_host_bytes: most bytes of host memory that the process ever held; None if unknown.
      staleness: asynchronous engines only: mean age of the messages read, in updates of the
        producing module.
      reuse: asynchronous engines only: reads per message.
      ring_bytes: asynchronous engines only: bytes held by the replay ring at each module's
        entrance, codebooks included.
    """

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
    codebook_share: list[float]
    codec_error: list[float]
    wall_seconds: float
    dataset: str
    versions: dict[str, str]
    cpu_threads: int | None = None
    wire_bytes_down_per_image: list[float] = field(default_factory=list)
    peak_memory_bytes: dict[str, int | None] | None = None
    peak_host_bytes: int | None = None
    staleness: list[float] | None = None
    reuse: list[float] | None = None
    ring_bytes: list[int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, without the asynchronous fields if the engine was synchronous."""
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if v is not None or k not in _ASYNCHRONOUS
        }


def read_summary(workdir: Path) -> Summary | None:
    """Returns the content of `summary.json`; None if it is missing or cannot be read."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = Summary(**json.loads(path.read_text(encoding="utf-8")))
        modules = summary.modules
        numbers = summary.epochs, summary.steps, *(module["updates"] for module in modules)
        accuracies = summary.ensemble_accuracy, *(module["test_accuracy"] for module in modules)
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if modules and all(map(_is_finite, (*numbers, *known))):
            return summary
        reason = "a field that must be a number is not one" if modules else "it has no modules"
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = str(error)
    _LOG.warning("%s cannot be read (%s): testing the run again", path, reason.splitlines()[0])
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# Libraries that influence the numerical results of a run, by their names on PyPI.
_RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of this package and of the libraries that influence numerical results.

    Keys are names on PyPI. The version of a library without package metadata (a source tree on the
    path) is its `__version__`, or "unknown".
    """
    return {"dgl_jax": __version__} | {name: _version(name) for name in _RECORDED}


def _version(name: str) -> str:
    try:
        version = importlib.metadata.version(name)
    except Exception:  # not installed, or damaged metadata, which raise many kinds of exceptions
        version = None
    return str(
        version
        or getattr(sys.modules.get(name.replace("-", ".")), "__version__", None)
        or "unknown"
    )
