"""Costs of local losses: operations by hand, blocks and modules, measured times, memory."""

import itertools
import math
import re
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from runs import small_config
from test_objective_runs import FOUR_BLOCKS, MOMENTUM, experiment

from dgl_jax.config import make_settings
from dgl_jax.objectives import RESIDUAL, Transport
from dgl_jax.profile import memory, timing
from dgl_jax.profile.flops import Blocks, block_flops, forward_flops, module_flops
from dgl_jax.profile.memory import module_memory
from dgl_jax.profile.timing import _lower_alone, _Part, block_times
from dgl_jax.run.build import Experiment, make_spec
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.tools.pipeline import reductions
from dgl_jax.types import nbytes


def test_costs_count_the_auxiliary_network():
    plain = experiment(**FOUR_BLOCKS)
    deep = experiment(**FOUR_BLOCKS, objective__name="auglocal", objective__depth=2)
    body, head = module_flops(deep.spec)[0]
    assert body == module_flops(plain.spec)[0][0]
    # Behind two of four blocks of width 4 follow blocks shaped like the others, and the head.
    x = deep.spec.hops[0].activations
    blocks = 0.0
    for block in deep.spec.modules[1].blocks:
        operations, x = forward_flops(block, x.shape, x.dtype)
        blocks += operations
    assert head == blocks + forward_flops(deep.spec.modules[0].objective.head, x.shape, x.dtype)[0]
    assert block_flops(make_blocks(deep.settings, deep.info)).heads[0][1] == head
    parameters = deep.spec.abstract_states()[0].params["objective"]
    assert sorted(parameters) == ["auxiliary_0", "auxiliary_1", "head"]


def test_costs_count_the_momentum_copy():
    momentum = experiment(**FOUR_BLOCKS, **MOMENTUM)
    plain = experiment(**FOUR_BLOCKS, objective__name="auglocal", objective__depth=1)
    x = momentum.spec.hops[0].activations
    following, _ = forward_flops(momentum.spec.modules[1].blocks[0], x.shape, x.dtype)
    heads = [module_flops(made.spec)[0][1] for made in (momentum, plain)]
    # The first auxiliary block is shaped like the next block (which pools), not like the last one.
    last, y = forward_flops(plain.spec.modules[0].objective.auxiliary[0], x.shape, x.dtype)
    after_last, _ = forward_flops(plain.spec.modules[0].objective.head, y.shape, y.dtype)
    assert heads[1] == last + after_last
    _, z = forward_flops(momentum.spec.modules[1].blocks[0], x.shape, x.dtype)
    after, _ = forward_flops(momentum.spec.modules[0].objective.head, z.shape, z.dtype)
    assert heads[0] == 2 * following + after


BESIDE: dict[str, dict[str, Any]] = {
    "momentum": MOMENTUM,
    "context": {"objective__context_input": True},
    "both": MOMENTUM | {"objective__context_input": True},
}


@pytest.mark.parametrize("name", BESIDE)
def test_costs_of_blocks_add_up_to_those_of_modules(name):
    made = experiment(**FOUR_BLOCKS, model__modules=3, **BESIDE[name])
    costs = block_flops(make_blocks(made.settings, made.info))
    starts = [module.first for module in made.spec.modules]
    assert costs.modules(starts) == list(map(sum, module_flops(made.spec)))
    assert (costs.first == costs.inner) == (name == "momentum")


BY_MODULE: dict[str, dict[str, Any]] = {
    "pyramid": {"name": "auglocal", "depth": 4, "pyramid": True},
    "info_pro": {"name": "info_pro"},
}


@pytest.mark.parametrize("name", BY_MODULE)
def test_cuts_know_heads_that_depend_on_the_module(name):
    options = {f"objective__{field}": value for field, value in BY_MODULE[name].items()}
    fields = {"model__name": "cnn6", "model__modules": 3, "model__split": "flops"}
    made = experiment(**fields, **options)
    network = make_blocks(made.settings, made.info)
    costs = block_flops(network)
    every = [(0, *later) for later in itertools.combinations(range(1, 6), 2)]
    exact = {
        starts: list(map(sum, module_flops(make_spec(made.settings, made.info, starts))))
        for starts in every
    }
    assert {starts: costs.modules(starts) for starts in every} == exact
    chosen = tuple(module.first for module in made.spec.modules)
    assert max(exact[chosen]) == min(map(max, exact.values()))
    # Twin: the heads of the first module, for all modules.
    twin = block_flops(network._replace(heads=network.heads[:1]))
    assert {starts: twin.modules(starts) for starts in every} != exact


