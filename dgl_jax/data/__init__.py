"""Data sets by name, and the sources that draw batches from them."""

from dgl_jax.config import DataSettings
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.data import folder, synthetic, tfds_sets  # noqa: F401 (they register their sets)
from dgl_jax.data.memory import ArraySource
from dgl_jax.data.source import (
    DataKind,
    DataSet,
    Examples,
    Layout,
    Shard,
    Source,
    StoredOptions,
    StoredSource,
)
from dgl_jax.data.streaming import RecordSet, RecordSource
from dgl_jax.errors import UserError

register_data_set = DATA_SETS.register

__all__ = [
    "DATA_SETS",
    "ArraySource",
    "DataKind",
    "DataSet",
    "Examples",
    "Layout",
    "RecordSet",
    "RecordSource",
    "Shard",
    "Source",
    "StoredOptions",
    "StoredSource",
    "make_source",
    "register_data_set",
]


def make_source(settings: DataSettings, seed: int) -> Source:
    """Builds the batch source of a configured data set.

    Args:
      settings: the group `config.data`; its `name` chooses the data set.
      seed: decides which examples are held out for validation, and the order of the batches.

    Returns:
      An `ArraySource` if the data set lies in memory, a `RecordSource` if it is decoded as needed.

    Raises:
      UserError: the data set is unknown, cannot be loaded, or does not fit the settings.
    """
    kind = DATA_SETS[settings.name]
    data = kind.make(settings)
    if settings.augment == "inception_crop" and isinstance(data, DataSet):
        raise UserError(
            "config.data.augment=inception_crop: needs photographs larger than the training "
            f"images, but {data.name} is kept in memory at a fixed size; use crop_flip or none"
        )
    make = ArraySource if isinstance(data, DataSet) else RecordSource
    return make(
        data,  # type: ignore[arg-type]
        batch_size=settings.batch_size,
        seed=seed,
        validation_fraction=settings.validation_fraction,
        train_examples=settings.train_examples,
        mean=settings.mean or kind.mean,
        std=settings.std or kind.std,
    )
