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

from dgl_jax.config import default_config


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = default_config()
    config.data.name = "imagenet"
    config.data.batch_size = 256
    config.data.validation_fraction = 0.01
    config.data.image_size = 224
    config.data.augment = "inception_crop"
    config.model.name = "resnet152"
    config.model.width = 64
    config.model.modules = 2
    config.model.split = "0,26"
    config.model.head = "mlp_sr"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.boundaries = (10.0, 20.0, 30.0, 40.0)
    config.schedule.factor = 0.1
    config.train.epochs = 50.0
    return config
