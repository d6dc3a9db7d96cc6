"""Times in a plan: stated and measured ones, codecs, augmentation."""

import dataclasses
import json
import re

import jax
import pytest
from plans import milliseconds, small
from runs import spec_of

from dgl_jax import system
from dgl_jax.codecs import make_codec
from dgl_jax.config import CodecSettings
from dgl_jax.errors import UserError
from dgl_jax.methods.dgl import Dgl
from dgl_jax.profile import turn_timing
from dgl_jax.profile.flops import block_flops
from dgl_jax.profile.timing import Elapsed
from dgl_jax.profile.turn_timing import CodecCost, augmentation_time, codec_costs
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.tools import plan as planning
from dgl_jax.tools.pipeline import Link, Pipeline, Reduction, fused_rate
from dgl_jax.tools.plan import plan, plan_run
from dgl_jax.tools.timeline import Work

pytestmark = pytest.mark.usefixtures("stated_memory")


def test_head_times_of_a_plain_list_follow_operations():
    settings = small()
    flops = block_flops(make_blocks(settings, known_info(settings.data)))
    numbers, _ = plan(settings, stated="1,2,3,4")
    per_operation = 10 / sum(flops.inner)
    assert (
        numbers["block_milliseconds"]["inner"]
        == numbers["block_milliseconds"]["first"]
        == pytest.approx([1, 2, 3, 4])
    )
    assert numbers["block_milliseconds"]["heads"][0] == pytest.approx(
        [per_operation * h for h in flops.heads[0]]
    )
    assert numbers["modules"][2]["milliseconds"] == pytest.approx(
        7 + per_operation * flops.heads[0][3]
    )


def test_stated_times_count_context_input():
    plain, added = (
        plan(small(objective__context_input=on), stated="2,4,1,1")[0] for on in (False, True)
    )
    assert plain["block_milliseconds"]["first"] == [2, 4, 1, 1]
    first, *later = added["block_milliseconds"]["first"]
    assert first == 2  # the first module reads the image itself
    assert all(after > before for after, before in zip(later, (4, 1, 1), strict=True))
    assert added["block_milliseconds"]["inner"] == [2, 4, 1, 1]


def test_plan_prices_the_objective_that_a_module_has():
    weights = {"reconstruction_weights": (5.0, 0.0), "task_weights": (0.0, 2.0)}
    fields = {f"objective__{name}": value for name, value in weights.items()}
    settings = small(objective__name="info_pro", **fields)  # three modules, cut at 1 and 2
    numbers, _ = plan(settings, stated="2,4,1,1")
    blocks, first = numbers["block_milliseconds"], numbers["modules"][0]
    (heads,) = blocks["heads"]
    per_operation = heads[0] / first["head_gflops"]
    for k, module in enumerate(numbers["modules"][:2]):
        assert heads[k] == pytest.approx(per_operation * module["head_gflops"], rel=1e-3)
        assert module["milliseconds"] == pytest.approx(blocks["first"][k] + heads[k])


def test_stated_heads_may_depend_on_the_module(tmp_path):
    path = tmp_path / "times.json"
    blocks = {"first": [1, 1, 1, 1], "inner": [1, 1, 1, 1]}
    settings = small(model__modules=2, model__split="time")

    def chosen(*heads):
        path.write_text(json.dumps(blocks | {"heads": heads}))
        numbers, _ = plan(settings, stated=str(path))
        assert numbers["block_milliseconds"]["heads"] == [list(map(float, row)) for row in heads]
        return [(m["first_block"], m["milliseconds"]) for m in numbers["modules"]]

    # The first row is of the module that ends early, the second of the last module.
    assert chosen([9, 1, 9, 9], [9, 9, 9, 2]) == [(0, pytest.approx(3)), (2, pytest.approx(4))]
    assert chosen([1, 9, 9, 9], [9, 1, 9, 2]) == [(0, pytest.approx(2)), (1, pytest.approx(5))]
    assert chosen([1, 9, 9, 2]) == [(0, pytest.approx(2)), (1, pytest.approx(5))]
    with pytest.raises(UserError, match=r"3 rows of heads, and config\.model\.modules=2; one row"):
        chosen(*[[1, 1, 1, 1]] * 3)


