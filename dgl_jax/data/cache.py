"""Cache of decoded images and of labels, in the project's cache directory."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dgl_jax.data.source import Examples
from dgl_jax.errors import UserError
from dgl_jax.system import cache_dir

_LOG = logging.getLogger(__name__)

_VERSION = 2  # increment when decoding changes the pixels, so that older entries are not used
LARGE = 16 << 20  # bytes; smaller sets decode within a second or two and are not worth caching


def decoded(
    key: Iterable[object], files: Iterable[Path], decode: Callable[[], Examples]
) -> Examples:
    """Returns the decoded images of a split from the cache, or decodes and caches them.

    Only sets of at least `LARGE` bytes are cached.

    Args:
      key: everything besides the files that determines the result, such as the name of the data set
        and the image size.
      files: the files that are decoded. An entry matches if paths, sizes and modification times
        are equal; contents are not compared.
      decode: decodes the images; called if the cache has no entry.

    Returns:
      Images and labels. The images may be a read-only memory map of a file.
    """
    entry = cache_dir() / "decoded" / _digest(key, files)
    try:
        # asarray drops the memmap class but keeps the mapping.
        images = np.asarray(np.load(entry / "images.npy", mmap_mode="r"))
        return Examples(images, np.load(entry / "labels.npy"))
    except (OSError, ValueError, EOFError):  # missing, truncated or empty
        pass
    examples = decode()
    if examples.inputs.nbytes >= LARGE:
        try:
            _write(entry, examples)
        except OSError as error:
            _LOG.warning("decoded images cannot be cached for the next run: %s", error)
    return examples


def labels(
    key: Iterable[object], files: Iterable[Path], read: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns the labels of a split from the cache, or reads and caches them.

    Other numbers of the images, such as the kinds of `decode.image_kinds`, are cached alike.

    Args:
      key: see `decoded`.
      files: see `decoded`.
      read: reads the numbers; called if the cache has no entry.
    """
    entry = cache_dir() / "labels" / f"{_digest(key, files)}.npy"
    try:
        return np.load(entry)
    except (OSError, ValueError, EOFError):
        pass
    numbers = read()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".npy", delete=False) as scratch:
            _save(Path(scratch.name), numbers)
        os.replace(scratch.name, entry)
    except OSError as error:
        _LOG.warning("labels cannot be cached for the next run: %s", error)
    return numbers


def _digest(key: Iterable[object], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr((_VERSION, *key)).encode())
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:
            raise UserError(f"{file}: no such file, or a link whose target is missing") from None
        digest.update(repr((str(file.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:32]


def _write(entry: Path, examples: Examples) -> None:
    """Writes an entry atomically: readers see all of it or nothing, even with several writers."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        _save(scratch / "images.npy", examples.inputs)
        _save(scratch / "labels.npy", examples.labels)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged entry, which could not be read
        os.rename(scratch, entry)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (entry / "labels.npy").exists():  # if it exists, another process was faster
            raise


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        # Otherwise a power cut after the rename could leave an empty file under the final name.
        os.fsync(file.fileno())
