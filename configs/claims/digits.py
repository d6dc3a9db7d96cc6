"""DGL against back-propagation on the digits, two seeds each: an example of a sweep.

    python launch.py --mode=sweep --sweep=configs/claims/digits.py --workdir=runs/claims/digits
    python launch.py --mode=sweep --sweep=configs/claims/digits.py:tiny --workdir=runs/tiny

The configuration is configs/digits.py. The argument `tiny` makes the network narrow and trains it
for two epochs, which only shows that everything works.

Hardware and time: four runs of 20 s each on two idle CPU cores.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from dgl_jax.configs import digits


def get_sweep(argument: str | None = None) -> Iterator[tuple[str, ConfigDict]]:
    """Yields the name and the configuration of each run.

    Args:
      argument: "full" (the default) or "tiny".
    """
    if argument not in (None, "full", "tiny"):
        raise ValueError(f"no size {argument!r}; there are full and tiny")
    for method in ("dgl", "backprop"):
        for seed in range(2):
            config = digits.get_config()
            config.method.name = method
            config.seed = seed
            if argument == "tiny":
                config.model.width = 4
                config.train.epochs = 2.0
            yield f"{method}/seed={seed}", config
