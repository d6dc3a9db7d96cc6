"""What a run remembers of its data set, and how it tells that the data are others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgl_jax.config import DataSettings
from dgl_jax.data.source import Source
from dgl_jax.errors import UserError


@dataclass(frozen=True)
class DatasetInfo:
    """Describes a data set to a trained network; part of every checkpoint, so that it can answer without the data.

    Attributes:
      class_names: by label.
      example_shape, example_dtype: of a stored example, of images (height, width, channels) and uint8.
      label_shape: of the label of an example.
      mean, std: of each channel, of images scaled to 0 ... 1; empty unless the examples are images.
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
        """Returns shape and type of an example, and the shape of its label, as text for a message."""
        example, label = (
            "x".join(map(str, shape)) for shape in (self.example_shape, self.label_shape)
        )
        return f"{example} {self.example_dtype}" + (f" with {label} labels" if label else "")

    @classmethod
    def of(cls, source: Source) -> "DatasetInfo":
        """Describes a data source."""
        mean, std = tuple(map(float, source.mean)), tuple(map(float, source.std))
        shapes = source.example_shape, mean, std, source.example_dtype, source.label_shape
        return cls(source.name, tuple(source.class_names), *shapes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        """Reads the JSON form, as `dataclasses.asdict` makes it."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)

    def check(self, found: "DatasetInfo", settings: DataSettings) -> None:
        """Checks that the data found now are of the classes and the shape that a run was trained on.

        Mean and deviation may differ, as they do when images are added: the run keeps its own.

        Raises:
          UserError: they are not; shows both.
        """
        told = []
        if self.class_names != found.class_names:
            known, now = listed(self.class_names, found.class_names)
            told.append(f"the run knows {known}, the data have {now}")
        if self.shape != found.shape:
            told.append(f"the run takes examples of {self.shape}, the data are of {found.shape}")
        if told:
            folder = getattr(settings, "dir", "")
            place = f"config.data.dir={folder}" if folder else f"config.data.name={settings.name}"
            raise UserError(
                f"{place}: these are not the data of this run: {'; '.join(told)}; "
                "put its data back, or train on these in another --workdir"
            )


def listed(one: Sequence[str], other: Sequence[str], most: int = 12) -> tuple[str, str]:
    """Writes out two lists of class names for a message: whole, or of long ones the part where they begin to differ."""
    differ = next(
        (n for n, pair in enumerate(zip(one, other)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    start = 0 if max(len(one), len(other)) <= most else max(0, differ - 2)

    def shown(names: Sequence[str]) -> str:
        stop = len(names) if len(names) <= most and not start else start + 5
        short = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[start:stop]]
        dots = (["..."] if start else []), (["..."] if stop < len(names) else [])
        return f"{len(names)} classes ({', '.join([*dots[0], *short, *dots[1]])})"

    return shown(one), shown(other)
