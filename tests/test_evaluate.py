"""Evaluation against NumPy, without padding, and the file patterns of predicted images."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import eval_step
from dgl_jax.engines import EngineState
from dgl_jax.engines.feed import Feed, Residence
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.errors import UserError
from dgl_jax.run import evaluator as evaluation
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.tasks import base
from dgl_jax.tools.predict import find_images
from dgl_jax.types import PADDING

SEED = 12


@pytest.fixture(scope="module")
def state(tiny):
    """Returns a state with perturbed heads: they disagree, and some predictions are correct."""
    modules, random = [], np.random.default_rng(SEED)
    for module in tiny.init(tiny.spec()):
        head = jax.tree.map(
            lambda x: 8 * (x + random.normal(0, 0.3, x.shape).astype(x.dtype)),
            module.params["objective"],
        )
        modules.append(
            module.replace(params=module.params | {"objective": head}, rng=jax.random.key(0))
        )
    return EngineState(tuple(modules))


def place(state, placement):
    return EngineState(
        tuple(jax.device_put(m, placement.replicated(k)) for k, m in enumerate(state.modules))
    )


def softmax(logits):
    exp = np.exp(np.float64(logits) - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def oracle(spec, modules: tuple[ModuleState, ...], source, split):
    """Computes the expected metrics of a split in NumPy, apart from the modules' forward passes."""
    stored, ids = source._stored[split], source._order.splits[split]
    x = (stored.inputs[ids] / 255 - 0.5) / 0.25
    x, heads = np.float32(x), []
    for module, state in zip(spec.modules, modules, strict=True):
        x, logits = eval_step(module, state.params, state.batch_stats, x)
        heads.append(None if logits is None else softmax(np.asarray(logits)))
    label = stored.labels[ids]
    metrics = {}
    for k, p in enumerate(heads):
        if p is not None:
            metrics[f"{split}/module_{k}/accuracy"] = np.mean(p.argmax(1) == label)
            metrics[f"{split}/module_{k}/loss"] = np.mean(-np.log(p[np.arange(len(label)), label]))
    weighted = sum(2**k * p for k, p in enumerate(heads) if p is not None)
    metrics[f"{split}/ensemble/accuracy"] = np.mean(weighted.argmax(1) == label)
    return metrics


@pytest.fixture(scope="module")
def expected(tiny, state):
    return {
        split: oracle(tiny.spec(), state.modules, tiny.source, split)
        for split in ("validation", "test")
    }


@pytest.fixture(scope="module")
def one(tiny, devices):
    return Evaluator(tiny.spec(), one_group(devices[:1], 3))


@pytest.mark.medium
@pytest.mark.parametrize("split", ["validation", "test"])
def test_metrics_of_every_head_equal_numpy(tiny, state, one, expected, split):
    assert tiny.source.examples(split) % tiny.batch_size, "the test needs a padded last batch"
    metrics = one.evaluate(place(state, one.placement), tiny.source, split)
    assert metrics == pytest.approx(expected[split], rel=1e-5)
    accuracies = {value for name, value in expected[split].items() if name.endswith("accuracy")}
    assert len(accuracies) > 1, "the test needs heads with different accuracies"


def test_twin_counted_padding_is_noticed(tiny, state, one, expected, monkeypatch):
    monkeypatch.setattr(base, "PADDING", -2)  # differs from the value that the source uses
    broken = Evaluator(tiny.spec(), one.placement)
    # A new jit, because the cached one was traced with the correct value.
    broken.forward, broken.metrics = (
        one.forward,
        jax.jit(lambda *args: broken.spec.task.metrics(*args)),
    )
    metrics = broken.evaluate(place(state, one.placement), tiny.source, "test")
    assert metrics != pytest.approx(expected["test"], rel=1e-5)


def test_every_example_is_evaluated_once(tiny, state, one):
    ids, padding = [], 0
    for batch in tiny.source.evaluation("test"):
        *_, context = one.answers(place(state, one.placement).modules, batch)
        real = np.asarray(context["label"]) != PADDING
        ids += np.asarray(context["id"])[real].tolist()
        padding += int((~real).sum())
    assert sorted(ids) == list(range(20))
    assert padding == 4


def test_ensemble_doubles_the_weight_with_depth(tiny):
    # Weights 1 : 2 : 4, and 1 : 4 without the middle head.
    ensemble = tiny.spec().task.ensemble
    heads = [np.float32([[1, 0]]), np.float32([[0, 1]]), np.float32([[0.5, 0.5]])]
    np.testing.assert_allclose(ensemble(heads), [[3 / 7, 4 / 7]], rtol=1e-6)
    np.testing.assert_allclose(ensemble([heads[0], None, heads[1]]), [[1 / 5, 4 / 5]], rtol=1e-6)
    np.testing.assert_allclose(ensemble([None, None, heads[0]]), heads[0], rtol=1e-6)


def test_modules_without_a_head_have_no_metrics(tiny, devices, expected):
    spec = tiny.spec(heads=False)
    evaluator = Evaluator(spec, one_group(devices[:1], 3))
    states = EngineState(tuple(m.replace(rng=jax.random.key(0)) for m in tiny.init(spec)))
    metrics = evaluator.evaluate(place(states, evaluator.placement), tiny.source, "test")
    assert set(metrics) == {
        "test/module_2/accuracy",
        "test/module_2/loss",
        "test/ensemble/accuracy",
    }
    assert metrics["test/ensemble/accuracy"] == metrics["test/module_2/accuracy"]
    assert metrics == pytest.approx(oracle(spec, states.modules, tiny.source, "test"), rel=1e-5)
    assert set(metrics) < set(expected["test"])