def test_json_of_a_plan_is_accepted_as_block_times(stated, tmp_path):
    before = plan_run(small(), stated=stated, as_json=True)
    path = tmp_path / "before.json"
    path.write_text(before)
    assert json.loads(before)["block_milliseconds"]["heads"][0] == pytest.approx(
        [0.5, 1.0, 9.0, 0.25]
    )
    assert plan_run(small(), stated=str(path), as_json=True) == before


@pytest.mark.parametrize(("times", "starts"), [("9,1,1,1", [0, 1]), ("1,1,1,9", [0, 3])])
def test_split_by_time_uses_stated_times(times, starts):
    numbers, _ = plan(small(model__split="time", model__modules=2), stated=times)
    assert [module["first_block"] for module in numbers["modules"]] == starts


@pytest.mark.slow
def test_times_are_measured_if_none_are_stated(monkeypatch):
    networks, concurrencies = [], []

    def block_times(network, optimizer, device, concurrency, meanwhile):
        networks.append(network)
        concurrencies.append(concurrency)
        return planning.stated_times("1,2,3,4", network, 2)

    monkeypatch.setattr(planning, "block_times", block_times)
    numbers, _ = plan(small(model__split="time"))
    assert len(networks) == 1  # measured once for both the split and the plan
    assert len(networks[0].blocks) == 4
    assert numbers["cores"] == system.cpu_count()
    assert numbers["block_times"] == "measured on cpu"
    monkeypatch.setattr(system, "cpu_count", lambda: 3)
    plan(small(model__modules=2, model__split="count"))
    plan(small(model__modules=2, model__split="count"), devices=4)
    assert concurrencies[1:] == [2, 3]  # one per device, and at most one per processor
    monkeypatch.setattr(system, "cpu_count", lambda: None)
    numbers, _ = plan(small())
    assert (numbers["cores"], concurrencies[3]) == (None, 1)


def elapsed(*milliseconds):
    return [Elapsed(m / 1e3, 2 * m / 1e3) for m in milliseconds]


@pytest.fixture
def measured(monkeypatch, stated):
    """Replaces measurements: blocks as in `stated`, and codecs that add milliseconds to turns."""
    monkeypatch.setattr(
        planning, "block_times", lambda network, *_, **__: planning.stated_times(stated, network, 2)
    )
    times = {"Bf16": elapsed(1, 4, 0.5)}
    monkeypatch.setattr(
        planning,
        "codec_costs",
        lambda spec, *_, **__: [
            CodecCost(each) for each in times.get(type(spec.codec).__name__, elapsed(0, 0, 0))
        ],
    )
    monkeypatch.setattr(planning, "augmentation_time", lambda *_, **__: Elapsed(0.0, 0.0))
    monkeypatch.setattr(system, "cpu_count", lambda: None)


def test_turns_include_the_configured_codec(measured):
    numbers, spans = plan(small(codec__name="bf16"))
    assert milliseconds(spans, 0)[:2] == [(0, 3), (3, 6)]
    assert milliseconds(spans, 1)[:2] == [(3, 10), (10, 17)]
    assert [row["milliseconds"] for row in numbers["modules"]] == pytest.approx([3, 7, 1.5])
    assert [row["codec_milliseconds"] for row in numbers["modules"]] == pytest.approx([1, 4, 0.5])
    assert numbers["ticks_per_second"] == pytest.approx(1000 / 7)
    assert numbers["speedup"] == pytest.approx(11.5 / 7)
    rates = {n: c and c["ticks_per_second"] for n, c in numbers["codecs"].items()}
    assert rates["bf16"] == pytest.approx(1000 / 7)
    assert rates["identity"] == pytest.approx(1000 / 3)
    # The table of codecs does not depend on the configured one.
    assert plan(small())[0]["codecs"]["bf16"]["ticks_per_second"] == pytest.approx(1000 / 7)
    assert "module_1            7                4           1\n" in plan_run(
        small(codec__name="bf16")
    )


