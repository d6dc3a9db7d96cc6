"""VGG-19 on ImageNet (ILSVRC 2012) in four or two modules with equal numbers of convolutions.

python launch.py --config=configs/imagenet_vgg19.py --workdir=runs/vgg19
python launch.py --config=configs/imagenet_vgg19.py --workdir=runs/vgg19_k2 \
    --config.model.modules=2 --config.model.split=0,8

See Belilovsky et al. 2020, Table 3.

Hardware: one accelerator, or one per module with --config.engine.name=pipeline. Time: not run here.

Published top-1 (top-5) accuracy of the last module on the 50,000 validation images, which are the
`test` split here:

    K = 4       69.2 % (89.0 %)
    K = 2       70.8 % (90.2 %), unconfirmed
    backprop    69.7 % (89.7 %)

A hundredth of the training images is held out to monitor the run. The published runs trained on all
of them (--config.data.validation_fraction=0), with float16 arithmetic (here float32; the nearest is
--config.model.dtype=bfloat16).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import imagenet


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = imagenet()
    config.model.name = "vgg19"
    config.model.modules = 4
    config.model.split = "0,4,8,12"
    return config
