"""ResNet-18 for small images on CIFAR-10 in two modules.

python launch.py --config=configs/cifar10_resnet18.py --workdir=runs/cifar10_resnet18

The first module consists of the stem and four blocks, the second of four blocks.

Hardware: one accelerator, or one per module with --config.engine.name=pipeline. Time: not run here.

Published test accuracy, by other authors who ran DGL as a baseline of their own method (300 epochs,
batch 128, learning rate 0.1):

    DGL, K = 2    94.79 %
    backprop      95.13 %

The weight decay and the epochs at which the learning rate falls are taken from
configs/cifar10_resnet110.py, not from the published runs. A tenth of the training images is held
out; --config.data.validation_fraction=0 trains on all of them.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import cifar10_resnet


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = cifar10_resnet()
    config.model.name = "resnet18_cifar"
    config.model.width = 64
    config.model.split = "0,5"
    config.optimizer.learning_rate = 0.1
    return config
