"""Settings shared by several experiments; each experiment starts from one and sets the rest."""

from ml_collections import ConfigDict

from dgl_jax.config import default_config


def cifar10() -> ConfigDict:
    """Returns the paper's data, optimizer and step schedule on CIFAR-10.

    The experiment sets the epochs at which the learning rate falls.
    """
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
    """Returns the settings shared by residual networks on CIFAR-10: two modules, 300 epochs."""
    config = cifar10()
    config.model.modules = 2
    config.schedule.boundaries = (150.0, 225.0)
    config.schedule.factor = 0.1
    config.train.epochs = 300.0
    return config


def imagenet() -> ConfigDict:
    """Returns the paper's recipe on ImageNet; the experiment sets the network and its cut."""
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
    """Changes an experiment to a modern recipe and returns it.

    The recipe is a cosine schedule with warm-up over 100 epochs, Nesterov momentum, label
    smoothing, and an exponential moving average of the parameters.

    Args:
      config: the experiment, which is changed in place.
      ema: decay of the moving average; longer epochs need a decay closer to 1.
    """
    config.optimizer.nesterov = True
    # Reset the group, because the boundaries of the paper's schedule do not apply to a cosine.
    config.schedule = default_config().schedule
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    config.train.epochs = 100.0
    config.train.label_smoothing = 0.1
    config.train.ema = ema
    return config
