"""Tests of training runs with the local losses `auglocal`, `pred_sim` and `info_pro`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plugin_runs import ByHand, config, equal, furthest, trained
from runs import LEAN_VQ, arrays, records, small_config

from dgl_jax import testing
from dgl_jax.config import make_settings
from dgl_jax.core.module import ModuleState
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.models import ContextInput
from dgl_jax.run.build import make_experiment, remarks
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate

MOMENTUM: dict[str, Any] = {
    "objective__name": "auglocal",
    "objective__depth": 1,
    "objective__momentum_block": True,
    "objective__momentum": 0.5,
    "objective__refresh_every": 2,
}
FOUR_BLOCKS = {"model__name": "cnn4"}
LOSSES: dict[str, dict[str, Any]] = {
    "auglocal": {"objective": {"name": "auglocal", "pyramid": True}},
    "momentum": {
        "objective": {"name": "auglocal", "momentum_block": True, "refresh_every": 3},
        "codec": {"name": "vq", "codes": 8, "dims": 2, "codebook_every": 2} | LEAN_VQ,
    },
    "pred_sim": {"objective": {"name": "pred_sim", "context_input": True}},
    "softmax": {"objective": {"name": "info_pro"}, "train": {"steps": 4, "accumulate": 2}},
    "contrast": {
        "objective": {"name": "info_pro", "form": "contrast", "transport": 0.1},
        "model": {"name": "resnet20", "width": 4, "init": "orthogonal"},
    },
}


def experiment(devices: int = 1, **fields: Any) -> Any:
    return make_experiment(make_settings(small_config(**fields)), jax.devices()[:devices])


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "contrast")) for name in LOSSES],
)
def test_losses_pass_the_checks_of_testing(name):
    groups = LOSSES[name] | {"model": LOSSES[name].get("model", {}) | {"modules": 3}}
    testing.check_objective(**groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_pipeline_equals_fused_and_resumes_exactly(name):
    model = LOSSES[name].get("model", {}) | {"modules": 3}
    testing.check_engine("pipeline", 3, **LOSSES[name] | {"model": model})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum", "softmax"])
def test_rings_carry_images_and_copies(name):
    testing.check_engine("simulated", **LOSSES[name] | {"model": {"modules": 3}})


@pytest.mark.medium
def test_similarities_compare_all_examples_of_a_device_group():
    settings = make_settings(small_config(objective__name="pred_sim", data__augment="none"))
    values = []
    for count in (1, 2):
        made = make_experiment(settings, jax.devices()[:count])
        *_, report = made.engine.run(made.engine.init(), made.source, 1)
        total, examples = report.metrics[0]["similarity"]
        values.append(float(total) / float(examples))
    np.testing.assert_allclose(*values, rtol=1e-5)

    module, state = made.spec.modules[0], made.spec.init()[0]
    batch = made.source.batch(0)
    images, label = made.spec.task.evaluate(batch.inputs), batch.context["label"]
    features, _ = module.apply_body(state.params, state.batch_stats, images, train=True)

    def similarity(rows: slice) -> float:
        loss, _ = module.apply_objective(
            *(state.params, state.batch_stats, features[rows], {"label": label[rows]}), train=True
        )
        total, examples = loss.metrics["similarity"]
        return float(total / examples)

    np.testing.assert_allclose(similarity(slice(None)), values[0], rtol=1e-5)
    halves = [similarity(slice(0, 4)), similarity(slice(4, 8))]
    assert abs(np.mean(halves) - values[0]) > 1e-3, "pairs across the devices do not count"


# The momentum copy of the next module's first block


def momentum_by_hand(steps: int, decay: float, refresh: int) -> list[Any]:
    """Trains two modules and keeps the copies of the second one's first block by hand."""
    hand = ByHand(**MOMENTUM)

    def loss_of(p, module, s, x, label, copy):
        features, body = module.apply_body(p, s, x, train=True)
        published = {} if copy is None else {"next_block": copy}
        variables = {"params": p["objective"], "batch_stats": s["objective"]}
        local, updated = module.objective.apply(
            variables, features, {"label": label}, published, train=True, mutable=["batch_stats"]
        )
        stats = {"body": body, "objective": updated.get("batch_stats", {})}
        return local.loss, (features, stats)

    def block():
        name = f"block_{hand.modules[1].first}"
        return {"params": hand.params[1]["body"][name], "batch_stats": hand.stats[1]["body"][name]}

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    copy, sent = block(), [None, None]  # two turns pass before the first publication arrives
    for number in range(steps):
        x, label = hand.batch(number)
        if (new := sent[number]) is not None:
            copy = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, copy, new)
        for k, module in enumerate(hand.modules):
            arguments = x, label, copy if k == 0 else None
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], *arguments
            )
            hand.update(k, gradient)
        sent.append(block() if number % refresh == 0 else None)
    return hand.params


