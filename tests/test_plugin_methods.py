"""Parts of a user's own that reach across modules: an adapter, an objective that reads a block above, a method that sends down."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import arrays, records
from test_plugin import config, equal, furthest, trained

from dgl_jax import testing
from dgl_jax.config import make_settings
from dgl_jax.core.module import LocalModule
from dgl_jax.engines import FusedEngine
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.export import export_run, load_exported
from dgl_jax.objectives import cross_entropy
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.plan import plan
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("plugin_kinds")

ECHO: dict[str, Any] = {"model__adapter": "echo"}
MIRROR: dict[str, Any] = {"objective__name": "mirror"}
LOOKAHEAD: dict[str, Any] = {"objective__name": "lookahead"}
REPLAYED: dict[str, Any] = {"method__name": "replayed", "model__modules": 3}


class ByHand:
    """Parameters, batch statistics and optimizer states of a small run, for a loop in plain JAX."""

    def __init__(self, **fields: Any):
        self.made = make_experiment(make_settings(config(**fields)), jax.devices()[:1])
        self.spec, states = self.made.spec, self.made.spec.init()
        self.modules = self.spec.modules
        self.params = [state.params for state in states]
        self.stats = [state.batch_stats for state in states]
        self.optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
        self.kept = [self.optimizer.init(p) for p in self.params]

    def batch(self, number: int) -> tuple[Any, Any]:
        batch = self.made.source.batch(number)
        return self.spec.task.evaluate(batch.inputs), batch.context["label"]

    def update(self, k: int, gradient: Any) -> None:
        updates, self.kept[k] = self.optimizer.update(gradient, self.kept[k], self.params[k])
        self.params[k] = optax.apply_updates(self.params[k], updates)


def head_loss(
    module: LocalModule, params: Any, stats: Any, features: Any, label: Any
) -> tuple[Any, Any]:
    variables = {"params": params, "batch_stats": stats}
    logits, new = module.objective.head.apply(
        variables, features, train=True, mutable=["batch_stats"]
    )
    return cross_entropy(logits, label), new.get("batch_stats", {})


# An adapter in front of every module but the first


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
        loss, own = head_loss(module, p["objective"], s["objective"], features, label)
        return loss, (
            features,
            {"body": body | ({"adapter": {}} if module.adapter else {}), "objective": own},
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


@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_an_adapter_is_the_hand_written_loop(engine):
    found = trained(4, engine__name=engine, **ECHO)
    assert furthest(found, echo_by_hand(4)) < 1e-5
    drawn = found[1]["body"].pop("adapter")
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(drawn)), (
        "the adapter did not learn"
    )
    assert furthest(found, trained(4, engine__name=engine)) > 1e-4, "the image went unnoticed"


@pytest.mark.slow
def test_an_adapter_answers_in_evaluation_and_export(tmp_path):
    train_and_evaluate(config(**ECHO), tmp_path)
    exported, images = (
        load_exported(export_run(tmp_path)),
        np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8),
    )
    with_image = exported.logits(images)[1]
    bare = dataclasses.replace(
        exported,
        spec=dataclasses.replace(
            exported.spec,
            modules=tuple(dataclasses.replace(m, adapter=None) for m in exported.spec.modules),
        ),
    )
    x = jnp.asarray(exported.spec.task.evaluate(images))
    (first, second), variables = bare.spec.modules, exported.variables
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
    assert np.abs(np.asarray(bare.logits(images)[1]) - expected).max() > 1e-3, (
        "an answer without the adapter went unnoticed"
    )
    assert evaluate_run(tmp_path)["step"] == 12


def test_an_adapter_that_asks_for_the_label_is_refused(monkeypatch):
    from examples.plugin import echo

    monkeypatch.setattr(echo.Echo, "needs", ("label",))
    with pytest.raises(
        UserError,
        match=r"^config\.model\.adapter=echo: needs 'label', and an evaluation has nothing but 'image'$",
    ):
        make_experiment(make_settings(config(**ECHO)), jax.devices()[:1])


def test_an_adapter_that_changes_the_type_is_refused(monkeypatch):
    from examples.plugin import echo

    monkeypatch.setattr(
        echo.Echo, "__call__", lambda self, inputs, context, train: inputs.astype("bfloat16")
    )
    with pytest.raises(
        UserError,
        match=r"^config\.model\.adapter: the adapter of module_1 turns .*bfloat16.*; it must keep",
    ):
        make_experiment(make_settings(config(**ECHO)), jax.devices()[:1]).spec.abstract_states()


# An objective that is built from the next block


def lookahead_by_hand(steps: int) -> list[Any]:
    hand = ByHand(**LOOKAHEAD)

    def loss_of(p, module, s, x, label):
        features, body = module.apply_body(p, s, x, train=True)
        seen, own = features, dict(s["objective"])
        if module.objective.following is not None:
            variables = {
                name: tree["objective"]["following"]
                for name, tree in (("params", p), ("batch_stats", s))
            }
            seen, new = module.objective.following.apply(
                variables, features, True, mutable=["batch_stats"]
            )
            own["following"] = new["batch_stats"]
        loss, of_head = head_loss(
            module, p["objective"]["head"], s["objective"].get("head", {}), seen, label
        )
        return loss, (
            features,
            {"body": body, "objective": own | ({"head": of_head} if of_head else {})},
        )

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    for number in range(steps):
        x, label = hand.batch(number)
        for k, module in enumerate(hand.modules):
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], x, label
            )
            hand.update(k, gradient)
    return hand.params


def test_a_lookahead_is_the_hand_written_loop():
    found = trained(4, 1, **LOOKAHEAD)
    assert furthest(found, lookahead_by_hand(4)) < 1e-5
    assert furthest(found, lookahead_by_hand(3)) > 1e-4


# An objective that reads the first block of the next module


def mirror_by_hand(steps: int, decay: float) -> list[Any]:
    hand = ByHand(**MIRROR)

    def loss_of(p, module, s, x, label, copy):
        features, body = module.apply_body(p, s, x, train=True)
        seen = features
        if copy is not None:
            seen, _ = module.objective.following.apply(
                copy, features, True, mutable=["batch_stats"]
            )
        loss, own = head_loss(
            module, p["objective"]["head"], s["objective"].get("head", {}), seen, label
        )
        return loss, (features, {"body": body, "objective": {"head": own} if own else {}})

    def published():
        name = f"block_{hand.modules[1].first}"
        return {"params": hand.params[1]["body"][name], "batch_stats": hand.stats[1]["body"][name]}

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    copy, sent = published(), [published(), published()]
    for number in range(steps):
        x, label = hand.batch(number)
        # What module 1 sent after its update two batches ago.
        copy = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, copy, sent[number])
        for k, module in enumerate(hand.modules):
            arguments = x, label, copy if k == 0 else None
            (_, (x, hand.stats[k])), gradient = step(
                hand.params[k], module, hand.stats[k], *arguments
            )
            hand.update(k, gradient)
        sent.append(published())
    return hand.params


@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_a_mirror_is_the_hand_written_loop(engine):
    expected = mirror_by_hand(4, 0.5)
    assert (
        furthest(trained(4, objective__decay=0.5, engine__name=engine, **MIRROR), expected) < 1e-5
    )
    assert (
        furthest(trained(4, objective__decay=0.0, engine__name=engine, **MIRROR), expected) > 1e-4
    ), "the average went unnoticed"


def test_a_publication_weighs_on_the_wire():
    made = make_experiment(
        make_settings(config(engine__name="pipeline", **MIRROR)), jax.devices()[:2]
    )
    plain = make_experiment(make_settings(config()), jax.devices()[:1])
    block = made.spec.abstract_states()[0].extras["published"]
    sent = sum(leaf.size * 4 for leaf in jax.tree.leaves(block))
    assert made.spec.traffic().wire[0] - plain.spec.traffic().wire[0] == sent / made.spec.batch_size
    *_, _ = made.engine.run(made.engine.init(), made.source, 3)
    assert made.engine.traffic().measured
    assert made.engine.traffic().wire[0] == made.spec.traffic().wire[0]


# A method with messages that go down


def replayed_by_hand(steps: int) -> list[Any]:
    hand = ByHand(**REPLAYED)
    last = len(hand.modules) - 1
    inputs: list[dict[int, Any]] = [{} for _ in range(last)]
    gradients: list[dict[int, Any]] = [{} for _ in range(last)]

    def loss_of(p, x, s, label):
        features, body = hand.modules[last].apply_body(p, s, x, train=True)
        loss, own = head_loss(hand.modules[last], p["objective"], s["objective"], features, label)
        return loss, {"body": body, "objective": own}

    body = jax.jit(
        lambda k, p, s, x: hand.modules[k].apply_body(p, s, x, train=True), static_argnums=0
    )
    step = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))
    for tick in range(steps + last):
        for k in range(last):
            if 0 <= (number := tick - (last - k)) < steps:
                x, cotangent = inputs[k].pop(number), gradients[k].pop(number)
                _, pull = jax.vjp(
                    lambda p, x, k=k: body(k, p, hand.stats[k], x)[0], hand.params[k], x
                )
                gradient, down = pull(cotangent)
                hand.update(k, gradient)
                if k:
                    gradients[k - 1][number] = down
        if tick < steps:
            x, label = hand.batch(tick)
            for k in range(last):
                inputs[k][tick] = x
                x, new = body(k, hand.params[k], hand.stats[k], x)
                hand.stats[k] = {"body": new}
            (_, hand.stats[last]), (gradient, gradients[last - 1][tick]) = step(
                hand.params[last], x, hand.stats[last], label
            )
            hand.update(last, gradient)
    return hand.params


@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_replayed_features_are_the_hand_written_loop(engine):
    found = trained(
        4, devices=3 if engine == "pipeline" else 1, engine__name=engine, train__steps=4, **REPLAYED
    )
    assert furthest(found, replayed_by_hand(4)) < 1e-5
    at_once = trained(4, devices=1, method__name="backprop", model__modules=3, train__steps=4)
    assert furthest(found, at_once) > 1e-4, "a gradient that is not late went unnoticed"


def gradients_of_the_last_batch(method: str, steps: int) -> list[Any]:
    """What each module's optimizer is given on its last batch, where no parameter ever moves."""
    made = make_experiment(
        make_settings(config(method__name=method, model__modules=3, train__steps=steps)),
        jax.devices()[:1],
    )
    still = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p),
        lambda g, _, p: (jax.tree.map(jnp.zeros_like, p), g),
    )
    engine = FusedEngine(
        dataclasses.replace(made.spec, optimizer=still), made.engine.placement, total_steps=steps
    )
    *_, last = engine.run(engine.init(), made.source, steps)
    return [jax.device_get(module.opt_state) for module in last.snapshot().modules]


