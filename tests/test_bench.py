"""The numbers of --mode=bench, on several devices a module too."""

import pytest
from runs import small_config

from dgl_jax.tools.bench import bench


@pytest.mark.slow
def test_a_codebook_is_whole_on_each_of_a_modules_devices(devices):
    # Three codes: no group of two devices divides them.
    vq = {"codec__name": "vq", "codec__dims": 4, "codec__codes": 3}
    found = bench(small_config(engine__name="pipeline", engine__group_sizes=(2, 2), **vq), 2)
    assert found["devices"] == "cpu: module 0 on 0,1; module 1 on 2,3"
    assert len(found["module_milliseconds"]) == 2
    assert min(found["module_milliseconds"]) > 0
    assert found["peak_memory_bytes"] > 2**20


def test_more_steps_than_the_training_would_have(monkeypatch):
    """An asynchronous engine would wait for ever for updates beyond the end of its training."""

    class Asked(Exception):
        pass

    def make(settings):
        assert settings.train.steps == 5 + 200  # to warm up, and what is measured
        raise Asked

    monkeypatch.setattr("dgl_jax.tools.bench.make_experiment", make)
    with pytest.raises(Asked):
        bench(small_config(engine__name="simulated", train__steps=2))
