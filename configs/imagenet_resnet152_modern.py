"""ResNet-152 on ImageNet with a modern training recipe.

python launch.py --config=configs/imagenet_resnet152_modern.py --workdir=runs/resnet152_modern

Differs from configs/imagenet_resnet152.py in the recipe (cosine schedule with warm-up over 100
epochs, Nesterov momentum, label smoothing, an exponential moving average of the parameters) and in
the arithmetic, which is bfloat16. If memory is short, use --config.model.remat=True or
--config.train.accumulate=2.

Time: not run here. To beat: 74.5 % top-1 accuracy of the last module with the paper's recipe
(K = 2).
"""

from ml_collections import ConfigDict

from dgl_jax.configs import imagenet_resnet152
from dgl_jax.configs.bases import modern


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    config = modern(imagenet_resnet152.get_config(), ema=0.9999)
    config.model.dtype = "bfloat16"
    return config
