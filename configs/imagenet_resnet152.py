"""ResNet-152 on ImageNet (ILSVRC 2012) in two modules of 26 and 25 blocks.

python launch.py --config=configs/imagenet_resnet152.py --workdir=runs/resnet152

See Belilovsky et al. 2020, Table 3. The first module consists of the stem and 3 + 8 + 14
bottlenecks; its head reads 1024 channels at 14x14. The head averages them to 4x4, a quarter rounded
up, as the paper describes; the released code took the map for 7x7 and averaged to 2x2.

Hardware: one accelerator, or one per module with --config.engine.name=pipeline. Time: not run here;
for the memory of the programs see benchmarks/memory.

Published top-1 (top-5) accuracy of the last module on the 50,000 validation images, which are the
`test` split here:

    K = 2       74.5 % (92.0 %)
    backprop    74.4 % (92.1 %)

A hundredth of the training images is held out to monitor the run. The published runs trained on all
of them (--config.data.validation_fraction=0), with float16 arithmetic (here float32; the nearest is
--config.model.dtype=bfloat16).
"""

from ml_collections import ConfigDict

from dgl_jax.configs.bases import imagenet


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = imagenet()
    config.model.name = "resnet152"
    config.model.modules = 2
    config.model.split = "0,26"
    return config
