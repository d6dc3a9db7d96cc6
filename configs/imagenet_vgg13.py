"""VGG-13 on ImageNet (ILSVRC 2012), one module per layer (K = 10) or in four modules.

python launch.py --config=configs/imagenet_vgg13.py --workdir=runs/vgg13
python launch.py --config=configs/imagenet_vgg13.py --workdir=runs/vgg13_k4 \
    --config.model.modules=4 --config.model.split=0,3,6,9

See Belilovsky et al. 2020, Table 3.

Hardware: one accelerator, or one per module with --config.engine.name=pipeline. Time: not run here.

Published top-1 (top-5) accuracy of the last module on the 50,000 validation images, which are the
`test` split here:

    K = 10      64.4 % (85.8 %, unconfirmed)
    K = 4       67.8 % (88.0 %)
    backprop    66.6 % (87.5 %)

A hundredth of the training images is held out to monitor the run. The published runs trained on all
of them (--config.data.validation_fraction=0), with float16 arithmetic (here float32; the nearest is
--config.model.dtype=bfloat16).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import imagenet


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = imagenet()
    config.model.name = "vgg13"
    config.model.modules = 10
    return config
