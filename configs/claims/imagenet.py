r"""Claim: DGL scales to ImageNet, with four modules as with back-propagation.

    python launch.py --mode=sweep --sweep=configs/claims/imagenet.py:small --workdir=runs/imagenet \
        --config.data.dir=FOLDER
    python launch.py --mode=report --workdir=runs/imagenet

VGG-13 in 4 and in 10 modules, at the full size also VGG-19 and ResNet-152. The small size trains a
network of an eighth of the width on any folder of images at 64 pixels, with padded crops and
mirroring.

Published top-1 accuracy (50 epochs): VGG-13 K = 4 67.8 %, K = 10 64.4 %, back-propagation 66.6 %;
VGG-19 K = 4 69.2 %, K = 2 70.8 % (unverified), back-propagation 69.7 %; ResNet-152 K = 2 74.5 %,
back-propagation 74.4 %.
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import imagenet
from dgl_jax.configs.claims import _common as common

ROWS: common.Variants = {
    "dgl,K=4": {"model.modules": 4, "model.split": "0,3,6,9"},
    "dgl,K=10": {"model.modules": 10},
    "backprop": {"method.name": "backprop", "model.modules": 1},
}
DEEPER: common.Variants = {
    "vgg19/dgl,K=4": {"model.name": "vgg19", "model.modules": 4},
    "vgg19/dgl,K=2": {"model.name": "vgg19", "model.modules": 2},
    "vgg19/backprop": {"model.name": "vgg19"} | ROWS["backprop"],
    "resnet152/dgl,K=2": {"model.name": "resnet152", "model.modules": 2},
    "resnet152/backprop": {"model.name": "resnet152"} | ROWS["backprop"],
}
CHOSEN: dict[str, float] = {"dgl,K=4": 0.1, "dgl,K=10": 0.1, "backprop": 0.1}


def base(full: bool) -> ConfigDict:
    """Returns the configuration that the rows share."""
    config = imagenet()
    config.model.name = "vgg13"
    config.checkpoint.keep = 1
    if not full:
        config.data.name, config.data.image_size = "folder", 64
        config.data.train_examples, config.data.batch_size = 10_000, 128
        config.data.validation_fraction, config.data.augment = 0.1, "crop_flip"
        config.model.width = 8
        config.schedule = common.small_cifar10().schedule
        config.train.epochs = 16.0
    return config


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    default = imagenet().optimizer.learning_rate if size == "full" else 0.03
    rows = ROWS | DEEPER if size == "full" else ROWS
    return common.sweep(base, rows, size, CHOSEN, default=default)
