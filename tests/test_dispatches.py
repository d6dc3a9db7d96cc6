"""Tests of dispatches of many steps, and of data sets that stay on the devices."""

import dataclasses
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import same_run, small_config
from test_engines import furthest, unequal
from test_evaluate import oracle, place

from dgl_jax import system
from dgl_jax.config import ReplaySettings, make_settings
from dgl_jax.data import synthetic
from dgl_jax.data.memory import ArraySource
from dgl_jax.engines import (
    EngineState,
    FusedEngine,
    SimulatedEngine,
    SimulatedOptions,
    feed,
    synchronous,
)
from dgl_jax.engines.dispatches import Dispatches, chosen_steps
from dgl_jax.engines.feed import Feed, Residence, put_stacked, select
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.errors import UserError
from dgl_jax.run import build
from dgl_jax.run.build import make_experiment
from dgl_jax.run.evaluator import Evaluator, make_evaluator
from dgl_jax.run.metrics import Window
from dgl_jax.run.record import Record
from dgl_jax.run.signals import Interrupted
from dgl_jax.run.throughput import Throughput
from dgl_jax.run.writers import read_jsonl
from dgl_jax.schedule import Turn, fused, grouped
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import PADDING

STEPS = 20


def test_dispatches_end_at_intervals_and_leave_single_steps():
    dispatches = Dispatches(3, (7, 10))
    sizes, step = [], 0
    while step < 15:
        sizes.append(dispatches.size(step, 15))
        step += sizes[-1]
    # Boundaries are at 7, 10 and 14; the last step before 7 and the one before 15 remain.
    assert sizes == [3, 3, 1, 3, 3, 1, 1]
    assert [Dispatches(3).size(step, 20) for step in (0, 1, 2, 3, 18)] == [3, 1, 1, 3, 1]
    assert {Dispatches().size(step, 20) for step in range(20)} == {1}


def test_groups_are_the_same_after_a_stop():
    size = Dispatches(3, (7,)).size

    def groups(start, stop=lambda: False):
        return list(
            grouped(lambda stop: fused(2, start, 14, stop), lambda step: size(step, 14), stop)
        )

    whole = groups(0)
    assert [len(group) for group in whole] == [3, 3, 1, 3, 3, 1]
    polls = iter([False] * 2 + [True] * 99)
    first = groups(0, lambda: next(polls))
    assert first == whole[:2], "a group that has begun is completed"
    assert first + groups(6) == whole
    # Twin: groups that count from where the run starts differ after a stop at step 4.
    assert groups(4) != whole[2:]


def test_only_equal_ticks_form_a_group():
    step, late = Turn(0, 0), Turn(1, 0, "backward")
    ticks = [(step,), (Turn(0, 1), late), (Turn(0, 2), late), (Turn(0, 3), late), (late,)]
    assert [len(group) for group in grouped(lambda stop: iter(ticks), lambda batch: 3)] == [1, 3, 1]
    assert [len(group) for group in grouped(lambda stop: iter(ticks), lambda batch: 4)] == [1] * 5


def test_chosen_steps_fit_the_log_and_leave_few_single_steps(tiny, devices):
    accelerator = SimpleNamespace(platform="gpu")
    assert chosen_steps(tiny.spec(), devices[0], 50, (351, 351)) == 1
    assert chosen_steps(tiny.spec(), accelerator) == 64
    assert chosen_steps(tiny.spec(), accelerator, 50, (350, 700)) == 50
    assert chosen_steps(tiny.spec(), accelerator, 50, (351, 702)) == 39  # 351 = 9 x 39


def test_chosen_steps_of_large_networks_take_half_a_second(tiny, monkeypatch):
    accelerator = SimpleNamespace(platform="gpu")
    monkeypatch.setattr("dgl_jax.engines.dispatches.module_flops", lambda spec: [(1e11, 1e11)] * 2)
    assert chosen_steps(tiny.spec(), accelerator) == 5  # 6e12 operations of 3 x 4e11 each
    monkeypatch.setattr("dgl_jax.engines.dispatches.module_flops", lambda spec: [(1e13, 0.0)])
    assert chosen_steps(tiny.spec(), accelerator) == 1


@pytest.mark.parametrize("chosen", [512, 4, 0])
def test_dispatches_are_not_longer_than_the_intervals(tiny, monkeypatch, caplog, chosen):
    accelerator = SimpleNamespace(platform="gpu")
    run = SimpleNamespace(spec=tiny.spec(), devices=[accelerator], log_every=50, every=(10, 25))
    dispatches = Dispatches.of(run, chosen)
    # Dispatches of ten steps would end at 10, 20 and, with single steps, 25 and 30.
    assert dispatches.steps == {512: 10, 4: 4, 0: 10}[chosen]
    assert dispatches.size(0, 100) == dispatches.steps
    assert [r.getMessage() for r in caplog.records] == (
        [
            "config.engine.steps_per_dispatch=512: uses 10, the steps between two evaluations or "
            "checkpoints"
        ]
        if chosen == 512
        else []
    )


