"""Metadata of a run's data set, stored in every checkpoint and compared when the run resumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgl_jax.config import DataSettings
from dgl_jax.data.source import Source
from dgl_jax.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a data set, stored in checkpoints so that a network works without the data.

    Attributes:
      name: of the data set.
      class_names: names of the classes, indexed by label.
      example_shape: shape of a stored example; of images (height, width, channels).
      mean: mean of each channel, of images scaled to [0, 1]; empty unless the examples are images.
      std: standard deviation of each channel, likewise.
      example_dtype: dtype of a stored example; of images uint8.
      label_shape: shape of an example's label; () for one label per example.
    """

    name: str
    class_names: tuple[str, ...]
    example_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    example_dtype: str = "uint8"
    label_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> str:
        """Returns shape and dtype of an example, and the shape of its label, as text."""
        example, label = (
            "x".join(map(str, shape)) for shape in (self.example_shape, self.label_shape)
        )
        return f"{example} {self.example_dtype}" + (f" with {label} labels" if label else "")

    @classmethod
    def of(cls, source: Source) -> "DatasetInfo":
        """Collects the metadata of a data source."""
        mean, std = tuple(map(float, source.mean)), tuple(map(float, source.std))
        rest = source.example_shape, mean, std, source.example_dtype, source.label_shape
        return cls(source.name, tuple(source.class_names), *rest)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        """Restores the metadata from `dataclasses.asdict`, also after a round trip through JSON."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)

    def check(self, current: "DatasetInfo", settings: DataSettings) -> None:
        """Checks that a data set has the classes and the example shape that a run was trained on.

        Mean and standard deviation may differ, for example after images were added: the run keeps
        the stored ones.

        Args:
          current: present metadata of the data set.
          settings: the group `config.data`; names the data set in the error message.

        Raises:
          UserError: classes or shapes differ; the message shows both.
        """
        problems = []
        if self.class_names != current.class_names:
            known, now = listed(self.class_names, current.class_names)
            problems.append(f"the run was trained on {known}, the data have {now}")
        if self.shape != current.shape:
            problems.append(
                f"the run expects examples of {self.shape}, the data have {current.shape}"
            )
        if problems:
            folder = getattr(settings, "dir", "")
            place = f"config.data.dir={folder}" if folder else f"config.data.name={settings.name}"
            raise UserError(
                f"{place}: the data do not match this run: {'; '.join(problems)}; "
                "restore the original data, or train on these in another --workdir"
            )


def listed(one: Sequence[str], other: Sequence[str], most: int = 12) -> tuple[str, str]:
    """Formats two lists of class names for a message that shows how they differ.

    Args:
      one: the first list.
      other: the second list.
      most: lists of up to this length are shown whole; longer ones only around the first
        difference.

    Returns:
      One text per list, such as "3 classes (ape, cat, zebra)".
    """
    differ = next(
        (n for n, pair in enumerate(zip(one, other)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    start = 0 if max(len(one), len(other)) <= most else max(0, differ - 2)

    def text(names: Sequence[str]) -> str:
        stop = len(names) if len(names) <= most and not start else start + 5
        short = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[start:stop]]
        before, after = (["..."] if start else []), (["..."] if stop < len(names) else [])
        return f"{len(names)} classes ({', '.join([*before, *short, *after])})"

    return text(one), text(other)
