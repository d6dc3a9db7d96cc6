"""ResNet-152 on ImageNet as configs/imagenet_resnet152.py, with today's recipe: cosine, warm-up, Nesterov, label smoothing, EMA.

python launch.py --config=configs/imagenet_resnet152_modern.py --workdir=runs/resnet152_modern

The arithmetic is bfloat16; where memory is short, --config.model.remat=True or --config.train.accumulate=2.

Not run here. To beat, top-1 accuracy of the last module with the paper's recipe: 74.5 % (K = 2).
"""

from ml_collections import ConfigDict

from dgl_jax.configs import imagenet_resnet152
from dgl_jax.configs.bases import modern


def get_config() -> ConfigDict:
    """See the top of this file."""
    config = modern(imagenet_resnet152.get_config(), ema=0.9999)
    config.model.dtype = "bfloat16"
    return config
