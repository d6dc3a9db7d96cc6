"""Evaluation entry point for library users: metrics of every head and of the ensemble."""

from pathlib import Path

from dgl_jax.config import Settings, differences
from dgl_jax.data import make_source
from dgl_jax.data.info import DatasetInfo
from dgl_jax.errors import UserError
from dgl_jax.run.evaluator import make_evaluator
from dgl_jax.run.restore import load_trained, read_settings


def evaluate_run(
    workdir: str | Path,
    checkpoint: str = "newest",
    split: str = "test",
    settings: Settings | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint of a run on a split of its data set.

    Args:
      workdir: folder of the run.
      checkpoint: "newest", "best" (on validation) or a step.
      split: "train", "validation" or "test".
      settings: settings of the same run, if they differ from the stored ones in fields that may
        change, such as the folder of the data.

    Returns:
      The metrics of `Evaluator.evaluate`, and the step of the checkpoint as `step`.

    Raises:
      UserError: there is no such run, checkpoint or split, `settings` belong to another run, or the
        data differ from those the run was trained on.
    """
    stored = read_settings(Path(workdir))
    if settings is not None and (changed := differences(stored, settings)):
        raise UserError(
            f"--workdir={workdir}: holds a run of another configuration: {'; '.join(changed)}"
        )
    trained = load_trained(Path(workdir), checkpoint)
    settings = settings or stored
    source = make_source(settings.data, settings.seed)
    trained.info.check(DatasetInfo.of(source), settings.data)
    if not source.examples(split):
        raise UserError(f"--split={split}: {source.name} has no {split} examples")
    evaluator = make_evaluator(trained.spec, trained.placement, settings)
    result = evaluator.evaluate(trained.restored.state, source, split)
    return {"step": trained.restored.step} | result
