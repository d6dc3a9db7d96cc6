"""Rows of the benchmark and their sizes; imports the standard library only."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, Any]


class Skipped(Exception):
    """Reason why a row has no figure."""


@dataclass(frozen=True)
class Size:
    """Sizes of networks and measurements.

    Attributes:
      name: full (an accelerator), small (a CPU) or smoke (tests of this benchmark).
      width: channels of the first block of the 6-layer CNN.
      modules: number of modules of the 6-layer CNN.
      batches: the usual and the large batch size.
      side: image size of the ImageNet networks in pixels.
      deep_width: channels of the first stage of the ImageNet networks.
      deep_batch: largest batch size that is tried for the ImageNet networks.
      matrix: rows and columns of the matrices whose product is timed.
      images: number of small training images.
      steps: updates of the runs that are compared bit for bit.
      seconds: length of a timed repeat.
      repeats: timed repeats.
      cost: factor of the rows' estimated times, which are those on an accelerator.
    """

    name: str
    width: int
    modules: int
    batches: tuple[int, int]
    side: int
    deep_width: int
    deep_batch: int
    matrix: int
    images: int
    steps: int
    seconds: float
    repeats: int
    cost: float


SIZES = {
    size.name: size
    for size in (
        Size("full", 128, 6, (128, 1024), 224, 64, 128, 8192, 50_000, 400, 1.0, 5, 1.0),
        Size("small", 4, 3, (16, 32), 32, 4, 4, 512, 2048, 60, 0.1, 3, 0.2),
        Size("smoke", 2, 2, (4, 8), 32, 2, 2, 64, 64, 20, 0.01, 2, 0.1),
    )
}


@dataclass
class Job:
    """Arguments of the function that measures a row.

    Attributes:
      size: sizes to measure at.
      folder: folder for files, shared by all rows.
      data_dir: the user's folder of images; "" without one.
      platform: platform of the first device, such as gpu.
      results: figures of the rows before, by name.
      deadline: monotonic time at which the row is stopped.
      shared: objects that rows of one process leave for each other.
    """

    size: Size
    folder: Path
    data_dir: str
    platform: str
    results: Mapping[str, Figures]
    deadline: float
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Returns the seconds until the row is stopped."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Row:
    """Row of the benchmark.

    Attributes:
      name: name of the row, unique in the benchmark.
      group: letter of the group, "a" to "e".
      measure: computes the figures of the row in a process of the benchmark.
      cost: estimated seconds on an accelerator, with compilation.
      process: rows with the same name here, one after the other, share a process.
      rank: rows of rank 0 run first, in the order of the groups, then rows of rank 1, and so on.
      host: True if the process keeps JAX on the CPU, because another process or library needs the
        accelerator's memory.
    """

    name: str
    group: str
    measure: Callable[[Job], Figures]
    cost: float
    process: str
    rank: int = 0
    host: bool = False

    def limit(self, size: Size) -> float:
        """Returns the seconds after which the row is stopped even if time is left."""
        return max(60.0, 5 * self.cost * size.cost)


class Answer(NamedTuple):
    """Result of a row: figures, or the reason why there are none."""

    figures: Figures
    reason: str = ""
