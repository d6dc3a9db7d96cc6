"""Where images come from: `make_source` by name, and `make_preprocess` for what happens to them on the device."""

from collections.abc import Callable

from dgl_jax.config import DataSettings, nearest
from dgl_jax.data import folder, streaming, synthetic, tfds_sets
from dgl_jax.data.memory import ArraySource
from dgl_jax.data.source import DataSet, Shard, Source
from dgl_jax.data.streaming import RecordSet, RecordSource
from dgl_jax.errors import UserError
from dgl_jax.tasks.image_classification import Preprocess, augment_key

__all__ = [
    "SHAPES",
    "ArraySource",
    "DataSet",
    "Preprocess",
    "RecordSource",
    "Shard",
    "Source",
    "augment_key",
    "make_preprocess",
    "make_source",
]

# A new set is one function from settings to a DataSet (in memory) or a RecordSet (decoded as needed), and one line here.
SETS: dict[str, Callable[[DataSettings], DataSet | RecordSet]] = {
    "digits": tfds_sets.load,
    "cifar10": tfds_sets.load,
    "cifar100": tfds_sets.load,
    "imagenet": streaming.load,
    "imagenette": streaming.load,
    "folder": folder.load,
    "synthetic": synthetic.load,
}
# Sets whose images are cut from photographs of any proportions: of these a network sees the middle.
PHOTOGRAPHS = tuple(name for name, load in SETS.items() if load is streaming.load)
# Of sets that are known before they are read: pixels a side (as stored, or as published work crops them), channels, classes.
SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (8, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "imagenet": (224, 3, 1000),
    "imagenette": (224, 3, 10),
    "synthetic": (32, 3, 10),
}
# Mean and standard deviation as published work uses them; those of other sets are computed from the training images.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": _IMAGENET,
    "imagenette": _IMAGENET,
}


def make_source(settings: DataSettings, seed: int) -> Source:
    """The source of a data set; the seed decides the held-out images and the order.

    Raises:
      UserError: no such set, or the set cannot be had or does not fit the settings.
    """
    if settings.name not in SETS:
        raise UserError(f"config.data.name={settings.name!r}: no such name; {nearest(settings.name, SETS)}")
    data = SETS[settings.name](settings)
    if settings.augment == "inception_crop" and isinstance(data, DataSet):
        raise UserError(
            f"config.data.augment=inception_crop: cuts photographs that are larger than the images trained on, and {data.name} "
            "is kept in memory at one size; use crop_flip or none"
        )
    mean, std = STATISTICS.get(settings.name, ((), ()))
    make = ArraySource if isinstance(data, DataSet) else RecordSource
    return make(
        data,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        seed=seed,
        validation_fraction=settings.validation_fraction,
        train_examples=settings.train_examples,
        mean=settings.mean or mean,
        std=settings.std or std,
    )


def make_preprocess(settings: DataSettings, source: Source) -> Preprocess:
    """The augmentation and normalisation that a source's images go through."""
    return Preprocess(settings.augment, source.mean, source.std)
