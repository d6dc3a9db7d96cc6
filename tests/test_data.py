"""Sources: random access, epochs, shards, held-out images, folders and the cache of decoded images."""

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dgl_jax.config import options
from dgl_jax.data import DataSet, Shard, cache, folder, make_source, synthetic
from dgl_jax.data.memory import ArraySource, channel_statistics
from dgl_jax.data.source import Examples, stratified
from dgl_jax.errors import UserError
from dgl_jax.types import PADDING


@pytest.fixture(autouse=True)
def cache_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def numbered(train=53, test=11, classes=3):
    """Images that show their own index."""

    def split(n):
        images = np.broadcast_to(
            np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 4, 4, 1)
        ).copy()
        return Examples(images, (np.arange(n) % classes).astype(np.int32))

    return DataSet("numbered", tuple(map(str, range(classes))), split(train), split(test))


def source(batch_size=8, seed=0, **kwargs):
    return ArraySource(numbered(), batch_size=batch_size, seed=seed, **kwargs)


def ids_of(batches):
    return np.concatenate([b.context["id"] for b in batches])


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def is_permutation(ids, expected):
    return sorted(ids.tolist()) == sorted(expected)


# Order


@pytest.mark.parametrize("start", [0, 5, 6, 1000])
def test_random_access_equals_iteration(start):
    fresh = source()
    for step, batch in enumerate(islice(source().batches(start), 14), start):
        assert same(batch, fresh.batch(step))
        assert batch.step == step
        assert batch.step.dtype == np.int32
    assert not same(fresh.batch(start), fresh.batch(start + 1))


def test_an_epoch_visits_every_example_at_most_once_and_drops_the_remainder():
    s = source()
    assert s.steps_per_epoch == 6
    first, second = (ids_of(islice(s.batches(6 * epoch), 6)) for epoch in range(2))
    assert len(set(first.tolist())) == len(first) == 48
    assert first.tolist() != second.tolist()
    # A window that is no epoch repeats examples: the assertion above would notice.
    window = ids_of(islice(s.batches(3), 6))
    assert len(set(window.tolist())) < 48


def test_an_epoch_of_whole_batches_visits_every_example_exactly_once():
    s = ArraySource(numbered(48), batch_size=8, seed=0)
    assert is_permutation(ids_of(islice(s.batches(6), 6)), range(48))
    assert not is_permutation(ids_of(islice(s.batches(7), 6)), range(48))


def test_images_labels_and_ids_belong_together():
    for batch in islice(source(validation_fraction=0.2).batches(0), 10):
        np.testing.assert_array_equal(batch.inputs[:, 0, 0, 0], batch.context["id"])
        np.testing.assert_array_equal(batch.context["label"], batch.context["id"] % 3)
        assert batch.context["id"].dtype == batch.context["label"].dtype == np.int32
        assert batch.inputs.dtype == np.uint8


def test_the_seed_decides_order_and_split():
    def order(seed):
        return ids_of(islice(source(seed=seed, validation_fraction=0.2).batches(0), 4)).tolist()

    assert order(1) == order(1) != order(2)


def test_a_batch_may_be_overwritten():
    s = source()
    before = s.batch(0)
    changed = s.batch(0)
    changed.inputs[:] = 255
    changed.context["label"][:] = 77
    assert same(before, s.batch(0))


# Shards


def test_shards_are_disjoint_and_together_the_global_batch():
    s = source()
    whole = s.batch(9)
    parts = [s.batch(9, Shard(i, 4)) for i in range(4)]
    assert [len(p.inputs) for p in parts] == [2] * 4
    np.testing.assert_array_equal(np.concatenate([p.inputs for p in parts]), whole.inputs)
    np.testing.assert_array_equal(ids_of(parts), whole.context["id"])
    assert ids_of(parts[::-1]).tolist() != whole.context["id"].tolist()


