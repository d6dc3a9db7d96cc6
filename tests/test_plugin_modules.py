"""User-defined adapter and objectives (`examples/plugin`) that read other modules or the image."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plugin_runs import ECHO, MIRROR, ByHand, config, furthest, head_loss, trained

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("plugin_kinds")

LOOKAHEAD: dict[str, Any] = {"objective__name": "lookahead"}


# An adapter in front of every module except the first


def echo_by_hand(steps: int) -> list[Any]:
    hand = ByHand(**ECHO)

    def loss_of(p, module, s, x, image, label):
        if module.adapter is not None:
            small = jax.image.resize(
                image, (*x.shape[:-1], image.shape[-1]), "linear", antialias=True
            )
            x = (
                x
                + small @ p["body"]["adapter"]["draw"]["kernel"]
                + p["body"]["adapter"]["draw"]["bias"]
            )
        features, body = dataclasses.replace(module, adapter=None).apply_body(p, s, x, train=True)
        loss, head_stats = head_loss(module, p["objective"], s["objective"], features, label)
        return loss, (
            features,
            {"body": body | ({"adapter": {}} if module.adapter else {}), "objective": head_stats},
        )

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    for number in range(steps):
        image, label = hand.batch(number)
        x = image
        for k, module in enumerate(hand.modules):
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], x, image, label
            )
            hand.update(k, gradient)
    return hand.params


@pytest.mark.medium
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_adapter_equals_plain_jax_loop(engine):
    params = trained(4, engine__name=engine, **ECHO)
    assert furthest(params, echo_by_hand(4)) < 1e-5
    adapter_params = params[1]["body"].pop("adapter")
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(adapter_params)), (
        "the adapter did not learn"
    )
    assert furthest(params, trained(4, engine__name=engine)) > 1e-4, "the adapter has no effect"


@pytest.mark.slow
def test_adapter_is_active_in_evaluation_and_export(tmp_path):
    train_and_evaluate(config(**ECHO), tmp_path)
    exported, images = (
        load_exported(export_run(tmp_path)),
        np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8),
    )
    with_image = exported.logits(images)[1]
    without_adapter = dataclasses.replace(
        exported,
        spec=dataclasses.replace(
            exported.spec,
            modules=tuple(dataclasses.replace(m, adapter=None) for m in exported.spec.modules),
        ),
    )
    x = jnp.asarray(exported.spec.task.evaluate(images))
    (first, second), variables = without_adapter.spec.modules, exported.variables
    features, _ = first.apply_body(
        variables[0]["params"], variables[0]["batch_stats"], x, train=False
    )
    draw, pooled = variables[1]["params"]["body"]["adapter"]["draw"], (*features.shape[:-1], 1)
    features = (
        features
        + jax.image.resize(x, pooled, "linear", antialias=True) @ draw["kernel"]
        + draw["bias"]
    )
    outputs, _ = second.apply_body(
        variables[1]["params"], variables[1]["batch_stats"], features, train=False
    )
    expected = second.predict(variables[1]["params"], variables[1]["batch_stats"], outputs)
    np.testing.assert_allclose(with_image, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(without_adapter.logits(images)[1]) - expected).max() > 1e-3, (
        "the adapter has no effect on the logits"
    )
    assert evaluate_run(tmp_path)["step"] == 12


def test_adapter_that_needs_the_label_is_refused(monkeypatch):
    from examples.plugin import echo

    monkeypatch.setattr(echo.Echo, "needs", ("label",))
    with pytest.raises(
        UserError,
        match=r"^config\.model\.adapter=echo: needs 'label', "
        r"but evaluation provides only 'image'$",
    ):
        make_experiment(make_settings(config(**ECHO)), jax.devices()[:1])


def test_adapter_that_changes_the_dtype_is_refused(monkeypatch):
    from examples.plugin import echo

    monkeypatch.setattr(
        echo.Echo, "__call__", lambda self, inputs, context, train: inputs.astype("bfloat16")
    )
    with pytest.raises(
        UserError,
        match=r"^config\.model\.adapter: the adapter of module_1 turns .*bfloat16.*; "
        "it must keep shape",
    ):
        make_experiment(make_settings(config(**ECHO)), jax.devices()[:1]).spec.abstract_states()


# An objective that contains a copy of the next block


def lookahead_by_hand(steps: int) -> list[Any]:
    hand = ByHand(**LOOKAHEAD)

    def loss_of(p, module, s, x, label):
        features, body = module.apply_body(p, s, x, train=True)
        head_inputs, objective_stats = features, dict(s["objective"])
        if module.objective.following is not None:
            variables = {
                name: tree["objective"]["following"]
                for name, tree in (("params", p), ("batch_stats", s))
            }
            head_inputs, updated = module.objective.following.apply(
                variables, features, True, mutable=["batch_stats"]
            )
            objective_stats["following"] = updated["batch_stats"]
        loss, head_stats = head_loss(
            module, p["objective"]["head"], s["objective"].get("head", {}), head_inputs, label
        )
        if head_stats:
            objective_stats["head"] = head_stats
        return loss, (features, {"body": body, "objective": objective_stats})

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    for number in range(steps):
        x, label = hand.batch(number)
        for k, module in enumerate(hand.modules):
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], x, label
            )
            hand.update(k, gradient)
    return hand.params


@pytest.mark.medium
def test_lookahead_objective_equals_plain_jax_loop():
    params = trained(4, 1, **LOOKAHEAD)
    assert furthest(params, lookahead_by_hand(4)) < 1e-5
    assert furthest(params, lookahead_by_hand(3)) > 1e-4


# An objective that reads the first block of the next module


def mirror_by_hand(steps: int, decay: float) -> list[Any]:
    hand = ByHand(**MIRROR)

    def loss_of(p, module, s, x, label, copy):
        features, body = module.apply_body(p, s, x, train=True)
        head_inputs = features
        if copy is not None:
            head_inputs, _ = module.objective.following.apply(
                copy, features, True, mutable=["batch_stats"]
            )
        loss, head_stats = head_loss(
            module, p["objective"]["head"], s["objective"].get("head", {}), head_inputs, label
        )
        objective_stats = {"head": head_stats} if head_stats else {}
        return loss, (features, {"body": body, "objective": objective_stats})

    def published():
        name = f"block_{hand.modules[1].first}"
        return {"params": hand.params[1]["body"][name], "batch_stats": hand.stats[1]["body"][name]}

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    copy, sent = published(), [published(), published()]
    for number in range(steps):
        x, label = hand.batch(number)
        # `sent` starts with two copies of the initial block: this message is two updates old.
        copy = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, copy, sent[number])
        for k, module in enumerate(hand.modules):
            arguments = x, label, copy if k == 0 else None
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], *arguments
            )
            hand.update(k, gradient)
        sent.append(published())
    return hand.params


@pytest.mark.medium
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_mirror_objective_equals_plain_jax_loop(engine):
    expected = mirror_by_hand(4, 0.5)
    assert (
        furthest(trained(4, objective__decay=0.5, engine__name=engine, **MIRROR), expected) < 1e-5
    )
    assert (
        furthest(trained(4, objective__decay=0.0, engine__name=engine, **MIRROR), expected) > 1e-4
    ), "the decay of the average has no effect"


@pytest.mark.medium
def test_publication_counts_as_traffic():
    published = make_experiment(
        make_settings(config(engine__name="pipeline", **MIRROR)), jax.devices()[:2]
    )
    plain = make_experiment(make_settings(config()), jax.devices()[:1])
    block = published.spec.abstract_states()[0].extras["published"]
    sent = sum(leaf.size * 4 for leaf in jax.tree.leaves(block))
    extra_bytes = published.spec.traffic().wire[0] - plain.spec.traffic().wire[0]
    assert extra_bytes == sent / published.spec.batch_size
    *_, _ = published.engine.run(published.engine.init(), published.source, 3)
    assert published.engine.traffic().measured
    assert published.engine.traffic().wire[0] == published.spec.traffic().wire[0]
