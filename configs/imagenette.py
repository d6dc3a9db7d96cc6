"""ResNet-18 on Imagenette (ten classes of ImageNet) at 128 pixels, affordable on one machine.

python launch.py --config=configs/imagenette.py --workdir=runs/imagenette

Four modules, one per stage of the network: the stem and the blocks of 64 channels, then the blocks
of 128, 256 and 512 channels. 9,469 training images; a forward pass takes 0.6e9 multiplications per
image.

Hardware: one accelerator, or a CPU and patience. Time and accuracy: not run here, and no result of
DGL on this data set is published.
"""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = default_config()
    config.data.name = "imagenette"
    config.data.batch_size = 64
    config.data.image_size = 128
    config.data.augment = "inception_crop"
    config.model.name = "resnet18"
    config.model.width = 64
    config.model.modules = 4
    config.model.split = "0,3,5,7"
    config.model.head = "mlp_sr"
    config.optimizer.learning_rate = 0.05
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 2.0
    config.train.epochs = 40.0
    return config
