"""ImageNet and Imagenette from generated archives: preparing, batches, shards, workers, errors."""

import io
import sys
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dgl_jax.config import options
from dgl_jax.data import (
    RecordSource,
    Shard,
    Source,
    archives,
    cache,
    make_source,
    streaming,
    tfds_sets,
)
from dgl_jax.data.tfds_sets import Records, builder_class, prepared
from dgl_jax.errors import UserError
from dgl_jax.types import PADDING

CLASSES = {"n01739381": 20, "n02105855": 12, "n02077923": 8}  # training images
VALIDATION = 11
SIZE = 16
# By number: two of the names under which ImageNet stores images that are not RGB JPEGs.
ODD_IMAGES = {
    0: ("n01739381_1309.JPEG", "JPEG", "CMYK"),
    20: ("n02105855_2933.JPEG", "PNG", "RGB"),
}


@pytest.fixture(autouse=True)
def cache_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def photo(number, form="JPEG", mode="RGB"):
    """Returns an encoded image: size and red encode its number, green and blue the position."""
    width, height = 40 + number * 7 % 31, 36 + number * 5 % 23
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0] = 6 * number
    pixels[..., 1] = np.linspace(20, 235, width)
    pixels[..., 2] = np.linspace(20, 235, height)[:, None]
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


