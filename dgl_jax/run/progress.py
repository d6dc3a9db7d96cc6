"""Progress display: a bar on a terminal, log lines elsewhere."""

import contextlib
import datetime
import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from dgl_jax.run.writers import Scalars

_LOG = logging.getLogger(__name__)


class Progress(contextlib.AbstractContextManager):
    """Progress display: a bar with accuracies and ETA on a terminal, log lines elsewhere.

    Every call of `update` is shown, so the caller decides how often. The log lines have level INFO.

    Args:
      console: where to draw, by default standard error; it also tells if there is a terminal.
      clock: returns seconds.
      bar: False to log lines on a terminal as well.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        bar: bool = True,
    ):
        self._clock = clock
        self._console = console or Console(stderr=True, force_terminal=None if bar else False)
        self._marks: deque[tuple[float, int]] = deque()  # (time, step)
        self._total = self._step = self._advances = 0
        self._status: dict[str, str] = {}
        self._live: Live | None = None

    def start(self, total_steps: int, done: int = 0) -> None:
        """Starts the display of a run.

        Args:
          total_steps: updates per module at the end of the run.
          done: updates per module before this process, which do not count for speed and ETA.
        """
        self.close()
        self._total, self._step, self._advances = total_steps, done, 0
        # Long enough to average over evaluations and checkpoints.
        self._marks = deque([(self._clock(), done)], maxlen=64)
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=2
            )
            self._live.start()

    def update(self, step: int, scalars: Scalars) -> None:
        """Shows the current step and the metrics.

        Args:
          step: updates per module so far.
          scalars: metrics; accuracies, ages, rates and speed are shown, see `status`.
        """
        if self._marks and step > self._marks[-1][1]:
            self._marks.append((self._clock(), step))
            self._advances += 1
            if self._advances == 2:
                self._marks.popleft()  # the first interval includes the compilation
        self._step, texts = step, status(scalars)
        self._status |= texts
        if self._live:
            return self._live.refresh()
        epoch = [f"epoch {float(scalars['epoch']):.2f}"] if "epoch" in scalars else []
        _LOG.info(
            "%s", " | ".join([f"step {step}/{self._total}", *epoch, *texts.values(), self._left()])
        )

    def eta(self) -> float | None:
        """Estimates the seconds until the last step from the latest updates.

        Returns None before the second update, because the first one includes the compilation.
        """
        if self._advances < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return max(
            0.0, end + max(0, self._total - last) * (end - start) / (last - first) - self._clock()
        )

    def message(self, text: str) -> None:
        """Prints a line above the bar, or logs it if there is no terminal."""
        if self._console.is_terminal:
            self._console.print(Text(text))
        else:
            _LOG.info("%s", text)

    def close(self) -> None:
        """Stops the bar and leaves it on the screen; a second call does nothing."""
        if self._live:
            self._live.stop()
            self._live = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _left(self) -> str:
        return (
            "ETA -"
            if (eta := self.eta()) is None
            else f"ETA {datetime.timedelta(seconds=round(min(eta, 1e9)))}"
        )

    def _render(self) -> Group:
        """Draws the bar with the metrics below it, which are long for many modules."""
        row = Table.grid(Column(ratio=1), Column(no_wrap=True), expand=True, padding=(0, 1))
        row.add_row(
            ProgressBar(max(1, self._total), self._step),
            f"{self._step}/{self._total} {self._left()}",
        )
        return Group(
            row,
            Text(
                " | ".join(
                    self._status[kind]
                    for kind in (*_SHOWN, *_PER_MODULE, "speed")
                    if kind in self._status
                )
            ),
        )


_HEAD = re.compile(r"(train|validation|test)/(?:module_(\d+)|ensemble)/(accuracy|loss)")
# By kind: metrics of modules, and the text that shows them.
_PER_MODULE = {
    "age": (re.compile(r"replay/module_(\d+)/age"), "age {}", ".1f"),
    "rate": (re.compile(r"work/module_(\d+)/updates_per_second"), "{} updates/s", ".1f"),
    "gradient": (
        re.compile(r"diagnostics/module_(\d+)/gradient_squared"),
        "squared gradient {}",
        ".2g",
    ),
    "drift": (re.compile(r"diagnostics/module_(\d+)/mmd"), "drift {}", ".2g"),
}
_MODULES = re.compile(r"(replay|work|wire)/module_(\d+)/")
_SHOWN = {"train": "train", "validation": "val", "test": "test"}


class StderrHandler(logging.StreamHandler):
    """Log handler that looks up `sys.stderr` for every line.

    While a bar is drawn, rich replaces `sys.stderr` by a stream that prints above the bar.
    """

    @property
    def stream(self) -> Any:
        """Returns the current standard error stream."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        pass


def log_to_stderr(process: int | None = None) -> None:
    """Sends the log of the package to standard error, with the time of day.

    Only the command line calls this function: a library must not configure logging.

    Args:
      process: number of this process, which begins every line, if the run has several. The first
        one logs everything, the others warnings alone.
    """
    handler = StderrHandler()
    prefix = "" if process is None else f"[{process}] "
    handler.setFormatter(logging.Formatter(f"{prefix}%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("dgl_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if process else logging.INFO)
    for other in logging.getLogger().handlers:  # other libraries: warnings only
        other.setLevel(logging.WARNING)
        # Through these loggers Orbax logs the full traceback of errors that it raises anyway.
        other.addFilter(lambda record: record.name not in ("absl", "asyncio"))


def status(scalars: Scalars) -> dict[str, str]:
    """Returns short texts of the metrics to display.

    Args:
      scalars: metrics by name.

    Returns:
      Texts by kind: `{"train": "train 0.91 0.95", "validation": "val 0.90 (ensemble 0.95)",
      "test": "test loss 1.25 0.75" (if there is no accuracy),
      "age": ..., "rate": ..., "gradient": ..., "drift": ..., "speed": ...}`, without the kinds
      that have no metric.
    """
    # By split and metric.
    by_split: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for key, value in scalars.items():
        if match := _HEAD.fullmatch(key):
            split, module, metric = match.groups()
            text = f"{float(value):.2f}"
            by_split.setdefault(split, {}).setdefault(metric, []).append(
                (int(module), text) if module else (math.inf, f"(ensemble {text})")
            )
    # A module may have made no update since the last record: show a dash. Module k sends over the
    # wire to module k + 1.
    modules = {
        int(match[2]) + (match[1] == "wire") for key in scalars if (match := _MODULES.match(key))
    }
    texts = {}
    for split, title in _SHOWN.items():
        if split not in by_split:
            continue
        metric = "accuracy" if "accuracy" in by_split[split] else "loss"
        heads = by_split[split][metric]
        if split == "train":
            present = {k for k, _ in heads}
            heads += [(k, "-") for k in range(max(modules, default=-1) + 1) if k not in present]
        values = [text for _, text in sorted(heads)]
        texts[split] = " ".join([title if metric == "accuracy" else f"{title} loss", *values])
    for kind, (pattern, text, form) in _PER_MODULE.items():
        numbers = {
            int(match[1]): format(float(value), form)
            for key, value in scalars.items()
            if (match := pattern.fullmatch(key))
        }
        if numbers:
            # Module 0 has no messages to read, hence no age and no drift.
            padded = (numbers.get(k, "-") for k in range(max(numbers) + 1))
            texts[kind] = text.format(" ".join(padded))
    if "images_per_second" in scalars:
        texts["speed"] = f"{float(scalars['images_per_second']):,.0f} images/s"
    return texts
