"""Data set `folder`: order, resizing, channels, image formats, errors, and the decoded cache."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_folders import random_image, write_image_folder
from PIL import Image

from dgl_jax.config import options
from dgl_jax.data import cache, folder, make_source
from dgl_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def write_unsorted_folder(root, size=(6, 5), per_class=3):
    """Writes classes in unsorted order and returns the pixels of each file."""
    random = np.random.default_rng(0)
    stored = {}
    for split in ("train", "test"):
        for number, name in enumerate(("zebra", "ape", "cat")):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = random.integers(0, 256, (size[1], size[0], 3), np.uint8)
                path = root / split / name / f"{i}.{('png', 'PNG', 'png')[number]}"
                Image.fromarray(pixels).save(path)
                stored[path] = pixels
    return stored


def settings_of(root, **kwargs):
    return options(
        "data", name="folder", dir=str(root), batch_size=2, validation_fraction=0.0, **kwargs
    )


@pytest.fixture
def images(tmp_path):
    write_unsorted_folder(tmp_path / "set")
    return tmp_path / "set"


def test_folder_is_sorted_and_keeps_the_pixels(tmp_path):
    stored = write_unsorted_folder(tmp_path / "set")
    (tmp_path / "set" / "train" / "ape" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "train" / ".hidden").mkdir()
    data = folder.load(settings_of(tmp_path / "set"))
    assert data.class_names == ("ape", "cat", "zebra")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = [stored[path] for path in sorted(stored) if "/train/" in str(path)]
    np.testing.assert_array_equal(data.train.inputs, expected)
    assert not np.array_equal(data.train.inputs, expected[::-1])
    s = make_source(settings_of(tmp_path / "set"), 0)
    np.testing.assert_allclose(s.mean, np.mean(expected, axis=(0, 1, 2)) / 255)
    np.testing.assert_allclose(s.std, np.std(expected, axis=(0, 1, 2)) / 255)


def test_folder_resizes_and_converts_images(images):
    Image.new("L", (40, 30), 128).save(images / "train" / "ape" / "9.jpeg")
    data = folder.load(settings_of(images, image_size=7))
    assert data.train.inputs.shape == (10, 7, 7, 3)
    np.testing.assert_allclose(data.train.inputs[3].astype(int), 128, atol=1)


def damage(root, kind):
    """Damages an image folder and returns the path to configure."""
    if kind == "missing":
        return root / "nowhere"
    if kind == "no test":
        (root / "test").rename(root / "tset")
    elif kind == "empty split":
        (root / "train").rename(root / "old")
        (root / "train").mkdir()
    elif kind == "empty class":
        (root / "train" / "dog").mkdir()
    elif kind == "unknown class":
        (root / "train" / "cat").rename(root / "old")
    elif kind == "unreadable":
        (root / "train" / "cat" / "1.png").write_bytes(b"\x89PNG but no more")
    elif kind == "truncated":
        path = root / "test" / "cat" / "1.png"
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "size":
        Image.new("RGB", (9, 9)).save(root / "train" / "cat" / "1.png")
    elif kind == "size of test":
        for path in (root / "test").glob("*/*"):
            Image.new("RGB", (9, 9)).save(path)
    return root


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"config.data.dir=.*nowhere: no such directory"),
        ("no test", r"set/test: no such directory; images belong in .*test/<class>/"),
        ("empty split", r"set/train: holds no class directories"),
        ("empty class", r"train/dog: holds no images \(.jpg, .jpeg, .png, "),
        ("unknown class", r"test/cat: the class cat has no directory in .*set/train"),
        ("unreadable", r"train/cat/1.png: cannot be read as an image"),
        ("truncated", r"test/cat/1.png: cannot be read as an image"),
        (
            "size",
            r"train/cat/1.png has 9x9 pixels, but .*train/ape/0.PNG has 6x5: set config.data.image",
        ),
        (
            "size of test",
            r"images in train have 6x5 pixels, but images in test have 9x9: set config.data.image",
        ),
    ],
)
def test_errors_of_a_folder_name_the_file(images, kind, message):
    make_source(settings_of(images), 0)  # the folder is valid before it is damaged
    with pytest.raises(UserError, match=message):
        make_source(settings_of(damage(images, kind)), 0)


def test_a_broken_link_is_one_line(images):
    link = images / "train" / "cat" / "0.png"
    link.unlink()
    link.symlink_to("nowhere.png")
    with pytest.raises(UserError, match=f"^{link}: no such file"):
        folder.load(settings_of(images))


def test_a_folder_without_a_directory_is_refused():
    with pytest.raises(UserError, match=r"config.data.dir is empty"):
        make_source(options("data", name="folder"), 0)


# Channels and formats


def test_grayscale_images_keep_one_channel(tmp_path):
    root = write_image_folder(tmp_path / "gray", mode="L")
    gray = random_image(0, mode="L")
    gray.convert("LA").save(root / "train" / "ape" / "0.png")
    Image.fromarray(np.full((8, 8), 257 * 7, np.uint16)).save(root / "train" / "ape" / "1.png")
    data = folder.load(settings_of(root))
    assert data.train.inputs.shape == (27, 8, 8, 1)
    np.testing.assert_array_equal(data.train.inputs[0, :, :, 0], np.asarray(gray))
    assert (data.train.inputs[1] == 7).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_color_image_gives_all_images_three_channels(tmp_path, split):
    root = write_image_folder(tmp_path / "set", mode="L")
    random_image(9).save(root / split / "cat" / "1.png")
    data = folder.load(settings_of(root))
    assert data.train.inputs.shape[-1] == data.test.inputs.shape[-1] == 3
    expected = np.asarray(random_image(0, mode="L").convert("RGB"))
    np.testing.assert_array_equal(data.train.inputs[0], expected)


def test_the_log_counts_ignored_files(tmp_path, caplog):
    root = write_image_folder(tmp_path / "set")
    for n, suffix in enumerate(("heic", "HEIC", "txt")):
        (root / "train" / "cat" / f"{n}.{suffix}").touch()
    (root / "train" / "ape" / "README").touch()
    (root / "train" / "ape" / "more.png").mkdir()
    os.mkfifo(root / "train" / "cat" / "pipe.png")  # reading it would wait for a writer
    (root / "train" / "ape" / "._1.png").touch()
    (root / "train" / "list.csv").touch()
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert len(folder.load(settings_of(root)).train.labels) == 27
    assert caplog.messages == [
        f"{root}/train: 7 of 34 files are not images and are ignored: 2 .heic, 1 .txt, "
        "1 folders, 1 outside the class directories, 1 pipes and devices, 1 without a suffix"
    ]


def test_all_listed_formats_are_read(tmp_path, caplog):
    root = write_image_folder(tmp_path / "set")
    for n, suffix in enumerate(("bmp", "gif", "ppm", "tif", "TIFF", "webp")):
        path = root / "test" / "ape" / f"9{n}.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        Image.new("RGB", (8, 8), (0, 0, 255)).save(path, **options)
    with caplog.at_level("WARNING", logger="dgl_jax"):
        images = folder.load(settings_of(root)).test.inputs
    assert (images[3:9] == (0, 0, 255)).all()
    assert caplog.messages == []
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "test" / "ape" / "99.tif")
    message = r"99.tif: cannot be read as an image \(its pixels are floating-point numbers"
    with pytest.raises(UserError, match=message):
        folder.load(settings_of(root))


def test_the_log_warns_about_transparency_and_frames(tmp_path, caplog):
    root = write_image_folder(tmp_path / "set")
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.save(root / "train" / "cat" / "1.png")
    clear.quantize(4).save(root / "test" / "cat" / "1.png", transparency=0)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(root / "train" / "cat" / "2.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level("WARNING", logger="dgl_jax"):
        data = folder.load(settings_of(root))
    assert caplog.messages == [
        f"{root}: 2 of 37 images have an alpha channel: "
        "transparency is ignored, the stored color is used",
        f"{root}: 1 of 37 images have several frames: the first one is used",
    ]
    assert (data.train.inputs[10] == (200, 0, 0)).all()


# The cache of decoded images


def test_large_sets_are_cached_and_read_from_the_cache(images, cache_directory, monkeypatch):
    small = folder.load(settings_of(images))
    assert not cache_directory.exists()  # small sets are not cached
    monkeypatch.setattr(cache, "LARGE", 1)
    folder.load(settings_of(images))
    assert len(list(cache_directory.glob("decoded/*/images.npy"))) == 2

    def fail(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder, "decode_images", fail)
    again = folder.load(settings_of(images))
    np.testing.assert_array_equal(again.train.inputs, small.train.inputs)
    np.testing.assert_array_equal(again.train.labels, small.train.labels)
    assert not again.train.inputs.flags.writeable
    with pytest.raises(AssertionError, match="decoded again"):
        folder.load(replace(settings_of(images), image_size=9))
    Image.new("RGB", (6, 5)).save(images / "train" / "cat" / "1.png")
    with pytest.raises(AssertionError, match="decoded again"):
        folder.load(settings_of(images))


def test_a_link_that_moves_to_another_class_is_read_again(images, cache_directory, monkeypatch):
    """Links such as those that sort one folder of images into classes."""
    monkeypatch.setattr(cache, "LARGE", 1)
    stored = images.parent / "stored"
    (images / "train").rename(stored)
    for file in stored.glob("*/*"):
        link = images / "train" / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    before = folder.load(settings_of(images)).train.labels
    first, second = sorted(path for path in (images / "train").iterdir())[:2]
    last = sorted(first.iterdir())[-1]
    last.rename(second / f"-{last.name}")  # it stays between its neighbors
    after = folder.load(settings_of(images)).train.labels
    assert np.bincount(before)[0] == np.bincount(after)[0] + 1
    assert len(before) == len(after)


def test_a_damaged_cache_entry_is_replaced(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    before = folder.load(settings_of(images))
    for path in cache_directory.glob("decoded/*/images.npy"):
        path.write_bytes(path.read_bytes()[:-10])
    after = folder.load(settings_of(images))
    np.testing.assert_array_equal(after.train.inputs, before.train.inputs)
    assert all(np.load(path).ndim == 4 for path in cache_directory.glob("decoded/*/images.npy"))
    assert len(list(cache_directory.glob("decoded/*"))) == 2


# Sizes: empty, half of the magic number, half of the header, header without data.
@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("size", [0, 3, 20, 128])
def test_a_truncated_cache_entry_is_replaced(images, cache_directory, monkeypatch, name, size):
    monkeypatch.setattr(cache, "LARGE", 1)
    before = folder.load(settings_of(images))
    paths = list(cache_directory.glob(f"decoded/*/{name}"))
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) == 2
    assert min(sizes) > 128
    for path in paths:
        os.truncate(path, size)
    after = folder.load(settings_of(images))
    np.testing.assert_array_equal(after.train.inputs, before.train.inputs)
    np.testing.assert_array_equal(after.test.labels, before.test.labels)
    assert [path.stat().st_size for path in paths] == sizes


def test_a_cache_entry_is_synced_to_disk_before_it_is_renamed(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    synced, renamed, fsync, rename = {}, [], os.fsync, os.rename

    def record_fsync(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size

    def record_rename(source, target):
        renamed.append(
            {
                path.name: path.stat().st_size == synced.get(path.stat().st_ino)
                for path in Path(source).iterdir()
            }
        )
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    folder.load(settings_of(images))
    assert renamed == [{"images.npy": True, "labels.npy": True}] * 2


def test_an_unwritable_cache_is_not_an_error(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    cache_directory.write_text("a file, where a directory should be")
    assert len(folder.load(settings_of(images)).train.labels) == 9


def test_cached_images_depend_on_the_number_of_channels(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    monkeypatch.setattr(folder, "_MANY", 1)
    root = write_image_folder(tmp_path / "set", mode="L")
    settings = settings_of(root)
    assert folder.load(settings).train.inputs.shape[-1] == 1
    random_image(9).save(root / "test" / "cat" / "1.png")  # the training files do not change
    assert folder.load(settings).train.inputs.shape[-1] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "image_kinds", lambda files: pytest.fail("headers read again"))
        patch.setattr(folder, "decode_images", lambda *args, **kwargs: pytest.fail("decoded again"))
        assert folder.load(settings).test.inputs.shape[-1] == 3
