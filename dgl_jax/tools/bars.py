"""Bars of the runs of a sweep on a terminal; nothing is drawn elsewhere."""

import contextlib
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from dgl_jax.tools.estimate import Meter, spoken


class Bars(contextlib.AbstractContextManager):
    """Display of one bar per running row and a line for the whole sweep.

    Args:
      console: where to draw, by default standard error; it also tells if there is a terminal.
    """

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._meters: Sequence[Meter] = ()
        self._line = ""
        self._live: Live | None = None

    def __enter__(self) -> "Bars":
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._meters = ()
            self._live.stop()
            self._live = None

    @property
    def drawn(self) -> bool:
        """Returns True if there is a terminal, so that progress is worth reading."""
        return self._live is not None

    def show(self, meters: Sequence[Meter], line: str) -> None:
        """Draws the bars at the next refresh.

        Args:
          meters: progress of the running rows.
          line: text below the bars.
        """
        self._meters, self._line = meters, line

    def _render(self) -> Group:
        table = Table.grid(
            Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), expand=True, padding=(0, 1)
        )
        for meter in self._meters:
            total = meter.total
            texts = [f"{meter.step}/{total}"] if total else ["starting"]
            if meter.rate is not None:
                texts.append(f"{meter.rate:.3g} steps/s")
            if (seconds := meter.seconds()) is not None:
                texts.append(f"{spoken(seconds)} left")
            bar = ProgressBar(max(1, total or 1), meter.step if total else 0)
            table.add_row(Text(meter.row.name), bar, " ".join(texts))
        return Group(table, Text(self._line))
