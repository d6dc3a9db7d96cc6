"""The training loop: trains, logs, evaluates, saves and tests one run."""

import json
import logging
from contextlib import ExitStack, closing
from pathlib import Path

from dgl_jax.engines import EngineState, Report, world
from dgl_jax.engines.dispatches import steps_per_dispatch
from dgl_jax.errors import where
from dgl_jax.run.begin import begin
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.compiling import Compiling
from dgl_jax.run.copies import Copies
from dgl_jax.run.due import Due, Events
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.probes import Probes
from dgl_jax.run.record import recording, summarize
from dgl_jax.run.restore import Trained
from dgl_jax.run.saver import Saver
from dgl_jax.run.signals import Interrupted, Interruption, interruptible
from dgl_jax.run.summary import Summary
from dgl_jax.run.writers import write_text

_LOG = logging.getLogger(__name__)


def train_loop(
    experiment: Experiment,
    workdir: Path,
    interruption: Interruption,
    compiling: Compiling,
    weights: Trained | None = None,
) -> Summary:
    """Trains to the last step, from the newest checkpoint if there is one, and tests the result.

    Args:
      experiment: the run to train.
      workdir: folder of the run, locked by the caller.
      interruption: tells if a signal has asked the run to stop.
      compiling: meter that logs the time until the first step.
      weights: another run, whose weights a new run starts from.

    Returns:
      The content of `summary.json`.

    Raises:
      UserError: the run diverged, a module failed permanently, the disk is full, or every
        checkpoint is damaged.
      Interrupted: a signal arrived; a checkpoint was written first.
    """
    settings, engine, source, total = (
        experiment.settings,
        experiment.engine,
        experiment.source,
        experiment.total_steps,
    )
    with ExitStack() as stack:
        evaluator = Evaluator(
            *(experiment.spec, engine.placement, settings.eval.codec, engine.residence),
            steps_per_dispatch(engine),
        )
        stack.callback(evaluator.close)
        checkpoints = stack.enter_context(
            closing(Checkpoints(workdir / "checkpoints", settings.checkpoint.keep))
        )
        start = begin(experiment, workdir, checkpoints, weights)
        state, step = start.state, start.step
        record = stack.enter_context(recording(experiment, workdir, start))
        saver = Saver(experiment, checkpoints, record, start)
        due = Due.of(settings, source.steps_per_epoch, total, apart=steps_per_dispatch(engine) == 1)
        copies = Copies(due, saver)
        if getattr(settings.engine, "restart_workers", False):
            engine.recover = saver.recover

        probes: Probes | None = None
        if settings.diagnostics.enabled:
            extra = start.meta.get("extra", {})
            probes = Probes(experiment, workdir, record, start, extra)
            if step == 0:
                probes.measure(step, state, state)

        def handle(events: Events, modules: EngineState, live: EngineState) -> None:
            if events.evaluate and source.examples("validation"):
                record.write(step, evaluator.evaluate(modules, source, "validation"))
            if events.probe and probes is not None:
                probes.measure(step, modules, live)
            if events.save:
                saver.save(step, modules)

        if step < total:
            record.pace(step)  # compiles the learning-rate schedule before anything is timed
            _LOG.info("compiling the training programs before the first step")
        while step < total:
            # A synchronous engine trains to the next event and drains, so that no message is in
            # flight while the modules are evaluated, probed and saved. A continuous engine trains
            # to the end in one go; events are then handled on snapshots while it trains.
            until = total if engine.continuous else due.next_event(step)
            first = step
            report: Report | None = None
            record.throughput.start()
            with interruptible(engine.run(state, source, until, stop=interruption.came)) as reports:
                for report in reports:
                    if compiling.log_first_step():
                        evaluator.compile(source)  # while the devices train
                    # A restarted module falls back to its checkpoint; the step of the run does not.
                    before, step = step, max(step, report.step)
                    record.add(report, step - before)
                    if step > before and due.log(step):
                        record.write_training(step, state)
                    if (
                        engine.continuous
                        and step < total
                        and (ready := copies.ready(report, step, before))
                    ):
                        handle(ready[1], ready[0], state)
                        del (
                            ready
                        )  # frees the snapshot, as large as the modules, before the next one
                        record.throughput.start()
            if report is not None:
                state = report.snapshot()
            if step > first:
                handle(due.at(step), state, state)
                if due.at(step).save:  # a resumed run sends all codebooks again: so does this one
                    state = EngineState(state.modules, state.flight)
            # A signal may arrive at any time: either the engine has stopped early because of it, or
            # it came between two calls of `run`, and the engine is not started again.
            signum = next(filter(None, world.exchange(interruption.signum)), None)
            if signum and step < total:
                saver.save(step, state)
                checkpoints.finish()
                raise Interrupted(signum, step)
        checkpoints.finish()

        if probes is not None:
            probes.finish(step, state, checkpoints)
        test = evaluator.evaluate(state, source, "test") if source.examples("test") else {}
        record.write(step, test)
        summary = summarize(experiment, start, record, step, state, test)
        if not world.first():
            return summary
        write_text(workdir / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
        from dgl_jax.run import plots  # here: matplotlib takes a second to import

        try:
            plots.plot(workdir)
        except Exception as error:  # a missing plot must not make a finished run fail
            _LOG.warning("no plots: %s", where(error))
        return summary
