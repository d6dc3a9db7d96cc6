"""Every file in configs/: a lab page whose experiment, shrunk, trains with its own network, optimizer, schedule and engine."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import jax
import pytest

from dgl_jax.experiment import make_experiment
from dgl_jax.settings import Settings, default_config, make_settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # pixels a side of the real images


def config_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrunk(path):
    """The page's experiment on made-up images, as small as its network allows; optimizer, schedule and engine as they are."""
    config = config_of(path)
    network = make_settings(config).model
    config.model.width = 4
    # Every pooling halves the images, and what the heads do depends on the size: a quarter of the real one will do.
    config.data.image_size = max(8, (config.data.image_size or SIZES[config.data.name]) // 4)
    config.data.name = "synthetic"
    config.data.batch_size = 8
    config.data.mean, config.data.std = (), ()
    config.train.steps = 2
    assert make_settings(config).model.name == network.name
    return make_settings(config)


def test_there_are_configs():
    assert {"cifar10", "digits"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_ticks(path):
    settings = shrunk(path)
    experiment = make_experiment(settings, jax.devices()[: max(settings.model.modules, 1)])
    state = experiment.engine.init()
    reports = list(experiment.engine.run(state, experiment.source, 2))
    assert [report.updates for report in reports] == [(step,) * settings.model.modules for step in (1, 2)]
    losses = [float(of_module["loss"]) for report in reports for of_module in report.metrics if of_module]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def page_problems(path, text):
    """What a lab page lacks."""
    page, found = ast.get_docstring(ast.parse(text)) or "", []
    if not re.search(rf"python launch\.py .*--config=configs/{path.stem}\.py\b.*--workdir=\S+", page):
        found.append("no command line")
    if not re.search(r"\bnot run here\b|(accuracy|error|%|percent).*\d|\d.*(accuracy|error|%|percent)", page, re.IGNORECASE):
        found.append("neither a result nor 'not run here'")
    if not re.search(r"\bminute|\bsecond|\bhour|\bnot run here\b", page, re.IGNORECASE):
        found.append("no time")
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_lab_page(path):
    assert page_problems(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("page", "problems"),
    [
        ("python launch.py --config=configs/a.py --workdir=runs/a\n\nIn a minute: accuracy 0.97.", []),
        ("python launch.py --config=configs/a.py --workdir=runs/a\n\nNot run here.", []),
        ("python launch.py --config=configs/b.py --workdir=runs/a\n\nNot run here: 90 % in 2 hours.", ["no command line"]),
        ("python launch.py --config=configs/a.py --workdir=runs/a", ["neither a result nor 'not run here'", "no time"]),
    ],
)
def test_lacking_pages_are_noticed(page, problems):
    assert page_problems(Path("configs/a.py"), f'"""{page}"""') == problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_starts_from_the_defaults(path):
    config = config_of(path)
    assert set(config) == set(default_config())
    assert isinstance(make_settings(config), Settings)
    assert config_of(path) == config, "a page must not depend on how often it is read"
