"""Published data sets through TensorFlow Datasets (TFDS), stored as ArrayRecord.

TensorFlow is not needed. A data set is looked up in `config.data.dir` (default: the project's
cache). If it is not there, it is prepared once, from archives in `config.data.manual_dir` (default:
`<dir>/downloads/manual/`) or from downloaded ones. Checksums are verified in both cases.
"""

import contextlib
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

from dgl_jax import system
from dgl_jax.config.fields import expand, option
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.data import cache
from dgl_jax.data.archives import archives, builder_class
from dgl_jax.data.decode import decode_images
from dgl_jax.data.source import DataKind, DataSet, Examples, Layout, StoredOptions
from dgl_jax.errors import UserError, require

_LOG = logging.getLogger(__name__)

_PATIENCE = 3.0  # seconds to wait for a server's answer


@dataclass(frozen=True)
class FetchedOptions(StoredOptions):
    """Options of data sets whose archives are downloaded from their publishers.

    Attributes:
      manual_dir: directory of archives downloaded by hand; empty: `<dir>/downloads/manual`.
    """

    manual_dir: str = option("", free=True)


def load(settings: StoredOptions, tfds_name: str = "") -> DataSet:
    """Reads a whole data set into memory, and prepares it first if needed.

    Args:
      settings: the group `config.data`.
      tfds_name: name of the data set in TFDS; empty: `settings.name`.

    Raises:
      UserError: see `prepared`.
    """
    return _read(settings, prepared(settings, tfds_name or settings.name))


def prepared(settings: StoredOptions, name: str) -> Path:
    """Returns the directory of a data set, and prepares it first if needed.

    Args:
      settings: the group `config.data`.
      name: name of the data set in TFDS, `name` or `name/config`.

    Raises:
      UserError: `config.data.dir` is missing or cannot be written; the data set in it has another
        file format; or an archive is missing and cannot be downloaded, or differs from the
        published one.
    """
    require(f"config.data.name={settings.name}", "tensorflow_datasets", "array_record", "PIL")
    root = (
        Path(expand(settings.dir, "config.data.dir"))
        if settings.dir
        else cache.cache_dir() / "tfds"
    )
    manual_dir = getattr(settings, "manual_dir", "")
    manual = (
        Path(expand(manual_dir, "config.data.manual_dir"))
        if manual_dir
        else root / "downloads" / "manual"
    )
    if settings.dir and not root.is_dir():
        raise UserError(
            f"config.data.dir={settings.dir}: no such directory; create it, or leave "
            f"config.data.dir empty to use {cache.cache_dir() / 'tfds'}"
        )
    if manual_dir and not manual.is_dir():
        raise UserError(
            f"config.data.manual_dir={manual_dir}: no such directory; it must hold the archives as "
            "published"
        )
    directory = _prepared(root, name)
    if directory is None:
        if name == "optical_digits":
            require("config.data.name=digits", "sklearn")
        # Before anything is written, so that a failure leaves no files behind.
        _check_archives(root, manual, name)
        with _locked(root, name):
            directory = _prepared(root, name)  # another process may have prepared it meanwhile
            if directory is None:
                _prepare(root, manual, name)
                directory = _prepared(root, name)
                assert directory is not None
    return directory


