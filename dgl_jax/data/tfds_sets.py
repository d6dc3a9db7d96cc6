"""Published sets through TensorFlow Datasets, kept as ArrayRecord; TensorFlow is never needed.

A set is looked for in `config.data.dir` (default: the project's cache) and prepared there once: from archives that lie
in `config.data.manual_dir` (default: `<dir>/downloads/manual/`), else by downloading them. Checksums are compared in
both cases.
"""

import contextlib
import fcntl
import functools
import io
import json
import logging
import socket
import tarfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgl_jax.data import cache
from dgl_jax.data.archives import archives, builder_class
from dgl_jax.data.decode import decode_images
from dgl_jax.data.source import DataKind, DataSet, Examples, StoredOptions
from dgl_jax.errors import UserError, require
from dgl_jax.fields import expand, option
from dgl_jax.registry import DATA_SETS

_LOG = logging.getLogger(__name__)

_PATIENCE = 3.0  # seconds in which a server must answer


@dataclass(frozen=True)
class FetchedOptions(StoredOptions):
    """Of sets whose archives are fetched from their publishers."""

    manual_dir: str = option(
        "", free=True
    )  # archives fetched by hand; empty: <dir>/downloads/manual


def load(settings: StoredOptions, tfds_name: str = "") -> DataSet:
    """Reads a whole set into memory, after preparing it where that has not been done.

    Args:
      tfds_name: what TFDS calls it; the same by default.

    Raises:
      UserError: see `prepared`.
    """
    return _read(settings, prepared(settings, tfds_name or settings.name))


def prepared(settings: StoredOptions, name: str) -> Path:
    """The directory of a set, after preparing it where that has not been done.

    Args:
      name: of TFDS, with the variant behind a slash.

    Raises:
      UserError: `config.data.dir` is missing or cannot be written, was written by TFDS in another file format, or an
        archive is neither there nor can be had, or is not what TFDS expects.
    """
    require(f"config.data.name={settings.name}", "tensorflow_datasets", "array_record", "PIL")
    root = (
        Path(expand(settings.dir, "config.data.dir"))
        if settings.dir
        else cache.cache_dir() / "tfds"
    )
    by_hand = getattr(settings, "manual_dir", "")
    manual = (
        Path(expand(by_hand, "config.data.manual_dir"))
        if by_hand
        else root / "downloads" / "manual"
    )
    if settings.dir and not root.is_dir():
        raise UserError(
            f"config.data.dir={settings.dir}: no such directory; create it, or leave config.data.dir empty "
            f"for {cache.cache_dir() / 'tfds'}"
        )
    if by_hand and not manual.is_dir():
        raise UserError(
            f"config.data.manual_dir={by_hand}: no such directory; it holds archives as they were published"
        )
    directory = _prepared(root, name)
    if directory is None:
        if name == "optical_digits":
            require("config.data.name=digits", "sklearn")
        _check_archives(
            root, manual, name
        )  # first of all: nothing is left in a directory that cannot be used
        with _locked(root, name):
            directory = _prepared(root, name)  # another process may just have done it
            if directory is None:
                _prepare(root, manual, name)
                directory = _prepared(root, name)
                assert directory is not None
    return directory


def reachable(url: str) -> bool:
    """Whether a server answers within three seconds.

    TFDS goes on trying for more than three minutes. Behind a proxy the answer is yes: only the proxy could tell.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(
        parts.hostname or ""
    ):
        return True
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), _PATIENCE).close()
            answered.set()

    # In a thread, because looking up the name has a patience of its own that no argument shortens.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answered.is_set()


def _prepared(root: Path, name: str) -> Path | None:
    """The newest version of a set in a directory of TFDS."""
    found = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    versions = {
        tuple(map(int, d.name.split("."))): d for d in found if d.name.replace(".", "").isdigit()
    }
    if not versions:
        return None
    directory = versions[max(versions)]
    file_format = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8")).get(
        "fileFormat", "tfrecord"
    )
    if file_format != "array_record":
        raise UserError(
            f"{directory} was written as {file_format}, which only TensorFlow reads: choose another config.data.dir, "
            "in which the set is then prepared as array_record"
        )
    return directory


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """One process at a time prepares a set."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name.replace('/', '.')}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{root} does not hold {name} and cannot be written ({error.strerror}): "
            "set config.data.dir to a directory that can, or to one in which TFDS has prepared the set"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_archives(root: Path, manual: Path, name: str) -> None:
    """Raises UserError where an archive is missing and cannot be downloaded, or is not the published one."""
    needed = archives(name)
    missing = [archive for archive in needed if not (manual / archive.filename).is_file()]
    instead = (
        "or set config.data.manual_dir to the directory that holds it, or config.data.dir to one in which TFDS has prepared "
        "the set as array_record, or read your own images with config.data.name=folder"
    )
    on_request = [archive.filename for archive in missing if archive.on_request]
    if on_request:
        raise UserError(
            f"{name} is not in {root}, and its archives must be asked for: put {' and '.join(on_request)} "
            f"(from https://image-net.org/download-images, after registering) into {manual}/, {instead}"
        )
    for archive in missing:
        stem, suffix = archive.filename.split(".", 1)
        earlier = (root / "downloads").glob(
            f"{name.partition('/')[0]}/*{stem}*.{suffix}"
        )  # as TFDS names its downloads
        if not any(earlier) and not reachable(archive.url):
            raise UserError(
                f"{name} is not in {root}, and {urllib.parse.urlsplit(archive.url).hostname} cannot be reached: put "
                f"{archive.filename} (from {archive.url}) into {manual}/, {instead}"
            )
    for archive in needed:
        if archive not in missing:
            _LOG.info("comparing the checksum of %s", archive.filename)
            archive.verify(manual / archive.filename)


