"""ResNet-110 on CIFAR-10 in two modules: the comparison with delayed gradients (Belilovsky et al. 2020, Table 2).

python launch.py --config=configs/cifar10_resnet110.py --workdir=runs/cifar10_resnet110

The first module is the stem, 18 blocks of 16 channels and 8 of 32; its head reads 32 channels at 16x16.

Hardware: one accelerator, or one a module with --config.engine.name=pipeline. Time: not run here.

Published, test accuracy of the last module:

    DGL, K = 2           93.5 +- 0.1 % over three runs; re-run by others 93.74 %
    backprop             93.53 %
    delayed gradients    93.41 % (unconfirmed)

A tenth of the training images is held out; the published runs trained on all of them (--config.data.validation_fraction=0).
"""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.augment = "crop_flip"
    config.model.name = "resnet110"
    config.model.width = 16
    config.model.modules = 2
    config.model.split = "0,27"
    config.model.head = "mlp_sr"
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    config.schedule.boundaries = (150.0, 225.0)
    config.schedule.factor = 0.1
    config.train.epochs = 300.0
    return config