@pytest.mark.medium
@pytest.mark.usefixtures("plugin_kinds")
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_momentum_block_equals_plain_jax_loop(engine):
    params = trained(6, engine__name=engine, **MOMENTUM)
    assert furthest(params, momentum_by_hand(6, 0.5, 2)) < 1e-5
    assert furthest(params, momentum_by_hand(6, 0.5, 1)) > 1e-5, "the period has no effect"


@pytest.mark.medium
@pytest.mark.usefixtures("plugin_kinds")
def test_publications_are_sent_once_per_period():
    made = make_experiment(
        make_settings(config(engine__name="pipeline", **MOMENTUM)), jax.devices()[:2]
    )
    plain = make_experiment(make_settings(config()), jax.devices()[:1]).spec.traffic()
    block = made.spec.abstract_states()[0].extras["published"]
    sent = sum(leaf.size * 4 for leaf in jax.tree.leaves(block)) / made.spec.batch_size
    assert made.spec.traffic().down == (sent / 2,)
    assert made.spec.traffic().wire[0] - plain.wire[0] == sent / 2
    *_, _ = made.engine.run(made.engine.init(), made.source, 4)
    assert made.engine.traffic().measured
    assert made.engine.traffic().down == (sent / 2,)


@pytest.mark.medium
def test_copies_carry_the_version_that_they_have():
    made = experiment(**MOMENTUM)
    ages, versions = [], []
    state = made.engine.init()
    for step in range(1, 8):
        *_, report = made.engine.run(state, made.source, step)
        state = report.snapshot()
        (first, _) = state.modules
        versions.append(int(first.extras["published"]["version"]))
        ages.append(float(report.metrics[0]["copy_age"]))
    # Publications follow updates 1, 3, 5, ... and are read two updates later.
    assert versions == [0, 0, 1, 1, 3, 3, 5]
    assert ages == [update - version for update, version in enumerate(versions)]


@pytest.mark.slow
def test_run_with_copies_resumes_exactly(tmp_path):
    fields = MOMENTUM | {"objective__refresh_every": 3}
    train_and_evaluate(small_config(**fields), tmp_path / "whole")
    for steps in (5, 12):
        train_and_evaluate(small_config(**fields, train__steps=steps), tmp_path / "part")
    ends = [arrays(tmp_path / name) for name in ("whole", "part")]
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
    assert any("train/module_0/copy_age" in record for record in records(tmp_path / "whole"))
    # A run that starts from its weights copies the block into three places, which are donated.
    summary = train_and_evaluate(
        small_config(**fields, train__steps=4), tmp_path / "new", init_from=tmp_path / "whole"
    )
    assert summary.steps == 4


# Evaluation


@pytest.mark.slow
def test_contrastive_modules_are_trained_evaluated_and_exported_without_predictions(tmp_path):
    fields = {"objective__name": "info_pro", "objective__form": "contrast", **FOUR_BLOCKS}
    summary = train_and_evaluate(small_config(**fields, model__modules=3), tmp_path)
    assert [module["test_accuracy"] is None for module in summary.modules] == [True, True, False]
    result = evaluate_run(tmp_path)
    accuracies = [result.get(f"test/module_{k}/accuracy") for k in range(3)]
    assert accuracies[:2] == [None, None]
    assert accuracies[2] == result["test/ensemble/accuracy"]  # the only module that predicts
    exported = load_exported(export_run(tmp_path))
    logits = exported.logits(np.zeros((2, 8, 8, 3), np.uint8))
    assert [x is None for x in logits] == [True, True, False]


@pytest.mark.medium
def test_context_input_by_hand():
    adapter = ContextInput()
    x, image = jnp.ones((2, 2, 2, 3)), np.random.default_rng(0).normal(size=(2, 4, 4, 1))
    context = {"image": jnp.asarray(image, jnp.float32)}
    variables = adapter.init(jax.random.key(0), x, context, train=False)
    small = image.reshape(2, 2, 2, 2, 2, 1).mean(axis=(2, 4))
    for number in range(2):  # 3x3 convolutions of 2x2 maps reach all four pixels
        kernel = np.asarray(variables["params"][f"Conv_{number}"]["kernel"])
        y = np.zeros((*small.shape[:3], kernel.shape[-1]))
        for i, j, a, b in np.ndindex(2, 2, 2, 2):
            y[:, i, j] += small[:, a, b] @ kernel[a - i + 1, b - j + 1]
        small = np.maximum(y / np.sqrt(1 + 1e-5), 0)  # batch norm with its initial statistics
    np.testing.assert_allclose(adapter.apply(variables, x, context, train=False), 1 + small, 1e-4)