@pytest.mark.parametrize("groups", [(1, 1, 1), (1, 2, 1)])
def test_metrics_on_several_devices_equal_one_device(tiny, state, devices, expected, groups):
    evaluator = Evaluator(tiny.spec(), assign(devices, 3, groups))
    metrics = evaluator.evaluate(place(state, evaluator.placement), tiny.source, "test")
    assert metrics == pytest.approx(expected["test"], rel=1e-5)


def test_split_without_examples_has_no_metrics(tiny, state, one):
    class Empty:
        def evaluation(self, split):
            return iter(())

    assert one.evaluate(place(state, one.placement), Empty(), "validation") == {}


def test_results_are_read_once_per_split(tiny, state, one, monkeypatch):
    reads, read = [], evaluation.read
    monkeypatch.setattr(evaluation, "read", lambda tree: reads.append(len(tree)) or read(tree))
    one.evaluate(place(state, one.placement), tiny.source, "test")
    assert reads == [3]  # three batches in one transfer


@pytest.fixture
def photos(tmp_path, monkeypatch):
    for name in (
        "a.png",
        "a[1].png",
        "a1.png",
        ".b.png",
        "sub/c.JPG",
        "sub/._c.JPG",
        ".thumbs/d.png",
        "notes.txt",
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos", ["a.png", "a1.png", "a[1].png", "sub/c.JPG"]),
        ("photos/*.png", ["a.png", "a1.png", "a[1].png"]),
        ("photos/**/*.JPG", ["sub/c.JPG"]),
        ("photos/s*", ["sub/c.JPG"]),
        ("photos/a[1].png", ["a[1].png"]),  # a file of that name wins over the pattern
        ("photos/a[0-9].png", ["a1.png"]),
        ("photos/.b.png", [".b.png"]),  # hidden files only if named
        ("photos/.thumbs", [".thumbs/d.png"]),
    ],
)
def test_pattern_selects_images(photos, pattern, expected):
    assert [path.as_posix() for path in find_images([pattern])] == [
        f"photos/{name}" for name in expected
    ]


@pytest.mark.parametrize(
    "pattern", ["", "photos/.*.png", "photos/b.png", "photos/a[2].png", "photos/" + "[a]" * 200]
)
def test_pattern_without_an_image_is_an_error(photos, pattern):
    with pytest.raises(UserError, match="no image there"):
        find_images([pattern])


def test_images_keep_the_order_of_the_patterns(photos):
    images = find_images(["photos/sub", "photos/a*.png"])
    assert [path.name for path in images] == ["c.JPG", "a.png", "a1.png", "a[1].png"]


def test_files_of_a_folder_that_are_not_images_are_logged(tmp_path, caplog):
    for name in ("a.png", "sub/b.heic", "sub/c.HEIC", "notes", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.png")
    assert find_images([str(tmp_path)]) == [tmp_path / "a.png"]
    assert caplog.messages == [
        f"{tmp_path}: 4 of 5 files are not images and are ignored: 2 .heic, 1 pipes and devices, "
        "1 without a suffix"
    ]


@pytest.mark.parametrize("at_once", [1, 2])
def test_evaluation_compiles_nothing_that_was_compiled_in_advance(tiny, devices, at_once):
    compiled = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    # New objects, so that no earlier test has compiled the programs of this spec.
    spec = dataclasses.replace(tiny.spec(), seed=100 + at_once)
    placement = one_group(devices[:1], 3)
    states = tuple(module.replace(rng=jax.random.key(0)) for module in tiny.init(spec))
    placed = place(EngineState(states), placement)
    evaluator = Evaluator(spec, placement, True, Residence("on"), at_once)
    evaluator._residence.stored(tiny.source, "validation", placement.replicated(0))
    Feed(tiny.source, placement, evaluator._residence).batch(0)  # compiles the gathering
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        evaluator.compile(tiny.source)
        evaluator._compiler.join()
        in_advance = len(compiled)
        assert in_advance > 0
        # The splits have different sizes; single batches of a resident split are gathered by a
        # program of their own.
        for split in ("validation", "test")[:at_once]:
            evaluator._residence.stored(tiny.source, split, placement.replicated(0))
            evaluator.evaluate(placed, tiny.source, split)
            assert len(compiled) == in_advance
        # Twin: without compiling in advance the same programs are compiled late.
        other = Evaluator(dataclasses.replace(spec, seed=200 + at_once), placement)
        other.evaluate(placed, tiny.source, "validation")
        assert len(compiled) > in_advance
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_closed_evaluator_compiles_no_further_program(tiny, devices):
    evaluator, compiled = Evaluator(tiny.spec(), one_group(devices[:1], 3)), []

    class Lowered:
        def compile(self):
            compiled.append(True)
            evaluator._closed = True

    evaluator._lowered = lambda source: iter([Lowered()] * 3)
    evaluator.compile(tiny.source)
    evaluator.close()
    assert compiled == [True]
