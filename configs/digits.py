"""DGL on scikit-learn's 1,797 real 8x8 digits, the set that comes with the package: a first run in under two minutes.

    python launch.py --config=configs/digits.py --workdir=runs/digits

In 20 s on two CPU cores (two minutes where others use them too): test accuracy 98.1, 98.1, 98.1, 97.8 % of modules 0 to 3, 98.1 %
of their ensemble, 359 test images (one is 0.28 %), seed 0; other processors round otherwise.

Four modules of one convolution each (the 4-layer network of the paper's learning curves, narrowed), each with its own head.
"""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = default_config()
    config.data.name = "digits"
    config.data.batch_size = 64
    config.model.name = "cnn4"
    config.model.width = 32
    config.model.modules = 4
    config.optimizer.learning_rate = 0.05
    config.schedule.name = "cosine"
    config.train.epochs = 20.0
    return config