def _prepare(root: Path, manual: Path, name: str) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    _LOG.info("preparing %s in %s, once", name, root)
    # No look at Google's storage for a prepared copy: those are TFRECORD.
    config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=manual)
    name, _, variant = name.partition("/")
    try:
        with _quiet():
            builder = builder_class(name)(
                data_dir=root,
                file_format="array_record",
                **({"config": variant} if variant else {}),
            )
            builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    except NonMatchingChecksumError as error:
        raise UserError(f"{name}: {error}") from None
    except (OSError, tfds.download.DownloadError, tarfile.TarError) as error:
        raise UserError(f"{name} could not be prepared in {root}: {error}") from error


class Record(NamedTuple):
    """An example as it is stored."""

    image: bytes  # encoded, as published
    label: int
    file_name: str  # empty where the set has none


class Records:
    """One split of a prepared set, encoded, by index. May be pickled: it is opened where it is first read."""

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "split": self.split}

    def __len__(self) -> int:
        return len(self._opened)

    def read(self, ids: Sequence[int]) -> list[Record]:
        """The records of these ids."""
        from tensorflow_datasets.proto import tf_example_pb2

        # Parsed here: what TFDS's features do besides takes as much time as all the rest of reading. And one record at a
        # time, where one is asked for, takes half as long as by the list.
        found = [self._opened[ids[0]]] if len(ids) == 1 else self._opened.__getitems__(list(ids))
        records = []
        for one in found:
            features = tf_example_pb2.Example.FromString(one).features.feature
            name = (
                features["file_name"].bytes_list.value[0].decode()
                if "file_name" in features
                else ""
            )
            records.append(
                Record(
                    features["image"].bytes_list.value[0],
                    features["label"].int64_list.value[0],
                    name,
                )
            )
        return records

    def describe(self, index: int) -> str:
        """What to call an image in an error message."""
        (record,) = self.read([index])
        return f"{self.directory}: {self.split} image {index}" + (
            f" ({record.file_name})" if record.file_name else ""
        )

    @functools.cached_property
    def files(self) -> list[Path]:
        """Those that hold the split."""
        return [Path(path) for path in open_set(self.directory).info.splits[self.split].filepaths]

    @functools.cached_property
    def _opened(self) -> Any:
        import tensorflow_datasets as tfds

        builder = open_set(self.directory)
        with _quiet():
            return builder.as_data_source(
                self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )


def open_set(directory: Path) -> Any:
    """TFDS's builder of a prepared set."""
    import tensorflow_datasets as tfds

    with _quiet():
        return tfds.builder_from_directory(directory)


def _read(settings: StoredOptions, directory: Path) -> DataSet:
    features = open_set(directory).info.features

    def split(name: str) -> Examples:
        stored = Records(directory, name)

        def decode() -> Examples:
            records = stored.read(range(len(stored)))
            images = decode_images(
                len(records),
                lambda i: records[i].image,
                channels=features["image"].shape[-1],
                image_size=settings.image_size,
                describe=stored.describe,
            )
            return Examples(images, np.array([record.label for record in records], np.int32))

        return cache.decoded(
            (settings.name, directory.name, name, settings.image_size), stored.files, decode
        )

    return DataSet(settings.name, tuple(features["label"].names), split("train"), split("test"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's progress bars, its announcements on the standard output and its absl log lines."""
    import tensorflow_datasets as tfds
    from absl import logging as absl_logging

    tfds.disable_progress_bar()
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)


DATA_SETS.ship(
    digits=DataKind(partial(load, tfds_name="optical_digits"), StoredOptions, (8, 1, 10)),
    cifar10=DataKind(
        load, FetchedOptions, (32, 3, 10), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ),
    cifar100=DataKind(
        load, FetchedOptions, (32, 3, 100), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
)
