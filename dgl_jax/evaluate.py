"""Measures every module's head, and all heads together, on a split: every label counts once."""

from pathlib import Path

from dgl_jax.config import Settings, differences
from dgl_jax.data import make_source
from dgl_jax.data.info import DatasetInfo
from dgl_jax.errors import UserError
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.restore import load_trained, read_settings


def evaluate_run(
    workdir: str | Path,
    checkpoint: str = "newest",
    split: str = "test",
    settings: Settings | None = None,
) -> dict[str, float]:
    """Measures a run's checkpoint on a split of its data set; see `Evaluator.evaluate` for what comes back.

    Args:
      checkpoint: newest, best (on validation) or a step.
      settings: of the same run; may say where the data lie now.

    Raises:
      UserError: there is no such run, checkpoint or split, `settings` are another run's, or the data are others.
    """
    stored = read_settings(Path(workdir))
    if settings is not None and (
        changed := differences(stored, settings)
    ):  # before anything is restored
        raise UserError(
            f"--workdir={workdir}: holds a run of another configuration: {'; '.join(changed)}"
        )
    trained = load_trained(Path(workdir), checkpoint)
    settings = settings or stored
    source = make_source(settings.data, settings.seed)
    trained.info.check(DatasetInfo.of(source), settings.data)
    if not source.examples(split):
        raise UserError(f"--split={split}: {source.name} has no such examples here")
    result = Evaluator(trained.spec, trained.placement, settings.eval.codec).evaluate(
        trained.restored.state, source, split
    )
    return {"step": trained.restored.step} | result
