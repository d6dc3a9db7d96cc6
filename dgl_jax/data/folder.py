"""Images in directories: `<dir>/train/<class>/*` and `<dir>/test/<class>/*`."""

from pathlib import Path

import numpy as np

from dgl_jax.data import cache
from dgl_jax.data.decode import decode_images
from dgl_jax.data.source import DataSet, Examples
from dgl_jax.errors import UserError
from dgl_jax.paths import expand
from dgl_jax.settings import DataSettings

SUFFIXES = (".jpg", ".jpeg", ".png")


def load(settings: DataSettings) -> DataSet:
    """Reads an image folder.

    Classes are the directories of `train`, sorted; images become RGB and are sorted by name within a class.

    Raises:
      UserError: `config.data.dir` is empty or missing, lacks `train` or `test`, a directory holds no images, `test`
        has a class that `train` has not, a file is no image, or the images differ in size and `config.data.image_size`
        is 0.
    """
    if not settings.dir:
        raise UserError("config.data.dir is empty: data.name=folder needs a directory with train/<class>/ and test/<class>/")
    root = Path(expand(settings.dir, "config.data.dir"))
    if not root.is_dir():
        raise UserError(f"config.data.dir={settings.dir}: no such directory")
    files = {split: _list(root / split) for split in ("train", "test")}
    unknown = sorted(files["test"].keys() - files["train"].keys())
    if unknown:
        raise UserError(f"{root / 'test' / unknown[0]}: the class {unknown[0]} has no directory in {root / 'train'}")
    class_names = tuple(sorted(files["train"]))
    train, test = (_read(split, files[split], class_names, settings.image_size) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{root}: images in train have {_pixels(train)} pixels and images in test {_pixels(test)}: "
            "set config.data.image_size to resize all of them"
        )
    return DataSet("folder", class_names, train, test)


def _list(directory: Path) -> dict[str, list[Path]]:
    """The image files of each class."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; images belong in {directory}/<class>/")
    found = {}
    for each in directory.iterdir():
        if not each.is_dir() or each.name.startswith("."):
            continue
        # Hidden files are no images: macOS leaves a ._name.jpg beside each name.jpg.
        images = (f for f in each.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        found[each.name] = sorted(images)
        if not found[each.name]:
            raise UserError(f"{each}: holds no images ({', '.join(SUFFIXES)}); remove the directory or fill it")
    if not found:
        raise UserError(f"{directory}: holds no class directories; images belong in {directory}/<class>/")
    return found


def _read(split: str, files: dict[str, list[Path]], class_names: tuple[str, ...], image_size: int) -> Examples:
    paths = [path for name in class_names for path in files.get(name, ())]
    labels = np.repeat(np.arange(len(class_names)), [len(files.get(name, ())) for name in class_names])

    def decode() -> Examples:
        images = decode_images(len(paths), lambda i: paths[i], channels=3, image_size=image_size, describe=lambda i: str(paths[i]))
        return Examples(images, labels.astype(np.int32))

    return cache.decoded(("folder", split, class_names, image_size), paths, decode)


def _pixels(examples: Examples) -> str:
    return f"{examples.images.shape[2]}x{examples.images.shape[1]}"
