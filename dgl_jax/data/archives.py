"""TFDS builders of published data sets that read the original archives without TensorFlow.

They use Python's tarfile and write exactly what the stock TFDS builders write: the same name,
version, features, keys and order of examples.
"""

import functools
import hashlib
import io
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dgl_jax.errors import UserError


@dataclass(frozen=True)
class Archive:
    """Published archive that a data set is prepared from, as registered in TFDS.

    Attributes:
      filename: name of the file as published.
      url: where it is published.
      size: bytes.
      sha256: checksum as hexadecimal digits.
      on_request: True if the user must register to get the archive; it is never downloaded.
    """

    filename: str
    url: str
    size: int
    sha256: str
    on_request: bool

    def verify(self, path: Path) -> None:
        """Checks that a file is this archive.

        Raises:
          UserError: the size or the checksum differs.
        """
        size = path.stat().st_size  # cheap, so it is compared before the checksum
        if size != self.size:
            raise UserError(
                f"{path} has {size} bytes, but the published archive has {self.size}: "
                "download it again"
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(
                f"{path} has the wrong checksum (sha256 {digest}, not {self.sha256}): "
                "download it again"
            )


def archives(name: str) -> list[Archive]:
    """Lists the archives that a data set is prepared from; empty if it needs none.

    Args:
      name: TFDS name of the data set, `name` or `name/config`.
    """
    name, _, config = name.partition("/")
    builder = builder_class(name)
    on_request = bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    needed = []
    for url, info in (builder.url_infos or {}).items():
        filename = info.filename or PurePosixPath(urllib.parse.urlsplit(url).path).name
        if not config or filename == f"{builder.builder_configs[config].dirname}.tgz":
            needed.append(Archive(filename, url, int(info.size), info.checksum, on_request))
    return needed


@functools.cache
def builder_class(name: str) -> Any:
    """Returns the TFDS builder class of a data set, modified to work without TensorFlow.

    Args:
      name: TFDS name of the data set, without its config.
    """
    import tensorflow_datasets as tfds

    if name == "optical_digits":
        from dgl_jax.data.digits import OpticalDigits

        return OpticalDigits
    stock = tfds.builder_cls(name)
    reader = {"imagenet2012": _ImageNet, "imagenette": _Imagenette}.get(name, _Cifar)
    # Without these attributes TFDS would look for checksums and descriptions beside this file.
    attributes = {
        "url_infos": stock.url_infos,
        "pkg_dir_path": stock._get_pkg_dir_path(),
        "stock_module": sys.modules[stock.__module__],
        "__module__": __name__,
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (reader, stock), attributes)
    builder.name = name  # type: ignore[attr-defined]
    return builder


class _Cifar:
    """Reader of CIFAR-10 and CIFAR-100, one archive of rows of labels and color planes."""

    info: Any

    def _split_generators(self, dl_manager):
        info = self._cifar_info  # type: ignore[attr-defined]
        path = dl_manager.download(info.url)
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

        keys = self._cifar_info.label_keys  # type: ignore[attr-defined]
        rows = np.concatenate(
            [np.frombuffer(c, np.uint8).reshape(-1, len(keys) + 3072) for c in contents]
        )
        for index, row in enumerate(rows):
            image = np.ascontiguousarray(row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0))
            labels = dict(zip(keys, row.tolist(), strict=False))
            yield index, {"id": f"{split_prefix}{index:05d}", "image": png(image), **labels}


class _ImageNet:
    """Reader of ImageNet 2012.

    Training images lie in one archive that holds an archive per class, validation images in one
    flat archive. About two dozen images are not RGB JPEGs; like the stock builder, this one
    converts them to RGB JPEGs, but it encodes them with Pillow.
    """

    stock_module: Any

    def _split_generators(self, dl_manager):
        import tensorflow_datasets as tfds

        directory = Path(dl_manager.manual_dir)
        labels = (
            tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
        )
        return {
            "train": self._generate_examples(directory / "ILSVRC2012_img_train.tar"),
            "validation": self._generate_examples(directory / "ILSVRC2012_img_val.tar", labels),
        }

    def _generate_examples(self, path, validation_labels=None):
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
            if validation_labels is not None:
                # The labels are listed in the order of the file names, not of the archive.
                labels = dict(
                    zip(sorted(member.name for member in members), validation_labels, strict=False)
                )
                for name, image in _files(archive):
                    yield self._example(name, image, labels[name])
                return
            for member in members:
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as class_archive:
                    for name, image in _files(class_archive):
                        yield self._example(name, image, member.name.removesuffix(".tar"))

    def _example(self, name: str, image: bytes, label: str) -> tuple[str, dict[str, Any]]:
        if name in self.stock_module.CMYK_IMAGES or name in self.stock_module.PNG_IMAGES:
            image = _rgb_jpeg(image)
        return name, {"file_name": name, "image": image, "label": label}


class _Imagenette:
    """Reader of Imagenette: `<archive>/train/<class>/*.JPEG` and `<archive>/val/<class>/*.JPEG`."""

    builder_config: Any

    def _split_generators(self, dl_manager):
        (archive,) = archives(f"imagenette/{self.builder_config.name}")
        path = dl_manager.download(archive.url)
        return {
            "train": self._generate_examples(path, "train"),
            "validation": self._generate_examples(path, "val"),
        }

    def _generate_examples(self, path, directory):
        with tarfile.open(path, "r|*") as archive:
            for name, image in _files(archive):
                match PurePosixPath(name).parts:
                    case (_, split, label, file) if split == directory and file.endswith(".JPEG"):
                        yield file, {"image": image, "label": label}


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of every file, in the order of the archive."""
    for member in archive:
        if member.isfile():
            yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]


def _rgb_jpeg(image: bytes) -> bytes:
    """Re-encodes an image as an RGB JPEG, at the highest quality."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.convert("RGB").save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()
