"""Tests of `--mode=plan`: speed, idle time, traffic and memory against hand calculations."""

import dataclasses
import json
import math
import re

import jax
import pytest
from matplotlib import image
from runs import small_config, spec_of

from dgl_jax import system
from dgl_jax.codecs import CODECS, make_codec
from dgl_jax.config import CodecSettings, DataSettings, make_settings
from dgl_jax.data import DATA_SETS, make_source
from dgl_jax.errors import UserError
from dgl_jax.methods.dgl import Dgl
from dgl_jax.profile import turn_timing
from dgl_jax.profile.flops import block_flops
from dgl_jax.profile.memory import ProgramMemory
from dgl_jax.profile.timing import Elapsed
from dgl_jax.profile.turn_timing import CodecCost, augmentation_time, codec_costs
from dgl_jax.run.parts import known_info, make_blocks
from dgl_jax.tools import plan as planning
from dgl_jax.tools.pipeline import Link, Pipeline, Reduction, fused_rate, reductions
from dgl_jax.tools.plan import plan, plan_run
from dgl_jax.tools.timeline import Work

# Bytes per image on 8x8 images with width 4: the messages of the first two modules have 8x8x4 and
# 4x4x8 float32 values, a label and an id.
BYTES = [8 * 8 * 4 * 4 + 8, 4 * 4 * 8 * 4 + 8]
BATCH = 8


def small(**fields):
    return make_settings(
        small_config(
            **{"model__modules": 3, "model__split": "0,1,2", "data__batch_size": BATCH} | fields
        )
    )


