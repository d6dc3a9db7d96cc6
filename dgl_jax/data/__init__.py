"""Where images come from: `make_source` by name."""

from dgl_jax.config import DataSettings
from dgl_jax.data import folder, synthetic, tfds_sets  # noqa: F401 (they register their sets)
from dgl_jax.data.memory import ArraySource
from dgl_jax.data.source import DataKind, DataSet, Examples, Shard, Source, StoredOptions
from dgl_jax.data.streaming import RecordSet, RecordSource
from dgl_jax.errors import UserError
from dgl_jax.registry import DATA_SETS

register_data_set = DATA_SETS.register

__all__ = [
    "DATA_SETS",
    "ArraySource",
    "DataKind",
    "DataSet",
    "Examples",
    "RecordSet",
    "RecordSource",
    "Shard",
    "Source",
    "StoredOptions",
    "make_source",
    "register_data_set",
]


def make_source(settings: DataSettings, seed: int) -> Source:
    """The source of a data set; the seed decides the held-out images and the order.

    Raises:
      UserError: no such set, or the set cannot be had or does not fit the settings.
    """
    kind = DATA_SETS[settings.name]
    data = kind.make(settings)
    if settings.augment == "inception_crop" and isinstance(data, DataSet):
        raise UserError(
            f"config.data.augment=inception_crop: cuts photographs that are larger than the images trained on, and {data.name} "
            "is kept in memory at one size; use crop_flip or none"
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
