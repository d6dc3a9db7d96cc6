"""Trains the rows of a sweep, each in a process of its own, several at the same time.

    rows -> checks -> estimate -> [ job 0: row 0, row 2, ... ]
                                  [ job 1: row 1, row 3, ... ] -> sweep.json

A row is an ordinary run in a folder of its own, so a second sweep skips the rows that are finished
and resumes the others from their checkpoints.
"""

import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgl_jax.errors import UserError, readable
from dgl_jax.run.checkpoint_folder import check_path
from dgl_jax.run.signals import Interruption, interrupted_by_signals
from dgl_jax.run.workdir import is_locked, lock
from dgl_jax.run.writers import check_writable
from dgl_jax.tools.bars import Bars
from dgl_jax.tools.estimate import BUDGET, Costs, Meter, spoken, store_config
from dgl_jax.tools.jobs import Job, backend, shares
from dgl_jax.tools.rows import Pairs, Row, check_given, make_rows, write

_LOG = logging.getLogger(__name__)
# Exit codes of a run that a signal has stopped, before and after it can write checkpoints.
_STOPPED = tuple(code for s in (signal.SIGINT, signal.SIGTERM) for code in (128 + s, -s))
_PAUSE = 0.2  # seconds between two looks at the processes
_LOOKS = 10  # looks between two looks at the progress of the runs


@dataclass(frozen=True)
class Result:
    """Outcome of a sweep.

    Attributes:
      rows: all rows in their order.
      signum: signal that stopped the sweep; None if none did.
    """

    rows: tuple[Row, ...]
    signum: int | None = None

    def names(self) -> dict[str, list[str]]:
        """Returns the names of the rows by their state."""
        states = ("finished", "failed", "stopped", "waiting")
        return {state: [r.name for r in self.rows if r.state == state] for state in states}

    @property
    def exit_code(self) -> int:
        """Returns 128 + signal if a signal stopped the sweep, 1 if a row failed, else 0."""
        states = {row.state for row in self.rows}
        if self.signum and states & {"stopped", "waiting"}:
            return 128 + self.signum
        return int("failed" in states)


def sweep(
    rows: Pairs,
    workdir: str | Path,
    jobs: int | None = None,
    *,
    estimate: bool = True,
    name: str = "",
    flags: Sequence[str] = (),
    given: Iterable[str] = (),
) -> Result:
    """Trains all rows that are not finished, and continues past rows that fail.

    SIGINT and SIGTERM stop all runs, which write their checkpoints first; a second one ends them at
    once. If this process is killed, the runs stop in the same way.

    Args:
      rows: pairs of a name and a complete configuration. A row is trained in the folder of its name
        inside `workdir`.
      workdir: folder of the sweep, created if missing.
      jobs: number of rows that are trained at the same time, each with its part of the GPUs or
        processors; by default one per GPU, and 1 on other platforms.
      estimate: if True, a few steps of each kind of row are measured before the start, unless a
        finished row tells their time.
      name: name of the sweep in `sweep.json`.
      flags: flags of the command line for every run, such as `--cpu_devices=2`.
      given: names of the fields that the user has changed in all rows.

    Returns:
      The rows with their states.

    Raises:
      UserError: the rows, the folder or the number of jobs are unusable; nothing was written.
    """
    workdir = Path(workdir)
    check_path(workdir, "--workdir")
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir}: holds a run; a sweep needs a folder of its own")
    table = make_rows(rows, workdir)
    check_given(table, given)
    check_writable(workdir, f"--workdir={workdir}", folder=True)
    parts = shares(*backend(), jobs)
    for line in dict.fromkeys(line for row in table for line in row.settings.ignored.values()):
        _LOG.warning("%s", line)
    with (
        lock(workdir, "sweep"),
        tempfile.TemporaryDirectory() as configs,
        interrupted_by_signals() as interruption,
    ):

        def launch(row: Row, slot: int) -> Job:
            config = store_config(row.settings, Path(configs, str(table.index(row))))
            arguments = ["--mode=train", config, f"--workdir={row.folder}", *flags]
            return Job(arguments, parts[slot], row.folder / "log.txt")

        costs = Costs()
        announce(table, len(parts), costs)
        if estimate:
            measure(
                table, costs, interruption, lambda *child: Job(child[0], parts[0], child[1]), flags
            )
        if not interruption.came():
            announce_needs(table, len(parts), costs, workdir)
        loop = Loop(
            table,
            len(parts),
            launch,
            costs,
            interruption,
            lambda: write(workdir / "sweep.json", name, table),
        )
        loop.run()
    result = Result(tuple(table), interruption.signum)
    conclude(result)
    return result


