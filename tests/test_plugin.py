"""User-defined parts (`examples/plugin`): one file and one registration each, under all engines."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plugin_runs import config, equal, furthest, trained
from runs import arrays, records

from dgl_jax.config import make_settings, options
from dgl_jax.config.registry import CODECS, ENGINES, HEADS, NETWORKS, OBJECTIVES, RULES, TASKS
from dgl_jax.core import rngs
from dgl_jax.data import make_source
from dgl_jax.errors import UserError
from dgl_jax.evaluate import evaluate_run
from dgl_jax.models import make_head, make_network
from dgl_jax.profile.flops import forward_flops, module_flops
from dgl_jax.replay import Ring
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.export import export_run, load_exported
from dgl_jax.tools.plan import plan
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import Header

pytestmark = pytest.mark.usefixtures("plugin_kinds")


IMAGE = {"objective__name": "reconstruction"}
PLUGIN_PARTS = {
    "model__name": "strided",
    "model__head": "maximum",
    "codec__name": "signs",
    "model__width": 8,
    "engine__name": "serial",
}


# An objective that reads the image


def by_hand(steps: int, weight: float):
    """Trains two modules on cross entropy plus reconstruction error, in plain JAX."""
    experiment = make_experiment(
        make_settings(config(objective__name="reconstruction", objective__weight=weight)),
        jax.devices()[:1],
    )
    spec, states = experiment.spec, experiment.spec.init()
    params, stats = (
        [getattr(state, name) for state in states] for name in ("params", "batch_stats")
    )
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
    opt_states = [optimizer.init(p) for p in params]

    def loss_of(p, module, s, x, image, label, key):
        features, body = module.apply_body(p, s, x, train=True, rng=key)
        head = module.objective.head
        variables = {
            "params": p["objective"]["head"],
            "batch_stats": s["objective"].get("head", {}),
        }
        logits, updated = head.apply(variables, features, train=True, mutable=["batch_stats"])
        reconstructed = features @ p["objective"]["draw"]["kernel"] + p["objective"]["draw"]["bias"]
        error = jnp.square(
            reconstructed - jax.image.resize(image, reconstructed.shape, "linear", antialias=True)
        ).mean()
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1).mean()
        head_stats = {"head": updated["batch_stats"]} if updated else {}
        return nats + weight * error, (features, {"body": body, "objective": head_stats})

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=1)
    for number in range(steps):
        batch = experiment.source.batch(number)
        x = image = spec.task.evaluate(batch.inputs)
        for k, module in enumerate(spec.modules):
            key = rngs.micro_batch(rngs.update(states[k].rng, number), 0)
            (_, (x, stats[k])), gradient = step(
                params[k], module, stats[k], x, image, batch.context["label"], key
            )
            updates, opt_states[k] = optimizer.update(gradient, opt_states[k], params[k])
            params[k] = optax.apply_updates(params[k], updates)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "pipeline"])
def test_reconstruction_objective_equals_plain_jax_loop(engine):
    expected = by_hand(3, 0.5)
    assert (
        furthest(trained(3, objective__weight=0.5, engine__name=engine, **IMAGE), expected) < 1e-5
    )
    assert (
        furthest(trained(3, objective__weight=0.4, engine__name=engine, **IMAGE), expected) > 1e-4
    ), "the weight of the image has no effect"


def test_image_is_sent_only_if_an_objective_needs_it_and_counts_as_traffic():
    plain, image = (
        make_experiment(make_settings(config(**fields)), jax.devices()[:1]).spec
        for fields in ({}, IMAGE)
    )
    assert plain.needs(1) == ("id", "label")
    assert image.needs(1) == ("id", "image", "label")
    assert image.traffic().wire[0] - plain.traffic().wire[0] == 8 * 8 * 4  # one channel of float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [pytest.param("reconstruction", marks=pytest.mark.full_compile), "lookahead"]
)
def test_synchronous_engines_agree_bit_for_bit(objective):
    devices = {"fused": 1, "pipeline": 2, "serial": 1}
    params = {
        name: trained(6, count, objective__name=objective, engine__name=name)
        for name, count in devices.items()
    }
    assert equal(params["fused"], params["pipeline"])
    assert equal(params["fused"], params["serial"])
    assert not equal(params["fused"], trained(6, 1, objective__name="classifier"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulated", "threads"])
def test_asynchronous_engines_pass_the_image_through_rings(engine, tmp_path):
    summary = train_and_evaluate(
        config(engine__name=engine, replay__rule="newest_half", replay__size=3, **IMAGE), tmp_path
    )
    assert [module["updates"] for module in summary.modules] == [12, 12]
    assert all(
        np.isfinite(record.get("train/module_1/reconstruction", 0.0))
        for record in records(tmp_path)
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "pipeline", "simulated", "threads"])
def test_user_defined_parts_run_under_every_engine(engine):
    replay = (
        {"replay__rule": "newest_half", "replay__size": 2}
        if engine in ("simulated", "threads")
        else {}
    )
    experiment = make_experiment(
        make_settings(
            config(
                **PLUGIN_PARTS | replay | {"engine__name": engine, "objective__name": "lookahead"}
            )
        )
    )
    *_, last = experiment.engine.run(experiment.engine.init(), experiment.source, 12)
    assert [int(module.updates) for module in last.snapshot().modules] == [12, 12]
    # Per image: one bit per value, a scale of 4 bytes, and 8 bytes for label and id.
    _, activations = experiment.spec.shapes(experiment.spec.abstract_states())
    bytes_per_image = activations.size / activations.shape[0] / 8 + 4 + 8
    assert experiment.engine.traffic().wire == (bytes_per_image,)


@pytest.mark.slow
def test_run_with_user_defined_parts_resumes_exactly_evaluates_and_exports(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_and_evaluate(config(**PLUGIN_PARTS, **IMAGE), whole)
    train_and_evaluate(config(**PLUGIN_PARTS, **IMAGE, train__steps=4), part)
    train_and_evaluate(config(**PLUGIN_PARTS, **IMAGE), part)
    assert equal(arrays(whole), arrays(part))
    evaluated = evaluate_run(whole)
    exported = load_exported(export_run(whole))
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert [logits.shape for logits in exported.logits(images)] == [(2, 8), (2, 8)]
    assert evaluated["step"] == 12


# Single parts


def test_signs_codec_against_hand_computed_values():
    codec, x = (
        CODECS["signs"].make(options("codec", name="signs"), "float32"),
        jnp.array([[1.0, -2, 3, -4, 5, -6, 7, -8]]),
    )
    assert not codec.lossless
    payload = codec.encode((), x)
    assert payload["bits"].tolist() == [[0b10101010]]
    np.testing.assert_allclose(codec.decode((), payload), [[4.5, -4.5] * 4], rtol=1e-6)


@pytest.mark.medium
def test_strided_blocks_and_maximum_head_equal_plain_jax():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    network = make_network("strided", 4, 5, (8, 8, 3))
    head, x = make_head("maximum", 5), images
    for block, stride in zip(network.blocks, (1, 2, 1, 2), strict=True):
        variables = block.init(jax.random.key(1), x, False)
        kernel, bias = (variables["params"]["Conv_0"][name] for name in ("kernel", "bias"))
        expected = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        expected = jax.nn.gelu(expected + bias)
        x = block.apply(variables, x, False)
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    assert x.shape == (2, 2, 2, 16)
    variables = head.init(jax.random.key(2), x, False)
    kernel, bias = (variables["params"]["Dense_0"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(
        head.apply(variables, x, False), np.max(x, (1, 2)) @ kernel + bias, rtol=1e-5
    )


def test_stripes_have_the_direction_of_their_label():
    source = make_source(
        options("data", name="stripes", batch_size=8, validation_fraction=0.0), seed=0
    )
    assert (source.examples("train"), source.examples("test"), source.example_shape) == (
        512,
        128,
        (8, 8, 1),
    )
    batch = source.batch(0)
    rows, columns = np.mgrid[:8, :8]

    def wave(label: int) -> np.ndarray:
        angle = np.pi * label / 8
        return np.exp(2j * (rows * np.sin(angle) + columns * np.cos(angle)))

    strength = np.abs(
        np.einsum(
            "bij,lij->bl",
            batch.inputs[..., 0] - 127.5,
            np.stack([wave(label) for label in range(8)]),
        )
    )
    assert strength.argmax(1).tolist() == batch.context["label"].tolist()


def test_newest_half_reads_newer_messages_up_to_their_limit_before_older_ones():
    ring = Ring(
        (jax.ShapeDtypeStruct((1,), np.float32), {"id": jax.ShapeDtypeStruct((1,), np.int32)}),
        4,
        "newest_half",
        max_reuse=2,
    )
    for number in range(4):
        ring.add(np.float32([number]), {"id": np.int32([number])}, Header(number, number))
    ages = [ring.sample().age for _ in range(8)]
    assert sorted(ages[:4]) == [0, 0, 1, 1]
    assert ages[4:] == [2, 2, 3, 3]


@pytest.mark.slow
def test_plan_counts_the_operations_of_the_copied_block():
    settings = [
        make_settings(config(model__modules=2, **fields))
        for fields in ({}, {"objective__name": "lookahead"})
    ]
    plain, ahead = (plan(s, stated="1,1,1,1")[0]["modules"][0]["head_gflops"] for s in settings)
    assert ahead > plain


@pytest.mark.slow
def test_split_by_time_works_with_an_objective_that_reads_the_image():
    settings = make_settings(config(model__split="time", **IMAGE))
    spec = make_experiment(settings, jax.devices()[:1]).spec
    assert spec.modules[0].first == 0
    assert len(spec.modules) == 2


def test_all_plugin_parts_are_registered():
    parts = {
        "signs": CODECS,
        "serial": ENGINES,
        "maximum": HEADS,
        "strided": NETWORKS,
        "lookahead": OBJECTIVES,
        "newest_half": RULES,
        "token_labels": TASKS,
    }
    assert all(name in list(kinds) for name, kinds in parts.items())


def test_missing_plugin_is_a_one_line_error():
    with pytest.raises(
        UserError,
        match=r"^config\.plugins='nowhere\.at_all': no such module; "
        r"install it, or put its folder on PYTHONPATH$",
    ):
        make_settings({"plugins": ("nowhere.at_all",)})


def test_conflicting_option_type_and_built_in_name_are_refused():
    from dataclasses import dataclass

    from dgl_jax.codecs import CodecKind, register_codec
    from dgl_jax.config import CodecSettings
    from dgl_jax.config.fields import option

    @dataclass(frozen=True)
    class Wrong(CodecSettings):
        dims: float = option(8.0)

    with pytest.raises(
        UserError,
        match=r"config\.codec\.name='wrong': its option config\.codec\.dims has type "
        r".*; choose another name for the option$",
    ):
        register_codec("wrong", CodecKind(lambda options, dtype: None, Wrong))
    with pytest.raises(
        UserError, match=r"config\.codec\.name='vq': dgl_jax already defines this name"
    ):
        register_codec("vq", CodecKind(lambda options, dtype: None))


# Costs of the parts


def operations(**fields):
    """Returns the spec of the small run and the operations per image of bodies and losses."""
    spec = make_experiment(make_settings(config(**fields)), jax.devices()[:1]).spec
    counts = np.array(module_flops(spec)) / spec.batch_size
    return spec, counts[:, 0], counts[:, 1]


def test_operations_of_a_reconstruction_and_of_an_adapter_are_counted():
    spec, bodies, losses = operations()
    _, same, with_image = operations(objective__name="reconstruction")
    np.testing.assert_array_equal(same, bodies)
    for k, ((_, height, width, channels), extra) in enumerate(
        zip([s.shape for s in spec.shapes(spec.abstract_states())[1:]], with_image - losses)
    ):
        colors = spec.inputs().shape[-1]
        convolution = 2 * height * width * channels * colors  # 1x1
        # A smaller map also averages the image, by one matrix product per axis.
        resize = 2 * colors * (height * 8 * 8 + height * width * 8) if height < 8 else 0
        assert extra == convolution + resize, k
    _, echoed, same = operations(model__adapter="echo")
    np.testing.assert_array_equal(same, losses)
    assert echoed[0] == bodies[0]  # the first module has no adapter
    assert echoed[1] > bodies[1]


def test_operations_after_a_published_block_are_counted():
    spec, _, losses = operations()
    _, _, mirrored = operations(objective__name="mirror")
    activations = spec.hops[0].activations
    first_block, mapped = forward_flops(spec.modules[1].blocks[0], *_shape(activations))
    before, after = (
        forward_flops(spec.modules[0].objective.head, *_shape(x))[0] for x in (activations, mapped)
    )
    assert losses[0] == before / spec.batch_size
    assert mirrored[0] == (first_block + after) / spec.batch_size
    assert mirrored[1] == losses[1]  # no module publishes to the last one


def _shape(x):
    return x.shape, x.dtype