@pytest.fixture
def stated(tmp_path):
    """Returns a file of block times that give the three modules turns of 2, 3 and 1 ms."""
    # The third module consists of the last two blocks; times of 9 ms must not be used.
    times = {
        "first": [1.5, 2.0, 0.25, 9.0],
        "inner": [9.0, 9.0, 9.0, 0.5],
        "head": [0.5, 1.0, 9.0, 0.25],
    }
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times))
    return str(path)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Replaces compilation: the n-th program needs 100 n scratch, 10 n outputs, n per message."""

    def module_memory(spec):
        return [ProgramMemory(1000 * n, 100 * n, 10 * n, n) for n, _ in enumerate(spec.modules, 1)]

    monkeypatch.setattr(planning, "module_memory", module_memory)


def milliseconds(spans, module):
    return [(round(1e3 * s.begin, 6), round(1e3 * s.end, 6)) for s in spans if s.module == module]


def test_three_devices_match_hand_calculation(stated):
    bandwidth = BATCH * BYTES[0] / 1e6  # GB/s: a message of module 0 takes 1 ms
    numbers, spans = plan(small(), stated=stated, bandwidth=bandwidth)
    late = round(BYTES[1] / BYTES[0], 6)  # ms that a message of module 1 takes
    assert milliseconds(spans, 0)[:4] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert milliseconds(spans, 1)[:4] == [(3, 6), (6, 9), (9, 12), (12, 15)]
    begins = [begin for begin, _ in milliseconds(spans, 2)[:4]]
    assert begins == pytest.approx([6 + late, 9 + late, 12 + late, 15 + late], abs=1e-5)
    assert max(span.batch for span in spans) == 10
    assert numbers["ticks_per_second"] == pytest.approx(1000 / 3)
    assert numbers["images_per_second"] == pytest.approx(1000 / 3 * BATCH)
    assert numbers["speedup"] == pytest.approx(6 / 3)
    assert numbers["idle"] == pytest.approx([1 / 3, 0, 2 / 3])
    assert numbers["idle_share"] == pytest.approx(1 / 3)
    assert [(m["devices"], m["milliseconds"], m["share"]) for m in numbers["modules"]] == [
        ([0], pytest.approx(2), pytest.approx(2 / 3)),
        ([1], pytest.approx(3), 1),
        ([2], pytest.approx(1), pytest.approx(1 / 3)),
    ]
    identity = numbers["codecs"]["identity"]
    assert identity["bytes_per_image"] == BYTES
    assert identity["compression"] == [1, 1]
    assert identity["megabytes_per_second"] == pytest.approx(
        [BATCH * b / 3e-3 / 1e6 for b in BYTES]
    )
    assert numbers["codecs"]["bf16"]["bytes_per_image"] == [(b - 8) / 2 + 8 for b in BYTES]
    assert numbers["codecs"]["int8"] is None, "config.codec.dims=8 does not divide 4 channels"
    assert [*numbers["codecs"]] == [*CODECS]


@pytest.mark.medium
def test_slow_links_limit_the_speed(stated):
    bandwidth = BATCH * BYTES[0] / 1e6 / 5  # 5 ms; the slowest module takes 3 ms
    numbers, _ = plan(
        small(codec__dims=4, codec__codes=16, codec__codebook_every=1),
        stated=stated,
        bandwidth=bandwidth,
    )
    assert numbers["ticks_per_second"] == pytest.approx(200)
    # Half the bytes: 2.5 ms.
    assert numbers["codecs"]["bf16"]["ticks_per_second"] == pytest.approx(1000 / 3)
    # One 4-bit code per 4 channels, two codes per byte; and with every message a codebook of 16 x 4
    # numbers per group.
    codes, books = [8 * 8 / 2 * 1, 4 * 4 * 2 / 2], [16 * 4 * 4, 2 * 16 * 4 * 4]
    assert numbers["codecs"]["vq"]["bytes_per_image"][1] == codes[1] + 8 + books[1] / BATCH
    assert plan(small(), stated=stated)[0]["ticks_per_second"] == pytest.approx(1000 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "placed", "ticks", "speedup", "idle"),
    [
        (1, [[0], [0], [0]], 1000 / 6, 1, [0]),
        (2, [[0], [1], [1]], 250, 1.5, [0.5, 0]),  # turns of 2 ms | 3 + 1 ms
        (4, [[0], [1], [2]], 1000 / 3, 2, [1 / 3, 0, 2 / 3, 1]),  # the fourth device is unused
        # Two devices per module, with half a batch each.
        (6, [[0, 1], [2, 3], [4, 5]], 2000 / 3, 4, [1 / 3, 1 / 3, 0, 0, 2 / 3, 2 / 3]),
    ],
)
def test_more_or_fewer_devices_than_modules(stated, devices, placed, ticks, speedup, idle):
    numbers, _ = plan(small(), devices, stated)
    assert [module["devices"] for module in numbers["modules"]] == placed
    assert numbers["ticks_per_second"] == pytest.approx(ticks)
    assert numbers["speedup"] == pytest.approx(speedup)
    assert numbers["idle"] == pytest.approx(idle)


def test_hops_inside_one_device_send_nothing(stated):
    numbers, _ = plan(small(), 2, stated, bandwidth=1.0)
    assert [rate > 0 for rate in numbers["codecs"]["identity"]["megabytes_per_second"]] == [
        True,
        False,
    ]
    assert plan(small(), 1, stated, bandwidth=1e-9)[0]["ticks_per_second"] == pytest.approx(
        1000 / 6
    )


def test_latency_matches_hand_calculation(stated):
    """Checks the begin of the turns, and the speed once hosts wait for news of earlier ticks."""
    bandwidth = BATCH * BYTES[0] / 1e6  # a message of module 0 takes 1 ms
    _, spans = plan(small(), stated=stated, bandwidth=bandwidth, latency=10.0)
    late = round(BYTES[1] / BYTES[0], 6)  # ms that a message of module 1 takes
    assert milliseconds(spans, 0)[:3] == [(0, 2), (2, 4), (4, 6)]
    assert milliseconds(spans, 1)[0] == (2 + 1 + 10, 16)
    assert milliseconds(spans, 2)[0][0] == pytest.approx(16 + late + 10, abs=1e-5)
    # Tick 3 is dispatched two latencies after the end of tick 0.
    assert milliseconds(spans, 0)[3] == (2 + 20, 24)
    # Without transfers: module 0 begins batch b, 12 ms later module 1, 13 ms later module 2, which
    # ends it 1 ms later, in tick b + 2. Tick b + 5 begins 20 ms later: 46 ms for five ticks.
    assert plan(small(), stated=stated, latency=10.0)[0]["ticks_per_second"] == pytest.approx(
        5000 / 46, rel=0.01
    )
    same, without = plan(small(), stated=stated, latency=0.0), plan(small(), stated=stated)
    assert same == without
    # Modules on one device send nothing.
    alone = plan(small(), 1, stated, latency=10.0)[0]
    assert alone["ticks_per_second"] == pytest.approx(1000 / 6)


def test_messages_keep_their_host_busy(stated):
    # Module 1 receives one message per turn and sends one: 4 ms, against 3 ms of computation.
    numbers, _ = plan(small(), stated=stated, message_cost=2.0)
    assert numbers["ticks_per_second"] == pytest.approx(250)
    # Twins: 2 ms are hidden behind the computation; modules on one device send nothing.
    assert plan(small(), stated=stated, message_cost=1.0)[0]["ticks_per_second"] == pytest.approx(
        1000 / 3
    )
    alone = plan(small(), 1, stated, message_cost=2.0)[0]
    assert alone["ticks_per_second"] == pytest.approx(1000 / 6)


@pytest.mark.medium
def test_sums_inside_groups_match_hand_calculation(stated):
    """Checks a ring of four devices: 6 rounds, each with a quarter of the gradients."""
    settings, bandwidth, latency = small(engine__group_sizes=(1, 4, 1)), 0.001, 0.01
    numbers, _ = plan(settings, stated=stated, bandwidth=bandwidth, latency=latency)
    rows = numbers["modules"]
    # Bytes over 0.001 GB/s are microseconds. The first module has a batch norm in its body and in
    # its head; each has a mean and a variance.
    spec = spec_of(settings, known_info(settings.data))
    norms = [len(jax.tree.leaves(state.batch_stats)) // 2 for state in spec.abstract_states()]
    wire = 6 / 4 * 4 * rows[1]["parameters"] / 1e3
    rounds = 6 * (1 + 2 * norms[1]) * latency
    assert [row["reduction_milliseconds"] for row in rows] == [0, pytest.approx(wire + rounds), 0]
    assert rows[1]["milliseconds"] == pytest.approx(3 / 4 + wire + rounds)
    # All modules on all six devices.
    parameters = sum(row["parameters"] for row in rows)
    total = 6 / 6 + 10 / 6 * 4 * parameters / 1e3 + 10 * (3 + 2 * sum(norms)) * latency
    assert numbers["fused_ticks_per_second"] is None, "6 devices do not divide a batch of 8"
    numbers, _ = plan(
        small(data__batch_size=12, engine__group_sizes=(1, 4, 1)),
        stated=stated,
        bandwidth=bandwidth,
        latency=latency,
    )
    assert numbers["fused_ticks_per_second"] == pytest.approx(1e3 / total)
    # Twin: links without limits, as before, cost nothing.
    free, _ = plan(settings, stated=stated)
    assert [row["milliseconds"] for row in free["modules"]] == pytest.approx([2, 3 / 4, 1])


def test_each_array_is_summed_alone_on_the_cpu():
    spec = spec_of(small(), known_info(small().data))
    joined, single = reductions(spec), reductions(spec, each_array=True)
    for state, one, each in zip(spec.abstract_states(), joined, single, strict=True):
        statistics = len(jax.tree.leaves(state.batch_stats))
        assert (one.times, each.times) == (
            1 + statistics,
            len(jax.tree.leaves(state.params)) + 2 * statistics,
        )
        assert one.bytes_ == each.bytes_
    assert Reduction(12.0, 5).seconds(1, Link(1e-9, 1.0, 1.0)) == 0
    # Four rounds: 16 bytes over 1 B/s, and five times 2 + 3 seconds each.
    assert Reduction(12.0, 5).seconds(3, Link(1e-9, 2.0, 3.0)) == pytest.approx(16 + 4 * 5 * 5)


def test_fused_shares_the_cores():
    sums = [Reduction()] * 2
    assert fused_rate([2.0, 4.0], [2.0, 4.0], sums, 2) == pytest.approx(1 / 3)
    assert fused_rate([2.0, 4.0], [2.0, 4.0], sums, 2, cores=1.0) == pytest.approx(1 / 6)


@pytest.mark.slow
def test_shared_cores_limit_the_speedup(stated):
    # The work per batch adds up to 6 ms of one core.
    assert plan(small(), stated=stated, cores=1.0)[0]["speedup"] == pytest.approx(1)
    assert 1 < plan(small(), stated=stated, cores=1.5)[0]["speedup"] < 1.5
    assert plan(small(), stated=stated, cores=3.0)[0]["speedup"] == pytest.approx(2)


def test_module_slightly_faster_than_slowest_is_idle_for_the_difference():
    """Checks that the idle share does not depend on how many ticks the host runs ahead."""
    works = Work(0, 0.0275), Work(1, 0.028)
    for ticks_in_flight in (1, 4, 1000):
        pipeline = Pipeline(works, BATCH, Link(), math.inf, ticks_in_flight, Dgl())
        rate, busy, _ = pipeline.steady([0.0])
        assert rate == pytest.approx(1 / 0.028)
        assert busy == pytest.approx({0: 0.0275 / 0.028, 1: 1.0})
    # One core for both devices.
    sharing = tuple(Work(work.device, work.seconds, cores=1.0) for work in works)
    rate, busy, _ = Pipeline(sharing, BATCH, Link(), 1.0, 2, Dgl()).steady([0.0])
    assert rate == pytest.approx(1 / 0.0555, rel=0.02)
    assert 0.9 < busy[0] <= 1.0


def test_memory_matches_hand_calculation(stated):
    numbers, _ = plan(small(engine__ticks_in_flight=1), stated=stated)
    # Per device: state and message, scratch, output, and further waiting messages. Messages to the
    # second module arrive faster than it works, so the ticks that the host dispatches ahead wait:
    # two behind the one in use (a message is sent at 3t - 2 ms and used until 3t + 5 ms).
    assert numbers["peak_memory_bytes"] == [
        1000 + 100 + 10 + 1,
        2000 + 200 + 20 + 2 * 2,
        3000 + 300 + 30,
    ]
    alone, _ = plan(small(engine__ticks_in_flight=1), 1, stated)
    assert alone["peak_memory_bytes"] == [6000 + 330 + 1]


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
    assert numbers["block_milliseconds"]["head"] == pytest.approx(
        [per_operation * h for h in flops.head]
    )
    assert numbers["modules"][2]["milliseconds"] == pytest.approx(7 + per_operation * flops.head[3])


def test_json_of_a_plan_is_accepted_as_block_times(stated, tmp_path):
    before = plan_run(small(), stated=stated, as_json=True)
    path = tmp_path / "before.json"
    path.write_text(before)
    assert json.loads(before)["block_milliseconds"]["head"] == pytest.approx([0.5, 1.0, 9.0, 0.25])
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
        return planning._stated("1,2,3,4", network)

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
        planning, "block_times", lambda network, *_, **__: planning._stated(stated, network)
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


def test_unknown_memory_is_printed_as_a_dash(stated, monkeypatch):
    monkeypatch.setattr(planning, "module_memory", lambda spec: None)
    assert (
        json.loads(plan_run(small(), stated=stated, as_json=True))["peak_memory_bytes"]
        == [None] * 3
    )
    assert re.search(r"^0 +33 % +-$", plan_run(small(), stated=stated), re.MULTILINE)


@pytest.mark.slow
def test_printed_tables_and_picture(stated, tmp_path):
    text = plan_run(small(), stated=stated, bandwidth=1.0, workdir=str(tmp_path))
    for words in (
        "module_2     2-3",
        "module_1            3           1\n",
        "333.3 ticks/s",
        "2.00 times one device; idle 33 % of the time",
        "0       33 %",
        "codec int8: config.codec.dims",
    ):
        assert words in text
    fits = plan_run(small(codec__dims=4, codec__codes=16), stated=stated)
    assert re.search(
        r"^vq, dims=4, codes=16, stages=1 +\d+ +\d+ +0\.\d +333\.3$", fits, re.MULTILINE
    )
    assert "int8, dims=4" in fits
    assert "fused" not in text, "3 devices do not divide a batch of 8"
    shared = plan_run(
        small(data__batch_size=12),
        6,
        stated,
        1.0,
        latency=1.0,
        message_cost=0.5,
    )
    assert "1 GB/s per link, 1 ms latency, 0.5 ms of the host per message\n" in shared
    assert "of it sums" in shared
    assert "of it sums" not in text
    assert re.search(r"^fused, data parallel: [\d.]+ ticks/s$", shared, re.MULTILINE)
    picture = tmp_path / "plots" / "plan.png"
    assert f"timeline: {picture}" in text
    assert image.imread(picture).shape[1] > 1000
    numbers = json.loads(
        plan_run(small(), stated=stated, as_json=True, output=str(tmp_path / "named.png"))
    )
    assert (tmp_path / "named.png").exists()
    spec = spec_of(small(), known_info(small().data))
    assert [m["name"] for m in numbers["modules"]] == [m.name for m in spec.modules]
    assert [m["body_parameters"] for m in numbers["modules"]] == [
        3 * 36 + 12,
        4 * 72 + 24,
        8 * 72 + 24 + 8 * 144 + 48,
    ]
    assert json.loads(plan_run(small(), stated=stated, as_json=True))["timeline"] is None


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        (
            {"method__name": "backprop"},
            {},
            ["config.method.name=backprop", "cannot work at the same time"],
        ),
        (
            {"data__name": "folder"},
            {},
            ["config.data.name=folder", "not known before it is read", "cifar10"],
        ),
        ({}, {"stated": "1,2"}, ["--block_times=1,2", "4 blocks, so 4 times"]),
        ({}, {"stated": "1,2,3,0"}, ["--block_times=1,2,3,0", "above 0"]),
        ({}, {"stated": "1,2,3,x"}, ["--block_times=1,2,3,x", "1.5,2,3"]),
        ({}, {"stated": "nowhere.json"}, ["--block_times=nowhere.json", "No such file"]),
        ({}, {"bandwidth": 0.0}, ["--bandwidth=0.0", "above 0"]),
        ({}, {"latency": -1.0}, ["--latency=-1.0", "0 or above"]),
        ({}, {"message_cost": math.inf}, ["--message_cost=inf", "0 or above"]),
        ({}, {"cores": -1.0}, ["--cores=-1.0", "above 0"]),
        (
            {},
            {"devices": 9},
            ["config.data.batch_size=8", "the 3 devices of module_0", "9 would do"],
        ),
        (
            {"engine__group_sizes": (1, 2, 1)},
            {"devices": 3},
            ["config.engine.group_sizes=(1, 2, 1)", "needs 4 devices"],
        ),
        ({"codec__name": "int8"}, {}, ["config.codec.dims=8"]),
    ],
)
def test_wrong_values_are_refused(fields, arguments, words):
    with pytest.raises(UserError) as error:
        plan(small(**fields), **{"stated": "1,1,1,1"} | arguments)
    assert [word for word in words if word not in str(error.value)] == []


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


def test_known_info_matches_data_sets():
    (name,) = [field for field in dataclasses.fields(DataSettings) if field.name == "name"]
    assert name.metadata["kinds"] is DATA_SETS
    assert {name for name, kind in DATA_SETS.items() if kind.layout} == set(DATA_SETS) - {"folder"}
    for name in ("digits", "synthetic"):
        settings = small(data__name=name, data__image_size=0).data
        source, known = make_source(settings, 0), known_info(settings)
        assert known.example_shape == source.example_shape
        assert len(known.class_names) == source.num_classes
    assert known_info(small(data__name="cifar100", data__image_size=16).data).example_shape == (
        16,
        16,
        3,
    )
