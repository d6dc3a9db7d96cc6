"""VGG-19 on ImageNet with a modern training recipe.

python launch.py --config=configs/imagenet_vgg19_modern.py --workdir=runs/vgg19_modern
python launch.py --config=configs/imagenet_vgg19_modern.py --workdir=runs/vgg19_modern_k2 \
    --config.model.modules=2 --config.model.split=0,8

Differs from configs/imagenet_vgg19.py in the recipe alone: cosine schedule with warm-up over
100 epochs, Nesterov momentum, label smoothing, and an exponential moving average of the parameters.

Time: not run here. To beat: 69.2 % (K = 4) and 70.8 % (K = 2, unconfirmed) top-1 accuracy of the
last module with the paper's recipe.
"""

from ml_collections import ConfigDict

from dgl_jax.configs import imagenet_vgg19
from dgl_jax.configs.bases import modern


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    return modern(imagenet_vgg19.get_config(), ema=0.9999)