def test_a_group_shares_the_time_of_its_codec(measured):
    numbers, _ = plan(small(codec__name="bf16"), devices=6)
    assert numbers["ticks_per_second"] == pytest.approx(2000 / 7)
    assert [row["codec_milliseconds"] for row in numbers["modules"]] == pytest.approx(
        [0.5, 2, 0.25]
    )


def test_codecs_use_the_shared_cores(measured):
    numbers, _ = plan(small(codec__name="bf16"), cores=1)
    # Blocks use one processor; the codec uses two for each of its milliseconds.
    assert numbers["ticks_per_second"] == pytest.approx(1000 / (6 + 2 * 5.5))


def test_the_first_module_augments(measured, monkeypatch):
    monkeypatch.setattr(planning, "augmentation_time", lambda *_, **__: Elapsed(0.002, 0.003))
    numbers, spans = plan(small(codec__name="bf16"))
    assert [row["milliseconds"] for row in numbers["modules"]] == pytest.approx([5, 7, 1.5])
    assert [row["augmentation_milliseconds"] for row in numbers["modules"]] == [2, 0, 0]
    assert numbers["speedup"] == pytest.approx(13.5 / 7)
    assert milliseconds(spans, 0)[:2] == [(0, 5), (5, 10)]
    # With one processor for all, the times of processors count.
    assert plan(small(), cores=1)[0]["ticks_per_second"] == pytest.approx(1000 / (6 + 3))


def test_augmentation_is_measured(monkeypatch):
    measured = []

    def clocked(program, *arguments, repeats, concurrency):
        measured.append(program(*arguments)[1])
        return Elapsed(1.0, 10.0), ()

    monkeypatch.setattr(turn_timing, "clocked", clocked)
    settings = small(data__augment="crop_flip")
    assert augmentation_time(spec_of(settings, known_info(settings.data)), jax.devices()[0]) == (
        1,
        10,
    )
    assert [(x.shape, x.dtype) for x in measured] == [((8, 8, 8, 3), "float32")]


