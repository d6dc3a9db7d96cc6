"""Engines agree: `pipeline` with `fused` bit for bit, many devices with one, stopped runs with whole ones, one trace, few waits."""

import itertools

import jax
import numpy as np
import pytest

from dgl_jax.config import options
from dgl_jax.engines import EngineState
from dgl_jax.engines.base import counts
from dgl_jax.ops import conv
from dgl_jax.ops.cpu import im2col, winograd
from dgl_jax.run import metrics
from dgl_jax.run.metrics import Window
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Inbox

pytestmark = pytest.mark.full_compile

STEPS = 4
VQ = options("codec", name="vq", codes=8, dims=2, codebook_every=3)
ONE_EACH = {2: (1, 1), 3: (1, 1, 1)}


def leaves(result):
    """(states, metrics) as named arrays."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(result)
    }


def unequal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return [
        name
        for name in a
        if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()
    ]


def furthest(a, b, floor=1e-2):
    """Largest |a - b| / max(|b|, floor) over a tree; `floor` because a value near 0 has no relative error to speak of."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    return max(
        float(np.max(np.abs(np.float64(a[n]) - b[n]) / np.maximum(np.abs(b[n]), floor))) for n in a
    )


@pytest.fixture(scope="module")
def fused(tiny):
    """Runs the oracle, once for each spec."""
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
def test_pipeline_is_fused_bit_for_bit(tiny, fused, groups, spec):
    states, reports = tiny.run(tiny.engine("pipeline", groups, **spec), STEPS)
    assert len(reports) == STEPS
    assert unequal((states, reports), fused(**spec)) == []
    first = tiny.init(tiny.spec(**spec))
    assert all(
        unequal(after.params, before.params) for after, before in zip(states, first, strict=True)
    ), "nothing was learnt"


@pytest.mark.slow
def test_pipeline_is_fused_where_weight_gradients_are_summed_in_parts(tiny, monkeypatch):
    monkeypatch.setattr(im2col, "_CHANNELS", 0)  # of so few channels they are one product
    plain = tiny.run(tiny.new_engine("fused", (), tiny.spec(modules=2)), STEPS)
    monkeypatch.setattr(conv, "CHUNK", 2)  # four parts a batch
    spec = tiny.spec(modules=2)
    found = [
        tiny.run(tiny.new_engine(name, groups, spec), STEPS)
        for name, groups in (("fused", ()), ("pipeline", ONE_EACH[2]))
    ]
    assert unequal(*found) == []
    assert unequal(found[0], plain), "nothing was summed in parts"


@pytest.mark.slow
def test_pipeline_is_fused_with_convolutions_in_transformed_tiles(tiny, fused, monkeypatch):
    plain = fused(modules=2)
    monkeypatch.setattr(winograd, "_TILES", 8)
    monkeypatch.setattr(winograd, "_CHANNELS", 1)
    spec = tiny.spec(modules=2)
    found = [
        tiny.run(tiny.new_engine(name, groups, spec), STEPS)
        for name, groups in (("fused", ()), ("pipeline", ONE_EACH[2]))
    ]
    assert unequal(*found) == []
    assert unequal(found[0], plain), "nothing was transformed"