def test_late_gradients_are_those_of_back_propagation_on_their_batch():
    late = gradients_of_the_last_batch("replayed", 4)
    expected = gradients_of_the_last_batch("backprop", 4)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-3
    assert furthest(late, expected) < 1e-5
    assert furthest(late, gradients_of_the_last_batch("backprop", 3)) > 1e-4, (
        "another batch went unnoticed"
    )


@pytest.mark.full_compile
@pytest.mark.slow
def test_replayed_features_have_one_result_and_are_back_propagation_with_one_module():
    testing.check_method("replayed")


def test_a_plan_of_replayed_features_knows_its_schedule():
    found, spans = plan(make_settings(config(**REPLAYED)), stated="3,3,3,3")
    assert {(span.module, span.batch) for span in spans} >= {
        (k, b) for k in range(3) for b in range(4)
    }
    assert found["peak_memory_bytes"] == [None] * 3
    assert 0 < found["speedup"] < 3


# Whole runs


@pytest.mark.slow
@pytest.mark.full_compile
def test_synchronous_engines_agree_to_the_bit():
    devices = {"fused": 1, "pipeline": 2, "serial": 1}
    found = {
        name: trained(6, count, engine__name=name, **MIRROR, **ECHO)
        for name, count in devices.items()
    }
    assert equal(found["fused"], found["pipeline"])
    assert equal(found["fused"], found["serial"])


