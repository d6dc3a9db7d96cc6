"""Decoded images and labels, kept in the project's cache directory."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dgl_jax.data.source import Examples
from dgl_jax.system import cache_dir

_LOG = logging.getLogger(__name__)

_VERSION = 2  # raised when decoding gives other pixels than before: older entries are then not found any more
LARGE = (
    16 << 20
)  # bytes of decoded images from which keeping them pays: less is decoded within a second or two


def decoded(
    key: Iterable[object], files: Iterable[Path], decode: Callable[[], Examples]
) -> Examples:
    """The images of a split: from the cache, or decoded and, where they are many, kept for the next time.

    Args:
      key: what determines the result besides the files, such as the name of the set and the image size.
      files: what is decoded. Paths, sizes and modification times are compared, contents are not.
      decode: makes the arrays; called where the cache has no such entry.

    Returns:
      Arrays that may be mapped from a file, read-only.
    """
    entry = cache_dir() / "decoded" / _digest(key, files)
    try:
        # asarray drops the memmap class and keeps the mapping.
        images = np.asarray(np.load(entry / "images.npy", mmap_mode="r"))
        return Examples(images, np.load(entry / "labels.npy"))
    except (OSError, ValueError, EOFError):  # none, cut short or empty
        pass
    examples = decode()
    if examples.inputs.nbytes >= LARGE:
        try:
            _write(entry, examples)
        except OSError as error:
            _LOG.warning("decoded images are not kept for the next run: %s", error)
    return examples


def labels(
    key: Iterable[object], files: Iterable[Path], read: Callable[[], np.ndarray]
) -> np.ndarray:
    """The labels of a split, or other numbers of its images: from the cache, or read and kept for the next time.

    See `decoded` for the arguments.
    """
    entry = cache_dir() / "labels" / f"{_digest(key, files)}.npy"
    try:
        return np.load(entry)
    except (OSError, ValueError, EOFError):
        pass
    found = read()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".npy", delete=False) as scratch:
            _save(Path(scratch.name), found)
        os.replace(scratch.name, entry)
    except OSError as error:
        _LOG.warning("labels are not kept for the next run: %s", error)
    return found


def _digest(key: Iterable[object], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr((_VERSION, *key)).encode())
    for file in files:
        stat = file.stat()
        digest.update(repr((str(file.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:32]


def _write(entry: Path, examples: Examples) -> None:
    """Writes beside the entry and renames: a reader sees all of it or nothing, whoever else writes the same."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        _save(scratch / "images.npy", examples.inputs)
        _save(scratch / "labels.npy", examples.labels)
        shutil.rmtree(entry, ignore_errors=True)  # an entry that could not be read
        os.rename(scratch, entry)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (entry / "labels.npy").exists():  # else another process was first
            raise


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(
            file.fileno()
        )  # else a power cut after the rename could leave an empty file under the final name
