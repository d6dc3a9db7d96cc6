"""Tests of the fields that reduce the kernels of a step: off by default, equivalent when on."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import arrays, small_config, spec_of
from traced import equations

from dgl_jax.config import make_settings, options
from dgl_jax.config.registry import OPTIMIZERS
from dgl_jax.core.optimizer import OptimizerKind, make_optimizer
from dgl_jax.data.info import DatasetInfo
from dgl_jax.engines import FusedEngine, fused, program
from dgl_jax.engines.fused import StepCompiler
from dgl_jax.engines.placement import one_group
from dgl_jax.errors import UserError
from dgl_jax.models import make_head
from dgl_jax.models.blocks import Conv
from dgl_jax.models.heads import CNNHead, LinearHead, MLPHead
from dgl_jax.models.network import with_choices
from dgl_jax.models.vgg import VGGClassifier
from dgl_jax.run.build import make_engine
from dgl_jax.run.restore import load_trained
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import Batch

DEFAULTS = {
    "optimizer.flat": False,
    "engine.barrier": True,
    "engine.command_buffers": False,
    "model.logits": "float32",
    "model.pointwise": "conv",
    "model.ops": "auto",
}
STEPS = 3
INFO = DatasetInfo("synthetic", tuple(map(str, range(10))), (8, 8, 3), (0.0,) * 3, (1.0,) * 3)


def largest_difference(one, other):
    """Returns the largest |a - b| / max(|b|, 0.01) over two pytrees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(
        float(np.max(np.abs(np.float64(a) - b) / np.maximum(np.abs(b), 1e-2))) for a, b in pairs
    )


@pytest.mark.parametrize("name", DEFAULTS)
def test_switch_is_off_by_default(name):
    group, field = name.split(".")
    assert getattr(getattr(make_settings(small_config()), group), field) == DEFAULTS[name]


# optimizer.flat


