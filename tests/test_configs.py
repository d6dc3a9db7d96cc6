"""Every file in configs/: a lab page whose experiment, shrunk, trains with its own network, optimizer, schedule and engine."""

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
SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # pixels a side of the real images
# The same blocks, fewer of them, cut by count: compiling the real ones takes minutes.
SHALLOW = {"vgg19": "vgg11", "resnet110": "resnet8", "resnet152": "four_bottlenecks"}


@pytest.fixture(scope="module", autouse=True)
def shallow_networks():
    """Residual networks of one block a stage."""
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
    """The page's experiment on made-up images, as small as its network allows; optimizer, schedule and engine as they are."""
    config = config_of(path)
    network = make_settings(config).model
    config.model.width = 4
    if network.name in SHALLOW:
        config.model.name, config.model.split = SHALLOW[network.name], "count"
    # Every pooling halves the images, and what the heads do depends on the size: a quarter of the real one will do, and
    # of 224 pixels a seventh, the least that VGG can halve as often as it does.
    size = config.data.image_size or SIZES[config.data.name]
    config.data.image_size = 32 if size >= 128 else max(8, size // 4)
    config.data.name = "synthetic"
    if config.data.augment == "inception_crop":  # needs images larger than those trained on
        config.data.augment = "crop_flip"
    config.data.batch_size = 8
    config.data.mean, config.data.std = (), ()
    config.train.steps = 2
    assert make_settings(config).model.name == SHALLOW.get(network.name, network.name)
    return make_settings(config)


def test_there_are_configs():
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
def test_two_ticks(path, tiny):
    settings = shrunk(path)
    experiment = make_experiment(settings, jax.devices()[:1])
    states, reports = tiny.run(experiment.engine, 2, source=experiment.source)
    assert [int(state.updates) for state in states] == [2] * settings.model.modules
    losses = [
        float(of_module["loss"][0]) for report in reports for of_module in report if of_module
    ]
    assert len(losses) == 2 * settings.model.modules
    assert all(math.isfinite(loss) for loss in losses)


def commands(path):
    """Settings of every command line of a page: the file's, and the fields that the line overrides."""
    page = ast.get_docstring(ast.parse(path.read_text()))
    for line in re.findall(r"^ *python launch\.py .*", page, re.M):
        config = config_of(path)
        for name, value in re.findall(r"--config\.(\S+?)=(\S+)", line):
            group, field = name.split(".")
            config[group][field] = type(config[group][field])(value)
        yield make_settings(config)


def modules_of(settings):
    """How many blocks of the real network each module has."""
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
def test_modules_of_the_command_lines(stem, modules):
    (path,) = (path for path in CONFIGS if path.stem == stem)
    assert [modules_of(settings) for settings in commands(path)] == modules


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_option_of_a_page_applies(path):
    for settings in (make_settings(config_of(path)), *commands(path)):
        assert settings.ignored == {}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_imagenet_schedule(path):
    settings = make_settings(config_of(path))
    rate = make_schedule(settings.schedule, settings.optimizer.learning_rate, 100, 5000)
    for epoch, expected in (
        (0, 0.1),
        (9.99, 0.1),
        (10, 0.01),
        (20, 1e-3),
        (30, 1e-4),
        (40, 1e-5),
        (49.99, 1e-5),
    ):
        assert float(rate(round(epoch * 100))) == pytest.approx(expected, rel=1e-5)
    assert (
        settings.optimizer.name,
        settings.optimizer.momentum,
        settings.optimizer.weight_decay,
    ) == ("sgd", 0.9, 1e-4)
    assert (settings.data.batch_size, settings.train.epochs, settings.model.head) == (
        256,
        50,
        "mlp_sr",
    )


@pytest.mark.parametrize("path", MODERN, ids=lambda path: path.stem)
def test_the_modern_recipe_is_all_that_differs(path):
    modern, paper = (
        make_settings(config_of(path)),
        make_settings(config_of(path.with_stem(path.stem.removesuffix("_modern")))),
    )
    changed = {name.split(" ")[0].removeprefix("config.") for name in differences(paper, modern)}
    assert changed - {"model.dtype"} == {
        "optimizer.nesterov",
        "schedule.name",
        "schedule.warmup_epochs",
        "train.ema",
    }
    assert (modern.schedule.name, modern.schedule.warmup_epochs, modern.train.epochs) == (
        "cosine",
        5,
        100,
    )
    assert (modern.optimizer.nesterov, modern.train.label_smoothing) == (True, 0.1)
    rate = make_schedule(modern.schedule, modern.optimizer.learning_rate, 100, 10_000)
    assert [float(rate(update - 1)) for update in (250, 500)] == pytest.approx(
        [0.05, 0.1], rel=1e-6
    )
    assert float(rate(9_999)) < 1e-5


def page_problems(path, text):
    """What a lab page lacks."""
    page, found = ast.get_docstring(ast.parse(text)) or "", []
    if not re.search(
        rf"python launch\.py .*--config=configs/{path.stem}\.py\b.*--workdir=\S+", page
    ):
        found.append("no command line")
    if not re.search(
        r"\bnot run here\b|(accuracy|error|%|percent).*\d|\d.*(accuracy|error|%|percent)",
        page,
        re.IGNORECASE,
    ):
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
        (
            "python launch.py --config=configs/a.py --workdir=runs/a\n\nIn a minute: accuracy 0.97.",
            [],
        ),
        ("python launch.py --config=configs/a.py --workdir=runs/a\n\nNot run here.", []),
        (
            "python launch.py --config=configs/b.py --workdir=runs/a\n\nNot run here: 90 % in 2 hours.",
            ["no command line"],
        ),
        (
            "python launch.py --config=configs/a.py --workdir=runs/a",
            ["neither a result nor 'not run here'", "no time"],
        ),
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