def test_equal_heads_are_a_single_row():
    made = experiment(**FOUR_BLOCKS, model__modules=3, objective__name="auglocal")
    assert len(make_blocks(made.settings, made.info).heads) == 1


@pytest.mark.medium
def test_adapters_and_copies_are_measured_with_their_blocks_and_heads(caplog):
    caplog.set_level("INFO", "dgl_jax")
    settings = make_settings(small_config(**BESIDE["both"]))
    blocks = make_blocks(settings, known_info(settings.data))
    times = block_times(blocks, optax.sgd(0.1), jax.devices()[0], repeats=1)
    (heads,) = times.seconds.heads
    assert all(
        second > 0 for row in (times.seconds.first, times.seconds.inner, heads) for second in row
    )


def test_waiting_copies_count_as_memory(monkeypatch):
    spec = experiment(**MOMENTUM).spec
    (counted, _), (state, _) = module_memory(spec), spec.abstract_states()
    # Twin: the program has the message that it reads, and no other.
    monkeypatch.setattr(memory, "nbytes", lambda tree: 0)
    (twin, _) = module_memory(spec)
    assert counted.arguments - twin.arguments == nbytes(state.extras["above"][1])


def loss_operations(**fields: Any) -> tuple[float, Any]:
    """Returns the operations per image of the first module's loss, and the experiment."""
    made = experiment(**FOUR_BLOCKS, **fields)
    return module_flops(made.spec)[0][1] / made.spec.batch_size, made


def test_costs_count_similarities():
    # The first two of four blocks end with 8 channels of 4x4; the head has ten outputs.
    (plain, _), (more, _) = (
        loss_operations(objective__name="pred_sim", objective__similarity_kernel=kernel)
        for kernel in (0, 3)
    )
    head = 2 * 8 * 10  # behind an average of the map
    similarities = 2 * 8 * 8 + 2 * 8 * 10  # of 8 examples by 8 channels, and of their labels
    assert plain == head + similarities
    assert more - plain == 2 * 4 * 4 * 9 * 8 * 8


def test_costs_count_the_decoder_and_the_bytes_of_images():
    operations, made = loss_operations(objective__name="info_pro")
    resize = 2 * 8 * (8 * 4 * 4 + 8 * 8 * 4)  # 8 channels from 4x4 to 8x4 and to 8x8
    convolutions = 2 * 8 * 8 * 9 * (8 * 12 + 12 * 3)
    assert operations == 2 * 8 * 10 + resize + convolutions
    # The image travels to the last module that reconstructs it. The weights fall from 5 to 0 at the
    # last but one module: of two modules the first reconstructs, of four the first two.
    assert made.spec.traffic().wire == experiment(**FOUR_BLOCKS).spec.traffic().wire
    wires = [
        experiment(**FOUR_BLOCKS, model__modules=4, **fields).spec.traffic().wire
        for fields in ({"objective__name": "info_pro"}, {})
    ]
    assert [a - b for a, b in zip(*wires, strict=True)] == [4 * 8 * 8 * 3, 0, 0]