def updated(optimizer, steps=4):
    """Returns the parameters and the optimizer's state after a few jitted updates."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 2, 4), "bias": (4,), "scale": ()}
    draw = lambda: {n: jnp.asarray(random.normal(size=s), "float32") for n, s in shapes.items()}  # noqa: E731
    params = draw()
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = jax.jit(optimizer.update)(draw(), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def optimizer_of(**fields):
    return make_optimizer(options("optimizer", **fields), lambda count: 0.1 / (count + 1))


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("rule", [{"name": "sgd", "nesterov": True}, {"name": "adam"}])
def test_flat_optimizer_makes_the_same_updates_on_one_vector(rule, decay):
    flat, state = updated(optimizer_of(**rule, weight_decay=decay, flat=True))
    plain, _ = updated(optimizer_of(**rule, weight_decay=decay))
    assert largest_difference(flat, plain) < 1e-6
    sizes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert sizes == {(3 * 3 * 2 * 4 + 4 + 1,)}
    twin, _ = updated(optimizer_of(**rule, weight_decay=decay + 0.01, flat=True))
    assert largest_difference(twin, plain) > 1e-4


def test_flat_optimizer_accepts_a_module_without_parameters():
    optimizer = optimizer_of(flat=True)
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


def test_flat_is_refused_for_optimizers_that_treat_arrays_as_a_whole(monkeypatch):
    monkeypatch.setitem(
        OPTIMIZERS._kinds, "by_array", OptimizerKind(lambda options, schedule: None)
    )
    config = small_config(optimizer__name="by_array", optimizer__flat=True)
    with pytest.raises(UserError, match=r"config.optimizer.flat=True: applies to .*sgd or adam"):
        make_settings(config, given=["optimizer.flat"])


@pytest.mark.full_compile
@pytest.mark.slow
def test_flat_run_equals_plain_run_and_resumes(tmp_path):
    def run(name, steps, flat):
        fields = {"optimizer__flat": flat, "train__steps": steps, "train__ema": 0.5}
        train_and_evaluate(small_config(eval__every=2, **fields), tmp_path / name)
        return tmp_path / name

    whole, plain = run("whole", 4, True), run("plain", 4, False)
    run("resumed", 2, True)
    for a, b in zip(arrays(whole), arrays(run("resumed", 4, True)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(arrays(whole)) < len(arrays(plain))
    states = (load_trained(path).restored.state.modules for path in (whole, plain))
    for pair in zip(*states, strict=True):
        one, other = ((s.params, s.batch_stats, s.extras["ema"]) for s in pair)
        assert largest_difference(one, other) < 1e-5
    with pytest.raises(UserError, match=r"config.optimizer.flat \(was True, is now False\)"):
        run("whole", 6, False)


# engine.barrier


def barriers(spec, *args):
    """Counts the optimization barriers in a step of all modules."""
    integers = jax.ShapeDtypeStruct((spec.batch_size,), "int32")
    images = jax.ShapeDtypeStruct((spec.batch_size, 4, 4, 3), "uint8")
    context = {"label": integers, "id": integers}
    batch = Batch(images, context, jax.ShapeDtypeStruct((), "int32"))
    turns = [(k, "step") for k in range(len(spec.modules))]
    jaxpr = jax.make_jaxpr(spec.method.fused(spec, turns, *args))(spec.abstract_states(), batch)
    return sum(e.primitive.name == "optimization_barrier" for e in equations(jaxpr.jaxpr))


def test_barrier_separates_modules_unless_it_is_off(tiny):
    spec = tiny.spec()
    assert barriers(spec) == barriers(spec, True) == len(spec.modules)
    assert barriers(spec, False) == 0
    assert barriers(tiny.spec(heads=False), False) == barriers(tiny.spec(heads=False)) == 0


@pytest.mark.medium
@pytest.mark.full_compile
def test_step_without_barrier_equals_step_with_barrier(tiny, devices, monkeypatch):
    spec, placement = tiny.spec(), one_group(devices[:1], 3)
    plain, metrics = tiny.run(tiny.engine("fused"), STEPS)
    states, other_metrics = tiny.run(
        FusedEngine(spec, placement, compiler=StepCompiler(False)), STEPS
    )
    assert largest_difference([s.params for s in states], [s.params for s in plain]) < 1e-5
    assert largest_difference(other_metrics, metrics) < 1e-5


@pytest.mark.medium
@pytest.mark.full_compile
def test_twin_turns_that_change_their_results_fail(tiny, devices, monkeypatch, fresh_traces):
    plain, _ = tiny.run(tiny.engine("fused"), STEPS)
    monkeypatch.setattr(
        jax.lax,
        "optimization_barrier",
        lambda results: jax.tree.map(
            lambda x: x * 1.0001 if x.dtype == jnp.float32 else x, results
        ),
    )
    engine = tiny.new_engine("fused", (), tiny.spec())
    states, _ = tiny.run(engine, STEPS)
    assert largest_difference([s.params for s in states], [s.params for s in plain]) > 1e-5


# engine.command_buffers


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Lets the options of a GPU reach XLA's CPU compiler, which parses and then ignores them."""
    monkeypatch.setattr(program, "GRAPH_PLATFORMS", ("cpu",))


def engine_of(**fields):
    settings = make_settings(small_config(**fields))
    return make_engine(settings, spec_of(settings, INFO), jax.devices()[:1], 1)


def compiler_options(monkeypatch, **fields):
    """Returns the options that the step of an engine is jitted with."""
    given = []
    monkeypatch.setattr(fused, "_jitted", lambda spec, turns, compiler, _: given.append(compiler))
    engine_of(**fields).steps[((0, "step"),)]
    return given[0]


def test_options_reach_the_compiler(monkeypatch, graphs_on_cpu):
    assert compiler_options(monkeypatch) == StepCompiler(True, ())
    compiler = compiler_options(monkeypatch, engine__command_buffers=True, engine__barrier=False)
    assert not compiler.barrier
    commands = dict(compiler.options)["xla_gpu_enable_command_buffer"].split(",")
    assert set(program.COMMANDS) - {"CONVOLUTION"} <= set(commands) <= set(program.COMMANDS)


