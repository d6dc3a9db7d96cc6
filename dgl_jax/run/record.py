"""The numbers of a run on their way to metrics.jsonl, to TensorBoard and to whoever waits."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.core.module import count_parameters
from dgl_jax.engines import EngineState, Report, counts
from dgl_jax.run.begin import Begun
from dgl_jax.run.build import Experiment
from dgl_jax.run.metrics import Window
from dgl_jax.run.progress import Progress
from dgl_jax.run.summary import Summary
from dgl_jax.run.throughput import Throughput
from dgl_jax.run.writers import JsonLinesWriter, MultiWriter, TensorBoardWriter, Writer


class Record:
    """Keeps what a run has measured, and writes it.

    Attributes:
      latest: the newest value of every metric.
      throughput: images per second of training.
    """

    def __init__(self, experiment: Experiment, begun: Begun, writer: Writer, progress: Progress):
        self.experiment, self.writer, self.progress = experiment, writer, progress
        self.latest: dict[str, float] = begun.meta.get("latest", {})
        self.throughput = Throughput(experiment.spec.batch_size)
        self._window = Window(begun.meta.get("window"))
        self._clock = begun.clock
        self._written: dict[
            str, int
        ] = {}  # the step of each of `latest` that this process has measured

    def add(self, report: Report, advance: int) -> None:
        """Takes a report, which says that `advance` more steps are done; reads nothing from the devices."""
        self.throughput.count(advance, report.at)
        self._window.add(report)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes and shows what was measured at a step."""
        self.latest = self.latest | scalars
        self._written |= dict.fromkeys(scalars, step)
        scalars = {"epoch": step / self.experiment.source.steps_per_epoch} | scalars
        self.writer.write_scalars(step, scalars)
        self.progress.update(step, scalars)

    def write_training(self, step: int, state: EngineState) -> None:
        """Writes the means of the training metrics since the last time, and what the engine says of itself.

        Args:
          state: whose flight is what is under way now.

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

    def pace(self, step: int) -> dict[str, float]:
        """Returns the learning rate of the update that led to a step, and the images per second if they are known."""
        with jax.default_device(
            system.host_device()
        ):  # one scalar: not worth an accelerator's while
            pace = {"learning_rate": float(self.experiment.schedule(step - 1))}
        rate = self.throughput.rate()
        return pace | ({"images_per_second": rate} if rate else {})

    def value(self, name: str, step: int) -> float | None:
        """Returns a metric if it was measured at this very step."""
        return self.latest.get(name) if self._written.get(name) == step else None

    def wall_seconds(self) -> float:
        """Returns how long the run has taken, earlier parts included."""
        return time.monotonic() - self._clock

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it, as JSON values, so that a resumed run writes the same.

        Raises:
          UserError: a loss is not finite.
        """
        return {
            "window": self._window.values(),
            "latest": self.latest,
            "wall_seconds": self.wall_seconds(),
        }


@contextmanager
def recording(experiment: Experiment, workdir: Path, begun: Begun) -> Iterator[Record]:
    """Opens the files that numbers go to, and the bar; closes them behind the block."""
    writers: list[Writer] = [JsonLinesWriter(workdir / "metrics.jsonl")]
    if experiment.settings.log.tensorboard:
        writers.append(TensorBoardWriter(workdir / "tensorboard", begun.step or None))
    with closing(MultiWriter(writers)) as writer, Progress() as progress:
        progress.start(experiment.total_steps, begun.step)
        yield Record(experiment, begun, writer, progress)


def summarise(
    experiment: Experiment,
    begun: Begun,
    record: Record,
    step: int,
    state: EngineState,
    test: dict[str, float],
) -> Summary:
    """Sums up a run that has ended.

    Args:
      step, state: those of the end.
      test: the metrics of the test.
    """
    settings, spec, engine = experiment.settings, experiment.spec, experiment.engine
    modules = [
        {
            "name": module.name,
            "parameters": count_parameters(trained),
            "devices": [d.id for d in group.devices.flat],
            "updates": updates,
            "validation_accuracy": record.latest.get(f"validation/{module.name}/accuracy"),
            "test_accuracy": test.get(f"test/{module.name}/accuracy"),
        }
        for module, trained, group, updates in zip(
            spec.modules, state.modules, engine.placement.groups, counts(state), strict=True
        )
    ]
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
        raw_bytes_per_image=list(traffic.raw),
        wire="measured" if traffic.measured else "simulated",
        codebook_share=[c / w for c, w in zip(traffic.codebook, traffic.wire)],
        codec_error=[
            record.latest.get(f"train/module_{k}/codec_error", 0.0) for k in range(len(traffic.raw))
        ],
        wall_seconds=round(record.wall_seconds(), 3),
        dataset=experiment.info.name,
        versions=begun.versions,
        cpu_threads=begun.cpu_threads,
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
