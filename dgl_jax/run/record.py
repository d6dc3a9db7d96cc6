"""Record of a run: collects its measurements and writes them to files and to the terminal."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import jax

from dgl_jax import system
from dgl_jax.core.module import count_parameters
from dgl_jax.engines import EngineState, Report, counts, world
from dgl_jax.run.begin import RunStart
from dgl_jax.run.build import Experiment
from dgl_jax.run.metrics import Window, early_metrics, early_values
from dgl_jax.run.progress import Progress
from dgl_jax.run.summary import Summary
from dgl_jax.run.throughput import Throughput
from dgl_jax.run.writers import JsonLinesWriter, MultiWriter, TensorBoardWriter, Writer
from dgl_jax.spec import Meter


class Record:
    """Measurements of a run, and the writer and progress display that they go to.

    Attributes:
      latest: newest value of every metric, including those from before a resume.
      throughput: meter of the images per second of training.
      extra: further JSON values for the checkpoints, by name.
    """

    def __init__(self, experiment: Experiment, start: RunStart, writer: Writer, progress: Progress):
        self.experiment, self.writer, self.progress = experiment, writer, progress
        self.latest: dict[str, float] = start.meta.get("latest", {})
        self.throughput = Throughput(experiment.spec.batch_size)
        self.extra: dict[str, Any] = {}
        self._window = Window(start.meta.get("window"))
        if rows := start.meta.get("early"):
            cast(Any, experiment.engine).early = early_metrics(rows)
        if hasattr(experiment.engine, "meters") and (rows := start.meta.get("meters")):
            experiment.engine.meters = [Meter(**row) for row in rows]
        self._records: int = start.meta.get("records", 0)
        self._clock, self._cpu_threads = start.clock, start.cpu_threads
        self._report: Report | None = None  # the newest one
        # Step at which this process has measured each metric in `latest`.
        self._written: dict[str, int] = {}

    def add(self, report: Report, advance: int) -> None:
        """Adds a report of an engine without reading its metrics from the devices.

        Args:
          report: the report.
          advance: number of steps that the run has advanced since the previous report.
        """
        before, self._report = self._report, report
        if before is not None and report.compiled:
            self.throughput.skip(report.at)
        else:
            self.throughput.count(advance, report.at)
        self._window.add(report)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes and displays metrics that were measured at `step`."""
        self.latest = self.latest | scalars
        self._written |= dict.fromkeys(scalars, step)
        scalars = {"epoch": step / self.experiment.source.steps_per_epoch} | scalars
        self.writer.write_scalars(step, scalars)
        self._records += 1
        self.progress.update(step, scalars)

    def write_training(self, step: int, state: EngineState) -> None:
        """Writes the means of the training metrics since the last call, and the engine's gauges.

        Args:
          step: current step of the run.
          state: current state; its `flight` provides the newest turns of an asynchronous engine.

        Raises:
          UserError: a loss is not finite.
        """
        engine = self.experiment.engine
        self.write(
            step,
            self._window.close()
            | self.pace(step)
            | engine.traffic().gauges()
            | engine.gauges(state),
        )
        if state.flight is not None:
            self.writer.write_turns(step, state.flight.recent(), state.flight.unit)
            self._records += 1

    def pace(self, step: int) -> dict[str, float]:
        """Returns the learning rate of the newest update at `step`, and the images/s if known."""
        report, updates = self._report, step
        if report is not None and report.module is not None:
            updates = report.updates[report.module]
        # On the host: a transfer from an accelerator costs more than computing one scalar.
        with jax.default_device(system.host_device()):
            pace = {"learning_rate": float(self.experiment.schedule(updates - 1))}
        rate = self.throughput.rate()
        return pace | ({"images_per_second": rate} if rate else {})

    def value(self, name: str, step: int) -> float | None:
        """Returns a metric if this process has measured it at exactly this step, otherwise None."""
        return self.latest.get(name) if self._written.get(name) == step else None

    def wall_seconds(self) -> float:
        """Returns the duration of the run in seconds, including the parts before a resume."""
        return time.monotonic() - self._clock

    def meta(self) -> dict[str, Any]:
        """Returns the state that a checkpoint stores, as JSON values.

        With it a resumed run writes the same records as an uninterrupted one. One exception: after
        a signal, a pipeline sends codebooks again, which counts.

        Raises:
          UserError: a loss is not finite.
        """
        return {
            "window": self._window.values(),
            "early": early_values(getattr(self.experiment.engine, "early", {})),
            "meters": [vars(meter) for meter in getattr(self.experiment.engine, "meters", ())],
            "latest": self.latest,
            "records": self._records,
            "wall_seconds": self.wall_seconds(),
            "cpu_threads": self._cpu_threads,
            "extra": self.extra,
        }