@pytest.mark.medium
def test_step_with_options_computes_the_same_bits(tiny, devices, graphs_on_cpu):
    spec, placement = tiny.spec(), one_group(devices[:1], 3)
    options = program.command_buffers(devices[0])
    assert options
    states, _ = tiny.run(FusedEngine(spec, placement, compiler=StepCompiler(True, options)), STEPS)
    plain, _ = tiny.run(tiny.new_engine("fused", (), spec), STEPS)
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    broken = FusedEngine(
        spec, placement, compiler=StepCompiler(True, (("xla_gpu_no_such_option", 1),))
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        tiny.run(broken, 1)


def test_command_unknown_to_xla_is_left_out_with_a_log_line(
    monkeypatch, graphs_on_cpu, devices, caplog
):
    monkeypatch.setattr(program, "COMMANDS", ("FUSION", "TELEPORT"))
    with caplog.at_level(logging.INFO):
        options = dict(program.command_buffers(devices[0]))
    assert options["xla_gpu_enable_command_buffer"] == "FUSION"
    assert [r.message for r in caplog.records if "command_buffers" in r.message] == [
        "config.engine.command_buffers: this XLA cannot record TELEPORT"
    ]


def test_program_that_fails_with_the_options_is_compiled_without_them(
    monkeypatch, graphs_on_cpu, devices, caplog
):
    def fail(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: capture failed\nat line 1")

    monkeypatch.setattr(program, "_trial", fail)
    assert program.command_buffers(devices[0]) == ()
    (record,) = caplog.records
    assert record.getMessage() == (
        "config.engine.command_buffers: compiling without them: INTERNAL: capture failed"
    )


def test_command_buffers_have_no_effect_on_a_cpu(devices, caplog):
    with caplog.at_level(logging.INFO):
        assert program.command_buffers(devices[0]) == ()
    assert caplog.records[-1].getMessage() == (
        "config.engine.command_buffers: has no effect on cpu, only on GPUs"
    )


# model.logits and model.pointwise


def logits_and_gradients(head, x, variables):
    """Returns logits, running averages and gradients of the parameters and the input."""

    def run(params, x):
        return head.apply(variables | {"params": params}, x, True, mutable=["batch_stats"])

    logits, pull, updated = jax.vjp(run, variables["params"], x, has_aux=True)
    cotangent = jnp.sin(jnp.arange(logits.size, dtype=logits.dtype)).reshape(logits.shape)
    return logits, updated, *pull(cotangent)


def primitives(head, variables, x):
    """Returns (name, dtype) of the convolutions and matrix products of a head's forward pass."""
    jaxpr = jax.make_jaxpr(lambda v, x: head.apply(v, x, False))(variables, x).jaxpr
    return [
        (e.primitive.name, str(e.outvars[0].aval.dtype))
        for e in equations(jaxpr)
        if e.primitive.name in ("conv_general_dilated", "dot_general")
    ]


def features(dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(32, 8, 8, 4)), dtype)


def relative_error(one, other):
    """Returns the largest |a - b| / max(|b|, 1) of the arrays of two pytrees, as norms."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1)) for a, b in pairs)


@pytest.mark.medium
def test_pointwise_convolutions_equal_matrix_products():
    # Batch norm over few examples, as in hidden layers, would magnify the rounding.
    x, conv = features(), MLPHead(10, convs=3, hidden=0)
    dot = with_choices(conv, pointwise="dot")
    variables = conv.init(jax.random.key(0), x, True)
    shapes = jax.eval_shape(lambda: dot.init(jax.random.key(0), x, True))
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        shapes,
        variables,
    )
    # Six batch norms in a row amplify rounding; float64 leaves the formulations to differ alone.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (x, variables))
        expected = logits_and_gradients(conv.clone(dtype="float64"), *wide)
        actual = logits_and_gradients(dot.clone(dtype="float64"), *wide)
    assert largest_difference(actual, expected) < 1e-5
    assert [name for name, _ in primitives(conv, variables, x)].count("conv_general_dilated") == 3
    assert {name for name, _ in primitives(dot, variables, x)} == {"dot_general"}


@pytest.mark.medium
def test_twin_transposed_kernel_fails(monkeypatch):
    x, conv = features(), make_head("mlp_sr", 10)
    variables = conv.init(jax.random.key(0), x, True)
    turned = jax.tree.map(lambda w: w.swapaxes(2, 3) if w.ndim == 4 else w, variables)
    actual = logits_and_gradients(with_choices(conv, pointwise="dot"), x, turned)
    assert relative_error(actual[0], logits_and_gradients(conv, x, variables)[0]) > 1e-2


def test_pointwise_keeps_other_kernels_and_strides():
    for kernel, stride in ((3, 1), (1, 2)):
        conv, dot = (Conv(5, kernel, stride, pointwise=p) for p in ("conv", "dot"))
        variables = conv.init(jax.random.key(0), features())
        np.testing.assert_array_equal(
            conv.apply(variables, features()), dot.apply(variables, features())
        )


HEADS = {
    "mlp_sr": MLPHead(10, convs=3, dtype="bfloat16"),
    "cnn": CNNHead(10, dtype="bfloat16"),
    "linear": LinearHead(10, dtype="bfloat16"),
    "vgg": VGGClassifier(10, 16, dtype="bfloat16"),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", HEADS)
def test_logits_in_the_dtype_of_the_model_are_close_to_float32_logits(name):
    x, plain = features("bfloat16"), HEADS[name]
    head = with_choices(plain, logits="model")
    variables = plain.init(jax.random.key(0), x, True)
    assert primitives(plain, variables, x)[-1] == ("dot_general", "float32")
    assert {dtype for _, dtype in primitives(head, variables, x)} == {"bfloat16"}
    actual, expected = (h.apply(variables, x, False) for h in (head, plain))
    assert actual.dtype == expected.dtype == jnp.float32
    error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.01
    # bfloat16 has 8 bits: the test would notice one bit less.
    assert error > 1e-4


def test_logits_of_a_float32_model_do_not_change():
    x = features()
    texts = [
        str(jax.make_jaxpr(lambda v, x, h=head: h.apply(v, x, False))(variables, x))
        for plain in [make_head("mlp_sr", 10)]
        for variables in [plain.init(jax.random.key(0), x, True)]
        for head in (plain, with_choices(plain, logits="model"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("method", "heads"), [("dgl", 2), ("backprop", 1)])
def test_choices_reach_every_head_of_a_run(method, heads):
    fields = {"model__name": "cnn4", "method__name": method}
    choices = {"model__head": "mlp_sr", "model__logits": "model", "model__pointwise": "dot"}
    settings = make_settings(small_config(**fields, **choices))
    modules = spec_of(settings, INFO).modules
    heads_of_run = [m.objective.head for m in modules if m.objective is not None]
    assert [(head.logits, head.pointwise) for head in heads_of_run] == [("model", "dot")] * heads
    default = spec_of(make_settings(small_config(**fields)), INFO).modules
    assert {m.objective.head.logits for m in default if m.objective} == {"float32"}


@pytest.mark.slow
def test_run_with_every_switch_learns_and_is_evaluated(tmp_path):
    fields = {
        "optimizer__flat": True,
        "engine__barrier": False,
        "engine__command_buffers": True,
        "model__logits": "model",
        "model__pointwise": "dot",
        "model__ops": "joint",
        "model__dtype": "bfloat16",
        "model__head": "mlp_sr",
    }
    train_and_evaluate(small_config(train__steps=4, eval__every=4, **fields), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 4
