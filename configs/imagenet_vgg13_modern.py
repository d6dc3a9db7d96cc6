"""VGG-13 on ImageNet with a modern training recipe.

python launch.py --config=configs/imagenet_vgg13_modern.py --workdir=runs/vgg13_modern
python launch.py --config=configs/imagenet_vgg13_modern.py --workdir=runs/vgg13_modern_k4 \
    --config.model.modules=4 --config.model.split=0,3,6,9

Differs from configs/imagenet_vgg13.py in the recipe alone: cosine schedule with warm-up over
100 epochs, Nesterov momentum, label smoothing, and an exponential moving average of the parameters.

Time: not run here. To beat: 64.4 % (K = 10) and 67.8 % (K = 4) top-1 accuracy of the last module
with the paper's recipe.
"""

from ml_collections import ConfigDict

from dgl_jax.configs import imagenet_vgg13
from dgl_jax.configs.bases import modern


def get_config() -> ConfigDict:
    """Returns the configuration of this experiment."""
    return modern(imagenet_vgg13.get_config(), ema=0.9999)