# Initial weights


@pytest.mark.medium
def test_orthogonal_weights_do_not_depend_on_the_cuts():
    def states(modules: int, **fields: Any) -> list[ModuleState]:
        return experiment(model__name="cnn6", model__modules=modules, **fields).spec.init()

    orthogonal = {"model__init": "orthogonal", "model__init_gain": 0.5}
    whole, parts = states(1, **orthogonal), states(6, **orthogonal)
    for n, state in enumerate(parts):
        block = state.params["body"][f"block_{n}"]
        assert equal(block, whole[0].params["body"][f"block_{n}"])
        kernel = np.asarray(block["Conv_0"]["kernel"])
        matrix = kernel.reshape(-1, kernel.shape[-1])
        np.testing.assert_allclose(matrix.T @ matrix, 0.25 * np.eye(matrix.shape[1]), atol=1e-5)
    default = states(6)
    assert not equal(default[0].params, parts[0].params)
    assert equal(default[0].batch_stats, parts[0].batch_stats)
    bias = ["body", "block_0", "Conv_0", "bias"]
    values = [parts[0].params, default[0].params]
    for name in bias:
        values = [value[name] for value in values]
    assert equal(*values)
    kernels = [parts[k].params["body"][f"block_{k}"]["Conv_0"]["kernel"] for k in (4, 5)]
    assert kernels[0].shape == kernels[1].shape
    assert not equal(*kernels), "two blocks draw the same numbers"


# Mistakes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective__name": "pred_sim", "train__accumulate": 2}, "micro-batches; use 1"),
        (
            {
                "objective__name": "info_pro",
                "objective__form": "contrast",
                "train__accumulate": 2,
            },
            "micro-batches; use 1",
        ),
        ({"objective__name": "pred_sim", "objective__similarity_kernel": 2}, "must be odd, or 0"),
        ({"objective__name": "info_pro", "objective__task_weights": (1.0,)}, "two numbers"),
        (
            {"objective__name": "info_pro", "objective__task_weights": (0.5, 0.0)},
            "nothing to minimize",
        ),
        ({"objective__name": "auglocal", "method__name": "backprop"}, "use classifier"),
        ({"objective__transport": 0.1}, "networks such as resnet20 do"),
        (
            {"objective__transport": 0.1, "model__name": "resnet20", "method__name": "fdg"},
            "only the last module has an objective",
        ),
        (
            {
                "objective__name": "auglocal",
                "objective__depth": 1,
                "objective__momentum_block": True,
                "objective__widen": 2.0,
            },
            "use 1.0, or objective.depth above 1",
        ),
        (
            {
                "objective__name": "auglocal",
                "objective__momentum_block": True,
                "method__name": "layerwise",
            },
            "reads next_block",
        ),
        (
            {
                "objective__name": "auglocal",
                "objective__momentum_block": True,
                "method__name": "deep_supervision",
            },
            "auglocal without momentum_block",
        ),
        ({"objective__name": "pred_sim", "model__width": 1}, r"\(config\.model\.width\), or class"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as error:
        experiment(**fields)
    assert "\n" not in str(error.value)


def test_contrast_warns_of_batches_without_pairs():
    contrast = {"objective__name": "info_pro", "objective__form": "contrast"}
    few = experiment(data__batch_size=8, **contrast)
    assert any("teaches nothing; use a larger batch" in line for line in remarks(few))
    for fields in (
        {"data__batch_size": 16, **contrast},
        {"data__batch_size": 8, "objective__name": "info_pro"},
        {"data__batch_size": 8, "model__modules": 1, **contrast},
    ):
        assert not any("teaches" in line for line in remarks(experiment(**fields)))


@pytest.mark.usefixtures("plugin_kinds")
def test_two_adapters_are_refused():
    settings = make_settings(config(model__adapter="echo", objective__context_input=True))
    with pytest.raises(UserError, match="a module has only one"):
        make_experiment(settings, jax.devices()[:1])
