"""Tests that engines compute the same numbers.

`pipeline` is compared with `fused`, several devices with one, and stopped runs with uninterrupted
ones.
"""

import itertools

import jax
import numpy as np
import pytest

from dgl_jax.config import options
from dgl_jax.ops import conv
from dgl_jax.ops.cpu import im2col, winograd
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch

pytestmark = pytest.mark.full_compile

STEPS = 4
VQ = options("codec", name="vq", codes=8, dims=2, codebook_every=3)
ONE_EACH = {2: (1, 1), 3: (1, 1, 1)}


def leaves(result):
    """Flattens (states, metrics) into a dict of arrays by path."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(result)
    }


def unequal(a, b):
    """Returns the names of the arrays that differ in dtype or in any bit."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()
    ]


def furthest(a, b, floor=1e-2):
    """Returns the largest |a - b| / max(|b|, floor) over a tree.

    The floor avoids large relative errors of values near 0.
    """
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return max(
        float(np.max(np.abs(np.float64(a[n]) - b[n]) / np.maximum(np.abs(b[n]), floor))) for n in a
    )


@pytest.fixture(scope="module")
def fused(tiny):
    """Runs the engine `fused`, once per spec."""
    runs = {}

    def run(**spec):
        key = tuple(spec.items())
        if key not in runs:
            runs[key] = tiny.run(tiny.engine("fused", **spec), STEPS)
        return runs[key]

    return run


# pipeline = fused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "spec"),
    [
        (ONE_EACH[2], {"modules": 2}),
        (ONE_EACH[3], {}),
        ((), {}),  # all modules on one device
        (ONE_EACH[3], {"dtype": "bfloat16"}),
        (ONE_EACH[2], {"modules": 2, "augment": "crop_flip", "codec": "bf16"}),
        (ONE_EACH[3], {"codec": VQ}),
        ((), {"codec": VQ}),
        (ONE_EACH[3], {"codec": options("codec", name="int8", dims=2)}),
    ],
    ids=[
        "two",
        "three",
        "one device",
        "bfloat16",
        "augmented, bf16",
        "vq",
        "vq, one device",
        "int8",
    ],
)
def test_pipeline_equals_fused_bit_for_bit(tiny, fused, groups, spec):
    states, reports = tiny.run(tiny.engine("pipeline", groups, **spec), STEPS)
    assert len(reports) == STEPS
    assert unequal((states, reports), fused(**spec)) == []
    first = tiny.init(tiny.spec(**spec))
    assert all(
        unequal(after.params, before.params) for after, before in zip(states, first, strict=True)
    ), "nothing was learned"


@pytest.mark.slow
def test_pipeline_equals_fused_with_weight_gradients_in_parts(tiny, monkeypatch):
    # With so few channels im2col would otherwise use a single product.
    monkeypatch.setattr(im2col, "_CHANNELS", 0)
    plain = tiny.run(tiny.new_engine("fused", (), tiny.spec(modules=2)), STEPS)
    monkeypatch.setattr(conv, "UNCUT_BYTES", 0)
    monkeypatch.setattr(conv, "CHUNK_BYTES", 0)
    monkeypatch.setattr(conv, "CHUNK", 2)  # four parts per batch
    spec = tiny.spec(modules=2)
    results = [
        tiny.run(tiny.new_engine(name, groups, spec), STEPS)
        for name, groups in (("fused", ()), ("pipeline", ONE_EACH[2]))
    ]
    assert unequal(*results) == []
    assert unequal(results[0], plain), "nothing was summed in parts"


@pytest.mark.slow
def test_pipeline_equals_fused_with_winograd_convolutions(tiny, fused, monkeypatch):
    plain = fused(modules=2)
    monkeypatch.setattr(winograd, "_TILES", 8)
    monkeypatch.setattr(winograd, "_CHANNELS", 1)
    spec = tiny.spec(modules=2)
    results = [
        tiny.run(tiny.new_engine(name, groups, spec), STEPS)
        for name, groups in (("fused", ()), ("pipeline", ONE_EACH[2]))
    ]
    assert unequal(*results) == []
    assert unequal(results[0], plain), "nothing was transformed"


