"""What a run keeps of itself: its configuration and its data set, read back and compared."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax.config import DataSettings, Settings, make_settings
from dgl_jax.errors import UserError

if TYPE_CHECKING:
    from dgl_jax.data import Source  # brings JAX, which the command line does without until its flags are read


@dataclass(frozen=True)
class DatasetInfo:
    """What a trained network must know of its data set; part of every checkpoint, so that it can answer without the data."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> str:
        """The image shape, for a message."""
        return "x".join(map(str, self.image_shape))

    @classmethod
    def of(cls, source: "Source") -> "DatasetInfo":
        """Of a data source."""
        mean, std = tuple(map(float, source.mean)), tuple(map(float, source.std))
        return cls(source.name, tuple(source.class_names), source.image_shape, mean, std)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DatasetInfo":
        """Of its JSON form."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
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
        if self.image_shape != found.image_shape:
            told.append(f"the run takes images of {self.shape}, the data are of {found.shape} (height, width, channels)")
        if told:
            folder = getattr(settings, "dir", "")
            place = f"config.data.dir={folder}" if folder else f"config.data.name={settings.name}"
            raise UserError(
                f"{place}: these are not the data of this run: {'; '.join(told)}; "
                "put its data back, or train on these in another --workdir"
            )


def listed(one: Sequence[str], other: Sequence[str], most: int = 12) -> tuple[str, str]:
    """Writes out two lists of class names for a message: whole, or of long ones the part where they begin to differ."""
    differ = next((n for n, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
    start = 0 if max(len(one), len(other)) <= most else max(0, differ - 2)

    def shown(names: Sequence[str]) -> str:
        stop = len(names) if len(names) <= most and not start else start + 5
        short = [name if len(name) <= 40 else f"{name[:40]}..." for name in names[start:stop]]
        dots = (["..."] if start else []), (["..."] if stop < len(names) else [])
        return f"{len(names)} classes ({', '.join([*dots[0], *short, *dots[1]])})"

    return shown(one), shown(other)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object, with at least these keys.

    Raises:
      UserError: it is missing, or holds something else; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(values, dict) else f"it holds {type(values).__name__} and not an object"
        missing = [key for key in keys if not reason and key not in values]
        reason = reason or (f"it lacks {missing[0]}" if missing else "")
    except FileNotFoundError:
        reason = "no such file"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise UserError(f"{path}: cannot be read ({reason}); restore the file")
    return values


def load_settings(path: Path) -> Settings:
    """Reads the configuration of a run from its `config.json`.

    Raises:
      UserError: see `read_json`, or it is no configuration; names the file.
    """
    values = read_json(path)
    try:
        return make_settings(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
