"""The training run: the only room that knows all rooms."""

import dataclasses
import fcntl
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dgl_jax.checkpoint import Checkpoints, all_finite, is_disk_full
from dgl_jax.engines import EngineState, updates_of
from dgl_jax.errors import UserError
from dgl_jax.evaluate import Evaluator
from dgl_jax.experiment import Experiment, abstract_states, borrow_weights, load_trained, make_experiment
from dgl_jax.metrics import Window, diverged
from dgl_jax.module import count_parameters
from dgl_jax.settings import Settings, differences, make_settings
from dgl_jax.writers import JsonLinesWriter, MultiWriter, Progress, TensorBoardWriter, truncate

_LOG = logging.getLogger(__name__)

_VERSIONS = ("dgl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds; accuracies are fractions, null for heads that were not trained."""

    engine: str
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
    codec_error: list[float]
    wall_seconds: float
    dataset: str
    versions: dict[str, str]
    staleness: list[float] | None = None  # asynchronous engines: mean age of the packets read, in updates of their producer
    reuse: list[float] | None = None  # and reads a packet, one entry a module

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it: what only asynchronous engines have is left out elsewhere."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None or k not in ("staleness", "reuse")}


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint is written."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: stopped at step {step}; the same line goes on from there")
        self.signum = signum


