"""ResNet-110 on CIFAR-10 in two modules (Belilovsky et al. 2020, Table 2).

python launch.py --config=configs/cifar10_resnet110.py --workdir=runs/cifar10_resnet110

This is the paper's comparison with delayed gradients. The first module consists of the stem, 18
blocks of 16 channels and 8 of 32 channels; its head reads 32 channels at 16x16.

Hardware: one accelerator, or one per module with --config.engine.name=pipeline. Time: not run here.

Published test accuracy of the last module:

    DGL, K = 2           93.5 +- 0.1 % over three runs; reproduced by others: 93.74 %
    backprop             93.53 %
    delayed gradients    93.41 % (unconfirmed)

A tenth of the training images is held out. The published runs trained on all of them
(--config.data.validation_fraction=0).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import cifar10_resnet


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = cifar10_resnet()
    config.model.name = "resnet110"
    config.model.width = 16
    config.model.split = "0,27"
    config.optimizer.learning_rate = 0.01
    return config
