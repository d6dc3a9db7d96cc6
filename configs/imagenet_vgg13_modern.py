"""VGG-13 on ImageNet as configs/imagenet_vgg13.py, with today's recipe: cosine, warm-up, Nesterov, label smoothing, EMA.

python launch.py --config=configs/imagenet_vgg13_modern.py --workdir=runs/vgg13_modern
python launch.py --config=configs/imagenet_vgg13_modern.py --workdir=runs/k4 --config.model.modules=4 --config.model.split=0,3,6,9

Not run here. To beat, top-1 accuracy of the last module with the paper's recipe: 64.4 % (K = 10) and 67.8 % (K = 4).
"""

from ml_collections import ConfigDict

from dgl_jax.configs import imagenet_vgg13
from dgl_jax.configs.bases import modern


def get_config() -> ConfigDict:
    """See the top of this file."""
    return modern(imagenet_vgg13.get_config(), ema=0.9999)
