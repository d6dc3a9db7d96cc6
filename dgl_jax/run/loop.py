"""The training loop."""

import json
import logging
from contextlib import ExitStack, closing
from pathlib import Path

from dgl_jax.engines import EngineState, Report
from dgl_jax.errors import UserError
from dgl_jax.run.begin import begin
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.copies import Copies
from dgl_jax.run.due import Due, Events
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.record import recording, summarise
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
    weights: Trained | None = None,
) -> Summary:
    """Trains up to the last step, from the newest checkpoint if there is one, and tests what was learnt.

    Args:
      workdir: locked by the caller.
      interruption: tells when to stop.
      weights: another run's, which a new one starts from.

    Returns:
      What `summary.json` then holds.

    Raises:
      UserError: the run diverged, a module failed for good, the disk is full, or every checkpoint is damaged.
      Interrupted: a signal came; a checkpoint was written first.
    """
    settings, engine, source, total = (
        experiment.settings,
        experiment.engine,
        experiment.source,
        experiment.total_steps,
    )
    with ExitStack() as stack:
        evaluator = Evaluator(experiment.spec, engine.placement, settings.eval.codec)
        checkpoints = stack.enter_context(
            closing(Checkpoints(workdir / "checkpoints", settings.checkpoint.keep))
        )
        begun = begin(experiment, workdir, checkpoints, weights)
        state, step = begun.state, begun.step
        record = stack.enter_context(recording(experiment, workdir, begun))
        saver, due = Saver(experiment, checkpoints, record, begun), Due.of(experiment)
        copies = Copies(due, saver)
        if getattr(settings.engine, "restart_workers", False):
            engine.recover = saver.recover

        def evaluate_and_save(state: EngineState, events: Events) -> None:
            if events.evaluate and source.examples("validation"):
                record.write(step, evaluator.evaluate(state, source, "validation"))
            if events.save:
                saver.save(step, state)

        if step < total:
            record.pace(step)  # what compiles at the first call does so before anything is timed
            _LOG.info("compiling; the first step follows")
        while step < total:
            # A synchronous engine trains up to the next event and drains: nothing is under way while its modules are evaluated
            # and saved. A continuous one goes all the way, and what is due is done beside it, on a copy.
            until = total if engine.continuous else due.next_event(step)
            first = step
            report: Report | None = None
            record.throughput.start()
            with interruptible(engine.run(state, source, until, stop=interruption.came)) as reports:
                for report in reports:
                    # A module that was restarted falls back; the step of the run does not.
                    before, step = step, max(step, report.step)
                    record.add(report, step - before)
                    if step > before and due.log(step):
                        record.write_training(step, state)
                    if (
                        engine.continuous
                        and step < total
                        and (ready := copies.ready(report, step, before))
                    ):
                        evaluate_and_save(*ready)
                        del ready  # before the next copy is made: each is as large as the modules
                        record.throughput.start()
            if report is not None:
                state = report.snapshot()
            if step > first:
                evaluate_and_save(state, due.at(step))
            # A signal may have come at any time: the engine has stopped early, or will not be started again.
            if interruption.signum and step < total:
                saver.save(step, state)
                checkpoints.finish()
                raise Interrupted(interruption.signum, step)
        checkpoints.finish()

        test = evaluator.evaluate(state, source, "test") if source.examples("test") else {}
        record.write(step, test)
        summary = summarise(experiment, begun, record, step, state, test)
        write_text(workdir / "summary.json", json.dumps(summary.to_dict(), indent=2) + "\n")
        from dgl_jax.run import plots  # matplotlib takes a second to import

        try:
            plots.plot(workdir)
        except UserError as error:  # the run is whole without pictures
            _LOG.warning("no pictures: %s", error)
        return summary
