"""A Vision Transformer of four encoder blocks on scikit-learn's digits, two modules with a head each.

python launch.py --config=examples/vit/config.py --workdir=runs/vit

In under a minute on one CPU core: test accuracy 98.1 and 97.5 % of modules 0 and 1, 97.8 % of their ensemble, seed 0.

Block 0 makes tokens of patches, blocks 1 to 4 are the encoder; any cut between them works, such as --config.model.modules=5
--config.model.split=count, and any engine.
"""

from ml_collections import ConfigDict

import examples.vit.vit  # noqa: F401 (registers the network)
from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = default_config()
    config.data.name = "digits"
    config.data.batch_size = 32
    config.model.name = "vit"
    config.model.width = 32
    config.model.modules = 2
    config.model.split = "0,3"
    config.model.head = "linear"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 2.0
    config.train.epochs = 20.0
    config.train.label_smoothing = 0.1
    return config
