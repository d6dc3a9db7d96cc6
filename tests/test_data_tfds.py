"""TFDS data sets that are prepared and read without TensorFlow and without a network."""

import errno
import fcntl
import io
import json
import shutil
import socket
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dgl_jax.config import options
from dgl_jax.config.registry import DATA_SETS
from dgl_jax.data import cache, folder, make_source, tfds_sets
from dgl_jax.data.tfds_sets import builder_class, reachable
from dgl_jax.errors import UserError

LABELS = {"cifar10": ("label",), "cifar100": ("coarse_label", "label")}


def load(settings):
    return DATA_SETS[settings.name].make(settings)


@pytest.fixture(autouse=True)
def cache_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def digits_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    load(options("data", name="digits", dir=str(root)))
    return root


# Digits


def test_digits_equal_those_of_scikit_learn(digits_directory):
    data = load(options("data", name="digits", dir=str(digits_directory)))
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train.labels), len(data.test.labels)) == (1438, 359)
    number = {image.tobytes(): i for i, image in enumerate(pixels)}
    assert len(number) == 1797  # no image occurs twice, so each image identifies its index
    indices = {}
    for split in ("train", "test"):
        stored = getattr(data, split)
        indices[split] = [number[image.tobytes()] for image in stored.inputs]
        assert indices[split] == sorted(indices[split])
        np.testing.assert_array_equal(stored.labels, labels[indices[split]])
        assert (stored.labels != labels[np.roll(indices[split], 1)]).any()
    assert sorted(indices["train"] + indices["test"]) == list(range(1797))
    # The test split holds a fifth of every class, to a whole image.
    shares = np.bincount(data.test.labels) / np.bincount(labels)
    assert np.abs(np.bincount(data.test.labels) - np.bincount(labels) / 5).max() < 1, shares


def test_digits_are_prepared_in_the_default_directory(cache_directory):
    source = make_source(options("data"), 0)
    assert (cache_directory / "tfds" / "optical_digits" / "1.0.0" / "dataset_info.json").exists()
    assert source.example_shape == (8, 8, 1)
    assert [source.examples(split) for split in ("train", "validation", "test")] == [1294, 144, 359]
    assert source.batch(0).inputs.shape == (128, 8, 8, 1)
    # A tenth of about 144 training images per class.
    labels = np.concatenate([b.context["label"] for b in source.evaluation("validation")])
    assert set(np.bincount(labels[labels >= 0]).tolist()) <= {14, 15}


def test_image_size_resizes_all_images(digits_directory):
    data = load(options("data", name="digits", dir=str(digits_directory), image_size=16))
    assert data.train.inputs.shape == (1438, 16, 16, 1)


def test_folder_and_tfds_decode_to_the_same_pixels(digits_directory, tmp_path):
    data = load(options("data", name="digits", dir=str(digits_directory)))
    for split, stored in (("train", data.train), ("test", data.test)):
        for i, (image, label) in enumerate(
            zip(stored.inputs[:40], stored.labels[:40], strict=True)
        ):
            path = tmp_path / "images" / split / str(label) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    other = folder.load(options("data", name="folder", dir=str(tmp_path / "images")))
    order = np.argsort(data.train.labels[:40], kind="stable")
    np.testing.assert_array_equal(other.train.inputs, data.train.inputs[:40][order])
    np.testing.assert_array_equal(other.train.labels, data.train.labels[:40][order])


def test_a_second_process_waits_and_does_not_prepare_again(digits_directory, tmp_path, monkeypatch):
    settings = options("data", name="digits", dir=str(tmp_path))

    def fail(*args):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(tfds_sets, "_prepare", fail)
    with ThreadPoolExecutor(1) as pool:
        with tfds_sets._locked(tmp_path, "optical_digits"):
            second = pool.submit(load, settings)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            shutil.copytree(digits_directory / "optical_digits", tmp_path / "optical_digits")
        assert len(second.result(timeout=30).train.labels) == 1438
        shutil.rmtree(tmp_path / "optical_digits")
        with pytest.raises(AssertionError, match="a second time"):
            pool.submit(load, settings).result(timeout=30)


