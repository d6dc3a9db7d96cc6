"""Tests of `--mode=bench`, also with several devices per module."""

import math

import jax
import pytest
from runs import small_config

from dgl_jax.config import make_settings
from dgl_jax.engines import fused
from dgl_jax.run.build import make_experiment
from dgl_jax.tools.bench import bench


@pytest.mark.slow
def test_every_device_of_a_module_has_the_whole_codebook(devices):
    # Three codes cannot be split over two devices.
    vq = {"codec__name": "vq", "codec__dims": 4, "codec__codes": 3}
    numbers = bench(small_config(engine__name="pipeline", engine__group_sizes=(2, 2), **vq), 2)
    assert numbers["devices"] == "cpu: module 0 on 0,1; module 1 on 2,3"
    assert len(numbers["module_milliseconds"]) == 2
    assert min(numbers["module_milliseconds"]) > 0
    assert numbers["peak_memory_bytes"]["process"] > 2**20


@pytest.mark.slow
def test_bench_tells_the_sizes_of_a_run():
    config = small_config()
    numbers = bench(config, 2, modules=False)
    assert numbers["module_milliseconds"] == []
    assert numbers["steps_per_epoch"] == 6
    states = make_experiment(make_settings(config)).spec.abstract_states()
    parameters = sum(math.prod(leaf.shape) for s in states for leaf in jax.tree.leaves(s.params))
    statistics = sum(
        math.prod(leaf.shape) for s in states for leaf in jax.tree.leaves(s.batch_stats)
    )
    # The momentum is as large as the parameters; counters and keys take a few bytes.
    arrays = 4 * (2 * parameters + statistics)
    assert arrays < numbers["checkpoint_bytes"] < arrays + 200


@pytest.mark.medium
def test_bench_measures_whole_dispatches(monkeypatch):
    measured, grouped = [], fused.grouped

    def watched(*args):
        for group in grouped(*args):
            measured.append(len(group))
            yield group

    monkeypatch.setattr(fused, "grouped", watched)
    numbers = bench(small_config(engine__steps_per_dispatch=4), 6, modules=False)
    assert (numbers["steps_per_dispatch"], numbers["steps"]) == (4, 8)
    assert measured == [4, 4, 4, 4]  # a warm-up of five steps needs two of them


def test_bench_extends_training_to_its_own_steps(monkeypatch):
    """Checks the length of the training: beyond its end an asynchronous engine waits forever."""

    class Stopped(Exception):
        pass

    def make(settings):
        assert settings.train.steps == 5 + 200  # warm-up and measured steps
        raise Stopped

    monkeypatch.setattr("dgl_jax.tools.bench.make_experiment", make)
    with pytest.raises(Stopped):
        bench(small_config(engine__name="simulated", train__steps=2))
