"""Tests of `dni` and `cdni`: targets, the joint update in plain JAX, and the exact gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plugin_runs import equal, furthest
from runs import small_config

from dgl_jax import testing
from dgl_jax.config import make_settings, options
from dgl_jax.engines import FusedEngine, PipelineEngine
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.methods.dni import Dni
from dgl_jax.models import Synthesizer
from dgl_jax.run.build import make_experiment

ADAM = optax.adam(1e-3)
DNI, CDNI = (Dni(Synthesizer(kernel=3), ADAM, conditional) for conditional in (False, True))


def spec_of(tiny, modules: int, method: Any, **changes: Any):
    return dataclasses.replace(tiny.spec(modules, heads=False), method=method, **changes)


def fused(tiny, modules: int, method: Any, **changes: Any) -> FusedEngine:
    spec = spec_of(tiny, modules, method, **changes)
    return FusedEngine(spec, one_group(jax.devices()[:1], modules))


def pipeline(tiny, modules: int, method: Any) -> PipelineEngine:
    placement = assign(jax.devices()[:modules], modules)
    return PipelineEngine(spec_of(tiny, modules, method), placement)


def learned(states) -> list[Any]:
    """Returns what a run has learned: parameters and synthesizers of all modules."""
    return [
        (s.params, {n: v for n, v in s.extras.items() if n in ("synthesizer", "ema")})
        for s in states
    ]


def batch_of(tiny, spec, number: int) -> tuple[Any, Any]:
    batch = tiny.source.batch(number)
    return spec.task.evaluate(batch.inputs), jax.nn.one_hot(batch.context["label"], 10)


def mean_loss(module, params, stats, x, targets) -> tuple[Any, Any]:
    """Returns the mean cross entropy of the last module by its definition, and its statistics."""
    x, body = module.apply_body(params, stats, x, train=True)
    variables = {"params": params["objective"], "batch_stats": stats["objective"]}
    logits, _ = module.objective.head.apply(variables, x, train=True, mutable=["batch_stats"])
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), {"body": body, "objective": {}}


# The regression targets


@pytest.mark.medium
@pytest.mark.parametrize("modules", [2, 3])
def test_message_down_is_the_gradient_of_the_function_above(tiny, modules):
    spec = spec_of(tiny, modules, CDNI)
    states = tiny.init(spec)
    after, _ = tiny.run(FusedEngine(spec, one_group(jax.devices()[:1], modules)), 1)
    x, targets = batch_of(tiny, spec, 0)
    h = []
    for module, state in zip(spec.modules[:-1], states):
        x, _ = module.apply_body(state.params, state.batch_stats, x, train=True)
        h.append(x)

    def true_loss(x):
        last = states[-1]
        return mean_loss(spec.modules[-1], last.params, last.batch_stats, x, targets)[0]

    def bootstrapped(x):
        """Returns a scalar with the prediction / B as its gradient at the second activations."""
        x, _ = spec.modules[1].apply_body(states[1].params, states[1].batch_stats, x, train=True)
        variables = {n: states[1].extras["synthesizer"][n] for n in ("params", "batch_stats")}
        prediction, _ = CDNI.synthesizer.apply(
            variables, x, targets, train=True, mutable=["batch_stats"]
        )
        return (jax.lax.stop_gradient(prediction) / tiny.batch_size * x).sum()

    expected = [jax.grad(true_loss)(h[-1])]
    if modules == 3:
        expected.insert(0, jax.grad(bootstrapped)(h[0]))
    for k, gradient in enumerate(expected):
        (message,) = after[k].extras["above"]
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(message.payload, gradient, rtol=1e-4, atol=1e-7)


# The joint update in plain JAX


def by_hand(tiny, modules: int, method: Dni, steps: int, fault: str = "") -> list[Any]:
    """Trains with one joint update at the end of each batch; returns parameters and synthesizers.

    The last regression is left out, as it waits for the next batch in a run.
    """
    spec = spec_of(tiny, modules, method)
    states, last, size = tiny.init(spec), modules - 1, tiny.batch_size

    def joint_update(params, stats, opts, synths, x, targets, old_targets):
        stats, synths, gradients = list(stats), list(synths), [None] * modules
        h, d = [None] * last, [None] * modules
        for k in range(last):
            h[k], pull, body = jax.vjp(
                lambda p, x, k=k: spec.modules[k].apply_body(p, stats[k], x, train=True),
                *(params[k], x),
                has_aux=True,
            )
            g, synths[k] = synthetic(synths[k]["params"], synths[k], h[k], targets)
            gradients[k], d[k] = pull(g if fault == "no 1/B" else g / size)
            x, stats[k] = h[k], {**stats[k], "body": body}
        (_, stats[last]), (gradients[last], d[last]) = jax.value_and_grad(
            lambda p, x: mean_loss(spec.modules[last], p, stats[last], x, targets),
            argnums=(0, 1),
            has_aux=True,
        )(params[last], x)
        before, targets = list(synths), old_targets if fault == "labels" else targets
        for k in range(last):
            target = (d[k + 1][::-1] if fault == "examples" else d[k + 1]) * size
            synths[k] = regressed(synths[k], h[k], targets, target)
        for k in range(modules):
            updates, opts[k] = spec.optimizer.update(gradients[k], opts[k], params[k])
            params[k] = optax.apply_updates(params[k], updates)
        return params, stats, opts, before, synths

    def synthetic(params, synth, h, targets):
        variables = {"params": params, "batch_stats": synth["batch_stats"]}
        arguments = h, targets if method.conditional else None
        g, new = method.synthesizer.apply(
            variables, *arguments, train=True, mutable=["batch_stats"]
        )
        return jax.lax.stop_gradient(g) if params is None else g, synth | new

    def regressed(synth, h, targets, target):
        def loss(params):
            prediction, new = synthetic(params, synth, h, targets)
            return jnp.sum((prediction - target) ** 2) / size, new["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(synth["params"])
        if fault == "no regression":
            return synth
        updates, opt_state = ADAM.update(gradient, synth["opt_state"])
        params = optax.apply_updates(synth["params"], updates)
        return {"params": params, "batch_stats": stats, "opt_state": opt_state}

    step = jax.jit(joint_update)
    params, stats = [s.params for s in states], [s.batch_stats for s in states]
    opts, synths = (
        [s.opt_state for s in states],
        [s.extras["synthesizer"] for s in states[:last]],
    )
    old_targets = batch_of(tiny, spec, 0)[1]
    for number in range(steps):
        x, targets = batch_of(tiny, spec, number)
        params, stats, opts, before, synths = step(
            params, stats, opts, synths, x, targets, old_targets
        )
        old_targets = targets
    extras = [{"synthesizer": synth} for synth in before] + [{}]
    return list(zip(params, extras, strict=True))


@pytest.mark.medium
@pytest.mark.parametrize(("method", "modules"), [(DNI, 2), (DNI, 3), (CDNI, 3)])
def test_updates_equal_joint_updates_in_plain_jax(tiny, method, modules):
    states, _ = tiny.run(fused(tiny, modules, method), 5)
    assert furthest(learned(states), by_hand(tiny, modules, method, 5)) < 1e-5


@pytest.mark.medium
@pytest.mark.parametrize("fault", ["examples", "labels", "no regression", "no 1/B"])
def test_twin_with_a_fault_differs_from_the_joint_update(tiny, fault):
    states, _ = tiny.run(fused(tiny, 3, CDNI), 5)
    assert furthest(learned(states), by_hand(tiny, 3, CDNI, 5, fault)) > 1e-4


@pytest.mark.medium
def test_first_update_changes_no_parameters_of_a_synthesizer(tiny):
    engine = fused(tiny, 2, DNI)
    before = tiny.init(engine.spec)[0].extras["synthesizer"]
    states, metrics = tiny.run(engine, 2)
    first, _ = tiny.run(engine, 1)
    synthesizer = first[0].extras["synthesizer"]
    assert equal(synthesizer["params"], before["params"])
    assert equal(synthesizer["opt_state"], before["opt_state"])
    assert metrics[0][0]["synthesizer_loss"] == (0, 0)
    assert metrics[0][0]["synthesizer_error"] == (0, 0)
    assert not equal(states[0].extras["synthesizer"]["params"], before["params"])
    error, squares = metrics[1][0]["synthesizer_error"]
    assert metrics[1][0]["synthesizer_loss"] == (error, tiny.batch_size)
    (gradient,) = (message.payload for message in first[0].extras["above"])
    assert squares == pytest.approx(((gradient * tiny.batch_size) ** 2).sum(), rel=1e-5)


# The exact gradient in place of a synthesizer


class Exact:
    """Stand-in for a synthesizer: B times the gradient, from parameters of the modules above."""

    def __init__(self, modules):
        self.modules = modules

    def lazy_init(self, *args, train):
        return {}

    def apply(self, variables, x, targets, train, mutable, rngs):
        def total(x):
            *lower, last = zip(self.modules[-len(above) :], above)
            for module, (params, stats) in lower:
                x, _ = module.apply_body(params, stats, x, train=True)
            module, (params, stats) = last
            return mean_loss(module, params, stats, x, targets)[0] * len(x)

        above = variables["params"]["above"]
        return jax.grad(total)(x), {}


def trained_with_exact_gradients(tiny, steps: int, refresh: bool = True) -> list[Any]:
    method = Dni(Exact(tiny.spec(3, heads=False).modules), optax.set_to_zero(), conditional=True)
    engine = fused(tiny, 3, method)
    states = tiny.init(engine.spec)
    for step in range(steps):
        if refresh or step == 0:
            above = [(s.params, s.batch_stats) for s in states]
        exact = [{"above": tuple(above[k + 1 :])} for k in range(2)]
        states = [
            s.replace(extras=s.extras | {"synthesizer": s.extras["synthesizer"] | {"params": p}})
            for s, p in zip(states, exact)
        ] + [states[2]]
        states, _ = tiny.run(engine, step + 1, states)
    return [s.params for s in states]


@pytest.mark.medium
def test_exact_gradients_equal_backprop(tiny):
    expected = [s.params for s in tiny.run(tiny.engine("backprop"), 3)[0]]
    assert furthest(trained_with_exact_gradients(tiny, 3), expected) < 1e-5
    # Twin: gradients for parameters of the first step.
    assert furthest(trained_with_exact_gradients(tiny, 3, refresh=False), expected) > 1e-4


# Engines


@pytest.mark.medium
@pytest.mark.full_compile
def test_pipeline_equals_fused_bit_for_bit_and_continues_its_state(tiny):
    whole, _ = tiny.run(fused(tiny, 3, CDNI), 4)
    engine = pipeline(tiny, 3, CDNI)
    assert equal(tiny.run(engine, 4)[0], whole)
    half, _ = tiny.run(fused(tiny, 3, CDNI), 2)
    assert equal(tiny.run(engine, 4, half)[0], whole)


class Late(Dni):
    """Twin whose gradients from above wait for one batch too many."""

    def extras(self, spec, k, states):
        extras = super().extras(spec, k, states)
        return extras | {"above": extras["above"] * 2} if "above" in extras else extras


@pytest.mark.medium
def test_twin_with_late_gradients_differs(tiny):
    whole, _ = tiny.run(fused(tiny, 3, CDNI), 4)
    late, _ = tiny.run(fused(tiny, 3, Late(CDNI.synthesizer, ADAM, conditional=True)), 4)
    assert furthest(learned(late), learned(whole)) > 1e-4


@pytest.mark.full_compile
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dni", "cdni"])
def test_method_passes_the_checks_of_testing(name):
    testing.check_method(name)


@pytest.mark.medium
def test_groups_of_devices_agree_with_one_device(tiny):
    placement = assign(jax.devices()[:4], 2, (2, 2))
    split = PipelineEngine(spec_of(tiny, 2, CDNI), placement)
    assert (
        furthest(learned(tiny.run(split, 1)[0]), learned(tiny.run(fused(tiny, 2, CDNI), 1)[0]))
        < 1e-5
    )


@pytest.mark.medium
def test_dispatch_of_many_steps_equals_single_steps(tiny):
    states = [
        [
            module.params
            for module in train_engine(method__name="cdni", engine__steps_per_dispatch=count)
        ]
        for count in (1, 3)
    ]
    assert furthest(*states) < 1e-5


def train_engine(**fields: Any):
    experiment = make_experiment(make_settings(small_config(**fields).to_dict()), jax.devices()[:1])
    *_, last = experiment.engine.run(experiment.engine.init(), experiment.source, 6)
    return jax.device_get([module.replace(rng=None) for module in last.snapshot().modules])


# Options


@pytest.mark.medium
@pytest.mark.parametrize(
    "codec",
    [options("codec", name="int8", dims=2), options("codec", name="vq", dims=2, codes=16)],
    ids=["int8", "vq"],
)
def test_codec_encodes_both_directions(tiny, codec):
    spec = dataclasses.replace(tiny.spec(2, heads=False, codec=codec), method=DNI)
    states, metrics = tiny.run(fused_like(spec), 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learned(states)))
    assert 0 < metrics[-1][0]["codec_error"] < 1
    assert 0 < metrics[-1][1]["gradient_codec_error"] < 1.5
    plain = dataclasses.replace(spec, method=dataclasses.replace(DNI, encode_gradients=False))
    assert sum(spec.traffic().down) < sum(plain.traffic().down)


@pytest.mark.medium
def test_mixed_precision_average_and_recomputation_keep_states_float32(tiny):
    spec = dataclasses.replace(tiny.spec(2, "bfloat16", heads=False), method=CDNI, ema=0.5)
    modules = tuple(dataclasses.replace(module, remat=True) for module in spec.modules)
    spec = dataclasses.replace(spec, modules=modules)
    states, _ = tiny.run(FusedEngine(spec, one_group(jax.devices()[:1], 2)), 3)
    synthesizer = states[0].extras["synthesizer"]
    assert {leaf.dtype for leaf in jax.tree.leaves(synthesizer["params"])} == {np.dtype("float32")}
    assert states[0].extras["pending"]["activations"].dtype == jnp.bfloat16
    weights = [0.25, 0.5, 1.0]
    history = [tiny.run(fused_like(spec), n)[0][0].params for n in (1, 2)] + [states[0].params]
    mean = jax.tree.map(
        lambda *leaves: sum(w * x for w, x in zip(weights, leaves)) / sum(weights), *history
    )
    assert furthest(states[0].extras["ema"]["params"], mean) < 1e-5


def fused_like(spec) -> FusedEngine:
    return FusedEngine(spec, one_group(jax.devices()[:1], len(spec.modules)))
