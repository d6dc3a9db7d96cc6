"""Tests of networks that users register: they are cut and trained by every engine, or refused."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from runs import FIELDS, small_config
from test_launch import fails, launch

from dgl_jax.config import make_settings
from dgl_jax.config.registry import NETWORKS
from dgl_jax.engines import counts
from dgl_jax.errors import UserError
from dgl_jax.models import Network, make_network, register_network
from dgl_jax.models.heads import LinearHead
from dgl_jax.run import hosts
from dgl_jax.run.build import make_experiment


class Tokens(nn.Module):
    """Block without parameters that turns images into tokens, one per row."""

    @nn.compact
    def __call__(self, x, train):
        return x.reshape(*x.shape[:2], -1)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x)))


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch):
    monkeypatch.setattr(NETWORKS, "_kinds", dict(NETWORKS._kinds))


def token_network(width, num_classes, dtype):
    return [Tokens(), Block(width), Block(width)]


def test_network_may_be_a_list_of_blocks():
    register_network("tokens", token_network)
    assert make_network("tokens", 6, 3, (8, 8, 3)) == Network(
        (Tokens(), Block(6), Block(6)), LinearHead(3)
    )
    register_network(
        "tokens", lambda width, num_classes, dtype: Network((Block(width),), LinearHead(7, dtype))
    )
    assert make_network("tokens", 6, 3, (8, 8, 3), "bfloat16").classifier == LinearHead(
        7, np.dtype("bfloat16")
    )


ENGINES = ["fused", "pipeline", "simulated", "threads", "backprop"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_a_user_network(engine):
    register_network("tokens", token_network)
    config = small_config(
        model__name="tokens",
        model__modules=3,
        model__head="mlp",
        engine__name=engine,
        train__steps=2,
    )
    config.engine.group_sizes, config.data.batch_size = (1, 1, 1), 12
    experiment = make_experiment(make_settings(config))
    state = experiment.engine.init()
    before = [jax.tree.map(np.asarray, module.params) for module in state.modules]
    for report in experiment.engine.run(state, experiment.source, 2):
        state = report.snapshot() if min(report.updates) == 2 else state
    assert counts(state) == [2, 2, 2]
    for k, (old, module) in enumerate(zip(before, state.modules)):
        unchanged = [
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(module.params))
        ]
        assert not any(unchanged), f"module_{k}"
        # `Tokens` has no parameters; the first module has some only if it has a head.
        assert bool(unchanged) == (k > 0 or engine != "backprop")


def test_names_of_the_package_cannot_be_registered_again():
    with pytest.raises(
        UserError, match=r"config\.model\.name='cnn4': dgl_jax already defines this name"
    ):
        register_network("cnn4", token_network)


def test_unknown_name_is_reported_before_data_is_loaded(monkeypatch):
    register_network("transformer", token_network)
    monkeypatch.setattr(hosts, "make_source", lambda *_: pytest.fail("data was loaded first"))
    with pytest.raises(
        UserError, match=r"config.model.name='transfomer': no such name; did you mean transformer"
    ):
        make_experiment(make_settings(small_config(model__name="transfomer")))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([], "the network has no blocks"),
        (
            [Tokens(), nn.Dense(3)],
            "block 1 is Dense, which is not a Flax Linen module called as block",
        ),
        ([Tokens], "block 0 is Tokens, which is not a Flax"),
        (Network((Tokens(),), nn.Dense(3)), "the classifier is Dense"),
    ],
)
def test_invalid_blocks_are_refused(blocks, words):
    register_network("tokens", lambda *_: blocks)
    with pytest.raises(UserError, match=rf"config\.model\.name='tokens': {words}"):
        make_network("tokens", 6, 3, (8, 8, 3))


CONFIG = """
from flax import linen as nn
from dgl_jax.models import register_network
from dgl_jax.config import default_config

class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.relu(nn.Dense(8)(x))

register_network("mine", lambda width, num_classes, dtype: [Block(), Block()])

def get_config():
    return default_config()
"""


@pytest.mark.slow
def test_config_file_registers_its_network_on_the_command_line(tmp_path):
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(CONFIG)
    fields = FIELDS | {"model.name": "mine", "train.steps": 2}
    done = launch(
        f"--config={file}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        f"--workdir={workdir}",
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["modules"]) == 2
    # Without the file, the name is unknown.
    assert "config.model.name='mine': no such name (if it is your own, config.plugins" in fails(
        "--mode=export", f"--workdir={workdir}"
    )
    assert launch("--mode=export", f"--workdir={workdir}", f"--config={file}").returncode == 0