@pytest.mark.parametrize("broken", ["late batch", "other labels", "order of updates"])
def test_a_broken_pipeline_is_not_fused(tiny, fused, monkeypatch, broken):
    run = tiny.engine("pipeline", ONE_EACH[3])
    broken_one = run.programs[1, "step"]
    previous = []

    def late(state, incoming, context):
        """Module 1 works on the packet of the tick before."""
        previous.append((incoming, context))
        return broken_one(state, *previous[max(0, len(previous) - 2)])

    def relabelled(state, incoming, context):
        """Module 1 learns the labels of the batch before."""
        previous.append(context)
        return broken_one(state, incoming, previous[max(0, len(previous) - 2)])

    def updated_first(state, incoming, context):
        """Module 1 hands on what it makes of the batch after its update."""
        state, _, of_step = broken_one(state, incoming, context)
        return (
            state,
            broken_one(jax.tree.map(lambda x: x.copy(), state), incoming, context)[1],
            of_step,
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


# Several devices a module


def single_steps(tiny, run, oracle_reports):
    """Each step of `run` from the state that the oracle had there: rounding does not add up."""
    worst = 0.0
    for step, (before, after, expected) in enumerate(oracle_reports):
        states, reports = tiny.run(run, step + 1, before)
        worst = max(
            worst,
            furthest(([s.params for s in states], reports), ([s.params for s in after], expected)),
        )
        assert [int(s.updates) for s in states] == [step + 1] * len(states)
    return worst


@pytest.fixture(scope="module")
def oracle(tiny):
    """(states before, states after, metrics) of each step of fused on one device."""

    def run(modules, codec="identity"):
        one, steps = tiny.engine("fused", modules=modules, codec=codec), []
        before = tiny.init(one.spec)
        for step in range(3):
            after, reports = tiny.run(one, step + 1, before)
            steps.append((before, after, reports))
            before = after
        return steps

    return {2: run(2), 3: run(3), "vq": run(2, VQ)}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(2, 2), (1, 2, 1)])
def test_several_devices_a_module_within_rounding(tiny, oracle, groups):
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
        found = report.snapshot().modules[0].extras["codec"]["learnt"].entries
        np.testing.assert_allclose(
            found, after[0].extras["codec"]["learnt"].entries, rtol=1e-5, atol=1e-6
        )
        copies = [np.asarray(shard.data) for shard in found.addressable_shards]
        assert len(copies) == groups[0]
        assert all(np.array_equal(copies[0], other) for other in copies)


@pytest.mark.slow
def test_another_batch_is_beyond_rounding(tiny, oracle):
    before, after, reports = oracle[2][1]
    first_again = tuple(state.replace(updates=np.int32(0)) for state in before)
    assert (
        single_steps(
            tiny, tiny.engine("pipeline", (2, 2), modules=2), [(first_again, after, reports)]
        )
        > 1e-3
    )


# Back-propagation


def test_backprop_of_one_module_is_fused_of_one_module(tiny, fused):
    found = tiny.run(tiny.engine("backprop", modules=1), STEPS)
    assert unequal(found, fused(modules=1)) == []


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
    assert furthest(body(decoupled), body(one)) > 1e-3  # local losses are another method


# What follows the activations


def watched(run, monkeypatch):
    """The example ids that each program received, in order, and the first module's batch numbers."""
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


@pytest.mark.parametrize("groups", [ONE_EACH[3], (1, 2, 1)])
def test_ids_follow_activations(tiny, monkeypatch, groups):
    run = tiny.engine("pipeline", groups)
    seen = watched(run, monkeypatch)
    tiny.run(run, STEPS)
    for of_module in seen:
        assert [ids.tolist() for ids in of_module] == [
            tiny.source.batch(t).context["id"].tolist() for t in range(STEPS)
        ]


def test_swapped_contexts_are_noticed(tiny, monkeypatch):
    carried, before = TrainSpec.carried, {}

    def swapped(self, k, context, added=None):
        """Pairs a message with the context of the one made before it."""
        before[k], earlier = carried(self, k, context, added), before.get(k)
        return earlier or before[k]

    monkeypatch.setattr(TrainSpec, "carried", swapped)
    with pytest.raises(AssertionError, match=r"assert \[\["):
        test_ids_follow_activations(tiny, monkeypatch, ())


# One trace, few waits, reports


def programs_of(run):
    steps = [(k, "step") for k in range(len(run.spec.modules))]
    return (
        [run.programs[step] for step in steps]
        if hasattr(run, "programs")
        else [run.steps[tuple(steps)]]
    )