def fused_engine(tiny, devices, steps, mode="on", every=(), count=1, **spec):
    spec = tiny.spec(**spec)
    engine = FusedEngine(
        spec, one_group(devices[:count], len(spec.modules)), dispatches=Dispatches(steps, every)
    )
    engine.residence = Residence(mode)
    return engine


@pytest.mark.medium
@pytest.mark.parametrize(
    "spec", [{"augment": "crop_flip"}, {"heads": False, "augment": "crop_flip"}], ids=["dgl", "bp"]
)
def test_many_steps_per_dispatch_equal_one(tiny, devices, spec):
    expected = tiny.run(fused_engine(tiny, devices, 1, "off", **spec), STEPS)
    for mode in ("on", "off"):
        states, metrics = tiny.run(fused_engine(tiny, devices, 6, mode, **spec), STEPS)
        assert len(metrics) == STEPS  # three dispatches of six steps, and two of one
        assert furthest((states, metrics), expected) < 1e-5
    # Twin: augmentation with the draws of another seed.
    spec = dataclasses.replace(tiny.spec(**spec), seed=1)
    other = FusedEngine(spec, one_group(devices[:1], 3), dispatches=Dispatches(6))
    assert furthest(tiny.run(other, STEPS), expected) > 1e-3


@pytest.mark.medium
def test_many_steps_per_dispatch_equal_one_on_two_devices(tiny, devices):
    expected = tiny.run(fused_engine(tiny, devices, 1, "off"), STEPS)
    for mode in ("on", "off"):
        engine = fused_engine(tiny, devices, 6, mode, count=2)
        states, metrics = tiny.run(engine, STEPS)
        assert len(metrics) == STEPS
        assert furthest((states, metrics), expected) < 1e-5
        stored = Feed(tiny.source, engine.placement, engine.residence).batches(0, 6)
        assert len(jax.tree.leaves(stored)[0].sharding.device_set) == 2


@pytest.mark.medium
def test_run_with_dispatches_of_many_steps_resumes_exactly(tiny, devices):
    engine = fused_engine(tiny, devices, 3, every=(7,))
    whole, metrics = tiny.run(engine, STEPS)
    polls = iter([False] * 3 + [True] * 99)
    states, first = tiny.run(engine, STEPS, stop=lambda: next(polls))
    assert len(first) == 7
    states, rest = tiny.run(engine, STEPS, states)
    assert not unequal((states, first + rest), (whole, metrics))


def test_selected_batches_equal_those_of_the_source(tiny, devices):
    placement = assign(devices, 3, (2, 1, 1))
    resident = Feed(tiny.source, placement, Residence("on"))
    assert resident.stored is not None
    for number in (0, 1, 2):
        assert not unequal(resident.batch(number), tiny.source.batch(number))
    stack = Feed(tiny.source, placement, Residence("on")).batches(3, 2)
    chosen = [select(resident.stored, jax.tree.map(lambda x, i=i: x[i], stack)) for i in range(2)]
    for i in range(2):
        assert not unequal(chosen[i], tiny.source.batch(3 + i))
    # Twin: the batch of another step.
    assert "inputs" in str(unequal(chosen[0], tiny.source.batch(4)))


def test_selected_padding_is_zero_and_does_not_count(tiny, devices):
    source = ArraySource(synthetic.make(64, 20, 4), batch_size=8, seed=0, validation_fraction=0.2)
    placement = one_group(devices[:1], 3)
    stored = Residence("on").stored(source, "test", placement.replicated(0))
    for ids, batch in zip(source.evaluation_ids("test"), source.evaluation("test"), strict=True):
        chosen = feed.chosen(ids.astype(np.int32), int(batch.step))
        assert not unequal(select(stored, placement.put_batch(chosen, 0)), batch)
    assert (np.asarray(batch.context["id"]) == PADDING).sum() == 4


def test_training_with_resident_data_is_bit_identical(tiny, devices):
    expected = tiny.run(fused_engine(tiny, devices, 1, "off"), 4)
    assert not unequal(tiny.run(fused_engine(tiny, devices, 1), 4), expected)
    pipeline = tiny.new_engine("pipeline", (1, 1, 1), tiny.spec())
    pipeline.residence = Residence("on")
    assert not unequal(tiny.run(pipeline, 4)[0], expected[0])
    simulated = SimulatedEngine(
        tiny.spec(),
        one_group(devices[:1], 3),
        4,
        SimulatedOptions(order="ordered"),
        ReplaySettings(1),
    )
    simulated.residence = Residence("on")
    state = simulated.resume(tiny.place(simulated, tiny.init(simulated.spec)), None)
    *_, last = simulated.run(state, tiny.source, 4)
    states = tuple(
        state.replace(rng=np.array(jax.random.key_data(state.rng)))
        for state in jax.device_get(last.snapshot().modules)
    )
    assert not unequal(states, expected[0])


def test_data_set_stays_on_an_accelerator_if_a_quarter_of_the_free_memory_holds_it(monkeypatch):
    free = {"value": 400}
    monkeypatch.setattr(
        system, "device_memory", lambda device: system.DeviceMemory(free=free["value"])
    )

    def fits(nbytes, platform="gpu"):
        return feed._fits(nbytes, SimpleNamespace(device_set=[SimpleNamespace(platform=platform)]))

    assert fits(100)
    assert not fits(101)
    assert not fits(1, "cpu")
    free["value"] = None  # unknown
    assert not fits(1)