def numbers(images):
    """Returns the number of the photograph from which each image was cropped."""
    return np.rint(images[..., 0].mean(axis=(1, 2)) / 6).astype(int)


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_imagenet(directory, damaged=None):
    """Writes ImageNet's archives, with training image number `damaged` truncated.

    Returns, by file name, number and class of each training image and the number of each
    validation image.
    """
    directory.mkdir(parents=True)
    train, validation = {}, {}
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as archive:
        for label, count in CLASSES.items():
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as class_archive:
                for _ in range(count):
                    number = len(train)
                    name, form, mode = ODD_IMAGES.get(
                        number, (f"{label}_{number}.JPEG", "JPEG", "RGB")
                    )
                    content = photo(number, form, mode)
                    size = len(content) // 2 if number == damaged else len(content)
                    add(class_archive, name, content[:size])
                    train[name] = number, label
            add(archive, f"{label}.tar", file.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in np.random.default_rng(0).permutation(VALIDATION).tolist():
            name = f"ILSVRC2012_val_{number + 1:08d}.JPEG"
            add(archive, name, photo(number))
            validation[name] = number
    return train, validation


def write_imagenette(directory):
    directory.mkdir(parents=True)
    splits = {"train": ("n01440764", "n02102040", "n01440764"), "val": ("n02102040",)}
    with tarfile.open(directory / "imagenette2-320.tgz", "w:gz") as archive:
        add(archive, "imagenette2-320/noisy_imagenette.csv", b"path")
        for split, labels in splits.items():
            for number, label in enumerate(labels):
                name = f"imagenette2-320/{split}/{label}/{split}_{number}.JPEG"
                add(archive, name, photo(number))


def url_infos(name, directory):
    """Returns the checksums of generated archives, to replace the published checksums."""
    from tensorflow_datasets.core.download import checksums

    return {
        a.url: checksums.compute_url_info(directory / a.filename) for a in archives.archives(name)
    }


def prepare_imagenet(root, damaged=None):
    """Writes and prepares ImageNet; returns the directory and what `write_imagenet` returns."""
    manual = root / "archives"
    stored = write_imagenet(manual, damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder_class("imagenet2012"), "url_infos", url_infos("imagenet2012", manual))
        prepared(
            options("data", name="imagenet", dir=str(root), manual_dir=str(manual)), "imagenet2012"
        )
    return root, *stored


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    return prepare_imagenet(tmp_path_factory.mktemp("imagenet"))


def settings_of(imagenet, **kwargs):
    fields = {
        "batch_size": 8,
        "validation_fraction": 0.0,
        "augment": "inception_crop",
        "image_size": SIZE,
    }
    return options("data", **{"name": "imagenet", "dir": str(imagenet[0])} | fields | kwargs)


def source_of(imagenet, seed=0, **kwargs):
    return make_source(settings_of(imagenet, **kwargs), seed)


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def ids_of(batches):
    return np.concatenate([batch.context["id"] for batch in batches])


# Preparing


def test_the_prepared_set_holds_all_images_and_labels(imagenet):
    root, train, validation = imagenet
    directory = root / "imagenet2012" / "5.1.0"
    names = tfds_sets.open_set(directory).info.features["label"].names
    assert len(names) == 1000
    stored = Records(directory, "train")
    records = stored.read(range(len(stored)))
    assert {r.file_name for r in records} == set(train)
    assert len(records) == len(train) == 40
    for record in records:
        number, label = train[record.file_name]
        assert names[record.label] == label
        with Image.open(io.BytesIO(record.image)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert numbers(np.asarray(image)[None]) == number
        if number not in ODD_IMAGES:
            assert record.image == photo(number)
    # TFDS lists the labels of the validation images in the order of their names.
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    stored = Records(directory, "validation")
    stored_labels = {r.file_name: names[r.label] for r in stored.read(range(len(stored)))}
    assert stored_labels == {name: labels[number] for name, number in validation.items()}
    assert "tensorflow" not in sys.modules


def test_stock_tfds_reads_the_prepared_set(imagenet):
    import tensorflow_datasets as tfds

    stock = tfds.data_source("imagenet2012", split="train", data_dir=imagenet[0], download=False)
    ours = Records(imagenet[0] / "imagenet2012" / "5.1.0", "train").read(range(40))
    assert [(r["file_name"].decode(), r["label"]) for r in stock] == [
        (r.file_name, r.label) for r in ours
    ]


def test_imagenette_is_prepared_and_read(tmp_path, monkeypatch):
    manual = tmp_path / "downloads" / "manual"
    write_imagenette(manual)
    monkeypatch.setattr(
        builder_class("imagenette"), "url_infos", url_infos("imagenette/320px-v2", manual)
    )
    monkeypatch.setattr(tfds_sets, "reachable", lambda url: False)
    source = source_of([tmp_path], name="imagenette", batch_size=3)
    assert source.mean == (0.485, 0.456, 0.406)
    assert len(source.class_names) == 10
    (batch,) = source.evaluation("train")
    pairs = zip(numbers(batch.inputs).tolist(), batch.context["label"].tolist(), strict=True)
    assert dict(pairs) == {0: 0, 1: 1, 2: 0}
    assert source.class_names[:2] == ("n01440764", "n02102040")
    (batch,) = source.evaluation("test")
    assert batch.context["label"].tolist() == [1, PADDING, PADDING]


def test_missing_archives_are_named(tmp_path, monkeypatch):
    message = (
        r"imagenet2012 is not in .*/tfds, and its archives require registration: put "
        r"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar "
        r"\(from https://image-net.org/download-images\) into .*/downloads/manual/"
    )
    with pytest.raises(UserError, match=message):
        make_source(options("data", name="imagenet"), 0)
    monkeypatch.setattr(tfds_sets, "reachable", lambda url: False)
    message = (
        r"s3.amazonaws.com cannot be reached: put imagenette2-320.tgz \(from https://s3.*320.tgz\)"
    )
    with pytest.raises(UserError, match=message):
        make_source(options("data", name="imagenette"), 0)
    write_imagenet(tmp_path / "archives")
    (tmp_path / "archives" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(UserError, match=r"put ILSVRC2012_img_val.tar \(from"):
        make_source(options("data", name="imagenet", manual_dir=str(tmp_path / "archives")), 0)


def test_archives_that_differ_from_the_published_ones_are_refused(tmp_path, monkeypatch):
    directory = tmp_path / "archives"
    write_imagenet(directory)
    settings = options("data", name="imagenet", manual_dir=str(directory))
    message = r"ILSVRC2012_img_train.tar has \d+ bytes, but the published archive has 147897477120:"
    with pytest.raises(UserError, match=message):
        prepared(settings, "imagenet2012")
    monkeypatch.setattr(
        builder_class("imagenet2012"), "url_infos", url_infos("imagenet2012", directory)
    )
    path = directory / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val.tar has the wrong checksum"):
        prepared(settings, "imagenet2012")


# Batches


def test_every_image_is_seen_exactly_once_per_epoch(imagenet):
    source = source_of(imagenet)
    assert isinstance(source, Source)
    assert isinstance(source, RecordSource)
    assert source.steps_per_epoch == 5
    id_of = {r.file_name: i for i, r in enumerate(source._data.train.read(range(40)))}
    number_of = {id_of[name]: number for name, (number, _) in imagenet[1].items()}
    orders = []
    for epoch in range(2):
        batches = list(islice(source.batches(5 * epoch), 5))
        ids = ids_of(batches)
        assert sorted(ids.tolist()) == list(range(40))
        images = np.concatenate([batch.inputs for batch in batches])
        assert numbers(images).tolist() == [number_of[i] for i in ids.tolist()]
        orders.append(ids.tolist())
    assert orders[0] != orders[1]
    # Batches across an epoch boundary repeat images, so the assertions above are not trivial.
    assert sorted(ids_of(islice(source.batches(3), 5)).tolist()) != list(range(40))


@pytest.mark.parametrize("augment", ["inception_crop", "none"])
def test_random_access_equals_iteration(imagenet, augment):
    source = source_of(imagenet, augment=augment)
    whole = list(islice(source_of(imagenet, augment=augment).batches(0), 9))
    # From the middle of an epoch into the next one.
    for step, batch in enumerate(islice(source.batches(3), 6), 3):
        assert same(batch, whole[step])
        assert same(batch, source.batch(step))
        assert batch.step == step
        assert batch.inputs.dtype == np.uint8
    assert not same(source.batch(3), source_of(imagenet, seed=1, augment=augment).batch(3))
    # The same image one epoch later is cropped elsewhere only with random crops.
    first, later = (
        {i: image for b in whole[s : s + 4] for i, image in zip(b.context["id"].tolist(), b.inputs)}
        for s in (0, 5)
    )
    both = sorted(first.keys() & later.keys())
    equal = [np.array_equal(first[i], later[i]) for i in both]
    assert both
    assert not any(equal) if augment == "inception_crop" else all(equal)


def test_shards_concatenate_to_the_global_batch(imagenet):
    source = source_of(imagenet)
    for step in range(source.steps_per_epoch):
        whole, parts = source.batch(step), [source.batch(step, Shard(host, 2)) for host in range(2)]
        assert [len(part.inputs) for part in parts] == [4, 4]
        np.testing.assert_array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
        np.testing.assert_array_equal(ids_of(parts), whole.context["id"])
    hosts = [ids_of(islice(source.batches(0, Shard(host, 2)), 5)) for host in range(2)]
    assert sorted(np.concatenate(hosts).tolist()) == list(range(40))
    whole = list(source.evaluation("test"))
    parts = [list(source.evaluation("test", Shard(host, 2))) for host in range(2)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(ids_of(p[step] for p in parts), batch.context["id"])
    assert [i for i in ids_of(whole).tolist() if i != PADDING] == list(range(VALIDATION))


def test_held_out_images_are_stratified_and_labels_are_cached(
    imagenet, cache_directory, monkeypatch
):
    source = source_of(imagenet, validation_fraction=0.25)
    sizes = [source.examples(split) for split in ("train", "validation", "test")]
    assert sizes == [30, 10, VALIDATION]
    held_out, trained = (
        [b.context for b in source.evaluation(split)] for split in ("validation", "train")
    )
    labels = np.concatenate([c["label"] for c in held_out])
    _, counts = np.unique(labels[labels != PADDING], return_counts=True)
    assert sorted(counts.tolist()) == [2, 3, 5]
    ids = [
        {i for c in contexts for i in c["id"].tolist() if i != PADDING}
        for contexts in (held_out, trained)
    ]
    assert ids[0] | ids[1] == set(range(40))
    assert len(ids[0]) + len(ids[1]) == 40
    # Labels are read once, and not at all if nothing has to be stratified.
    assert len(list(cache_directory.glob("labels/*.npy"))) == 1
    monkeypatch.setattr(Records, "read", lambda *args: pytest.fail("read again"))
    source_of(imagenet, validation_fraction=0.1)
    source_of(imagenet)
    next(cache_directory.glob("labels/*.npy")).write_bytes(b"")
    with pytest.raises(pytest.fail.Exception, match="read again"):
        source_of(imagenet, validation_fraction=0.1)


def test_settings_that_do_not_fit_the_data_are_refused(imagenet):
    with pytest.raises(
        UserError, match=r"config.data.batch_size=41: there are only 40 training examples"
    ):
        source_of(imagenet, batch_size=41)
    with pytest.raises(
        UserError, match=r"config.data.mean=\(0.5,\): needs one value per channel.* has 3 "
    ):
        source_of(imagenet, mean=(0.5,), std=(0.5,))
    assert source_of(imagenet, image_size=0).example_shape == (224, 224, 3)
    with pytest.raises(
        UserError, match=r"config.data.augment=inception_crop: .*, but synthetic is kept in memory"
    ):
        make_source(options("data", name="synthetic", augment="inception_crop"), 0)


# Workers and unreadable images


@pytest.fixture(scope="session")
def damaged(tmp_path_factory):
    return prepare_imagenet(tmp_path_factory.mktemp("damaged"), damaged=7)


@pytest.mark.slow
def test_worker_processes_return_the_same_batches_and_name_a_damaged_image(damaged):
    source = source_of(damaged)
    names = [record.file_name for record in source._data.train.read(range(40))]
    bad = names.index("n01739381_7.JPEG")
    message = (
        rf"imagenet2012/5.1.0: train image {bad} \(n01739381_7.JPEG\): "
        r"cannot be read as an image \(.*truncated"
    )
    step = next(step for step in range(5) if bad in source._order.training(step))
    with pytest.raises(UserError, match=message):
        source.batch(step)
    with pytest.raises(UserError, match=message):
        list(source.evaluation("train"))
    # A seed with which the damaged image comes late in the epoch.
    seed = next(s for s in range(50) if bad in source_of(damaged, seed=s)._order.training(3))
    here, there = source_of(damaged, seed=seed), source_of(damaged, seed=seed, workers=2)
    batches = there.batches(0)
    for step in range(3):
        batch = next(batches)
        assert same(batch, here.batch(step))
        assert type(batch.inputs) is np.ndarray
    with pytest.raises(UserError, match=message):
        next(batches)


def test_a_set_without_validation_images_is_refused(imagenet, monkeypatch):
    class Other:
        info = type("Info", (), {"splits": {"train": None}})

    monkeypatch.setattr(tfds_sets, "open_set", lambda directory: Other)
    with pytest.raises(UserError, match=r"5.1.0 was prepared without validation images"):
        streaming.load(replace(settings_of(imagenet), dir=str(Path(imagenet[0]))), "imagenet2012")