def traces(run):
    return [program._cache_size() for program in programs_of(run)]


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_each_program_is_traced_once(tiny, name):
    run = tiny.engine(name, modules=1) if name == "fused" else tiny.engine(name, ONE_EACH[3])
    for program in programs_of(run):
        program.clear_cache()
    state = tiny.place(run, tiny.init(run.spec))
    for until in (2, 3, 5):  # segments, as between evaluations
        *_, last = run.run(state, tiny.source, until)
        state = last.snapshot()
    assert set(traces(run)) == {1}
    # A batch of another size is a second trace.
    batch = jax.tree.map(lambda x: x[:4] if x.ndim else x, tiny.source.batch(0))
    moved = run.placement.put_batch(batch, 0)
    if name == "fused":
        programs_of(run)[0](state.modules, moved)
    else:
        programs_of(run)[0](state.modules[0], Inbox(moved), moved.context)
    assert traces(run)[0] == 2


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_reports(tiny, name):
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    state = tiny.place(run, tiny.init(run.spec))
    reports = list(run.run(state, tiny.source, STEPS))
    assert [report.updates for report in reports] == [(step,) * 3 for step in range(1, STEPS + 1)]
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert all(
        set(of_module) == {"loss", "accuracy"} for report in reports for of_module in report.metrics
    )
    for report in reports[:-1]:
        with pytest.raises(RuntimeError, match="in the pipe"):
            report.snapshot()
    state = reports[-1].snapshot()
    assert isinstance(state, EngineState)
    assert set(counts(state)) == {STEPS}
    assert list(run.run(state, tiny.source, STEPS)) == []
    assert list(run.run(state, tiny.source, STEPS + 1, stop=lambda: True)) == []
    assert set(counts(state)) == {STEPS}  # and not given away


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_a_stopped_run_goes_on_to_the_same_numbers(tiny, fused, name):
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    asked = itertools.count()
    states, first = tiny.run(run, STEPS, stop=lambda: next(asked) >= 2)
    assert [int(s.updates) for s in states] == [2, 2, 2]
    assert len(first) == 2
    states, rest = tiny.run(run, STEPS, states)
    assert unequal((states, first + rest), fused()) == []
    # Had the count not come along, the run would have begun with batch 0 again.
    forgotten, _ = tiny.run(run, 2, [s.replace(updates=np.int32(0)) for s in tiny.run(run, 2)[0]])
    assert furthest([s.params for s in forgotten], [s.params for s in states]) > 1e-3


@pytest.mark.parametrize("name", ["fused", "pipeline"])
def test_waits_and_reads_are_few(tiny, monkeypatch, name):
    steps, log_every, modules = 8, 4, 3
    run = tiny.engine(name, ONE_EACH[3] if name == "pipeline" else ())
    state = tiny.place(run, tiny.init(run.spec))
    waits, reads, block, read = [], [], jax.block_until_ready, metrics.read
    monkeypatch.setattr(
        jax,
        "block_until_ready",
        lambda tree: waits.append(len(jax.tree.leaves(tree))) or block(tree),
    )
    monkeypatch.setattr(metrics, "read", lambda tree: reads.append(len(tree)) or read(tree))
    window = Window()
    for report in run.run(state, tiny.source, steps):
        window.add(report)
        if report.updates[-1] % log_every == 0:
            window.close()
    # One wait a tick, for sum and count of the two metrics of each module that worked in it, and one read a log record.
    ticks = steps + (modules - 1 if name == "pipeline" else 0)
    assert len(waits) == ticks
    assert max(waits) == 4 * modules
    assert sum(waits) == 4 * modules * steps
    assert reads == [log_every] * (steps // log_every)


def test_the_host_runs_ahead_by_no_more_than_asked(tiny, monkeypatch):
    run = tiny.engine("fused")
    events, (step,), block = [], programs_of(run), jax.block_until_ready
    turns = tuple((k, "step") for k in range(len(run.spec.modules)))
    monkeypatch.setitem(run.steps, turns, lambda *args: events.append("dispatch") or step(*args))
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: events.append("wait") or block(tree))
    tiny.run(run, 5)
    assert run.ticks_in_flight == 2
    assert events == ["dispatch"] * 3 + ["wait", "dispatch"] * 2 + ["wait"] * 3
