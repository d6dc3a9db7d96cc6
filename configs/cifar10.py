"""The paper's 6-layer CNN on CIFAR-10, one module per layer (Belilovsky et al. 2020, Table 1).

python launch.py --config=configs/cifar10.py --workdir=runs/cifar10
python launch.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.engine.name=pipeline

Every module but the last has an MLP-SR head. The second command runs each module on its own device
group.

Hardware: one accelerator, or with `pipeline` one per module. Time: not run here at this size (one
epoch takes hours on two CPU cores).

Published: 91.2 % test accuracy of the last module (not verified against the paper). At width 32 and
16 epochs: 79.5 %, benchmarks/cifar10_accuracy.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import cifar10


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = cifar10()
    config.model.name = "cnn6"
    config.model.width = 128
    config.model.modules = 6
    config.optimizer.learning_rate = 0.1
    config.schedule.boundaries = (15.0, 30.0, 45.0)
    config.schedule.factor = 0.2
    config.train.epochs = 50.0
    return config
