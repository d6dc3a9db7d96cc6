"""What several experiments share, on top of the defaults: a page begins with one of these and sets what is its own."""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def cifar10() -> ConfigDict:
    """Returns the paper's data, optimizer and kind of schedule on CIFAR-10; the page sets when its rate falls."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.augment = "crop_flip"
    config.model.head = "mlp_sr"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "step"
    return config


def cifar10_resnet() -> ConfigDict:
    """Returns what the residual networks on CIFAR-10 share: two modules, 300 epochs."""
    config = cifar10()
    config.model.modules = 2
    config.schedule.boundaries = (150.0, 225.0)
    config.schedule.factor = 0.1
    config.train.epochs = 300.0
    return config


def imagenet() -> ConfigDict:
    """Returns the paper's recipe on ImageNet; the page sets the network and where it is cut."""
    config = default_config()
    config.data.name = "imagenet"
    config.data.batch_size = 256
    config.data.validation_fraction = 0.01
    config.data.image_size = 224
    config.data.augment = "inception_crop"
    config.model.width = 64
    config.model.head = "mlp_sr"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.schedule.name = "step"
    config.schedule.boundaries = (10.0, 20.0, 30.0, 40.0)
    config.schedule.factor = 0.1
    config.train.epochs = 50.0
    return config


def modern(config: ConfigDict, ema: float) -> ConfigDict:
    """Returns the experiment with today's recipe: cosine with warm-up, Nesterov's momentum, label smoothing, averaged parameters.

    Args:
      config: changed in place.
      ema: decay of the average; a longer epoch wants one nearer to 1.
    """
    config.optimizer.nesterov = True
    config.schedule = (
        default_config().schedule
    )  # without the boundaries of the paper's schedule, which a cosine has no use for
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    config.train.epochs = 100.0
    config.train.label_smoothing = 0.1
    config.train.ema = ema
    return config
