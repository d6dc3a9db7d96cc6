"""ResNet-152 on ImageNet (ILSVRC 2012) in two modules of 26 and 25 blocks (Belilovsky et al. 2020, Table 3).

python launch.py --config=configs/imagenet_resnet152.py --workdir=runs/resnet152

The first module is the stem and 3 + 8 + 14 bottlenecks; its head reads 1024 channels at 14x14. It averages them to 4x4, a
quarter rounded up, as the paper has it; the released code took the map for 7x7 and averaged to 2x2.

Hardware: one accelerator, or one a module with --config.engine.name=pipeline. Time: not run here; memory of its programs:
benchmarks/memory.

Published, top-1 (top-5) accuracy of the last module on the 50,000 validation images, which are the `test` split here:

    K = 2       74.5 % (92.0 %)
    backprop    74.4 % (92.1 %)

A hundredth of the training images is held out to follow the run; the published runs trained on all of them
(--config.data.validation_fraction=0), with float16 arithmetic (here float32; --config.model.dtype=bfloat16 is the nearest).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import imagenet


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = imagenet()
    config.model.name = "resnet152"
    config.model.modules = 2
    config.model.split = "0,26"
    return config