@pytest.mark.medium
@pytest.mark.parametrize("broken", ["late batch", "other labels", "order of updates"])
def test_twin_broken_pipeline_differs_from_fused(tiny, fused, monkeypatch, broken):
    run = tiny.engine("pipeline", ONE_EACH[3])
    original = run.programs[1, "step"]
    previous = []

    def late(state, incoming, context):
        """Runs module 1 on the message of the previous tick."""
        previous.append((incoming, context))
        return original(state, *previous[max(0, len(previous) - 2)])

    def relabelled(state, incoming, context):
        """Runs module 1 with the labels of the previous batch."""
        previous.append(context)
        return original(state, incoming, previous[max(0, len(previous) - 2)])

    def updated_first(state, incoming, context):
        """Sends the outputs that module 1 computes after its update."""
        state, _, metrics = original(state, incoming, context)
        return (
            state,
            original(jax.tree.map(lambda x: x.copy(), state), incoming, context)[1],
            metrics,
        )

    replacement = {
        "late batch": late,
        "other labels": relabelled,
        "order of updates": updated_first,
    }[broken]
    monkeypatch.setitem(run.programs, (1, "step"), replacement)
    states, _ = tiny.run(run, STEPS)
    expected, _ = fused()
    assert unequal(states[0], expected[0]) == []
    assert furthest(states[2].params, expected[2].params) > 1e-3


# Several devices per module


def single_steps(tiny, run, oracle_reports):
    """Returns the largest deviation of single steps from the reference.

    Each step starts from the reference's state, so that rounding errors do not add up.
    """
    worst = 0.0
    for step, (before, after, expected) in enumerate(oracle_reports):
        states, reports = tiny.run(run, step + 1, before)
        worst = max(
            worst,
            furthest(([s.params for s in states], reports), ([s.params for s in after], expected)),
        )
        assert [int(s.updates) for s in states] == [step + 1] * len(states)
    return worst


def reference_steps(tiny, **spec):
    """Runs `fused` on one device; returns (states before, states after, metrics) of each step."""
    one, steps = tiny.engine("fused", **spec), []
    before = tiny.init(one.spec)
    for step in range(3):
        after, reports = tiny.run(one, step + 1, before)
        steps.append((before, after, reports))
        before = after
    return steps


@pytest.fixture(scope="module")
def oracle(tiny):
    """Returns the steps of `fused` on one device for two and three modules, and with `vq`."""
    return {
        2: reference_steps(tiny, modules=2),
        3: reference_steps(tiny, modules=3),
        "vq": reference_steps(tiny, modules=2, codec=VQ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(2, 2), (1, 2, 1)])
def test_several_devices_per_module_agree_within_rounding(tiny, oracle, groups):
    run = tiny.engine("pipeline", groups, modules=len(groups))
    assert single_steps(tiny, run, oracle[len(groups)]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(2, 2), (1, 2)])
def test_several_devices_share_one_codebook(tiny, oracle, groups):
    run = tiny.engine("pipeline", groups, modules=2, codec=VQ)
    assert single_steps(tiny, run, oracle["vq"]) < 1e-5
    for before, after, _ in oracle["vq"]:
        step = int(before[0].updates)
        report = list(run.run(tiny.place(run, before), tiny.source, step + 1))[-1]
        entries = report.snapshot().modules[0].extras["codec"]["learnt"].entries
        np.testing.assert_allclose(
            entries, after[0].extras["codec"]["learnt"].entries, rtol=1e-5, atol=1e-6
        )
        copies = [np.asarray(shard.data) for shard in entries.addressable_shards]
        assert len(copies) == groups[0]
        assert all(np.array_equal(copies[0], other) for other in copies)


