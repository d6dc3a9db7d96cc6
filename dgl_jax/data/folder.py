"""Data set `folder`: images in `<dir>/train/<class>/*` and `<dir>/test/<class>/*`."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgl_jax.config.fields import expand
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.data import cache
from dgl_jax.data.decode import ALPHA, FRAMES, GRAY, decode_images, image_kinds
from dgl_jax.data.source import DataKind, DataSet, Examples, StoredOptions
from dgl_jax.errors import UserError

_LOG = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
_MANY = 5000  # reading the headers of this many files takes a second, so the result is cached


def load(settings: StoredOptions) -> DataSet:
    """Reads an image folder into memory.

    Classes are the directories of `train`, sorted by name; within a class, images are sorted by
    name. The images have one channel if all of them are grayscale, otherwise three (RGB).

    Raises:
      UserError: `config.data.dir` is empty or missing, or lacks `train` or `test`; a directory
        holds no images; `test` has a class that `train` lacks; a file is not an image; or the
        images differ in size and `config.data.image_size` is 0.
    """
    if not settings.dir:
        raise UserError(
            "config.data.dir is empty: data.name=folder needs a directory with train/<class>/ "
            "and test/<class>/"
        )
    root = Path(expand(settings.dir, "config.data.dir"))
    if not root.is_dir():
        raise UserError(f"config.data.dir={settings.dir}: no such directory")
    files = {split: _list(root / split) for split in ("train", "test")}
    unknown = sorted(files["test"].keys() - files["train"].keys())
    if unknown:
        raise UserError(
            f"{root / 'test' / unknown[0]}: the class {unknown[0]} has no directory in "
            f"{root / 'train'}"
        )
    class_names = tuple(sorted(files["train"]))
    paths = {
        split: [path for name in class_names for path in files[split].get(name, ())]
        for split in files
    }
    channels = _channels(root, paths)
    train, test = (
        _read(split, paths[split], files[split], class_names, channels, settings.image_size)
        for split in files
    )
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise UserError(
            f"{root}: images in train have {_pixels(train)} pixels, but images in test have "
            f"{_pixels(test)}: set config.data.image_size to resize all of them"
        )
    return DataSet("folder", class_names, train, test)


def _list(directory: Path) -> dict[str, list[Path]]:
    """Lists the image files of each class; logs how many files are ignored."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; images belong in {directory}/<class>/")
    classes: dict[str, list[Path]] = {}
    ignored: Counter[str] = Counter()
    for folder in directory.iterdir():
        if folder.name.startswith("."):
            continue
        if not folder.is_dir():
            ignored["outside the class directories"] += 1
            continue
        # Hidden files are not images: macOS leaves a ._name.jpg beside each name.jpg.
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        images = [*filter(is_image, visible)]
        ignored.update(map(kind_of_file, {*visible} - {*images}))
        # Names and their order must not depend on the locale, hence the raw bytes.
        name = os.fsencode(folder.name).decode("utf-8", "surrogateescape")
        classes[name] = sorted(images, key=lambda file: os.fsencode(file.name))
        if not images:
            raise UserError(
                f"{folder}: holds no images ({', '.join(SUFFIXES)}); "
                "remove the directory or fill it"
            )
    if not classes:
        raise UserError(
            f"{directory}: holds no class directories; images belong in {directory}/<class>/"
        )
    log_ignored(directory, ignored, sum(map(len, classes.values())))
    return classes


def log_ignored(directory: Path, ignored: Counter[str], used: int) -> None:
    """Logs how many files of a directory are not images, by kind, beside the images used."""
    if ignored:
        count = sum(ignored.values())
        _LOG.warning(
            "%s: %d of %d files are not images and are ignored: %s",
            directory,
            count,
            count + used,
            ", ".join(f"{number} {kind}" for kind, number in sorted(ignored.items())),
        )


def is_image(path: Path) -> bool:
    """Returns whether a path has the suffix of an image and can be one.

    Folders, pipes and devices cannot: reading a pipe would wait for a writer. A broken link can, so
    that the error names it.
    """
    return path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())


def kind_of_file(path: Path) -> str:
    """Returns how the log names a path that is not an image."""
    if path.is_dir():
        return "folders"
    return path.suffix.lower() or "without a suffix" if path.is_file() else "pipes and devices"


def _channels(root: Path, paths: dict[str, list[Path]]) -> int:
    """Returns 1 if all images of both splits are grayscale, else 3; logs which content is lost."""
    files = [path for split in paths.values() for path in split]
    many = len(files) >= _MANY
    kinds = (
        cache.labels(("kinds",), files, lambda: image_kinds(files)) if many else image_kinds(files)
    )
    log_lost(str(root), kinds)
    return 1 if np.all(kinds & GRAY) else 3


def log_lost(name: str, kinds: np.ndarray) -> None:
    """Logs which content of images is not used, given what `image_kinds` returns for them."""
    for kind, warning in (
        (ALPHA, "have an alpha channel: transparency is ignored, the stored color is used"),
        (FRAMES, "have several frames: the first one is used"),
    ):
        if count := int(np.count_nonzero(kinds & kind)):
            _LOG.warning("%s: %d of %d images %s", name, count, len(kinds), warning)


def _read(
    split: str,
    paths: Sequence[Path],
    files: dict[str, list[Path]],
    class_names: tuple[str, ...],
    channels: int,
    image_size: int,
) -> Examples:
    """Reads the images of one split, from the cache if they are there."""
    counts = tuple(len(files.get(name, ())) for name in class_names)
    labels = np.repeat(np.arange(len(class_names)), counts)

    def decode() -> Examples:
        images = decode_images(
            len(paths),
            lambda i: paths[i],
            channels=channels,
            image_size=image_size,
            describe=lambda i: str(paths[i]),
        )
        return Examples(images, labels.astype(np.int32))

    # The counts: a link may have moved to another class, while the file it leads to has not.
    key = ("folder", split, class_names, counts, image_size, channels)
    return cache.decoded(key, paths, decode)


def _pixels(examples: Examples) -> str:
    return f"{examples.inputs.shape[2]}x{examples.inputs.shape[1]}"


DATA_SETS.ship(folder=DataKind(load, StoredOptions))
