"""ResNet-18 for small images on CIFAR-10 in two modules: the stem and four blocks, then four blocks.

python launch.py --config=configs/cifar10_resnet18.py --workdir=runs/cifar10_resnet18

Hardware: one accelerator, or one a module with --config.engine.name=pipeline. Time: not run here.

Published by others, who ran DGL beside their own method (300 epochs, batch 128, learning rate 0.1), test accuracy:

    DGL, K = 2    94.79 %
    backprop      95.13 %

The epochs at which the rate falls and the weight decay are those of ResNet-110 beside this file, not theirs. A tenth of the
training images is held out; --config.data.validation_fraction=0 trains on all of them.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import cifar10_resnet


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = cifar10_resnet()
    config.model.name = "resnet18_cifar"
    config.model.width = 64
    config.model.split = "0,5"
    config.optimizer.learning_rate = 0.1
    return config
