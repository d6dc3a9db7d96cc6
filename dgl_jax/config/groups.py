"""Groups of configuration fields, one frozen dataclass per group.

A group with a field `name` chooses a registered kind by it (`registry.py`); the options of that
kind derive from the group's dataclass and add fields to the group.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dgl_jax.config import registry
from dgl_jax.config.fields import MANY, SEVERAL, Applies, Having, choice, kind_of, number, option
from dgl_jax.errors import UserError

if TYPE_CHECKING:
    from dgl_jax.config.settings import Settings


class Group:
    """Base class of the groups, and of the options of the registered kinds."""

    def check(self, settings: "Settings") -> None:
        """Raises UserError if the fields contradict each other or the rest of the settings."""


_IMAGES: Applies = {"task.images": (True,)}
_HEADS: Applies = {"method.local": (True,), "objective.heads": (True,), **SEVERAL}


@dataclass(frozen=True)
class DataSettings(Group):
    """Group `data`: the examples.

    Attributes:
      name: data set.
      batch_size: examples per update; at least 2, because batch norm needs a variance.
      validation_fraction: fraction of the training examples that is held out, stratified by class;
        0: none.
      train_examples: size of a stratified subset of the training examples; 0: all of them.
      augment: augmentation of training images.
      image_size: side in pixels after resizing; 0: as stored (ImageNet: 224).
      mean: mean of each channel, of images scaled to [0, 1]; empty: the published values, if there
        are any, otherwise computed from the training images.
      std: standard deviation of each channel, likewise.
      on_device: "auto" keeps a data set that lies in arrays on an accelerator if it takes at most a
        quarter of the memory that is free there; "on" always keeps it on the devices of the first
        module, "off" never.
    """

    name: str = kind_of(registry.DATA_SETS, "digits")
    batch_size: int = number(128, 2, MANY)
    validation_fraction: float = number(0.1, 0.0, 0.9)
    train_examples: int = number(0, 0, MANY)
    augment: str = choice("none", "crop_flip", "inception_crop", applies=_IMAGES)
    image_size: int = number(0, 0, 4096, applies=_IMAGES)
    mean: tuple[float, ...] = option((), _IMAGES)
    std: tuple[float, ...] = option((), _IMAGES)
    on_device: str = choice("auto", "on", "off", free=True)

    def check(self, settings: "Settings") -> None:
        """Raises UserError if mean and std differ in length or are not on the scale of [0, 1]."""
        means, stds = len(self.mean), len(self.std)
        if means != stds:
            raise UserError(f"config.data.mean has {means} values, but config.data.std has {stds}")
        for name, least in (("mean", 0.0), ("std", 1e-3)):
            values = getattr(self, name)
            if not all(least <= value <= 1 for value in values):
                raise UserError(
                    f"config.data.{name}={values}: every value must be between {least:g} and 1, as "
                    "the images are scaled to [0, 1]; divide values for pixels from 0 to 255 by 255"
                )


@dataclass(frozen=True)
class TaskSettings(Group):
    """Group `task`: what the examples are and what the network predicts.

    Attributes:
      name: task.
    """

    name: str = kind_of(registry.TASKS, "image_classification")


@dataclass(frozen=True)
class ModelSettings(Group):
    """Group `model`: the network and its cut into modules.

    Attributes:
      name: network.
      width: channels of the first block.
      modules: number of modules K.
      split: where the network is cut: "count" (blocks), "flops", "time" (minimizes the time of the
        slowest module), or the first block of each module such as "0,2,4".
      head: head of every module but the last.
      adapter: input adapter in front of every module.
      dtype: dtype of the arithmetic; parameters and batch statistics stay float32.
      remat: True recomputes each block in the backward pass instead of storing its intermediates.
      ops: "auto" uses the fastest implementation on each platform; "xla" uses only XLA's own, which
        support all derivatives; "joint" is "auto" with two sums of batch norm per reduction, which
        saves kernels on a GPU.
      logits: dtype in which the last layer of every head is computed: "float32" or that of the
        "model"; the loss is computed in float32 in any case.
      pointwise: how heads compute their 1x1 convolutions: "conv" as convolutions, "dot" as matrix
        products.
      init: initial weights of convolutions and linear layers: the "default" of each layer, or
        "orthogonal" matrices.
      init_gain: factor of the orthogonal matrices.
    """

    name: str = kind_of(registry.NETWORKS, "cnn4")
    width: int = number(64, 1, 65536)
    modules: int = number(4, 1, 4096)
    split: str = option("count", SEVERAL)
    head: str = kind_of(registry.HEADS, "mlp_sr", applies=_HEADS)
    adapter: str = kind_of(registry.ADAPTERS, "none")
    dtype: str = choice("float32", "bfloat16")
    remat: bool = option(False, free=True)
    ops: str = choice("auto", "xla", "joint")
    logits: str = choice("float32", "model", applies={"model.dtype": ("bfloat16",)})
    pointwise: str = choice(
        "conv", "dot", applies={**_HEADS, "model.head": Having(registry.HEADS, "pointwise")}
    )
    init: str = choice("default", "orthogonal")
    init_gain: float = number(
        1.0, 0.0, 1e6, exclusive=True, applies={"model.init": ("orthogonal",)}
    )


@dataclass(frozen=True)
class ObjectiveSettings(Group):
    """Group `objective`: what every module minimizes.

    Attributes:
      name: objective.
      context_input: True adds a small learned encoding of the image to the inputs of every module
        but the first, in training and evaluation.
      transport: weight of the squared residuals of a module's blocks, which are added to its loss;
        needs a network of residual blocks; 0: none.
    """

    name: str = kind_of(registry.OBJECTIVES, "classifier")
    context_input: bool = option(False, applies={**_IMAGES, **SEVERAL})
    transport: float = number(0.0, 0.0, 1e6)

    def remarks(self, settings: "Settings", classes: int) -> list[str]:
        """Returns warnings about consequences that the user may not expect."""
        return []


@dataclass(frozen=True)
class MethodSettings(Group):
    """Group `method`: the training rule.

    Attributes:
      name: method.
    """

    name: str = kind_of(registry.METHODS, "dgl")


@dataclass(frozen=True)
class OptimizerSettings(Group):
    """Group `optimizer`: the update rule, the same for all modules.

    Attributes:
      name: optimizer.
      learning_rate: learning rate before the schedule scales it.
      weight_decay: factor of the parameters that is added to their gradients.
      flat: True joins all parameters of a module to one vector for the update, which then takes few
        kernels on a GPU. Not free to change on resume, because it decides the shapes of the
        optimizer's state.
    """

    name: str = kind_of(registry.OPTIMIZERS, "sgd")
    learning_rate: float = number(0.1, 0.0, 1e30, exclusive=True)
    weight_decay: float = number(5e-4, 0.0, 1e6)
    flat: bool = option(False, applies={"optimizer.elementwise": (True,)})


@dataclass(frozen=True)
class ScheduleSettings(Group):
    """Group `schedule`: the learning rate over the epochs.

    The schedule is the same for all modules; each module follows it by its own update count.

    Attributes:
      name: schedule.
      warmup_epochs: epochs of a linear rise from 0 before any schedule.
    """

    name: str = kind_of(registry.SCHEDULES, "constant")
    warmup_epochs: float = number(0.0, 0.0, 1e6)


@dataclass(frozen=True)
class TrainSettings(Group):
    """Group `train`: length of training and details of the update.

    Attributes:
      epochs: length of training in epochs, unless `steps` is above 0.
      steps: length in updates per module; 0: as many as `epochs` has.
      accumulate: micro-batches per batch; their mean gradient makes one update.
      label_smoothing: share of each target that is spread over all classes, in every head's loss.
      ema: decay of the moving average of the parameters that is evaluated; 0: none. Not free to
        change on resume, because it decides which arrays a checkpoint holds.
    """

    epochs: float = number(50.0, 0.0, 1e6, free=True, applies={"train.steps": (0,)})
    steps: int = number(0, 0, MANY, free=True)
    accumulate: int = number(1, 1, MANY, free=True)
    label_smoothing: float = number(0.0, 0.0, 1.0, free=True)
    ema: float = number(0.0, 0.0, 0.999999)


@dataclass(frozen=True)
class EngineSettings(Group):
    """Group `engine`: where and when modules run.

    Attributes:
      name: engine.
    """

    name: str = kind_of(registry.ENGINES, "fused")


_RINGS: Applies = {"engine.asynchronous": (True,), **SEVERAL}


@dataclass(frozen=True)
class ReplaySettings(Group):
    """Group `replay`: the rings at the entrances of modules 1 to K-1 in asynchronous engines.

    Attributes:
      size: messages per ring.
      rule: chooses the message to read.
      max_reuse: how often a message may be read; 0: without limit.
      at_limit: when no message may be read, "wait" postpones the turn and "skip" drops it.
    """

    size: int = number(50, 1, MANY, applies=_RINGS)
    rule: str = kind_of(registry.RULES, "least_used_latest", applies=_RINGS)
    max_reuse: int = number(0, 0, MANY, applies=_RINGS)
    at_limit: str = choice("wait", "skip", applies={**_RINGS, "engine.continuous": (False,)})


@dataclass(frozen=True)
class CodecSettings(Group):
    """Group `codec`: encoding of the messages between modules, also inside the rings.

    Attributes:
      name: codec.
    """

    name: str = kind_of(registry.CODECS, "identity", applies=SEVERAL)


@dataclass(frozen=True)
class CheckpointSettings(Group):
    """Group `checkpoint`: when the run is saved.

    Attributes:
      every: steps between checkpoints; 0: once per epoch.
      keep: number of newest checkpoints to keep; the best one on validation is kept in addition.
      replay_every: least number of steps between two checkpoints that hold the replay rings, which
        are large; 0: none does, and resuming is then not exact.
    """

    every: int = number(0, 0, MANY, free=True)
    keep: int = number(2, 1, MANY, free=True)
    replay_every: int = number(1, 0, MANY, free=True, applies=_RINGS)


@dataclass(frozen=True)
class EvalSettings(Group):
    """Group `eval`: when and how the run is evaluated on the validation examples.

    Attributes:
      every: steps between evaluations; 0: once per epoch.
      codec: True encodes messages between modules as in training, with the published codebooks;
        False passes the activations unencoded.
    """

    every: int = number(0, 0, MANY, free=True)
    codec: bool = option(True, free=True, applies={"codec.lossless": (False,)})


_DIAGNOSED: Applies = {"diagnostics.enabled": (True,)}


@dataclass(frozen=True)
class DiagnosticsSettings(Group):
    """Group `diagnostics`: measurements of convergence on a fixed probe set.

    Attributes:
      enabled: True measures gradient norms, and the drift of each module's inputs.
      every: steps between two probes.
      batches: training batches in the probe set.
      projections: random directions on which the inputs of a module are compared.
    """

    enabled: bool = option(False, free=True)
    every: int = number(200, 1, MANY, free=True, applies=_DIAGNOSED)
    batches: int = number(2, 1, 65536, applies=_DIAGNOSED)
    projections: int = number(64, 1, 65536, applies=_DIAGNOSED)


@dataclass(frozen=True)
class LogSettings(Group):
    """Group `log`: when and where training metrics are written.

    Attributes:
      every: steps between entries; 0: once per epoch.
      tensorboard: True also writes TensorBoard files.
    """

    every: int = number(50, 0, MANY, free=True)
    tensorboard: bool = option(False, free=True)