@contextmanager
def recording(experiment: Experiment, workdir: Path, start: RunStart) -> Iterator[Record]:
    """Opens the metric files and the progress display for the duration of a `with` block."""
    writers: list[Writer] = [JsonLinesWriter(workdir / "metrics.jsonl")] if world.first() else []
    if experiment.settings.log.tensorboard and world.first():
        writers.append(TensorBoardWriter(workdir / "tensorboard", start.step))
    with closing(MultiWriter(writers)) as writer, Progress(bar=world.first()) as progress:
        progress.start(experiment.total_steps, start.step)
        yield Record(experiment, start, writer, progress)


def summarize(
    experiment: Experiment,
    start: RunStart,
    record: Record,
    step: int,
    state: EngineState,
    test: dict[str, float],
) -> Summary:
    """Returns the summary of a run that has ended.

    Args:
      experiment: the run.
      start: state from which this process started the run.
      record: its measurements.
      step: its last step.
      state: its final state.
      test: metrics on the test split.
    """
    settings, spec, engine = experiment.settings, experiment.spec, experiment.engine
    modules = [
        {
            "name": module.name,
            "parameters": count_parameters(module_state),
            "devices": [d.id for d in group.devices.flat],
            "updates": updates,
            "validation_accuracy": record.latest.get(f"validation/{module.name}/accuracy"),
            "test_accuracy": test.get(f"test/{module.name}/accuracy"),
        }
        for module, module_state, group, updates in zip(
            spec.modules, state.modules, engine.placement.groups, counts(state), strict=True
        )
    ]
    devices = {
        device
        for group in engine.placement.groups
        for device in group.devices.flat
        if device.process_index == world.index()
    }
    peaks = system.peak_memory(devices)
    traffic, gauges, asynchronous = engine.traffic(), engine.gauges(state), state.flight is not None
    return Summary(
        engine=settings.engine.name,
        method=settings.method.name,
        config_hash=settings.hash(),
        seed=settings.seed,
        epochs=round(step / experiment.source.steps_per_epoch, 3),
        steps=step,
        modules=modules,
        ensemble_accuracy=test.get("test/ensemble/accuracy"),
        images_per_second=record.throughput.rate(),
        wire_bytes_per_image=list(traffic.wire),
        wire_bytes_down_per_image=list(traffic.down),
        raw_bytes_per_image=list(traffic.raw),
        wire="measured" if traffic.measured else "simulated",
        codebook_share=[c / w for c, w in zip(traffic.codebook, traffic.wire)],
        codec_error=[
            record.latest.get(f"train/module_{k}/codec_error", 0.0) for k in range(len(traffic.raw))
        ],
        wall_seconds=round(record.wall_seconds(), 3),
        dataset=experiment.info.name,
        versions=start.versions,
        cpu_threads=start.cpu_threads,
        peak_memory_bytes=peaks if peaks and any(peaks.values()) else None,
        peak_host_bytes=system.process_peak(),
        staleness=[gauges.get(f"replay/{m.name}/age", 0.0) for m in spec.modules]
        if asynchronous
        else None,
        ring_bytes=[int(gauges.get(f"replay/{m.name}/bytes", 0)) for m in spec.modules]
        if asynchronous
        else None,
        reuse=[gauges.get(f"replay/{m.name}/reuse", 1.0) for m in spec.modules]
        if asynchronous
        else None,
    )