def test_streamed_data_come_from_the_host(tiny, devices):
    class Streamed:
        """Source that decodes its examples, so that it has no arrays to keep."""

        def __init__(self, source):
            self.batch, self.batches = source.batch, source.batches

    placement = one_group(devices[:1], 3)
    assert Feed(Streamed(tiny.source), placement, Residence("on")).stored is None


def test_evaluation_dispatches_as_many_batches_as_training(tiny, devices):
    for steps in (0, 3):
        settings = make_settings(small_config(engine__steps_per_dispatch=steps))
        evaluator = make_evaluator(tiny.spec(), one_group(devices[:1], 3), settings)
        assert evaluator._at_once == max(1, steps)


@pytest.mark.medium
def test_grouped_evaluation_equals_the_oracle(tiny, devices):
    spec = tiny.spec()
    states = tuple(module.replace(rng=jax.random.key(0)) for module in tiny.init(spec))
    placement = one_group(devices[:1], 3)
    placed = place(EngineState(states), placement)
    for split in ("validation", "test"):
        grouped_metrics = Evaluator(spec, placement, True, Residence("on"), 2).evaluate(
            placed, tiny.source, split
        )
        single = Evaluator(spec, placement, True, Residence("on")).evaluate(
            placed, tiny.source, split
        )
        host = Evaluator(spec, placement).evaluate(placed, tiny.source, split)
        assert single == host
        expected = oracle(spec, states, tiny.source, split)
        assert grouped_metrics.keys() == host.keys() == expected.keys()
        for name, value in expected.items():
            assert grouped_metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.medium
def test_steps_of_a_dispatch_share_its_time(tiny, devices, monkeypatch):
    seconds = iter(range(100))
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=lambda: 0.0)
    monkeypatch.setattr(synchronous, "time", clock)  # each dispatch takes a second
    engine = fused_engine(tiny, devices, 4)
    reports = list(engine.run(tiny.place(engine, tiny.init(engine.spec)), tiny.source, 12))
    assert [report.at for report in reports] == [n / 4 for n in range(1, 13)]
    record = Record.__new__(Record)
    record.throughput = Throughput(tiny.spec().batch_size, lambda: 0.0)
    record._report, record._window = None, Window()
    record.throughput.start()
    rates = []
    for number, report in enumerate(reports):
        assert report.compiled == (number < 4)  # all steps of the dispatch, not only the first one
        record.add(report, 1)
        rates.append(record.throughput.rate())
    assert rates == [None] * 4 + [4 * tiny.spec().batch_size] * 8


def test_resident_data_are_refused_if_they_are_streamed(monkeypatch):
    settings = make_settings(small_config(data__on_device="on"))
    assert make_experiment(settings, jax.devices()[:1]).source
    monkeypatch.setattr(build, "StoredSource", type(None))
    with pytest.raises(
        UserError,
        match=r"^config\.data\.on_device=on: config\.data\.name=synthetic decodes its examples",
    ):
        make_experiment(settings, jax.devices()[:1])


@pytest.mark.slow
def test_run_with_dispatches_of_many_steps_writes_the_same_records(tmp_path):
    records = []
    for name, fields in (
        ("one", {}),
        ("many", {"engine__steps_per_dispatch": 4, "data__on_device": "on"}),
    ):
        train_and_evaluate(small_config(**fields), tmp_path / name)
        records.append(read_jsonl(tmp_path / name / "metrics.jsonl"))
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
    for one, many in zip(*records, strict=True):
        speed = {"images_per_second"}
        assert one.keys() - speed == many.keys() - speed
        for name in one.keys() - speed:
            assert many[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_signal_ends_the_run_after_the_dispatches_in_flight(tmp_path, monkeypatch):
    fields = {"engine__steps_per_dispatch": 3, "data__on_device": "on"}
    train_and_evaluate(small_config(**fields), tmp_path / "whole")
    added, add = [], Record.add

    def signaled(self, report, steps):
        added.append(report.step)
        if report.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return add(self, report, steps)

    monkeypatch.setattr(Record, "add", signaled)
    with pytest.raises(Interrupted, match="stopped at step 4") as stopped:
        train_and_evaluate(small_config(**fields), tmp_path / "stopped")
    # Step 4 was dispatched, alone as a checkpoint follows, before step 1 was reported.
    assert added == [1, 2, 3, 4]
    assert stopped.value.signum == signal.SIGTERM
    assert train_and_evaluate(small_config(**fields), tmp_path / "stopped").steps == 12
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


def test_stack_is_split_over_the_devices_of_a_group(tiny, devices):
    placement = assign(devices, 3, (2, 1, 1))
    stack = put_stacked([tiny.source.batch(i) for i in range(3)], placement)
    assert stack.inputs.sharding.shard_shape(stack.inputs.shape)[:2] == (3, 4)
