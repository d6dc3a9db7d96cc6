"""Every file in configs/ is a lab page, and its experiment trains on small generated images."""

import ast
import importlib.util
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import pytest

from dgl_jax.config import Settings, default_config, differences, make_settings
from dgl_jax.core.optimizer import make_schedule
from dgl_jax.models import NETWORKS, NetworkKind, cuts, make_network, resnet
from dgl_jax.run.build import make_experiment

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
MODERN = [path for path in CONFIGS if path.stem.endswith("_modern")]
PAPER = [path for path in CONFIGS if path.stem.startswith("imagenet_") and path not in MODERN]
SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # sides of the real images in pixels
# Networks with fewer of the same blocks, because compiling the real ones takes minutes.
SHALLOW = {"vgg19": "vgg11", "resnet110": "resnet8", "resnet152": "four_bottlenecks"}


@pytest.fixture(scope="module", autouse=True)
def shallow_networks():
    """Registers residual networks with one block per stage."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(resnet._BOTTLENECK, 6, (1, 1, 1, 1))
        patched.setitem(NETWORKS._kinds, "resnet8", NetworkKind(partial(resnet.cifar_resnet, 8)))
        patched.setitem(
            NETWORKS._kinds, "four_bottlenecks", NetworkKind(partial(resnet.imagenet_resnet, 6))
        )
        yield


def config_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrunk(path):
    """Returns the settings of a page with generated images and a small network.

    Optimizer, schedule and engine are unchanged.
    """
    config = config_of(path)
    network = make_settings(config).model
    config.model.width = 4
    if network.name in SHALLOW:
        config.model.name, config.model.split = SHALLOW[network.name], "count"
    # The pooling layers and the heads need a minimal size. A quarter of the real side is enough;
    # for 224 pixels it is 32, which VGG can halve five times.
    size = config.data.image_size or SIZES[config.data.name]
    config.data.image_size = 32 if size >= 128 else max(8, size // 4)
    config.data.name = "synthetic"
    if config.data.augment == "inception_crop":  # needs photographs larger than the input
        config.data.augment = "crop_flip"
    config.data.batch_size = 8
    config.data.mean, config.data.std = (), ()
    config.train.steps = 2
    assert make_settings(config).model.name == SHALLOW.get(network.name, network.name)
    return make_settings(config)


def test_the_published_experiments_have_configs():
    networks = {
        "imagenet_vgg13",
        "imagenet_vgg19",
        "imagenet_resnet152",
        "cifar10_resnet110",
        "cifar10_resnet18",
    }
    assert {"cifar10", "digits", "imagenette"} | networks <= {path.stem for path in CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shrunk_experiment_trains_two_steps(path, tiny):
    settings = shrunk(path)
    experiment = make_experiment(settings, jax.devices()[:1])
    states, reports = tiny.run(experiment.engine, 2, source=experiment.source)
    assert [int(state.updates) for state in states] == [2] * settings.model.modules
    losses = [float(metrics["loss"][0]) for report in reports for metrics in report if metrics]
    assert len(losses) == 2 * settings.model.modules
    assert all(math.isfinite(loss) for loss in losses)


def commands(path):
    """Yields the settings of every command line of a page, with the overridden fields."""
    page = ast.get_docstring(ast.parse(path.read_text()))
    for line in re.findall(r"^ *python launch\.py .*", page, re.M):
        config = config_of(path)
        for name, value in re.findall(r"--config\.(\S+?)=(\S+)", line):
            group, field = name.split(".")
            config[group][field] = type(config[group][field])(value)
        yield make_settings(config)


def modules_of(settings):
    """Returns the number of blocks of the real network in each module."""
    model, size = settings.model, settings.data.image_size or SIZES[settings.data.name]
    blocks = make_network(model.name, model.width, 10, (size, size, 3)).blocks
    starts = cuts(model.split, len(blocks), model.modules)
    return [b - a for a, b in pairwise([*starts, len(blocks)])]


@pytest.mark.parametrize(
    ("stem", "modules"),
    [
        ("imagenet_vgg13", [[1] * 10, [3, 3, 3, 1]]),
        ("imagenet_vgg19", [[4] * 4, [8, 8]]),
        ("imagenet_resnet152", [[26, 25]]),
        ("imagenet_vgg13_modern", [[1] * 10, [3, 3, 3, 1]]),
        ("imagenet_vgg19_modern", [[4] * 4, [8, 8]]),
        ("imagenet_resnet152_modern", [[26, 25]]),
        ("imagenette", [[3, 2, 2, 2]]),
        ("cifar10_resnet110", [[27, 28]]),
        ("cifar10_resnet18", [[5, 4]]),
    ],
)
def test_command_lines_cut_the_network_into_the_published_modules(stem, modules):
    (path,) = (path for path in CONFIGS if path.stem == stem)
    assert [modules_of(settings) for settings in commands(path)] == modules


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_option_of_a_page_applies(path):
    for settings in (make_settings(config_of(path)), *commands(path)):
        assert settings.ignored == {}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_imagenet_configs_follow_the_papers_recipe(path):
    settings = make_settings(config_of(path))
    rate = make_schedule(settings.schedule, settings.optimizer.learning_rate, 100, 5000)
    rates = {0: 0.1, 9.99: 0.1, 10: 0.01, 20: 1e-3, 30: 1e-4, 40: 1e-5, 49.99: 1e-5}
    for epoch, expected in rates.items():
        assert float(rate(round(epoch * 100))) == pytest.approx(expected, rel=1e-5)
    optimizer = settings.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (settings.data.batch_size, settings.train.epochs) == (256, 50)
    assert settings.model.head == "mlp_sr"


@pytest.mark.parametrize("path", MODERN, ids=lambda path: path.stem)
def test_modern_configs_differ_from_the_paper_in_the_recipe_alone(path):
    modern = make_settings(config_of(path))
    paper = make_settings(config_of(path.with_stem(path.stem.removesuffix("_modern"))))
    changed = {name.split(" ")[0].removeprefix("config.") for name in differences(paper, modern)}
    assert changed - {"model.dtype"} == {
        "optimizer.nesterov",
        "schedule.name",
        "schedule.warmup_epochs",
        "train.ema",
    }
    assert (modern.schedule.name, modern.schedule.warmup_epochs) == ("cosine", 5)
    assert modern.train.epochs == 100
    assert (modern.optimizer.nesterov, modern.train.label_smoothing) == (True, 0.1)
    rate = make_schedule(modern.schedule, modern.optimizer.learning_rate, 100, 10_000)
    warmup = [float(rate(update - 1)) for update in (250, 500)]
    assert warmup == pytest.approx([0.05, 0.1], rel=1e-6)
    assert float(rate(9_999)) < 1e-5


def page_problems(path, text):
    """Lists what a lab page lacks: command line, result, or time."""
    page, problems = ast.get_docstring(ast.parse(text)) or "", []
    command = rf"python launch\.py .*--config=configs/{path.stem}\.py\b.*--workdir=\S+"
    if not re.search(command, page):
        problems.append("no command line")
    result = r"\bnot run here\b|(accuracy|error|%|percent).*\d|\d.*(accuracy|error|%|percent)"
    if not re.search(result, page, re.IGNORECASE):
        problems.append("neither a result nor 'not run here'")
    if not re.search(r"\bminute|\bsecond|\bhour|\bnot run here\b", page, re.IGNORECASE):
        problems.append("no time")
    return problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_lab_page_is_complete(path):
    assert page_problems(path, path.read_text()) == []


COMMAND = "python launch.py --config=configs/a.py --workdir=runs/a"


@pytest.mark.parametrize(
    ("page", "problems"),
    [
        (f"{COMMAND}\n\nIn a minute: accuracy 0.97.", []),
        (f"{COMMAND}\n\nNot run here.", []),
        (
            f"{COMMAND.replace('a.py', 'b.py')}\n\nNot run here: 90 % in 2 hours.",
            ["no command line"],
        ),
        (COMMAND, ["neither a result nor 'not run here'", "no time"]),
    ],
)
def test_incomplete_lab_pages_are_noticed(page, problems):
    assert page_problems(Path("configs/a.py"), f'"""{page}"""') == problems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_all_fields_and_is_the_same_when_read_again(path):
    config = config_of(path)
    assert set(config) == set(default_config())
    assert isinstance(make_settings(config), Settings)
    assert config_of(path) == config
