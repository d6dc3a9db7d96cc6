"""Checks of the configuration: refused values and their messages, and changes on resume."""

import dataclasses
import json
import math
import typing

import pytest

from dgl_jax.config import (
    Settings,
    default_config,
    differences,
    field_names,
    fields_of,
    make_settings,
)
from dgl_jax.errors import UserError


def nest(name: str, value: typing.Any) -> dict[str, typing.Any]:
    """Returns {'a': {'b': value}} for the name 'a.b'."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def find(name: str) -> dataclasses.Field:
    group, _, leaf = name.rpartition(".")
    return (
        fields_of(group)[leaf]
        if group
        else next(f for f in dataclasses.fields(Settings) if f.name == leaf)
    )


def other(name: str) -> typing.Any:
    """Returns a valid value of a field that is not its default."""
    field = find(name)
    if "kinds" in field.metadata:
        return [kind for kind in field.metadata["kinds"] if kind != field.default][-1]
    if "choices" in field.metadata:
        return field.metadata["choices"][-1]
    if name in ("method.synthesizer_kernel", "objective.similarity_kernel"):
        return 7  # must be odd
    if name == "plugins":
        return ["json"]  # any module that can be imported
    if name == "engine.slowdown":  # one factor per module
        return [1.0, 1.5, 1.0, 1.0]
    if name in ("objective.reconstruction_weights", "objective.task_weights"):
        return [1.0, 1.5]  # of the first module and the last but one
    if typing.get_origin(field.type) is tuple:
        return [1 if typing.get_args(field.type)[0] is int else 1.0]
    if field.type is str:
        return "0,1"
    if field.type is bool:
        return not field.default
    return field.default + 1 if field.type is int else field.default / 2 + 0.01


def kinds_for(name: str) -> dict[str, typing.Any]:
    """Returns a nested configuration in which a field applies."""
    group, _, leaf = name.rpartition(".")
    config: dict[str, typing.Any] = {}
    for condition, fitting in find(name).metadata["applies"].items():
        other_group, trait = condition.split(".")
        if trait in fields_of(other_group):
            config.setdefault(other_group, {})[trait] = fitting[0]
        # `continuous` is only used with `asynchronous`, whose first engine is not continuous.
        elif trait != "continuous":
            kinds = fields_of(other_group)["name"].metadata["kinds"]
            config.setdefault(other_group, {})["name"] = next(
                n for n, kind in kinds.items() if getattr(kind, trait) in fitting
            )
    if group and "name" in fields_of(group) and leaf != "name":
        kinds = fields_of(group)["name"].metadata["kinds"]
        having = [
            n
            for n, kind in kinds.items()
            if kind.options and leaf in {f.name for f in dataclasses.fields(kind.options)}
        ]
        default = Settings.__dataclass_fields__[group].default_factory()
        if leaf not in {f.name for f in dataclasses.fields(default)}:
            config.setdefault(group, {}).setdefault("name", having[0])
    return config


def changed(name: str) -> Settings:
    config = kinds_for(name)
    value = nest(name, other(name))
    if name in ("data.mean", "data.std"):  # both must have the same length
        value = {"data": {"mean": [1.0], "std": [1.0]}}
    for group, fields in value.items():
        config[group] = config.get(group, {}) | fields if isinstance(fields, dict) else fields
    return make_settings(config)


# Each entry: a field and a wrong value, and parts of the message.
MISTAKES = [
    (
        ("optimizer.learning_rat", 0.1),
        [
            "config.optimizer.learning_rat",
            "no such field",
            "did you mean",
            "optimizer.learning_rate",
        ],
    ),
    (("optimiser", {}), ["config.optimiser", "no such field", "did you mean", "optimizer.name"]),
    (
        ("xyzzy", 1),
        ["config.xyzzy", "no such field", "there are: seed, plugins, data.name", "log.tensorboard"],
    ),
    (("train.accumulate", 0), ["config.train.accumulate=0", "between 1 and 2147483647"]),
    (("train.ema", 1.0), ["config.train.ema=1.0", "between 0.0 and 0.999999"]),
    (("train.label_smoothing", 1.5), ["config.train.label_smoothing=1.5", "between 0.0 and 1.0"]),
    (
        ("model.head", "zzz"),
        ["config.model.head='zzz'", "there are: mlp_sr, mlp, cnn, conv5x5, linear"],
    ),
    (("engine.name", "pipelines"), ["config.engine.name='pipelines'", "did you mean pipeline"]),
    (("optimizer.learning_rate", 0), ["config.optimizer.learning_rate=0.0", "above 0"]),
    (("optimizer.learning_rate", -1.0), ["config.optimizer.learning_rate=-1.0", "above 0"]),
    (("optimizer.momentum", 1.5), ["config.optimizer.momentum=1.5", "between 0.0 and 1.0"]),
    (("optimizer.weight_decay", float("nan")), ["config.optimizer.weight_decay=nan"]),
    (("data.batch_size", 0), ["config.data.batch_size=0", "between 2 and 2147483647"]),
    (("data.batch_size", 1), ["config.data.batch_size=1", "between 2 and"]),
    (("train.steps", 2**31), ["config.train.steps=2147483648", "between 0 and 2147483647"]),
    (("seed", 10**400), ["config.seed=1"]),
    (("train.epochs", 1e300), ["config.train.epochs=1e+300", "between 0.0 and 1000000.0"]),
    (
        ("schedule.boundaries", (1.0, 1e300)),
        ["config.schedule.boundaries=(1.0, 1e+300)", "at most a million"],
    ),
    (("data.image_size", 100_000), ["config.data.image_size=100000", "between 0 and 4096"]),
    (
        ("data.validation_fraction", 0.95),
        ["config.data.validation_fraction=0.95", "between 0.0 and 0.9"],
    ),
    (("data.batch_size", 8.5), ["config.data.batch_size=8.5", "a whole number"]),
    (("data.batch_size", True), ["config.data.batch_size=True", "a whole number"]),
    (("train.epochs", "ten"), ["config.train.epochs='ten'", "a number"]),
    (("log.tensorboard", 1), ["config.log.tensorboard=1", "a bool is needed, not a int"]),
    (("data.dir", 3), ["config.data.dir=3", "a str is needed, not a int"]),
    (("seed", -1), ["config.seed=-1", "between 0 and 2147483647"]),
    (("seed", 2**31), ["config.seed=2147483648", "between 0 and 2147483647"]),
    (("data", 3), ["config.data=3", "a group of fields"]),
    (("engine.group_sizes", 2), ["config.engine.group_sizes=2", "a tuple", "(1,2)"]),
    (("engine.group_sizes", (1, "2")), ["config.engine.group_sizes=(1, '2')", "a tuple"]),
    (("engine.group_sizes", (1, 1.5)), ["config.engine.group_sizes=(1, 1.5)", "a tuple"]),
    (("engine.group_sizes", (1, 0)), ["config.engine.group_sizes=(1, 0)", "at least one device"]),
    (
        ("schedule.boundaries", (2.0, 1.0)),
        ["config.schedule.boundaries=(2.0, 1.0)", "positive and increasing"],
    ),
    (
        ("schedule.boundaries", (0.0, 1.0)),
        ["config.schedule.boundaries=(0.0, 1.0)", "positive and increasing"],
    ),
    (
        ("schedule.boundaries", (1.0, 1.0)),
        ["config.schedule.boundaries=(1.0, 1.0)", "positive and increasing"],
    ),
    (("data.mean", (0.5,)), ["config.data.mean has 1", "config.data.std has 0"]),
]


@pytest.mark.parametrize(
    ("mistake", "words"), MISTAKES, ids=[f"{name}={value}" for (name, value), _ in MISTAKES]
)
def test_mistakes_are_reported_in_one_line(mistake, words):
    config = nest(*mistake)
    if "boundaries" in mistake[0]:
        config["schedule"]["name"] = "step"
    with pytest.raises(UserError) as error:
        make_settings(config)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5, 0.5), (0.2, 0.0), r"config\.data\.std=\(0\.2, 0\.0\).*between 0\.001 and 1,"),
        ((0.5,), (1e-30,), r"config\.data\.std=\(1e-30,\).*between 0\.001 and 1,"),
        ((0.5,), (58.4,), r"config\.data\.std=\(58\.4,\).*divide .* by 255"),
        ((123.7,), (0.2,), r"config\.data\.mean=\(123\.7,\).*between 0 and 1, .*divide .* by 255"),
        ((-0.1,), (0.2,), r"config\.data\.mean=\(-0\.1,\).*between 0 and 1,"),
        ((math.nan,), (0.2,), r"config\.data\.mean=\(nan,\)"),
    ],
)
def test_mean_and_std_are_of_images_scaled_to_0_to_1(mean, std, words):
    with pytest.raises(UserError, match=words):
        make_settings({"data": {"mean": mean, "std": std}})
    make_settings({"data": {"mean": (0.0, 1.0), "std": (0.001, 1.0)}})


def test_values_are_converted_to_the_types_of_the_fields():
    settings = make_settings(
        {
            "data": {"batch_size": 8.0},
            "optimizer": {"learning_rate": 1},
            "engine": {"group_sizes": [1, 2.0]},
        }
    )
    batch_size, learning_rate = settings.data.batch_size, settings.optimizer.learning_rate
    assert (batch_size, type(batch_size)) == (8, int)
    assert (learning_rate, type(learning_rate)) == (1.0, float)
    assert settings.engine.group_sizes == (1, 2)
    assert all(type(n) is int for n in settings.engine.group_sizes)


def test_defaults_are_valid_and_survive_json():
    settings = make_settings(default_config())
    assert settings == Settings() == make_settings({})
    assert make_settings(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


def backwards(tree):
    return {key: backwards(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


def test_hash_ignores_the_order_of_keys():
    config = Settings().to_dict()
    assert list(backwards(config)) != list(config)
    assert make_settings(backwards(config)).hash() == Settings().hash()
    assert len(Settings().hash()) == 12


# The package has a single objective and a single task.
ONE_KIND = ("objective.name", "task.name", "model.adapter")
CHANGEABLE = [name for name in field_names() if name not in ONE_KIND]


@pytest.mark.parametrize("name", CHANGEABLE)
def test_hash_changes_with_every_field(name):
    assert changed(name).hash() != make_settings(kinds_for(name)).hash()


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_resumed_run_may_change_only_free_fields(name):
    old, new = make_settings(kinds_for(name)), changed(name)
    refused = differences(old, new)
    free = (
        name.startswith(
            (
                "train.",
                "checkpoint.",
                "eval.",
                "log.",
                "engine.group_sizes",
                "engine.ticks",
                "engine.steps",
                "engine.barrier",
                "engine.command",
                "engine.restart",
                "engine.watchdog",
            )
        )
        or name
        in (
            "plugins",
            "data.dir",
            "data.manual_dir",
            "data.workers",
            "data.on_device",
            "model.remat",
            "diagnostics.enabled",
            "diagnostics.every",
        )
    ) and name != "train.ema"
    if free:
        assert refused == []
    elif name in ("data.mean", "data.std"):
        assert len(refused) == 2
    else:
        was = old.to_dict()
        for part in name.split("."):
            was = was[part]
        assert f"config.{name} (was {was!r}, is now {other(name)!r})" in refused
        assert refused[1:] == [] or name.endswith(".name")


def test_fields_missing_in_an_older_run_take_their_defaults():
    values = Settings().to_dict()
    del values["codec"], values["model"]["dtype"]
    old = make_settings(values)
    assert differences(old, Settings()) == []
    new = make_settings({"codec": {"name": "bf16"}})
    assert differences(old, new) == ["config.codec.name (was 'identity', is now 'bf16')"]


def test_tuples_compare_equal_to_their_json_lists():
    settings = make_settings({"schedule": {"boundaries": (1.0, 2.5)}})
    assert differences(make_settings(json.loads(json.dumps(settings.to_dict()))), settings) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_and_nan_are_refused(value):
    with pytest.raises(UserError, match=r"config\.train\.epochs=(inf|nan): a number is needed"):
        make_settings({"train": {"epochs": value}})
