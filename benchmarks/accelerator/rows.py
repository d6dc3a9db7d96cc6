"""Rows of the benchmark and their sizes; imports the standard library only."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
      head: head of its modules.
      batches: the usual and the large batch size.
      images: number of its training images.
      side: image size of the ImageNet networks in pixels.
      deep_width: channels of the first stage of the ImageNet networks.
      deep_batch: largest batch size that is tried for the ImageNet networks.
      matrix: rows and columns of the matrices whose product is timed.
      steps: updates of the runs that are compared bit for bit.
      seconds: length of a timed repeat.
      repeats: timed repeats.
      late: rank of the first rows of the large batch and of the ImageNet networks; see `Row`.
      cost: factor of the rows' estimated times, which are for an accelerator.
    """

    name: str
    width: int
    modules: int
    head: str
    batches: tuple[int, int]
    images: int
    side: int
    deep_width: int
    deep_batch: int
    matrix: int
    steps: int
    seconds: float
    repeats: int
    late: int
    cost: float


FULL = Size(
    name="full",
    width=128,
    modules=6,
    head="mlp_sr",
    batches=(128, 1024),
    images=50_000,
    side=224,
    deep_width=64,
    deep_batch=128,
    matrix=8192,
    steps=400,
    seconds=1.0,
    repeats=5,
    late=0,
    cost=1.0,
)
# Most of the time of the smaller sizes is compilation, which deep networks and large heads need.
SMALL = replace(
    FULL,
    name="small",
    width=4,
    modules=2,
    head="linear",
    batches=(16, 32),
    images=2048,
    side=32,
    deep_width=4,
    deep_batch=4,
    matrix=512,
    steps=60,
    seconds=0.1,
    repeats=3,
    late=2,
    cost=0.2,
)
SMOKE = replace(
    SMALL,
    name="smoke",
    width=2,
    batches=(4, 8),
    images=64,
    matrix=64,
    steps=20,
    seconds=0.01,
    repeats=2,
    cost=0.1,
)
SIZES = {size.name: size for size in (FULL, SMALL, SMOKE)}


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
      patient: True if the row may take all the time that is left.
    """

    name: str
    group: str
    measure: Callable[[Job], Figures]
    cost: float
    process: str
    rank: int = 0
    host: bool = False
    patient: bool = False

    def limit(self, size: Size) -> float:
        """Returns the seconds after which the row is stopped even if time is left."""
        return float("inf") if self.patient else max(120.0, 5 * self.cost * size.cost)


class Answer(NamedTuple):
    """Result of a row: figures, or the reason why there are none."""

    figures: Figures
    reason: str = ""
