"""A run and its data set: what it was trained on is what it is asked about, in names, order and shape."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import arrays, records, small_config

from dgl_jax import train
from dgl_jax.config import make_settings
from dgl_jax.data import folder
from dgl_jax.data.info import DatasetInfo, listed
from dgl_jax.data.memory import channel_statistics
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.export import export_run, load_exported
from dgl_jax.run import build, restore
from dgl_jax.run.build import make_experiment
from dgl_jax.run.checkpoint import newest_meta
from dgl_jax.run.restore import load_trained
from dgl_jax.tools import predict
from dgl_jax.tools.predict import predict_probabilities, predict_run
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
CLASSES = ("ape", "cat", "ñandú")


def pixels(number: int, size=(8, 8), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))


def write(root: Path, mode: str = "RGB", size=(8, 8), classes=CLASSES) -> Path:
    for split, count in (("train", 9), ("test", 3)):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels(100 * c + i, size, mode).save(root / split / name / f"{i}.png")
    return root


def config_of(root: Path, **fields):
    fields = {
        "train__steps": 6,
        "data__augment": "none",
        "eval__every": 0,
        "checkpoint__every": 0,
    } | fields
    return small_config(
        data__name="folder",
        data__dir=str(root),
        data__image_size=0,
        data__train_examples=0,
        **fields,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train_and_evaluate(config_of(images), path)
    return path


@pytest.fixture
def other(images, tmp_path) -> Path:
    """A copy of the data, to be changed."""
    return shutil.copytree(images, tmp_path / "other")


def rename(root: Path, old: str, new: str) -> None:
    for split in ("train", "test"):
        (root / split / old).rename(root / split / new)


def resize(root: Path) -> None:
    for path in root.glob("*/*/*.png"):
        pixels(0, (9, 8)).save(path)


CHANGES = {
    "renamed": (
        lambda root: rename(root, "cat", "cow"),
        r"the run knows 3 classes \(ape, cat, ñandú\), the data have 3 classes \(ape, cow, ñandú\)",
    ),
    "added": (
        lambda root: shutil.copytree(root / "train" / "cat", root / "train" / "bat"),
        r"the run knows 3 classes \(ape, cat, ñandú\), the data have 4 classes \(ape, bat, cat, ñandú\)",
    ),
    "order": (  # renamed so that the same names stand for other pictures cannot be seen; another order of names can
        lambda root: rename(root, "ape", "dog"),
        r"the run knows 3 classes \(ape, cat, ñandú\), the data have 3 classes \(cat, dog, ñandú\)",
    ),
    "size": (resize, r"the run takes examples of 8x8x3 uint8, the data are of 8x9x3 uint8"),
    "grey": (
        lambda root: [pixels(0, mode="L").save(path) for path in root.glob("*/*/*.png")],
        r"the run takes examples of 8x8x3 uint8, the data are of 8x8x1 uint8",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_are_refused_with_both_lists(run, other, tmp_path, change):
    alter, message = CHANGES[change]
    alter(other)
    copy = shutil.copytree(run, tmp_path / "run")
    before = sorted(copy.rglob("*"))
    with pytest.raises(
        UserError, match=f"^config.data.dir={other}: these are not the data of this run: {message}"
    ):
        evaluate_run(copy, settings=make_settings(config_of(other)))
    with pytest.raises(
        UserError, match=f"^config.data.dir={other}: these are not the data of this run: {message}"
    ):
        train_and_evaluate(config_of(other, train__steps=8), copy)
    assert sorted(copy.rglob("*")) == before
    assert not (copy / "damaged").exists()


def test_more_images_keep_the_mean_and_deviation_of_the_run(run, other, tmp_path):
    stored = newest_meta(run / "checkpoints")["dataset"]
    for i in range(20, 24):
        Image.new("RGB", (8, 8), "white").save(other / "train" / "cat" / f"{i}.png")
    copy = shutil.copytree(run, tmp_path / "run")
    found = DatasetInfo.of(make_experiment(make_settings(config_of(other))).source)
    assert np.abs(np.subtract(found.mean, stored["mean"])).min() > 0.01
    train_and_evaluate(config_of(other, train__steps=8), copy)
    assert newest_meta(copy / "checkpoints")["dataset"] == stored
    assert load_trained(copy).spec.task.mean == tuple(stored["mean"])
    assert (
        evaluate_run(copy, settings=make_settings(config_of(other)))["test/ensemble/accuracy"] >= 0
    )
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # twin: what is computed anew is another normalisation
        patch.setattr(train, "_stored", lambda *_: {})
        made = make_experiment(
            make_settings(config_of(other, train__steps=9)), **train._stored(copy, None)
        )
    assert made.spec.task.mean != tuple(stored["mean"])


def test_the_same_data_elsewhere_change_nothing(run, other, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    train_and_evaluate(config_of(other), copy)
    assert records(copy) == records(run)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(run), arrays(copy), strict=True))


def test_long_lists_show_where_they_differ():
    one = [f"class_{n}" for n in range(1000)]
    other = [*one[:500], "new", *one[500:]]
    assert listed(one, other) == (
        "1000 classes (..., class_498, class_499, class_500, class_501, class_502, ...)",
        "1001 classes (..., class_498, class_499, new, class_500, class_501, ...)",
    )
    assert listed(one, one[:-1])[1] == "999 classes (..., class_997, class_998)"
    assert listed(["x" * 100], ["y"])[0] == f"1 classes ({'x' * 40}...)"
    assert listed(one, ["a", "b"]) == (
        "1000 classes (class_0, class_1, class_2, class_3, class_4, ...)",
        "2 classes (a, b)",
    )


# Weights of another run


@pytest.mark.slow
def test_weights_of_a_run_with_other_classes(run, images, tmp_path, caplog):
    four = write(tmp_path / "four", classes=(*CLASSES, "zebra"))
    with pytest.raises(
        UserError,
        match=r"^--init_from: that run has 3 classes \(ape, cat, ñandú\) of data.name=folder",
    ) as error:
        train_and_evaluate(config_of(four), tmp_path / "new", init_from=run)
    assert "this one 4 classes (ape, cat, zebra, ñandú) of data.name=folder" in str(error.value)
    assert "config.model" not in str(error.value)
    with pytest.raises(
        UserError, match=r"parameters of other shapes: config.model.width is 4 there and 8 here$"
    ):
        train_and_evaluate(config_of(images, model__width=8), tmp_path / "new", init_from=run)
    grey = write(tmp_path / "grey", mode="L")
    with pytest.raises(
        UserError,
        match=r"parameters of other shapes: examples are 8x8x3 uint8 there and 8x8x1 uint8 here$",
    ):
        train_and_evaluate(config_of(grey), tmp_path / "new", init_from=run)
    with pytest.raises(UserError, match=r"^--init_from: that run has 2 modules, this one 3$"):
        train_and_evaluate(config_of(images, model__modules=3), tmp_path / "new", init_from=run)
    assert not (tmp_path / "new").exists()
    rename(four, "zebra", "bee")
    for split in ("train", "test"):
        shutil.rmtree(four / split / "cat")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        restore.check_weights(make_experiment(make_settings(config_of(four))), load_trained(run))
    assert (
        "that run has 3 classes (ape, cat, ñandú), this one 3 classes (ape, bee, ñandú): the heads start"
        in caplog.text
    )


# Pictures of other sizes


def test_pictures_of_any_size_are_predicted(run, tmp_path):
    trained = load_trained(run)
    large = pixels(3, (20, 12))
    large.save(tmp_path / "large.png")
    (found,) = predict._read([tmp_path / "large.png"], trained.info.example_shape, False)
    np.testing.assert_array_equal(
        found, np.asarray(large.resize((8, 8), Image.Resampling.BILINEAR))
    )
    predict_run(run, "newest", [str(tmp_path)], tmp_path / "out.csv")
    assert len((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()) == 2


def test_pictures_for_a_network_of_unequal_sides_are_resized(tmp_path):
    pictures = [pixels(n, size) for n, size in enumerate(((6, 4), (20, 12), (4, 6)))]
    for n, picture in enumerate(pictures):
        picture.save(tmp_path / f"{n}.png")
    found = predict._read([tmp_path / f"{n}.png" for n in range(3)], (4, 6, 3), False)
    assert found.shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(found[0], np.asarray(pictures[0]))
    for n in (1, 2):
        np.testing.assert_array_equal(
            found[n], np.asarray(pictures[n].resize((6, 4), Image.Resampling.BILINEAR))
        )


# Grey pictures


def test_grey_pictures_keep_one_channel(tmp_path):
    root = write(tmp_path / "grey", mode="L")
    pixels(0, mode="L").convert("LA").save(root / "train" / "ape" / "0.png")
    Image.fromarray(np.full((8, 8), 257 * 7, np.uint16)).save(root / "train" / "ape" / "1.png")
    data = folder.load(make_settings(config_of(root)).data)
    assert data.train.inputs.shape == (27, 8, 8, 1)
    np.testing.assert_array_equal(data.train.inputs[0, :, :, 0], np.asarray(pixels(0, mode="L")))
    assert (data.train.inputs[1] == 7).all()


@pytest.mark.slow
def test_a_run_on_grey_pictures_has_one_channel_everywhere(tmp_path):
    root = write(tmp_path / "grey", mode="L")
    data = folder.load(make_settings(config_of(root)).data)
    train_and_evaluate(config_of(root), tmp_path / "run")
    trained = load_trained(tmp_path / "run")
    mean, std = channel_statistics(
        data.train.inputs, make_experiment(trained.settings).source._order.splits["train"]
    )
    assert trained.info == DatasetInfo("folder", CLASSES, (8, 8, 1), mean, std)
    probabilities, _ = predict_probabilities(trained, data.test.inputs)
    logits = load_exported(export_run(tmp_path / "run")).logits(data.test.inputs)[-1]
    np.testing.assert_allclose(
        np.exp(logits) / np.exp(logits).sum(1, keepdims=True), probabilities, rtol=1e-4
    )
    pixels(5).save(tmp_path / "coloured.png")
    (found,) = predict._read([tmp_path / "coloured.png"], trained.info.example_shape, False)
    np.testing.assert_array_equal(found[:, :, 0], np.asarray(pixels(5).convert("L")))


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_coloured_picture_makes_three_channels_of_all(tmp_path, split):
    root = write(tmp_path / "set", mode="L")
    pixels(9).save(root / split / "cat" / "1.png")
    data = folder.load(make_settings(config_of(root)).data)
    assert data.train.inputs.shape[-1] == data.test.inputs.shape[-1] == 3
    np.testing.assert_array_equal(
        data.train.inputs[0], np.asarray(pixels(0, mode="L").convert("RGB"))
    )


def test_what_is_kept_decoded_has_its_channels(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.cache, "LARGE", 1)
    monkeypatch.setattr(folder.cache, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(folder, "_MANY", 1)
    root = write(tmp_path / "set", mode="L")
    settings = make_settings(config_of(root)).data
    assert folder.load(settings).train.inputs.shape[-1] == 1
    pixels(9).save(root / "test" / "cat" / "1.png")  # the files of train are as they were
    assert folder.load(settings).train.inputs.shape[-1] == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "image_kinds", lambda files: pytest.fail("looked at again"))
        patch.setattr(folder, "decode_images", lambda *args, **kwargs: pytest.fail("decoded again"))
        assert folder.load(settings).test.inputs.shape[-1] == 3


# One line for what surprises


def test_files_that_are_not_used_are_counted(tmp_path, caplog):
    root = write(tmp_path / "set")
    for n, suffix in enumerate(("heic", "HEIC", "txt")):
        (root / "train" / "cat" / f"{n}.{suffix}").touch()
    (root / "train" / "ape" / "README").touch()
    (root / "train" / "ape" / "more").mkdir()
    (root / "train" / "ape" / "._1.png").touch()
    (root / "train" / "list.csv").touch()
    with caplog.at_level("WARNING", logger="dgl_jax"):
        assert len(folder.load(make_settings(config_of(root)).data).train.labels) == 27
    assert caplog.messages == [
        f"{root}/train: 6 of 33 files are no images and are ignored: "
        "2 .heic, 1 .txt, 1 beside the classes, 1 folders, 1 without a suffix"
    ]


def test_more_kinds_of_pictures_are_read(tmp_path, caplog):
    root = write(tmp_path / "set")
    for n, suffix in enumerate(("bmp", "gif", "ppm", "tif", "TIFF", "webp")):
        picture = Image.new("RGB", (8, 8), (0, 0, 255))
        picture.save(
            root / "test" / "ape" / f"9{n}.{suffix}",
            **({"lossless": True} if suffix == "webp" else {}),
        )
    with caplog.at_level("WARNING", logger="dgl_jax"):
        found = folder.load(make_settings(config_of(root)).data).test.inputs
    assert (found[3:9] == (0, 0, 255)).all()
    assert caplog.messages == []
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "test" / "ape" / "99.tif")
    with pytest.raises(
        UserError,
        match=r"99.tif: not an image that can be read \(its pixels are floating-point numbers",
    ):
        folder.load(make_settings(config_of(root)).data)


def test_hidden_colour_and_frames_are_said(tmp_path, caplog):
    root = write(tmp_path / "set")
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.save(root / "train" / "cat" / "1.png")
    clear.quantize(4).save(root / "test" / "cat" / "1.png", transparency=0)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(root / "train" / "cat" / "2.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level("WARNING", logger="dgl_jax"):
        data = folder.load(make_settings(config_of(root)).data)
    assert caplog.messages == [
        f"{root}: 2 of 37 images have transparent parts: transparency is ignored, and the colour stored under it is what counts",
        f"{root}: 1 of 37 images have several frames: the first is used",
    ]
    assert (data.train.inputs[10] == (200, 0, 0)).all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"checkpoint__every": 4, "eval__every": 6, "train__steps": 12},
            "coincide only at the last step",
        ),
        ({"checkpoint__every": 4, "eval__every": 6, "train__steps": 13}, ""),
        ({"checkpoint__every": 4, "eval__every": 2, "train__steps": 12}, ""),
        (
            {"checkpoint__every": 12, "eval__every": 5, "train__steps": 12},
            "",
        ),  # there is but one checkpoint
        ({"checkpoint__every": 0, "eval__every": 0, "train__steps": 12}, ""),
        ({"data__validation_fraction": 0.0}, "no examples are held out for validation"),
    ],
)
def test_a_best_checkpoint_that_can_never_be_is_said(images, fields, said):
    (*told,) = build.remarks(make_experiment(make_settings(config_of(images, **fields))))
    assert len(told) == bool(said)
    assert said in "".join(told)


def test_a_single_class_is_said(tmp_path, monkeypatch, caplog):
    def enough(workdir):
        raise UserError("before anything is compiled")

    monkeypatch.setattr(train, "lock", enough)
    root = write(tmp_path / "set", classes=("cat",))
    with (
        caplog.at_level("WARNING", logger="dgl_jax"),
        pytest.raises(UserError, match="before anything"),
    ):
        train_and_evaluate(config_of(root, train__steps=1, data__batch_size=4), tmp_path / "run")
    assert "folder: has a single class, so every prediction is correct" in caplog.text


# Another locale


@pytest.mark.slow
def test_an_ascii_locale_changes_neither_names_nor_bytes(run, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xb1.png"
    pixels(0).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    script = (
        "import sys, json\n"
        "from dgl_jax import evaluate\nfrom dgl_jax.run import progress\nfrom dgl_jax.tools import predict\n"
        "progress.log_to_stderr()\n"
        "assert sys.getfilesystemencoding() == 'ascii', sys.getfilesystemencoding()\n"
        "print(json.dumps(evaluate.evaluate_run(sys.argv[1])))\n"
        "predict.predict_run(sys.argv[1], 'newest', sys.argv[2:], None)\n"
    )
    command = [sys.executable, "-c", script, str(run), path]
    locale = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | locale, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    measured, header, row = done.stdout.splitlines()
    assert json.loads(measured) == evaluate_run(run)
    assert header.startswith(b"image,label")
    predict_run(run, "newest", [os.fsdecode(path)], tmp_path / "out.csv")
    assert row == (tmp_path / "out.csv").read_bytes().splitlines()[1]
    assert row.startswith(path)
    assert row.split(b",")[1].decode() in CLASSES