def test_a_directory_that_cannot_be_locked_is_used_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with tfds_sets._locked(tmp_path, "optical_digits"):
        assert f"{tmp_path}: cannot be locked (No locks available)" in caplog.text


# CIFAR from generated archives


def write_archive(name, path, train=30, test=10, seed=0):
    """Writes an archive of random images; returns images and rows of labels of each split."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix, names, train_files = {
        "cifar10": (
            "cifar-10-batches-bin",
            {"batches.meta.txt": 10},
            [f"data_batch_{i}.bin" for i in range(1, 6)],
        ),
        "cifar100": (
            "cifar-100-binary",
            {"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
            ["train.bin"],
        ),
    }[name]
    test_file = "test_batch.bin" if name == "cifar10" else "test.bin"
    stored, files = {}, {}
    for split, count, members in (("train", train, train_files), ("test", test, [test_file])):
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = np.stack([random.integers(0, n, count, np.uint8) for n in names.values()], axis=1)
        rows = np.concatenate([labels, images.transpose(0, 3, 1, 2).reshape(count, 3072)], axis=1)
        files |= {
            member: part.tobytes()
            for member, part in zip(members, np.split(rows, len(members)), strict=True)
        }
        stored[split] = images, labels
    files |= {
        file: "".join(f"{file[0]}{i}\n" for i in range(n)).encode() for file, n in names.items()
    }
    with tarfile.open(path, "w:gz") as archive:
        for member, content in files.items():
            info = tarfile.TarInfo(f"{prefix}/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stored


def expect(name, archive, monkeypatch):
    """Replaces the checksum of the published archive by that of a generated one."""
    from tensorflow_datasets.core.download import checksums

    (url,) = builder_class(name).url_infos
    monkeypatch.setattr(
        builder_class(name), "url_infos", {url: checksums.compute_url_info(archive)}
    )


def no_network(url):
    return False


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_local_archive_is_prepared_and_read_back_exactly(name, tmp_path, monkeypatch):
    file = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}[name]
    archive = tmp_path / "downloads" / "manual" / file
    stored = write_archive(name, archive)
    expect(name, archive, monkeypatch)
    monkeypatch.setattr(tfds_sets, "reachable", no_network)
    settings = options("data", name=name, dir=str(tmp_path))
    data = load(settings)
    for split in ("train", "test"):
        images, labels = stored[split]
        prepared = getattr(data, split)
        # TFDS shuffles the examples when it writes them.
        number = {image.tobytes(): i for i, image in enumerate(images)}
        order = [number[image.tobytes()] for image in prepared.inputs]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(prepared.labels, labels[order, -1])
    assert len(data.class_names) == {"cifar10": 10, "cifar100": 100}[name]
    first_names = {"cifar10": ("b0", "b1", "b2"), "cifar100": ("f0", "f1", "f2")}
    assert data.class_names[:3] == first_names[name]
    # Once the set is prepared, the archive is not needed.
    archive.unlink()
    np.testing.assert_array_equal(load(settings).train.inputs, data.train.inputs)
    assert "tensorflow" not in sys.modules
    source = make_source(options("data", name=name, dir=str(tmp_path), batch_size=4), 0)
    means = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
    assert source.mean == means[name]


def test_stock_tfds_reads_the_prepared_set(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_archive("cifar10", archive)
    expect("cifar10", archive, monkeypatch)
    data = load(options("data", name="cifar10", dir=str(tmp_path)))
    stock = tfds.data_source("cifar10", split="train", data_dir=tmp_path, download=False)
    assert [r["label"] for r in stock] == data.train.labels.tolist()
    np.testing.assert_array_equal(np.stack([r["image"] for r in stock]), data.train.inputs)
    assert {r["id"] for r in stock} == {b"train_%05d" % i for i in range(30)}


def test_an_archive_that_differs_from_the_published_one_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_archive("cifar10", archive)
    size = archive.stat().st_size
    message = rf"{archive} has {size} bytes, but the published archive has 170052171"
    with pytest.raises(UserError, match=message):
        load(options("data", name="cifar10", dir=str(tmp_path)))
    expect("cifar10", archive, monkeypatch)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{archive} has the wrong checksum \(sha256 [0-9a-f]{{64}}, not"
    ):
        load(options("data", name="cifar10", dir=str(tmp_path)))
    assert not list(tmp_path.glob("cifar10/*/dataset_info.json"))


def test_archives_are_read_from_manual_dir(tmp_path, monkeypatch):
    archive = tmp_path / "elsewhere" / "cifar-10-binary.tar.gz"
    write_archive("cifar10", archive)
    expect("cifar10", archive, monkeypatch)
    monkeypatch.setattr(tfds_sets, "reachable", no_network)
    data = load(options("data", name="cifar10", manual_dir=str(tmp_path / "elsewhere")))
    assert len(data.train.labels) == 30
    with pytest.raises(UserError, match=r"config.data.manual_dir=.*nowhere: no such directory"):
        load(options("data", name="cifar10", manual_dir=str(tmp_path / "nowhere")))


def test_a_missing_network_is_reported_at_once(cache_directory, monkeypatch):
    monkeypatch.setattr(tfds_sets, "reachable", no_network)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load(options("data", name="cifar100"))
    file = "cifar-100-binary.tar.gz"
    advice = f"put {file} (from https://www.cs.toronto.edu/~kriz/{file})"
    assert f"{advice} into {cache_directory}/tfds/downloads/manual/" in str(error.value)
    assert "config.data.name=folder" in str(error.value)
    assert time.monotonic() - start < 3
    assert not cache_directory.exists()  # nothing was written


def test_reachable_asks_the_server_except_behind_a_proxy(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        assert reachable(url)
    assert not reachable(url)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy:3128"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
    assert reachable(url)  # only the proxy could tell
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: True)
    assert not reachable(url)


def test_a_server_that_never_answers_costs_only_the_timeout(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(tfds_sets, "_PATIENCE", 0.1)

    def silence(*args):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silence)
    start = time.monotonic()
    assert not reachable("https://example.invalid/file")
    assert time.monotonic() - start < 0.9


# Directories


def test_a_missing_directory_is_refused(tmp_path):
    for name in ("digits", "cifar10"):
        with pytest.raises(UserError, match=r"config.data.dir=.*nowhere: no such directory"):
            load(options("data", name=name, dir=str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()


def test_another_file_format_is_refused(digits_directory, tmp_path):
    info = json.loads(
        (digits_directory / "optical_digits" / "1.0.0" / "dataset_info.json").read_text()
    )
    target = tmp_path / "optical_digits" / "1.0.0" / "dataset_info.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError,
        match=r"written as tfrecord, which only TensorFlow reads: choose another config.data.dir",
    ):
        load(options("data", name="digits", dir=str(tmp_path)))


@pytest.mark.parametrize("content", ["{", "[1, 2]", ""])
def test_a_damaged_description_is_refused(digits_directory, tmp_path, content):
    target = tmp_path / "optical_digits" / "1.0.0" / "dataset_info.json"
    target.parent.mkdir(parents=True)
    target.write_text(content)
    with pytest.raises(UserError) as error:
        load(options("data", name="digits", dir=str(tmp_path)))
    assert str(error.value) == (
        f"{target}: is damaged; delete {target.parent}, and the data set is prepared again"
    )


def test_an_unwritable_directory_is_refused(cache_directory):
    cache_directory.write_text("a file, where a directory should be")
    with pytest.raises(
        UserError, match=r"does not hold optical_digits and cannot be written .*set config.data.dir"
    ):
        load(options("data", name="digits"))


def test_preparing_prints_nothing(tmp_path, capfd):
    load(options("data", name="digits", dir=str(tmp_path)))
    out, err = capfd.readouterr()
    assert out == ""
    assert "Generating" not in err
    assert "ArrayRecord" not in err


def test_a_large_set_is_decoded_only_once(digits_directory, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    settings = options("data", name="digits", dir=str(digits_directory))
    first = load(settings)
    assert len(list(cache_directory.glob("decoded/*/images.npy"))) == 2

    def fail(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(tfds_sets, "decode_images", fail)
    np.testing.assert_array_equal(load(settings).test.inputs, first.test.inputs)
    with pytest.raises(AssertionError, match="decoded again"):
        load(options("data", name="digits", dir=str(digits_directory), image_size=9))