@pytest.mark.slow
@pytest.mark.full_compile
def test_a_mirror_in_ordered_turns_is_fused():
    ordered = {"engine__name": "simulated", "engine__order": "ordered", "replay__size": 1}
    assert equal(trained(6, 1, **ordered, **MIRROR), trained(6, 1, **MIRROR))


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("fields", [MIRROR | ECHO, REPLAYED], ids=["mirror and echo", "replayed"])
def test_a_run_resumes_exactly_evaluates_and_exports(fields, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_and_evaluate(config(**fields, checkpoint__every=5, checkpoint__keep=9), whole)
    _cut_off(whole, part, at=5)
    train_and_evaluate(config(**fields, checkpoint__every=5, checkpoint__keep=9), part)
    assert equal(arrays(whole), arrays(part))
    assert all(np.isfinite(record.get("train/module_1/loss", 0.0)) for record in records(whole))
    assert evaluate_run(whole)["step"] == 12
    assert load_exported(export_run(whole)).logits(np.zeros((2, 8, 8, 1), np.uint8))[-1].shape == (
        2,
        8,
    )


def _cut_off(whole: Path, part: Path, at: int) -> None:
    """Copies a run as it was when it was killed some steps after a checkpoint."""
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    for checkpoint in (part / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > at:
            shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_a_finished_run_of_replayed_features_can_be_made_longer(tmp_path):
    train_and_evaluate(config(**REPLAYED, train__steps=5), tmp_path)
    summary = train_and_evaluate(config(**REPLAYED, train__steps=9), tmp_path)
    assert [module["updates"] for module in summary.modules] == [9, 9, 9]


@pytest.mark.slow
@pytest.mark.full_compile
@pytest.mark.parametrize("engine", ["simulated", "threads"])
def test_asynchronous_engines_bring_what_a_mirror_and_an_echo_read(engine, tmp_path):
    fields = (
        {"replay__size": 3, "checkpoint__every": 4, "checkpoint__keep": 9, "engine__name": engine}
        | MIRROR
        | ECHO
    )
    whole, part = tmp_path / "whole", tmp_path / "part"
    summary = train_and_evaluate(config(**fields), whole)
    assert [module["updates"] for module in summary.modules] == [12, 12]
    if engine == "simulated":
        _cut_off(whole, part, at=4)
        train_and_evaluate(config(**fields), part)
        assert equal(arrays(whole), arrays(part))
