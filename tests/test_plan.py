"""Tests of `--mode=plan`: speed, idle time, traffic and memory against hand calculations."""

import dataclasses
import json
import math
import re

import jax
import pytest
from matplotlib import image
from plans import BATCH, BYTES, milliseconds, small
from runs import spec_of

from dgl_jax.codecs import CODECS
from dgl_jax.config import DataSettings
from dgl_jax.data import DATA_SETS, make_source
from dgl_jax.errors import UserError
from dgl_jax.methods.dgl import Dgl
from dgl_jax.run.parts import known_info
from dgl_jax.tools import plan as planning
from dgl_jax.tools.pipeline import Link, Pipeline, Reduction, fused_rate, reductions
from dgl_jax.tools.plan import plan, plan_run
from dgl_jax.tools.timeline import Work

pytestmark = pytest.mark.usefixtures("stated_memory")


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