def test_stated_times_leave_codecs_out(stated):
    numbers, _ = plan(small(codec__name="bf16"), stated=stated)
    assert numbers["ticks_per_second"] == pytest.approx(1000 / 3)
    assert [row["codec_milliseconds"] for row in numbers["modules"]] == [0, 0, 0]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("method", "shared", "whole", "gathered"),
    [
        ("dgl", [1, 2, 1], [1, 1, 0], [(2048, 1024), (4096, 2048), ()]),
        (
            "fdg",
            [2, 4, 2],
            [1, 2, 1],
            [(2048, 1024), (4096, 2048, 2048, 1024), (4096, 2048)],
        ),
    ],
)
def test_codecs_are_measured_per_message(monkeypatch, method, shared, whole, gathered):
    calls = []

    def clocked(program, *arguments, repeats, concurrency):
        calls.append(jax.tree.map(jax.numpy.shape, program(*arguments)))
        return Elapsed(1.0, 10.0), ()

    monkeypatch.setattr(turn_timing, "clocked", clocked)
    settings = small(method__name=method, codec__name="vq", codec__dims=4, codec__codes=16)
    spec = spec_of(settings, known_info(settings.data))
    plain = dataclasses.replace(spec, codec=make_codec(CodecSettings("identity"), "float32"))
    costs = codec_costs(spec, jax.devices()[0])
    assert [cost.shared for cost in costs] == [(n, 10 * n) for n in shared]
    # Each device learns from the vectors that all have drawn: 128 of 4 or 8 channels per update
    # and 64 for restarts, in float32.
    assert [cost.whole for cost in costs] == [(n, 10 * n) for n in whole]
    assert [cost.gathered for cost in costs] == gathered
    # Two norms and the number of vectors that are left out, per message.
    assert [cost.sums for cost in costs] == [3 * len(sizes) // 2 for sizes in gathered]
    assert codec_costs(plain, jax.devices()[0]) == [CodecCost()] * 3, "measured without any work"
    assert len(calls) == 6  # two hops; programs that encode, learn and decode
    decoded = [call[1] for call in calls if call[0] == ()]
    assert sorted(decoded) == [(8, 4, 4, 8), (8, 8, 8, 4)]
    calls.clear()
    # Without draws the batch stays split, and so does the work.
    every = dataclasses.replace(spec.codec, samples=0, restart=0.0)
    for cost, n, m in zip(
        codec_costs(dataclasses.replace(spec, codec=every), jax.devices()[0]), shared, whole
    ):
        assert (cost.shared.seconds, cost.whole.seconds, cost.gathered) == (n + m, 0, ())
    assert {cost.shared for cost in codec_costs(spec, None)} == {Elapsed(0.0, 0.0)}
    # Later stages learn from the same vectors, which all devices have by then.
    stages = dataclasses.replace(spec, codec=dataclasses.replace(spec.codec, stages=2))
    assert [cost.gathered for cost in codec_costs(stages, None)] == gathered
    assert len(calls) == 6


def test_cost_of_a_codec_in_a_group():
    cost = CodecCost(Elapsed(6.0, 9.0), Elapsed(1.0, 2.0), (30, 60), 2)
    assert cost.on(1) == (7, 11)
    assert cost.on(3) == (3, 15)
    link, none = Link(1e-9, 2.0, 3.0), [Reduction()]  # one byte per second; five per message
    # Two rounds of an all-gather with 10 and 20 bytes; four of each sum, with 4 / 3 bytes.
    exchanged = 2 * (30 + 2 * 5) + 2 * 4 * (4 / 3 + 5)
    rate = fused_rate([12.0], [12.0], none, 3, link, codec=[cost])
    assert rate == pytest.approx(1 / (4 + 3 + exchanged))
    rate = fused_rate([12.0], [12.0], none, 3, link, cores=1.0, codec=[cost])
    assert rate == pytest.approx(1 / (12 + 15 + exchanged))
    work = Work(0, 4.0, cores=3.0)
    pipeline = Pipeline((work,), 8, link, 2.0, 2, Dgl()).with_codec([cost], [range(3)])
    # On a single device, which learns once: 12 + 7 seconds, and 30 + 11 of two processors.
    assert pipeline.alone([12.0], [30.0], [cost]) == pytest.approx(41 / 2)
    assert pipeline.alone([12.0], [12.0], [cost]) == pytest.approx(19)
    assert pipeline.works[0].seconds == 7
    assert pipeline.works[0].reduction == pytest.approx(exchanged)
    assert pipeline.works[0].cores == pytest.approx((12 + 15) / (7 + exchanged))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__split": "bananas"}, "config.model.split='bananas'"),
        (
            {"model__split": "0,1.5,2"},
            "would cut inside block 1; the nearest places to cut are 1 and 2",
        ),
        (
            {"model__modules": 9, "model__split": "time"},
            "config.model.modules=9: the network has 4 blocks",
        ),
        ({"engine__group_sizes": (1, 2)}, "config.engine.group_sizes"),
    ],
)
def test_wrong_values_are_refused_before_measuring(fields, words, monkeypatch):
    monkeypatch.setattr(planning, "block_times", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(UserError, match=re.escape(words)):
        plan(small(**fields))


@pytest.mark.parametrize(
    "text", ['{"inner": [1, 2, 3, 4]}', '{"first": 3}', "[1, 2]", "3", "{", '{"a": [null]}']
)
def test_files_without_times_are_refused(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(UserError, match="--block_times="):
        plan(small(), stated=str(path))
    with pytest.raises(UserError, match=r"--output=.*\.png"):
        plan_run(small(), output=str(path))