def test_shards_of_an_evaluation_cover_it_with_padding_at_the_end():
    s = source()
    whole = list(s.evaluation("test"))
    parts = [list(s.evaluation("test", Shard(i, 4))) for i in range(4)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(ids_of(p[step] for p in parts), batch.context["id"])


def test_hosts_that_do_not_divide_the_batch():
    with pytest.raises(UserError, match=r"batch_size=8: the 3 hosts do not divide it; 9 would do"):
        source().batch(0, Shard(0, 3))
    with pytest.raises(ValueError, match="no such shard"):
        source().batch(0, Shard(4, 4))


# Evaluation and held-out images


@pytest.mark.parametrize(("split", "count"), [("train", 45), ("validation", 8), ("test", 11)])
def test_evaluation_counts_every_example_once(split, count):
    s = source(validation_fraction=0.15)
    assert s.examples(split) == count
    batches = list(s.evaluation(split))
    assert all(b.inputs.shape == (8, 4, 4, 1) for b in batches)
    ids = ids_of(batches)
    real = ids[ids != PADDING]
    assert len(real) == count
    assert real.tolist() == sorted(set(real.tolist()))
    assert len(ids) == -(-count // 8) * 8
    padding = -count % 8
    last = batches[-1]
    assert (last.context["label"][8 - padding :] == PADDING).all()
    assert (last.inputs[8 - padding :] == 0).all()
    assert (last.context["label"][: 8 - padding] != PADDING).all()


def test_training_and_validation_share_no_image_and_leave_none_out():
    s = source(validation_fraction=0.25)
    ids = {
        split: {i for i in ids_of(s.evaluation(split)).tolist() if i != PADDING}
        for split in ("train", "validation")
    }
    assert not ids["train"] & ids["validation"]
    assert ids["train"] | ids["validation"] == set(range(53))
    assert set(ids_of(islice(s.batches(0), 30)).tolist()) <= ids["train"]
    with pytest.raises(ValueError, match="there are train, validation, test"):
        s.examples("dev")


@pytest.mark.parametrize("seed", range(3))
def test_stratification_is_exact(seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    random = np.random.Philox(seed)
    assert np.bincount(labels[stratified(labels, 10, random)]).tolist() == [5, 3, 2]
    # 7 % of 50, 30, 20 is 3.5, 2.1, 1.4: the one left over goes to the class that lost most.
    chosen = stratified(labels, 7, random)
    assert np.bincount(labels[chosen]).tolist() == [4, 2, 1]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    # A plain draw does not keep the shares: the assertions above are not trivial.
    plain = [
        np.bincount(labels[np.random.default_rng(k).permutation(100)[:10]]).tolist()
        for k in range(5)
    ]
    assert plain != [[5, 3, 2]] * 5


def test_a_subset_is_taken_from_what_validation_left():
    whole, part = (
        source(validation_fraction=0.15),
        source(validation_fraction=0.15, train_examples=15),
    )
    held = [
        [i for i in ids_of(s.evaluation("validation")).tolist() if i >= 0] for s in (whole, part)
    ]
    assert held[0] == held[1]
    kept = [b.context for b in part.evaluation("train")]
    labels = np.concatenate([t["label"] for t in kept])
    assert np.bincount(labels[labels >= 0]).tolist() == [5, 5, 5]
    assert part.examples("train") == 15
    assert part.steps_per_epoch == 1


def test_what_does_not_fit():
    with pytest.raises(
        UserError, match=r"config.data.batch_size=54: there are only 53 training examples"
    ):
        source(batch_size=54)
    assert source(batch_size=53).steps_per_epoch == 1
    with pytest.raises(UserError, match=r"config.data.train_examples=54: numbered has 53"):
        source(train_examples=54)
    with pytest.raises(
        UserError, match=r"config.data.mean=\(0.1, 0.2\): one value a channel .* has 1"
    ):
        source(mean=(0.1, 0.2), std=(1.0, 1.0))


def test_statistics_by_hand():
    images = np.zeros((3, 1, 2, 2), np.uint8)
    images[0, 0, :, 0], images[1, 0, :, 0] = 255, 255
    images[2] = 255  # not among the chosen ones
    mean, std = channel_statistics(images, np.array([0, 1]), at_once=1)
    assert mean == (1.0, 0.0)
    assert std == (1 / 255, 1 / 255)  # no contrast at all
    mean, std = channel_statistics(images, np.array([0, 2]))
    assert mean == (1.0, 0.5)
    assert std == (1 / 255, 0.5)


# By name


def test_synthetic_images_can_be_learnt_and_have_the_size_asked_for():
    s = make_source(options("data", name="synthetic", image_size=8), seed=0)
    assert s.example_shape == (8, 8, 3)
    assert [s.examples(split) for split in ("train", "validation", "test")] == [1843, 205, 128]
    data = synthetic.make(500, 200, 8)
    means = np.stack([data.train.inputs[data.train.labels == k].mean(axis=0) for k in range(10)])
    distances = ((data.test.inputs[:, None].astype(float) - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == data.test.labels).mean() > 0.9
    assert (distances.argmin(axis=1) == np.roll(data.test.labels, 1)).mean() < 0.3


def test_settings_override_mean_and_std():
    settings = options(
        "data",
        name="synthetic",
        image_size=8,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        augment="crop_flip",
    )
    source = make_source(settings, 0)
    assert (source.mean, source.std) == (settings.mean, settings.std)


def test_unknown_name():
    with pytest.raises(
        UserError, match=r"config.data.name='cifar': no such name; did you mean cifar10"
    ):
        make_source(options("data", name="cifar"), 0)


# Folders


def write_folder(root, size=(6, 5), per_class=3):
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
    write_folder(tmp_path / "set")
    return tmp_path / "set"


def test_folder_holds_the_pixels_in_order(tmp_path):
    stored = write_folder(tmp_path / "set")
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


def test_folder_resizes_and_converts(images):
    Image.new("L", (40, 30), 128).save(images / "train" / "ape" / "9.jpeg")
    data = folder.load(settings_of(images, image_size=7))
    assert data.train.inputs.shape == (10, 7, 7, 3)
    np.testing.assert_allclose(data.train.inputs[3].astype(int), 128, atol=1)


def broken(what):
    def apply(root):
        if what == "missing":
            return root / "nowhere"
        if what == "no test":
            (root / "test").rename(root / "tset")
        elif what == "empty split":
            (root / "train").rename(root / "old")
            (root / "train").mkdir()
        elif what == "empty class":
            (root / "train" / "dog").mkdir()
        elif what == "unknown class":
            (root / "train" / "cat").rename(root / "old")
        elif what == "unreadable":
            (root / "train" / "cat" / "1.png").write_bytes(b"\x89PNG but no more")
        elif what == "truncated":
            path = root / "test" / "cat" / "1.png"
            path.write_bytes(path.read_bytes()[:60])
        elif what == "size":
            Image.new("RGB", (9, 9)).save(root / "train" / "cat" / "1.png")
        elif what == "size of test":
            for path in (root / "test").glob("*/*"):
                Image.new("RGB", (9, 9)).save(path)
        return root

    return apply


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"config.data.dir=.*nowhere: no such directory"),
        ("no test", r"set/test: no such directory; images belong in .*test/<class>/"),
        ("empty split", r"set/train: holds no class directories"),
        ("empty class", r"train/dog: holds no images \(.jpg, .jpeg, .png, "),
        ("unknown class", r"test/cat: the class cat has no directory in .*set/train"),
        ("unreadable", r"train/cat/1.png: not an image that can be read"),
        ("truncated", r"test/cat/1.png: not an image that can be read"),
        (
            "size",
            r"train/cat/1.png has 9x9 pixels and .*train/ape/0.PNG 6x5: set config.data.image_size",
        ),
        (
            "size of test",
            r"images in train have 6x5 pixels and images in test 9x9: set config.data.image_size",
        ),
    ],
)
def test_folder_errors(images, what, message):
    make_source(settings_of(images), 0)  # nothing is wrong yet
    with pytest.raises(UserError, match=message):
        make_source(settings_of(broken(what)(images)), 0)


def test_folder_needs_a_directory():
    with pytest.raises(UserError, match=r"config.data.dir is empty"):
        make_source(options("data", name="folder"), 0)


# The cache of decoded images


def test_decoded_images_are_kept_and_found_again(images, cache_directory, monkeypatch):
    small = folder.load(settings_of(images))
    assert not cache_directory.exists()  # a small set is decoded every time
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


def test_a_damaged_entry_is_replaced(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    before = folder.load(settings_of(images))
    for path in cache_directory.glob("decoded/*/images.npy"):
        path.write_bytes(path.read_bytes()[:-10])
    after = folder.load(settings_of(images))
    np.testing.assert_array_equal(after.train.inputs, before.train.inputs)
    assert all(np.load(path).ndim == 4 for path in cache_directory.glob("decoded/*/images.npy"))
    assert len(list(cache_directory.glob("decoded/*"))) == 2


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize(
    "size", [0, 3, 20, 128]
)  # nothing, half the magic, half the header, no data
def test_an_entry_cut_short_is_replaced(images, cache_directory, monkeypatch, name, size):
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


def test_an_entry_is_on_the_disk_before_it_has_its_name(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    synced, renamed, fsync, rename = {}, [], os.fsync, os.rename

    def note_fsync(descriptor):
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_size

    def note_rename(source, target):
        renamed.append(
            {
                path.name: path.stat().st_size == synced.get(path.stat().st_ino)
                for path in Path(source).iterdir()
            }
        )
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder.load(settings_of(images))
    assert renamed == [{"images.npy": True, "labels.npy": True}] * 2


def test_a_cache_that_cannot_be_written_is_no_error(images, cache_directory, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 1)
    cache_directory.write_text("a file, where a directory should be")
    assert len(folder.load(settings_of(images)).train.labels) == 9