@pytest.mark.slow
def test_twin_other_batch_exceeds_rounding(tiny, oracle):
    before, after, reports = oracle[2][1]
    first_again = tuple(state.replace(updates=np.int32(0)) for state in before)
    assert (
        single_steps(
            tiny, tiny.engine("pipeline", (2, 2), modules=2), [(first_again, after, reports)]
        )
        > 1e-3
    )


# Back-propagation


@pytest.mark.medium
def test_backprop_equals_fused_for_one_module(tiny, fused):
    result = tiny.run(tiny.engine("backprop", modules=1), STEPS)
    assert unequal(result, fused(modules=1)) == []


@pytest.mark.medium
def test_backprop_does_not_depend_on_the_cut(tiny, fused):
    one, reports_one = tiny.run(tiny.engine("backprop", modules=1), STEPS)
    three, reports_three = tiny.run(tiny.engine("backprop", modules=3), STEPS)

    def body(states):
        return {name: block for state in states for name, block in state.params["body"].items()}

    assert furthest(body(three), body(one)) < 1e-6
    assert furthest(three[-1].params["objective"], one[-1].params["objective"]) < 1e-6
    assert [r[:-1] for r in reports_three] == [({}, {})] * STEPS
    assert furthest([r[-1] for r in reports_three], [r[-1] for r in reports_one]) < 1e-6
    assert all("objective" not in state.params for state in three[:-1])
    decoupled, _ = fused()
    assert furthest(body(decoupled), body(one)) > 1e-3  # twin: local losses give other parameters


# Contexts travel with their activations


def watched(run, monkeypatch):
    """Records the example ids that each program receives, in order."""
    modules = range(len(run.spec.modules))
    seen = [[] for _ in modules]

    def watch(k, program):
        def call(state, inbox, context):
            seen[k].append(jax.device_get(context["id"]))
            if isinstance(inbox.below, Batch):
                assert inbox.below.context is context
            return program(state, inbox, context)

        return call

    for k in modules:
        monkeypatch.setitem(run.programs, (k, "step"), watch(k, run.programs[k, "step"]))
    return seen


@pytest.mark.medium
@pytest.mark.parametrize("groups", [ONE_EACH[3], (1, 2, 1)])
def test_ids_follow_activations(tiny, monkeypatch, groups):
    run = tiny.engine("pipeline", groups)
    seen = watched(run, monkeypatch)
    tiny.run(run, STEPS)
    for module_ids in seen:
        assert [ids.tolist() for ids in module_ids] == [
            tiny.source.batch(t).context["id"].tolist() for t in range(STEPS)
        ]


def test_twin_swapped_contexts_are_detected(tiny, monkeypatch):
    carried, before = TrainSpec.carried, {}

    def swapped(self, k, context, added=None):
        """Pairs each message with the context of the previous one."""
        before[k], earlier = carried(self, k, context, added), before.get(k)
        return earlier or before[k]

    monkeypatch.setattr(TrainSpec, "carried", swapped)
    with pytest.raises(AssertionError, match=r"assert \[\["):
        test_ids_follow_activations(tiny, monkeypatch, ())


# Stop and resume


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_stopped_run_resumes_to_same_numbers(tiny, fused, name):
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    asked = itertools.count()
    states, first = tiny.run(run, STEPS, stop=lambda: next(asked) >= 2)
    assert [int(s.updates) for s in states] == [2, 2, 2]
    assert len(first) == 2
    states, rest = tiny.run(run, STEPS, states)
    assert unequal((states, first + rest), fused()) == []
    # Twin: without the update counts the second run starts again at batch 0.
    forgotten, _ = tiny.run(run, 2, [s.replace(updates=np.int32(0)) for s in tiny.run(run, 2)[0]])
    assert furthest([s.params for s in forgotten], [s.params for s in states]) > 1e-3