class Shift(nn.Module):
    """Block that adds a linear function of its inputs to them, and sows it."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        residual = nn.Dense(x.shape[-1], use_bias=False)(x)
        self.sow("intermediates", RESIDUAL, residual)
        return x + residual


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_program_of_a_block_has_its_transport_cost(weight):
    x, cotangent = (jax.random.normal(jax.random.key(n), (4, 3)) for n in (1, 2))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    part = _Part(Shift(), shape, "inner", transport=weight)
    program = _lower_alone(part, optax.sgd(1.0), Blocks((), (), shape)).compile()
    kernel = jax.random.normal(jax.random.key(3), (3, 3))
    (state, *_), _ = program.args_info
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.replace(rng=None))
    state.params["body"]["block_0"]["Dense_0"]["kernel"] = np.asarray(kernel)

    def loss(kernel: Any, x: Any) -> Any:
        residual = x @ kernel
        return (cotangent * (x + residual)).sum() + weight * (residual**2).mean()

    after, outputs, gradient = program(
        state.replace(rng=jax.random.key(0)), x, {"cotangent": cotangent}, {}
    )
    expected = jax.grad(loss, (0, 1))(kernel, x)
    made = kernel - after.params["body"]["block_0"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(made, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs, x + x @ kernel, rtol=1e-6)


def test_blocks_are_measured_with_the_transport_cost(monkeypatch):
    settings = make_settings(
        small_config(model__name="resnet20", model__width=4, objective__transport=0.1)
    )
    parts: list[_Part] = []
    monkeypatch.setattr(timing, "_lower_alone", lambda part, *_: parts.append(part))
    monkeypatch.setattr(timing, "compile_all", lambda lowered, *_: [*lowered, 1 / 0])
    network = make_blocks(settings, known_info(settings.data))
    with pytest.raises(ZeroDivisionError):  # ends before anything is measured
        block_times(network, optax.sgd(0.1), jax.devices()[0])
    assert {part.transport for part in parts if part.role != "head"} == {0.1}


def test_transport_has_no_operations_of_its_own():
    fields = {"model__name": "resnet20", "model__width": 4}
    plain, moved = (
        module_flops(experiment(**fields, objective__transport=weight).spec)
        for weight in (0.0, 0.1)
    )
    assert moved == plain


BYTES = {"f32": 4, "s32": 4}
COMPARED = {
    "pred_sim": {"objective__name": "pred_sim"},
    "contrast": {"objective__name": "info_pro", "objective__form": "contrast"},
}


def collectives(made: Experiment) -> dict[str, list[int]]:
    """Returns the bytes of each array that the compiled step sums or gathers over the devices."""
    (tick, *_) = made.spec.method.schedule([0, 0], 1, 1, lambda: False)
    turns = tuple((turn.module, turn.kind) for turn in tick)
    batch = made.engine.placement.batch_shapes(made.spec.batch())
    program = made.engine.steps[turns].lower(made.engine.init().modules, batch).compile()
    found: dict[str, list[int]] = {"all-reduce": [], "all-gather": []}
    for results, name in re.findall(r"= (.*) (all-reduce|all-gather)\(", program.as_text()):
        for dtype, shape in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", results):
            sizes = map(int, filter(None, shape.split(",")))
            found[name].append(BYTES[dtype] * math.prod(sizes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_objectives_state_what_devices_exchange(name):
    fields = FOUR_BLOCKS | {"data__batch_size": 8}
    made = experiment(2, **fields, **COMPARED[name])
    exchange = made.spec.modules[0].objective.exchange(made.spec.hops[0].activations)
    found = collectives(made)
    assert sorted(found["all-gather"]) == sorted(exchange.gathered)
    summed = Counter(found["all-reduce"])
    softmax = {"objective__name": "info_pro"} if name == "contrast" else {}
    plain = collectives(experiment(2, **fields, **softmax))
    assert plain["all-gather"] == []
    assert Counter(exchange.summed) <= summed
    wrapped = Transport(made.spec.modules[0].objective, 1.0)
    assert wrapped.exchange(made.spec.hops[0].activations) == exchange


def test_plans_count_what_objectives_exchange():
    made = experiment(**FOUR_BLOCKS, objective__name="pred_sim", data__batch_size=8)
    first, last = reductions(made.spec)
    state, other = made.spec.abstract_states()
    # Eight vectors of 8 channels, and eight labels of ten classes.
    assert first.gathered == (4 * 8 * 8, 4 * 8 * 10)
    assert first.bytes_ == nbytes(state.params) + 4 * 8 * 8
    assert first.times == 2 + len(jax.tree.leaves(state.batch_stats))
    assert (last.bytes_, last.gathered) == (nbytes(other.params), ())
