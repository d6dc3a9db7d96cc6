"""Consistency of a run with its data set: class names, their order, and example shapes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_folders import CLASSES, random_image, write_image_folder
from PIL import Image
from runs import arrays, records, small_config

from dgl_jax import train
from dgl_jax.config import make_settings
from dgl_jax.data import folder
from dgl_jax.data.info import DatasetInfo, listed
from dgl_jax.data.memory import channel_statistics
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.run import build, restore
from dgl_jax.run.build import make_experiment
from dgl_jax.run.restore import load_trained, newest_meta
from dgl_jax.tools import predict
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.predict import predict_probabilities, predict_run
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent


def config_of(root: Path, **fields):
    fields = {
        "train__steps": 6,
        "data__augment": "none",
        "eval__every": 0,
        "checkpoint__every": 0,
        "model__name": "cnn4",  # another process knows it too
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
    return write_image_folder(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    train_and_evaluate(config_of(images), path)
    return path


@pytest.fixture
def other(images, tmp_path) -> Path:
    """Returns a copy of the data that a test may change."""
    return shutil.copytree(images, tmp_path / "other")


def rename(root: Path, old: str, new: str) -> None:
    for split in ("train", "test"):
        (root / split / old).rename(root / split / new)


def resize(root: Path) -> None:
    for path in root.glob("*/*/*.png"):
        random_image(0, (9, 8)).save(path)


TRAINED = r"the run was trained on 3 classes \(ape, cat, ñandú\), "
CHANGES = {
    "renamed": (
        lambda root: rename(root, "cat", "cow"),
        TRAINED + r"the data have 3 classes \(ape, cow, ñandú\)",
    ),
    "added": (
        lambda root: shutil.copytree(root / "train" / "cat", root / "train" / "bat"),
        TRAINED + r"the data have 4 classes \(ape, bat, cat, ñandú\)",
    ),
    # Only a new order of the names is detected, not a permutation of the names among the classes.
    "order": (
        lambda root: rename(root, "ape", "dog"),
        TRAINED + r"the data have 3 classes \(cat, dog, ñandú\)",
    ),
    "size": (resize, r"the run expects examples of 8x8x3 uint8, the data have 8x9x3 uint8"),
    "gray": (
        lambda root: [random_image(0, mode="L").save(path) for path in root.glob("*/*/*.png")],
        r"the run expects examples of 8x8x3 uint8, the data have 8x8x1 uint8",
    ),
}


@pytest.mark.medium
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_do_not_match_the_run_are_refused(run, other, tmp_path, change):
    alter, difference = CHANGES[change]
    alter(other)
    copy = shutil.copytree(run, tmp_path / "run")
    before = sorted(copy.rglob("*"))
    message = f"^config.data.dir={other}: the data do not match this run: {difference}"
    with pytest.raises(UserError, match=message):
        evaluate_run(copy, settings=make_settings(config_of(other)))
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config_of(other, train__steps=8), copy)
    assert sorted(copy.rglob("*")) == before
    assert not (copy / "damaged").exists()


@pytest.mark.medium
def test_adding_images_keeps_the_stored_mean_and_std(run, other, tmp_path):
    stored = newest_meta(run / "checkpoints")["dataset"]
    for i in range(20, 24):
        Image.new("RGB", (8, 8), "white").save(other / "train" / "cat" / f"{i}.png")
    copy = shutil.copytree(run, tmp_path / "run")
    changed = DatasetInfo.of(make_experiment(make_settings(config_of(other))).source)
    assert np.abs(np.subtract(changed.mean, stored["mean"])).min() > 0.01
    train_and_evaluate(config_of(other, train__steps=8), copy)
    assert newest_meta(copy / "checkpoints")["dataset"] == stored
    assert load_trained(copy).spec.task.mean == tuple(stored["mean"])
    assert (
        evaluate_run(copy, settings=make_settings(config_of(other)))["test/ensemble/accuracy"] >= 0
    )
    with pytest.MonkeyPatch.context() as patch:  # twin: recomputing the mean changes it
        patch.setattr(train, "stored_choices", lambda *_: {})
        experiment = make_experiment(
            make_settings(config_of(other, train__steps=9)), **train.stored_choices(copy, None)
        )
    assert experiment.spec.task.mean != tuple(stored["mean"])


def test_moving_the_data_to_another_directory_changes_nothing(run, other, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    train_and_evaluate(config_of(other), copy)
    assert records(copy) == records(run)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(run), arrays(copy), strict=True))


def test_long_class_lists_are_shortened_to_the_first_difference():
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
def test_init_from_a_run_that_does_not_fit_is_refused(run, images, tmp_path, caplog):
    four = write_image_folder(tmp_path / "four", classes=(*CLASSES, "zebra"))
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
    gray = write_image_folder(tmp_path / "gray", mode="L")
    with pytest.raises(
        UserError,
        match=r"parameters of other shapes: examples are 8x8x3 uint8 there and 8x8x1 uint8 here$",
    ):
        train_and_evaluate(config_of(gray), tmp_path / "new", init_from=run)
    with pytest.raises(UserError, match=r"^--init_from: that run has 2 modules, this one 3$"):
        train_and_evaluate(config_of(images, model__modules=3), tmp_path / "new", init_from=run)
    assert not (tmp_path / "new").exists()
    rename(four, "zebra", "bee")
    for split in ("train", "test"):
        shutil.rmtree(four / split / "cat")
    with caplog.at_level("WARNING", logger="dgl_jax"):
        restore.check_weights(make_experiment(make_settings(config_of(four))), load_trained(run))
    assert (
        "that run has 3 classes (ape, cat, ñandú), "
        "this one 3 classes (ape, bee, ñandú): the heads start" in caplog.text
    )


# Images of other sizes


def test_images_of_any_size_are_resized_and_predicted(run, tmp_path):
    trained = load_trained(run)
    large = random_image(3, (20, 12))
    large.save(tmp_path / "large.png")
    (resized,) = predict._read([tmp_path / "large.png"], trained.info.example_shape, False)
    expected = np.asarray(large.resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resized, expected)
    predict_run(run, "newest", [str(tmp_path)], tmp_path / "out.csv")
    assert len((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()) == 2


def test_images_are_resized_to_a_rectangular_input_shape(tmp_path):
    images = [random_image(n, size) for n, size in enumerate(((6, 4), (20, 12), (4, 6)))]
    for n, image in enumerate(images):
        image.save(tmp_path / f"{n}.png")
    resized = predict._read([tmp_path / f"{n}.png" for n in range(3)], (4, 6, 3), False)
    assert resized.shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(resized[0], np.asarray(images[0]))
    for n in (1, 2):
        expected = np.asarray(images[n].resize((6, 4), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resized[n], expected)


# Grayscale images


@pytest.mark.slow
def test_a_run_on_grayscale_images_has_one_channel_everywhere(tmp_path):
    root = write_image_folder(tmp_path / "gray", mode="L")
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
    color = random_image(5)
    color.save(tmp_path / "color.png")
    (converted,) = predict._read([tmp_path / "color.png"], trained.info.example_shape, False)
    np.testing.assert_array_equal(converted[:, :, 0], np.asarray(color.convert("L")))


# Warnings


@pytest.mark.parametrize(
    ("fields", "remark"),
    [
        (
            {"checkpoint__every": 4, "eval__every": 6, "train__steps": 12},
            "coincide only at the last step",
        ),
        ({"checkpoint__every": 4, "eval__every": 6, "train__steps": 13}, ""),
        ({"checkpoint__every": 4, "eval__every": 2, "train__steps": 12}, ""),
        # There is only one checkpoint.
        ({"checkpoint__every": 12, "eval__every": 5, "train__steps": 12}, ""),
        ({"checkpoint__every": 0, "eval__every": 0, "train__steps": 12}, ""),
        ({"data__validation_fraction": 0.0}, "no examples are held out for validation"),
    ],
)
def test_a_run_without_a_best_checkpoint_is_remarked(images, fields, remark):
    (*remarks,) = build.remarks(make_experiment(make_settings(config_of(images, **fields))))
    assert len(remarks) == bool(remark)
    assert remark in "".join(remarks)


def test_a_single_class_is_remarked(tmp_path, monkeypatch, caplog):
    def stop(workdir):
        raise UserError("before anything is compiled")

    monkeypatch.setattr(train, "lock", stop)
    root = write_image_folder(tmp_path / "set", classes=("cat",))
    with (
        caplog.at_level("WARNING", logger="dgl_jax"),
        pytest.raises(UserError, match="before anything"),
    ):
        train_and_evaluate(config_of(root, train__steps=1, data__batch_size=4), tmp_path / "run")
    assert "folder: has a single class, so every prediction is correct" in caplog.text


# Other locales


@pytest.mark.slow
def test_an_ascii_locale_changes_neither_names_nor_bytes(run, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xb1.png"
    random_image(0).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    script = (
        "import sys, json\n"
        "from dgl_jax import evaluate\n"
        "from dgl_jax.run import progress\n"
        "from dgl_jax.tools import predict\n"
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
