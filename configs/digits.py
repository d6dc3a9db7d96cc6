"""DGL on scikit-learn's 1,797 real 8x8 digits, a first run in under two minutes.

    python launch.py --config=configs/digits.py --workdir=runs/digits

The data set comes with the package. Four modules of one convolution each (the 4-layer network of
the paper's learning curves, narrowed), each with a head.

Hardware and time: 20 s on two idle CPU cores, two minutes on busy ones.

Test accuracy (359 images, so one is 0.28 %; seed 0): 98.1, 98.1, 98.1, 97.8 % for modules 0 to 3,
98.1 % for their ensemble. Other processors round differently.
"""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
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