def reachable(url: str) -> bool:
    """Checks that a server answers within three seconds.

    TFDS itself would retry for more than three minutes. Behind a proxy the result is always True,
    because only the proxy can tell.
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

    # In a thread, because the DNS lookup has a timeout that no argument can shorten.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answered.is_set()


def _prepared(root: Path, name: str) -> Path | None:
    """Returns the directory of the newest prepared version of a data set; None if there is none.

    Raises:
      UserError: it is damaged, or stored in another file format than ArrayRecord.
    """
    folders = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    versions = {
        tuple(map(int, d.name.split("."))): d for d in folders if d.name.replace(".", "").isdigit()
    }
    if not versions:
        return None
    directory = versions[max(versions)]
    info = directory / "dataset_info.json"
    try:
        file_format = json.loads(info.read_text(encoding="utf-8")).get("fileFormat", "tfrecord")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{info}: is damaged; delete {directory}, and the data set is prepared again"
        ) from None
    if file_format != "array_record":
        raise UserError(
            f"{directory} was written as {file_format}, which only TensorFlow reads: choose "
            "another config.data.dir, where the data set will be prepared as array_record"
        )
    return directory


@contextlib.contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Holds a file lock, so that only one process at a time prepares a data set."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name.replace('/', '.')}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{root} does not hold {name} and cannot be written ({error.strerror}): set "
            "config.data.dir to a writable directory, or to one in which TFDS has prepared the set"
        ) from None
    with lock:
        system.flock(lock, str(root))
        yield


def _check_archives(root: Path, manual: Path, name: str) -> None:
    """Checks that the archives are there or can be downloaded, and verifies those that are there.

    Raises:
      UserError: an archive is missing and cannot be downloaded, or is not the published one.
    """
    needed = archives(name)
    missing = [archive for archive in needed if not (manual / archive.filename).is_file()]
    instead = (
        "or set config.data.manual_dir to the directory that holds it, or config.data.dir to one "
        "in which TFDS has prepared the set as array_record, or read your own images with "
        "config.data.name=folder"
    )
    on_request = [archive.filename for archive in missing if archive.on_request]
    if on_request:
        raise UserError(
            f"{name} is not in {root}, and its archives require registration: put "
            f"{' and '.join(on_request)} (from https://image-net.org/download-images) into "
            f"{manual}/, {instead}"
        )
    for archive in missing:
        # TFDS may have downloaded the archive before; this is how it names its downloads.
        stem, suffix = archive.filename.split(".", 1)
        downloads = (root / "downloads").glob(f"{name.partition('/')[0]}/*{stem}*.{suffix}")
        if not any(downloads) and not reachable(archive.url):
            host = urllib.parse.urlsplit(archive.url).hostname
            raise UserError(
                f"{name} is not in {root}, and {host} cannot be reached: put {archive.filename} "
                f"(from {archive.url}) into {manual}/, {instead}"
            )
    for archive in needed:
        if archive not in missing:
            _LOG.info("verifying the checksum of %s", archive.filename)
            archive.verify(manual / archive.filename)


def _prepare(root: Path, manual: Path, name: str) -> None:
    """Downloads missing archives and writes the data set as ArrayRecord."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    _LOG.info("preparing %s in %s (only once)", name, root)
    # Prepared copies in Google's storage are of no use, because they are TFRecord.
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
    """Stored example of an image data set.

    Attributes:
      image: encoded image, as published.
      label: class number.
      file_name: name of the published file; empty if the data set has no names.
    """

    image: bytes
    label: int
    file_name: str


class Records:
    """Random access to the encoded records of one split of a prepared data set.

    Objects can be pickled; each process opens the files when it first reads them.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "split": self.split}

    def __len__(self) -> int:
        return len(self._opened)

    def read(self, ids: Sequence[int]) -> list[Record]:
        """Returns the records with these indices."""
        from tensorflow_datasets.proto import tf_example_pb2

        # Parsed here, because decoding through TFDS's features would double the time. Reading one
        # record by its index takes half as long as reading a list of one.
        stored = [self._opened[ids[0]]] if len(ids) == 1 else self._opened.__getitems__(list(ids))
        records = []
        for serialized in stored:
            features = tf_example_pb2.Example.FromString(serialized).features.feature
            name = (
                features["file_name"].bytes_list.value[0].decode()
                if "file_name" in features
                else ""
            )
            image = features["image"].bytes_list.value[0]
            records.append(Record(image, features["label"].int64_list.value[0], name))
        return records

    def describe(self, index: int) -> str:
        """Returns the name of an image for error messages."""
        (record,) = self.read([index])
        return f"{self.directory}: {self.split} image {index}" + (
            f" ({record.file_name})" if record.file_name else ""
        )

    @functools.cached_property
    def files(self) -> list[Path]:
        """Returns the paths of the files that hold the split."""
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
    """Returns the TFDS builder of a prepared data set."""
    import tensorflow_datasets as tfds

    with _quiet():
        return tfds.builder_from_directory(directory)


def _read(settings: StoredOptions, directory: Path) -> DataSet:
    """Decodes a prepared data set, or takes the images from the cache."""
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
    """Suppresses TFDS's progress bars, its output on stdout and its absl log lines."""
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
    digits=DataKind(
        partial(load, tfds_name="optical_digits"), StoredOptions, Layout.images(8, 1, 10)
    ),
    cifar10=DataKind(
        load,
        FetchedOptions,
        Layout.images(32, 3, 10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    cifar100=DataKind(
        load,
        FetchedOptions,
        Layout.images(32, 3, 100),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
)