def announce(rows: Sequence[Row], jobs: int, costs: Costs) -> None:
    """Logs how many rows are finished, and takes their costs."""
    for row in rows:
        if row.state == "finished":
            costs.learn(row)
    left = [row for row in rows if row.state != "finished"]
    resumed = sum(row.resumes for row in left)
    _LOG.info(
        "%d runs: %d finished, %d to resume, %d to start; %d at the same time",
        len(rows),
        len(rows) - len(left),
        resumed,
        len(left) - resumed,
        jobs,
    )


def measure(
    rows: Sequence[Row],
    costs: Costs,
    interruption: Interruption,
    start: Callable[[list[str], Path], Job],
    flags: Sequence[str] = (),
    pause: Callable[[], None] = lambda: time.sleep(_PAUSE),
) -> None:
    """Measures some steps of each kind of row whose costs are unknown.

    Args:
      rows: all rows.
      costs: receives the results.
      interruption: tells if a signal asks to stop.
      start: starts a child process with given flags and log file.
      flags: flags of every child process.
      pause: waits a moment.
    """

    def run(arguments: list[str], log: Path) -> Job:
        job = start(arguments, log)
        try:
            while job.poll() is None:
                if interruption.came():
                    job.kill()
                pause()
        finally:
            job.kill()
        return job

    kinds = costs.unknown([row for row in rows if row.state != "finished"])
    begin = time.monotonic()
    for count, row in enumerate(kinds):
        if interruption.came():
            return
        if time.monotonic() - begin > BUDGET:
            _LOG.info("%d more kinds of runs are not measured", len(kinds) - count)
            return
        _LOG.info("measuring some steps of %s (--noestimate skips this)", row.name)
        error = costs.measure(row, flags, run)
        if error and not interruption.came():
            _LOG.warning("%s: cannot be measured: %s", row.name, error)


def announce_needs(rows: Sequence[Row], jobs: int, costs: Costs, workdir: Path) -> None:
    """Logs the estimated time and disk space, and warns if the disk has too little."""
    left = [row for row in rows if row.state != "finished"]
    seconds, size = costs.seconds(left, jobs), costs.disk(left)
    free = shutil.disk_usage(workdir).free
    if left:
        _LOG.info(
            "estimated time: %s; checkpoints: %s, %s free",
            "unknown" if seconds is None else f"about {spoken(seconds)}",
            "unknown" if size is None else f"at most {readable(size)}",
            readable(free),
        )
    if size is not None and size > free:
        _LOG.warning(
            "--workdir=%s: the checkpoints may need %s, but only %s is free; free some space, or "
            "set a smaller checkpoint.keep",
            workdir,
            readable(size),
            readable(free),
        )


def conclude(result: Result) -> None:
    """Logs which rows failed or were stopped."""
    names = result.names()
    for row in result.rows:
        if row.state == "failed":
            _LOG.error("%s failed: %s (see %s)", row.name, row.error, row.folder / "log.txt")
    _LOG.info("%d of %d runs are finished", len(names["finished"]), len(result.rows))
    if result.signum and result.exit_code > 1:
        _LOG.info(
            "%s: stopped; run the same command again to continue",
            signal.Signals(result.signum).name,
        )


@dataclass
class _Running:
    """A row that is being trained."""

    row: Row
    job: Job
    meter: Meter
    since: float  # Unix seconds


