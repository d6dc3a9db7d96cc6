"""One file an experiment, each a lab page; and the recipe that those called modern share. Shipped as `dgl_jax.configs`."""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def modern(config: ConfigDict, ema: float) -> ConfigDict:
    """The same experiment with today's recipe: cosine with warm-up, Nesterov's momentum, label smoothing, averaged parameters.

    Args:
      config: changed in place, and returned.
      ema: decay of the average; a longer epoch wants one nearer to 1.
    """
    config.optimizer.nesterov = True
    config.schedule = default_config().schedule  # without the boundaries of the paper's schedule, which a cosine has no use for
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    config.train.epochs = 100.0
    config.train.label_smoothing = 0.1
    config.train.ema = ema
    return config
