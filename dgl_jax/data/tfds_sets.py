"""CIFAR-10, CIFAR-100 and the digits through TensorFlow Datasets, kept as ArrayRecord; TensorFlow is never needed.

A set is looked for in `config.data.dir` (default: the project's cache) and prepared there once: from an archive that
lies in `<dir>/downloads/manual/`, else by downloading it. TFDS checks the archive's checksum in both cases.
"""

import contextlib
import fcntl
import functools
import io
import json
import socket
import tarfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dgl_jax.data import cache
from dgl_jax.data.decode import decode_images
from dgl_jax.data.source import DataSet, Examples
from dgl_jax.errors import UserError
from dgl_jax.settings import DataSettings

_TFDS_NAMES = {"digits": "optical_digits"}
_PATIENCE = 3.0  # seconds in which a server must answer


def load(settings: DataSettings) -> DataSet:
    """Reads a set, after preparing it where that has not been done.

    Raises:
      UserError: `config.data.dir` is missing or cannot be written, was written by TFDS in another file format, or the
        archive is neither there nor can be had, or is not what TFDS expects.
    """
    root = Path(settings.dir).expanduser() if settings.dir else cache.cache_dir() / "tfds"
    if settings.dir and not root.is_dir():
        raise UserError(
            f"config.data.dir={settings.dir}: no such directory; create it, or leave config.data.dir empty "
            f"for {cache.cache_dir() / 'tfds'}"
        )
    name = _TFDS_NAMES.get(settings.name, settings.name)
    directory = _prepared(root, name)
    if directory is None:
        _check_archive(root, name)  # first of all: nothing is left in a directory that cannot be used
        with _locked(root, name):
            directory = _prepared(root, name)  # another process may just have done it
            if directory is None:
                _prepare(root, name)
                directory = _prepared(root, name)
                assert directory is not None
    return _read(settings, directory)


@functools.cache
def builder_class(name: str) -> type:
    """TFDS's builder of a set, made to read the archive with Python's tarfile where the stock one needs TensorFlow.

    The data set it writes is the stock one: same name, version, features, keys and order.
    """
    import tensorflow_datasets as tfds

    if name == "optical_digits":
        from dgl_jax.data.digits import OpticalDigits

        return OpticalDigits
    stock: Any = tfds.builder_cls(name)

    class FromArchive(stock, skip_registration=True):  # type: ignore[call-arg]
        url_infos = stock.url_infos  # TFDS would look for a file of checksums beside this one

        def _split_generators(self, dl_manager):
            info, path = self._cifar_info, dl_manager.download(self._cifar_info.url)
            with tarfile.open(path) as archive:
                files = {
                    file: archive.extractfile(info.prefix + file).read()  # type: ignore[union-attr]
                    for file in [*info.label_files, *info.train_files, *info.test_files]
                }
            for key, file in zip(info.label_keys, info.label_files, strict=True):
                self.info.features[key].names = files[file].decode().split()
            return {
                "train": self._generate_examples("train_", [files[file] for file in info.train_files]),
                "test": self._generate_examples("test_", [files[file] for file in info.test_files]),
            }

        def _generate_examples(self, split_prefix, contents):
            from dgl_jax.data.digits import png

            keys = self._cifar_info.label_keys
            rows = np.concatenate([np.frombuffer(c, np.uint8).reshape(-1, len(keys) + 3072) for c in contents])
            for index, row in enumerate(rows):
                image = np.ascontiguousarray(row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0))
                labels = dict(zip(keys, row.tolist(), strict=False))
                yield index, {"id": f"{split_prefix}{index:05d}", "image": png(image), **labels}

    FromArchive.name = name
    return FromArchive


def reachable(url: str) -> bool:
    """Whether a server answers within three seconds.

    TFDS goes on trying for more than three minutes. Behind a proxy the answer is yes: only the proxy could tell.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or ""):
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
    versions = {tuple(map(int, d.name.split("."))): d for d in found if d.name.replace(".", "").isdigit()}
    if not versions:
        return None
    directory = versions[max(versions)]
    file_format = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
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
        lock = (root / f".{name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{root} does not hold {name} and cannot be written ({error.strerror}): "
            "set config.data.dir to a directory that can, or to one in which TFDS has prepared the set"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_archive(root: Path, name: str) -> None:
    downloads = root / "downloads"
    for url, info in (builder_class(name).url_infos or {}).items():  # type: ignore[attr-defined]
        earlier = downloads.glob(f"{name}/*{info.filename.split('.')[0]}*.tar.gz")  # as TFDS names its downloads
        present = (downloads / "manual" / info.filename).exists() or any(earlier)
        if not present and not reachable(url):
            raise UserError(
                f"{name} is not in {root}, and {urllib.parse.urlsplit(url).hostname} cannot be reached: put "
                f"{info.filename} (from {url}) into {downloads / 'manual'}/, or set config.data.dir to a directory "
                "in which TFDS has prepared the set as array_record, or read your own images with "
                "config.data.name=folder"
            )


def _prepare(root: Path, name: str) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    logging.info("preparing %s in %s, once", name, root)
    # No look at Google's storage for a prepared copy: those are TFRECORD.
    config = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=root / "downloads" / "manual")
    try:
        with _quiet():
            builder = builder_class(name)(data_dir=root, file_format="array_record")
            builder.download_and_prepare(download_dir=root / "downloads", download_config=config)
    except NonMatchingChecksumError as error:
        raise UserError(f"{name}: {error}") from None
    except (OSError, tfds.download.DownloadError) as error:
        raise UserError(f"{name} could not be prepared in {root}: {error}") from error


def _read(settings: DataSettings, directory: Path) -> DataSet:
    import tensorflow_datasets as tfds

    with _quiet():
        builder = tfds.builder_from_directory(directory)
    class_names = tuple(builder.info.features["label"].names)
    channels = builder.info.features["image"].shape[-1]

    def split(name: str) -> Examples:
        def decode() -> Examples:
            with _quiet():
                records = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
            records = records.__getitems__(list(range(len(records))))
            images = decode_images(
                len(records),
                lambda i: records[i]["image"],
                channels=channels,
                image_size=settings.image_size,
                describe=lambda i: f"{directory}: {name} image {i}",
            )
            return Examples(images, np.array([record["label"] for record in records], np.int32))

        files = [Path(path) for path in builder.info.splits[name].filepaths]
        return cache.decoded((settings.name, directory.name, name, settings.image_size), files, decode)

    return DataSet(settings.name, class_names, split("train"), split("test"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's progress bars, its announcements on the standard output and its absl log lines."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
