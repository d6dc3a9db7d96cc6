"""TFDS's builders of published sets, made to read the original archives with Python's tarfile instead of TensorFlow.

What they write is what the stock builders write: same name, version, features, keys and order.
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
    """A file that a set is prepared from, as TFDS has it registered."""

    filename: str
    url: str
    size: int  # bytes
    sha256: str
    on_request: bool  # the user must register to get it: it is never downloaded

    def verify(self, path: Path) -> None:
        """Raises UserError where a file is not this archive; its size is compared first, which costs nothing."""
        size = path.stat().st_size
        if size != self.size:
            raise UserError(f"{path} has {size} bytes and the archive {self.size}: fetch it again")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{path} has the wrong checksum (sha256 {found}, not {self.sha256}): fetch it again"
            )


def archives(name: str) -> list[Archive]:
    """What the set called `name` or `name/config` is prepared from; empty where nothing is needed."""
    name, _, config = name.partition("/")
    builder = builder_class(name)
    on_request = bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    found = []
    for url, info in (builder.url_infos or {}).items():
        filename = info.filename or PurePosixPath(urllib.parse.urlsplit(url).path).name
        if not config or filename == f"{builder.builder_configs[config].dirname}.tgz":
            found.append(Archive(filename, url, int(info.size), info.checksum, on_request))
    return found


@functools.cache
def builder_class(name: str) -> Any:
    """The builder of a set."""
    import tensorflow_datasets as tfds

    if name == "optical_digits":
        from dgl_jax.data.digits import OpticalDigits

        return OpticalDigits
    stock = tfds.builder_cls(name)
    parts = {"imagenet2012": _ImageNet, "imagenette": _Imagenette}.get(name, _Cifar)
    # TFDS would look beside this file for checksums and descriptions.
    attributes = {
        "url_infos": stock.url_infos,
        "pkg_dir_path": stock._get_pkg_dir_path(),
        "stock_module": sys.modules[stock.__module__],
        "__module__": __name__,
    }
    with tfds.core.registered.skip_registration():
        made = type(name, (parts, stock), attributes)
    made.name = name  # type: ignore[attr-defined]
    return made


class _Cifar:
    """CIFAR-10 and CIFAR-100: rows of labels and planes in one archive."""

    info: Any

    def _split_generators(self, dl_manager):
        info, path = self._cifar_info, dl_manager.download(self._cifar_info.url)  # type: ignore[attr-defined]
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
    """ImageNet 2012: training images in one archive of archives, a class each; validation images in a flat one.

    The two dozen images that are no RGB JPEGs are stored as such, as the stock builder does, but encoded by Pillow.
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
                # The list is in the order of the names, not of the archive.
                labels = dict(
                    zip(sorted(member.name for member in members), validation_labels, strict=False)
                )
                for name, image in _files(archive):
                    yield self._example(name, image, labels[name])
                return
            for member in members:
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as of_class:
                    for name, image in _files(of_class):
                        yield self._example(name, image, member.name.removesuffix(".tar"))

    def _example(self, name: str, image: bytes, label: str) -> tuple[str, dict[str, Any]]:
        if name in self.stock_module.CMYK_IMAGES or name in self.stock_module.PNG_IMAGES:
            image = _rgb_jpeg(image)
        return name, {"file_name": name, "image": image, "label": label}


class _Imagenette:
    """Ten easy classes of ImageNet: `<archive>/train/<class>/*.JPEG`, `<archive>/val/<class>/*.JPEG`."""

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
                    case (_, of_split, label, file) if of_split == directory and file.endswith(
                        ".JPEG"
                    ):
                        yield file, {"image": image, "label": label}


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every file, in the order of the archive."""
    for member in archive:
        if member.isfile():
            yield member.name, archive.extractfile(member).read()  # type: ignore[union-attr]


def _rgb_jpeg(image: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        opened.convert("RGB").save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()
