"""Configuration of small runs with one label per token (`examples/plugin/tokens.py`)."""

from typing import Any

import jax
from runs import small_config

from dgl_jax.config import default_config, make_settings
from dgl_jax.run.build import Experiment, make_experiment

TOKENS = {
    "data__name": "token_sums",
    "task__name": "token_labels",
    "model__name": "token_conv",
    "model__head": "each_token",
}
LENGTH, SYMBOLS = 16, 8


def config(**fields: Any) -> Any:
    """Returns the configuration of the small run on tokens, with `fields` set."""
    token_config = default_config(("examples.plugin",))
    token_config.update(small_config().to_dict() | {"plugins": token_config.plugins})
    token_config.data.augment, token_config.data.image_size = "none", 0
    for name, value in (TOKENS | {"model__width": 16} | fields).items():
        group, _, leaf = name.partition("__")
        setattr(token_config[group], leaf, value)
    return token_config


def experiment(devices: int = 1, **fields: Any) -> Experiment:
    return make_experiment(make_settings(config(**fields)), jax.devices()[:devices])
