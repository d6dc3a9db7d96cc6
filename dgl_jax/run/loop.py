"""The training run: the only room that knows all rooms."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from dgl_jax import system
from dgl_jax.core.module import ModuleState, count_parameters
from dgl_jax.engines import EngineState, Report, counts
from dgl_jax.engines.placement import Placement
from dgl_jax.errors import UserError
from dgl_jax.profile.table import module_costs, table
from dgl_jax.registry import SCHEDULES
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints, all_finite
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.metrics import Window, diverged
from dgl_jax.run.progress import Progress
from dgl_jax.run.restore import borrow_weights
from dgl_jax.run.signals import Interrupted, Interruption
from dgl_jax.run.summary import Summary, versions
from dgl_jax.run.throughput import Throughput
from dgl_jax.run.writers import JsonLinesWriter, MultiWriter, TensorBoardWriter, read_jsonl, truncate, write_text

if TYPE_CHECKING:
    pass

_LOG = logging.getLogger(__name__)
_Due = tuple[int, EngineState, tuple[bool, bool]]  # a step, a copy of the modules there, whether to evaluate and to save it


class Run:
    """One call of `train_and_evaluate` past the checks: holds what its parts share."""

    def __init__(self, experiment: Experiment, workdir: Path, interruption: "Interruption"):
        self.experiment, self.settings, self.workdir = experiment, experiment.settings, workdir
        self.engine, self.source = experiment.engine, experiment.source
        self.interruption = interruption
        self.evaluator = Evaluator(experiment.spec, self.engine.placement, self.settings.eval.codec)
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.settings.checkpoint.keep)
        if getattr(self.settings.engine, "restart_workers", False):
            self.engine.recover = self._recover
        self.window = Window()
        self.throughput = Throughput(experiment.spec.batch_size)
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self.wanted = (False, False)  # of a continuous engine: whether a copy is to be evaluated, and saved
        self.step = 0
        self.evaluated = -1  # the step of the newest validation
        self.saved = -1  # the step of the newest checkpoint
        self.saved_flight = -1  # and of the newest with the rings
        self.wall_before, self.began = 0.0, time.monotonic()
        self.cpu_threads = system.cpu_threads() if jax.default_backend() == "cpu" else None
        self.versions = versions()  # now, not at the end of a long run
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
        if self.step < total:
            self._pace()  # what compiles at the first call does so before anything is timed
            _LOG.info("compiling; the first step follows")
        while self.step < total:
            begun = self.step
            state = self._segment(state, total if self.engine.continuous else self._next_event())
            if self.step > begun:
                self._events(state, *self._due_now())
            if self.interruption.signum and self.step < total:
                if self.step:
                    self._save(state)
                self.checkpoints.finish()
                raise Interrupted(self.interruption.signum, self.step)
        self.checkpoints.finish()
        return self._end(state)

    def _begin(self, other: Any) -> EngineState:
        """The newest checkpoint on this run's devices, or a fresh state; config.json and metrics.jsonl made to agree with it."""
        metrics = self.workdir / "metrics.jsonl"
        if self.checkpoints.steps():
            restored = self.checkpoints.restore(self._prepare, set_aside=True)
            self.step = self.saved = restored.step
            state = self.engine.resume(restored.state, restored.flight)
            self.saved_flight = restored.step if restored.flight is not None else -1
            if state.flight is not None and restored.flight is None:
                _LOG.warning("the checkpoint holds no replay rings: they are filled anew, and the run is no exact repetition")
            self.window = Window(restored.meta["window"])
            self.latest = restored.meta["latest"]
            self.wall_before = restored.meta["wall_seconds"]
            _LOG.info("going on from step %d", self.step)
            planned = restored.meta["total_steps"]
            if SCHEDULES[self.settings.schedule.name].whole and planned != self.experiment.total_steps:
                _LOG.warning(
                    "the cosine now ends at step %d, not %d: this is not what one run of that length would have done",
                    self.experiment.total_steps,
                    planned,
                )
        else:
            state = self.engine.init()
            if other is not None:
                state = self.engine.place(borrow_weights(state, other))
        (self.workdir / "summary.json").unlink(missing_ok=True)
        truncate(metrics, self.step, without="test/")  # tested again at the end
        if self.latest and not (metrics.exists() and read_jsonl(metrics)):
            _LOG.warning("%s: holds nothing of the steps up to %d: their curves are lost, training goes on", metrics, self.step)
        _write_json(self.workdir / "config.json", self.settings.to_dict())
        threads = f" ({self.cpu_threads} threads)" if self.cpu_threads else ""
        _LOG.info("%s%s", self.engine.placement.describe(), threads)
        for line in table(module_costs(self.experiment.spec)):
            _LOG.info("%s", line)
        return state

    def _prepare(self, _: Any) -> tuple[Sequence[ModuleState], Placement]:
        return self.experiment.spec.abstract_states(), self.engine.placement

    def _recover(self, k: int) -> ModuleState | None:
        """Module k as the newest checkpoint has it."""
        self.checkpoints.finish()
        return self.checkpoints.restore_module(k, self._prepare) if self.checkpoints.steps() else None

    def _segment(self, state: EngineState, until: int) -> EngineState:
        """Trains up to a step at which something is due (or until a signal), with nothing in flight afterwards.

        A continuous engine goes all the way: what is due is done beside it, on a copy.
        """
        self.throughput.start()
        report: Report | None = None
        due: _Due | None = None
        reports: Any = self.engine.run(state, self.source, until, stop=lambda: bool(self.interruption.signum))
        try:
            for report in reports:
                due = self._heard(report, state, until, due)
        except KeyboardInterrupt as interrupt:
            reports.throw(interrupt)  # just closed, the engine would wait for its workers, and one may never end
            raise
        finally:
            reports.close()
        return state if report is None else report.snapshot()

    def _heard(self, report: Report, state: EngineState, until: int, due: _Due | None) -> _Due | None:
        """Counts a report and writes what it is time for; gives what a continuous engine's copy is kept for."""
        log_every = self.settings.log.every or self.source.steps_per_epoch
        before, self.step = self.step, max(self.step, min(report.updates))  # a restarted module falls back
        self.throughput.count(self.step - before, report.at)
        self.window.add(report)
        if self.step > before and (self.step % log_every == 0 or self.step == self.experiment.total_steps):
            self._write(self.window.close() | self._pace() | self.engine.traffic().gauges() | self.engine.gauges(state))
            if state.flight is not None:
                self.writer.write_turns(self.step, state.flight.recent(), state.flight.unit)
        if self.engine.continuous and self.step < until:
            if due is None and self.step > before:
                self.wanted = self._due_now()
            if any(self.wanted) and min(report.updates) >= self.step:
                copy = report.snapshot(flight=self.wanted[1] and self._holds_flight())
                # A module that was restarted meanwhile is behind: another copy is made once it has caught up.
                if min(counts(copy)) >= self.step:
                    due, self.wanted = (min(counts(copy)), copy, self.wanted), (False, False)
            # The copy may be ahead of the reports: it is used once they have caught up, under its true step.
            if due is not None and self.step >= due[0]:
                self._events(due[1], *due[2])
                self.throughput.start()
                due = None
        return due

    def _due_now(self) -> tuple[bool, bool]:
        """Whether to evaluate, and whether to save."""
        return self._due(self.settings.eval.every), self._due(self.settings.checkpoint.every)

    def _events(self, state: EngineState, evaluate: bool, save: bool) -> None:
        if evaluate and self.source.examples("validation"):
            self._write(self.evaluator.evaluate(state, self.source, "validation"))
            self.evaluated = self.step
        if save:
            self._save(state)

    def _holds_flight(self) -> bool:
        """Whether a checkpoint that is made now holds what is under way."""
        every = self.settings.checkpoint.replay_every
        return bool(every) and (self.saved_flight < 0 or self.step - self.saved_flight >= every)

    def _pace(self) -> dict[str, float]:
        with jax.default_device(system.host_device()):  # one scalar: not worth an accelerator's while
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
        last = self.latest.get(f"validation/{self.experiment.spec.modules[-1].name}/accuracy")
        evaluated = last if self.evaluated == self.step else None
        meta = {
            "window": window,
            "latest": self.latest,
            "dataset": dataclasses.asdict(self.experiment.info),
            "first_blocks": [module.first for module in self.experiment.spec.modules],
            "total_steps": self.experiment.total_steps,
            "wall_seconds": self.wall_before + time.monotonic() - self.began,
        }
        flight = None
        if state.flight is not None and self._holds_flight():
            flight, self.saved_flight = state.flight.snapshot(), self.step
        self.checkpoints.save(self.step, state, meta, evaluated, flight)
        self.saved = self.step

    def _end(self, state: EngineState) -> Summary:
        test = self.evaluator.evaluate(state, self.source, "test") if self.source.examples("test") else {}
        self._write(test)
        summary = self._summary(state, test)
        _write_json(self.workdir / "summary.json", summary.to_dict())
        self.writer.flush()
        from dgl_jax.run import plots  # matplotlib takes a second to import

        try:
            plots.plot(self.workdir)
        except UserError as error:  # the run is whole without pictures
            _LOG.warning("no pictures: %s", error)
        return summary

    def _summary(self, state: EngineState, test: dict[str, float]) -> Summary:
        settings, spec, groups = self.settings, self.experiment.spec, self.engine.placement.groups
        modules = [
            {
                "name": module.name,
                "parameters": count_parameters(trained),
                "devices": [d.id for d in group.devices.flat],
                "updates": updates,
                "validation_accuracy": self.latest.get(f"validation/{module.name}/accuracy"),
                "test_accuracy": test.get(f"test/{module.name}/accuracy"),
            }
            for module, trained, group, updates in zip(spec.modules, state.modules, groups, counts(state), strict=True)
        ]
        traffic = self.engine.traffic()
        hops = range(len(traffic.raw))
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
            codebook_share=[c / w for c, w in zip(traffic.codebook, traffic.wire)],
            codec_error=[self.latest.get(f"train/module_{k}/codec_error", 0.0) for k in hops],
            wall_seconds=round(self.wall_before + time.monotonic() - self.began, 3),
            dataset=self.experiment.info.name,
            versions=self.versions,
            cpu_threads=self.cpu_threads,
            staleness=[gauges.get(f"replay/{m.name}/age", 0.0) for m in spec.modules] if asynchronous else None,
            ring_bytes=[int(gauges.get(f"replay/{m.name}/bytes", 0)) for m in spec.modules] if asynchronous else None,
            reuse=[gauges.get(f"replay/{m.name}/reuse", 1.0) for m in spec.modules] if asynchronous else None,
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def _closing(writer: MultiWriter) -> Iterator[MultiWriter]:
    try:
        yield writer
    finally:
        writer.close()