def train_and_evaluate(
    config: Mapping[str, Any] | ConfigDict | Settings, workdir: str | Path, init_from: str | Path | None = None
) -> Summary:
    """Trains the configured run in `workdir`, or goes on with the one that is there, and tests it at the end.

    Args:
      config: see `settings.py`.
      workdir: made where missing; afterwards holds config.json, metrics.jsonl, summary.json, checkpoints/ and plots/.
      init_from: workdir of another run of the same network, whose newest weights this one starts from.

    Raises:
      UserError: a mistake the user can correct, or a run that diverged.
      Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    settings = config if isinstance(config, Settings) else make_settings(config)
    workdir = Path(workdir)
    _check_workdir(workdir, settings)
    done = _finished(workdir, settings)
    if done:
        _LOG.info("this run is finished: %s/summary.json", workdir)
        return done
    experiment = make_experiment(settings)
    other = load_trained(Path(init_from)) if init_from else None
    try:
        with _lock(workdir), _interruption() as interruption:
            run = _Run(experiment, workdir, interruption)
            try:
                return run.run(other)
            finally:
                run.close()
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"{workdir}: the disk is full; free some space and run the same line again") from error
        raise


class _Run:
    """One call of `train_and_evaluate` past the checks: holds what its parts share."""

    def __init__(self, experiment: Experiment, workdir: Path, interruption: "_Interruption"):
        self.experiment, self.settings, self.workdir = experiment, experiment.settings, workdir
        self.engine, self.source = experiment.engine, experiment.source
        self.interruption = interruption
        self.evaluator = Evaluator(experiment.recipe, self.engine.placement)
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.settings.checkpoint.keep)
        self.window = Window()
        self.throughput = _Throughput(experiment.recipe.batch_size)
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self.step = 0
        self.saved = -1  # the step of the newest checkpoint
        self.saved_flight = -1  # and of the newest with the rings
        self.wall_before, self.began = 0.0, time.monotonic()
        self.closing = ExitStack()
        self.closing.callback(self.checkpoints.close)

    def close(self) -> None:
        self.closing.close()

    def run(self, other: Any) -> Summary:
        state = self._begin(other)
        total, resumed_at = self.experiment.total_steps, self.step or None
        writers: list[Any] = [JsonLinesWriter(self.workdir / "metrics.jsonl")]
        if self.settings.log.tensorboard:
            writers.append(TensorBoardWriter(self.workdir / "tensorboard", resumed_at))
        self.writer = self.closing.enter_context(_closing(MultiWriter(writers)))
        self.progress = self.closing.enter_context(Progress())
        self.progress.start(total, self.step)
        while self.step < total:
            state = self._segment(state, self._next_event())
            if self._due(self.settings.eval.every) and self.source.examples("validation"):
                self._write(self.evaluator.evaluate(state, self.source, "validation"))
            if self._due(self.settings.checkpoint.every) or self.interruption.signum:
                self._save(state)
            if self.interruption.signum and self.step < total:
                self.checkpoints.finish()
                raise Interrupted(self.interruption.signum, self.step)
        self.checkpoints.finish()
        return self._end(state)

    def _begin(self, other: Any) -> EngineState:
        """The newest checkpoint on this run's devices, or a fresh state; config.json and metrics.jsonl made to agree with it."""
        metrics = self.workdir / "metrics.jsonl"
        (self.workdir / "summary.json").unlink(missing_ok=True)
        if self.checkpoints.steps():
            abstract = abstract_states(self.experiment.recipe)
            restored = self.checkpoints.restore(abstract, self.engine.placement, set_aside=True)
            self.step = self.saved = restored.step
            state = self.engine.resume(restored.state, restored.flight)
            self.saved_flight = restored.step if restored.flight is not None else -1
            if state.flight is not None and restored.flight is None:
                _LOG.warning("the checkpoint holds no replay rings: they are filled anew, and the run is no exact repetition")
            self.window = Window(restored.meta["window"])
            self.latest = restored.meta["latest"]
            self.wall_before = restored.meta["wall_seconds"]
            _LOG.info("going on from step %d", self.step)
        else:
            state = self.engine.init()
            if other is not None:
                state = self.engine.place(borrow_weights(state, other))
        truncate(metrics, self.step)
        _write_atomically(self.workdir / "config.json", json.dumps(self.settings.to_dict(), indent=2) + "\n")
        _LOG.info("%s", self.engine.placement.describe())
        for k, module in enumerate(state.modules):
            _LOG.info(
                "module_%d: %d blocks, %d parameters",
                k,
                len(self.experiment.recipe.modules[k].blocks),
                count_parameters(module),
            )
        return state

    def _segment(self, state: EngineState, until: int) -> EngineState:
        """Trains up to a step at which something is due (or until a signal), with nothing in flight afterwards."""
        log_every = self.settings.log.every or self.source.steps_per_epoch
        self.throughput.start()
        report = None
        for report in self.engine.run(state, self.source, until, stop=lambda: bool(self.interruption.signum)):
            before, self.step = self.step, min(report.updates)
            self.throughput.count(self.step - before)
            self.window.add(report)
            if self.step > before and (self.step % log_every == 0 or self.step == self.experiment.total_steps):
                self._write(self.window.close() | self._pace() | self.engine.gauges(state))
        return state if report is None else report.snapshot()

    def _pace(self) -> dict[str, float]:
        pace = {"learning_rate": float(self.experiment.schedule(self.step - 1))}
        rate = self.throughput.rate()
        return pace | ({"images_per_second": rate} if rate else {})

    def _write(self, scalars: dict[str, float]) -> None:
        self.latest = self.latest | scalars
        scalars = {"epoch": self.step / self.source.steps_per_epoch} | scalars
        self.writer.write_scalars(self.step, scalars)
        self.progress.update(self.step, scalars)

    def _next_event(self) -> int:
        periods = [self.settings.eval.every, self.settings.checkpoint.every]
        steps = [p or self.source.steps_per_epoch for p in periods]
        return min([self.experiment.total_steps] + [(self.step // n + 1) * n for n in steps])

    def _due(self, every: int) -> bool:
        return self.step == self.experiment.total_steps or self.step % (every or self.source.steps_per_epoch) == 0

    def _save(self, state: EngineState) -> None:
        if self.step == self.saved:
            return
        window = self.window.values()  # raises where a loss is not finite
        for k, ok in enumerate(all_finite(state)):
            if not ok:
                raise diverged(f"a parameter of module_{k} is not finite at step {self.step}")
        last = self.latest.get(f"validation/{self.experiment.recipe.modules[-1].name}/accuracy")
        evaluated = last if self._due(self.settings.eval.every) else None
        meta = {
            "window": window,
            "latest": self.latest,
            "dataset": dataclasses.asdict(self.experiment.info),
            "wall_seconds": self.wall_before + time.monotonic() - self.began,
        }
        every, flight = self.settings.checkpoint.replay_every, None
        if state.flight is not None and every and (self.saved_flight < 0 or self.step - self.saved_flight >= every):
            flight, self.saved_flight = state.flight.snapshot(), self.step
        self.checkpoints.save(self.step, state, meta, evaluated, flight)
        self.saved = self.step

    def _end(self, state: EngineState) -> Summary:
        test = self.evaluator.evaluate(state, self.source, "test") if self.source.examples("test") else {}
        self._write(test)
        summary = self._summary(state, test)
        _write_atomically(self.workdir / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
        self.writer.flush()
        from dgl_jax import plots  # matplotlib takes a second to import

        plots.plot(self.workdir)
        return summary

    def _summary(self, state: EngineState, test: dict[str, float]) -> Summary:
        settings, recipe, groups = self.settings, self.experiment.recipe, self.engine.placement.groups
        modules = [
            {
                "name": module.name,
                "parameters": count_parameters(trained),
                "devices": [d.id for d in group.devices.flat],
                "updates": self.step,
                "validation_accuracy": self.latest.get(f"validation/{module.name}/accuracy"),
                "test_accuracy": test.get(f"test/{module.name}/accuracy"),
            }
            for module, trained, group in zip(recipe.modules, state.modules, groups, strict=True)
        ]
        traffic = self.engine.traffic()
        hops = range(len(traffic.raw))
        assert updates_of(state) == self.step
        gauges = self.engine.gauges(state)
        asynchronous = state.flight is not None
        return Summary(
            engine=settings.engine.name,
            config_hash=settings.hash(),
            seed=settings.seed,
            epochs=round(self.step / self.source.steps_per_epoch, 3),
            steps=self.step,
            modules=modules,
            ensemble_accuracy=test.get("test/ensemble/accuracy"),
            images_per_second=self.throughput.rate(),
            wire_bytes_per_image=list(traffic.wire),
            raw_bytes_per_image=list(traffic.raw),
            wire="measured" if traffic.measured else "simulated",
            codec_error=[self.latest.get(f"train/module_{k}/codec_error", 0.0) for k in hops],
            wall_seconds=round(self.wall_before + time.monotonic() - self.began, 3),
            dataset=self.experiment.info.name,
            versions={name: version(name) for name in _VERSIONS},
            staleness=[gauges.get(f"replay/{m.name}/age", 0.0) for m in recipe.modules] if asynchronous else None,
            reuse=[gauges.get(f"replay/{m.name}/reuse", 1.0) for m in recipe.modules] if asynchronous else None,
        )


class _Throughput:
    """Images per second of training alone: without compiling, evaluating or saving."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.images, self.seconds = 0, 0.0
        self._last: float | None = None
        self._compiled = False

    def start(self) -> None:
        """A segment begins; the first one of a process begins by compiling and counts from its first batch on."""
        self._last = time.monotonic() if self._compiled else None

    def count(self, batches: int) -> None:
        """So many more batches are done by all modules."""
        now = time.monotonic()
        if self._last is not None:
            self.images += batches * self.batch_size
            self.seconds += now - self._last
        self._last, self._compiled = now, True

    def rate(self) -> float | None:
        """None before the second batch."""
        return round(self.images / self.seconds, 2) if self.seconds else None


class _Interruption:
    """The first SIGINT or SIGTERM, once it has come."""

    signum: int | None = None

    def __call__(self, signum: int, frame: Any) -> None:
        if self.signum is not None:  # a second one quits at once
            raise KeyboardInterrupt
        self.signum = signum
        _LOG.info("%s: finishing the step and writing a checkpoint; again to quit at once", signal.Signals(signum).name)


@contextmanager
def _interruption() -> Iterator[_Interruption]:
    """Handles both signals inside the block (of the main thread; elsewhere signals are the caller's)."""
    interruption = _Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {s: signal.signal(s, interruption) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _closing(writer: MultiWriter) -> Iterator[MultiWriter]:
    try:
        yield writer
    finally:
        writer.close()


@contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps a second training off it; the system lets go of the lock when the process ends, however."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "w")  # noqa: SIM115
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir={workdir}: another training is running there") from None
        yield


def _check_workdir(workdir: Path, settings: Settings) -> None:
    """Raises UserError where the workdir holds a run of another configuration, naming the fields."""
    path = workdir / "config.json"
    if not path.is_file():
        return
    changed = differences(json.loads(path.read_text()), settings)
    if changed:
        raise UserError(
            f"--workdir={workdir}: holds a run of another configuration: {'; '.join(changed)}; "
            "use another workdir, or start from its weights with --init_from"
        )


def _finished(workdir: Path, settings: Settings) -> Summary | None:
    """The summary of a run that has nothing left to do under these settings."""
    path = workdir / "summary.json"
    if not path.is_file():
        return None
    summary = Summary(**json.loads(path.read_text()))
    before = make_settings(json.loads((workdir / "config.json").read_text())).train
    asked = settings.train
    if asked == before or (asked.steps and asked.steps <= summary.steps):
        return summary
    more = asked.epochs > summary.epochs + 1e-3 if not asked.steps else True
    return None if more else summary


def _write_atomically(path: Path, text: str) -> None:
    """All of it or, after a crash in between, what was there before."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