class Loop:
    """Scheduler that keeps a number of jobs busy until no row is left.

    Args:
      rows: all rows; those in state "waiting" are trained in their order.
      jobs: number of rows at the same time.
      launch: starts a row in one of the jobs 0 to `jobs` - 1.
      costs: learns from every finished row.
      interruption: tells if a signal asks to stop.
      save: called whenever a row has changed its state.
      bars: display; by default on standard error.
      pause: waits a moment.
      locked: returns True if another process trains in a folder.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        jobs: int,
        launch: Callable[[Row, int], Job],
        costs: Costs,
        interruption: Interruption,
        save: Callable[[], None],
        *,
        bars: Bars | None = None,
        pause: Callable[[], None] = lambda: time.sleep(_PAUSE),
        locked: Callable[[Path], bool] = is_locked,
    ):
        self._rows, self._jobs, self._launch, self._costs = rows, jobs, launch, costs
        self._interruption, self._save, self._pause = interruption, save, pause
        self._bars, self._locked = bars or Bars(), locked
        self._waiting = [row for row in rows if row.state == "waiting"]
        self._running: dict[int, _Running] = {}  # by job
        self._stopping = False
        self._blocked: set[str] = set()  # rows reported as trained by another process

    def run(self) -> None:
        """Trains the rows until all have ended, or until the running ones have been stopped."""
        self._save()
        looks = 0
        try:
            with self._bars:
                while self._running or (self._waiting and not self._interruption.came()):
                    self._stop_if_asked()
                    self._start()
                    self._collect()
                    if looks % _LOOKS == 0:
                        self._show()
                    looks += 1
                    self._pause()
        except KeyboardInterrupt:  # a second signal
            for running in self._running.values():
                running.job.kill()
                running.row.state = "stopped"
        finally:
            for running in self._running.values():
                if running.job.poll() is None:
                    running.job.stop()
            self._save()

    def _stop_if_asked(self) -> None:
        if self._interruption.came() and not self._stopping:
            self._stopping = True
            names = ", ".join(running.row.name for running in self._running.values())
            _LOG.info("waiting for the checkpoints of %s", names)
            for running in self._running.values():
                running.job.stop()

    def _start(self) -> None:
        for slot in range(self._jobs):
            if slot in self._running or self._interruption.came():
                continue
            row = next((row for row in self._waiting if not self._locked(row.folder)), None)
            if row is None:
                for row in self._waiting:
                    if row.name not in self._blocked:
                        self._blocked.add(row.name)
                        _LOG.info("%s: waits for the end of another training there", row.name)
                return
            self._waiting.remove(row)
            row.state, row.error, row.exit_code, row.seconds = "running", None, None, None
            since = time.time()
            self._running[slot] = _Running(row, self._launch(row, slot), Meter(row), since)
            _LOG.info("%s: %s", row.name, "resumed" if row.resumes else "started")
            self._save()

    def _collect(self) -> None:
        for slot, running in list(self._running.items()):
            code = running.job.poll()
            if code is None:
                continue
            row, job = running.row, running.job
            row.exit_code, row.seconds = code, job.seconds()
            if code == 0:
                row.state = "finished"
                self._costs.learn(row)
            elif self._interruption.came() and code in _STOPPED:
                row.state = "stopped"
            else:
                row.state, row.error = "failed", job.error()
            del self._running[slot]
            self._save()
            if code == 0:
                parts = [f"finished in {spoken(row.seconds)}", row.outcome(), self._left()]
                _LOG.info("%s: %s", row.name, "; ".join(part for part in parts if part))
            else:
                _LOG.info("%s: %s", row.name, row.error or row.state)
            self._show()

    def _show(self) -> None:
        meters = []
        for running in self._running.values():
            meter = running.meter
            meter.read(running.since)
            meters.append(meter)
            if meter.rate:
                self._costs.observe(running.row, 1 / meter.rate, meter.steps_per_epoch)
        self._bars.show(meters, self._left())

    def _left(self) -> str:
        done = sum(row.state == "finished" for row in self._rows)
        rows = [*self._waiting, *(running.row for running in self._running.values())]
        seconds = self._costs.seconds(rows, self._jobs) if rows else None
        left = f", about {spoken(seconds)} left" if seconds is not None else ""
        return f"{done} of {len(self._rows)} runs finished{left}"
