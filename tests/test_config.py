"""Checks of the configuration: refused values and their messages, and changes on resume."""

import dataclasses
import json
import re
import typing

import jax
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
from dgl_jax.run.build import make_experiment
from runs import small_config


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


def test_standard_deviations_must_be_positive():
    with pytest.raises(UserError, match=r"config\.data\.std=\(0\.2, 0\.0\).*above 0"):
        make_settings({"data": {"mean": (0.0, 0.0), "std": (0.2, 0.0)}})


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


# Options that do not apply

RINGS = {"engine.slowdown", "engine.finished", "checkpoint.replay_every", "codec.decode"} | {
    f"replay.{name}" for name in ("size", "rule", "max_reuse", "at_limit")
}
OF_VQ = {
    f"codec.{name}"
    for name in ("codes", "stages", "start", "rule", "decay", "smoothing", "restart", "samples")
} | {
    "codec.codebook_every",
    "codec.decode",
}
OF_THREADS = {"engine.restart_workers", "engine.watchdog_seconds"}
OF_SIMULATED = {"engine.order", "replay.at_limit"}
OF_METHODS = {name for name in field_names() if name.startswith("method.")} - {"method.name"}
OF_DELAYED = {"method.encode_gradients"}
COMMON = {"objective.name", "objective.context_input", "objective.transport"}
OF_OBJECTIVES = {name for name in field_names() if name.startswith("objective.")} - COMMON
OF_DIAGNOSTICS = {f"diagnostics.{name}" for name in ("every", "batches", "projections")}
# Kinds to which most options apply, and the options that do not apply to `simulated`.
RICH = {
    "data": {"name": "imagenet"},
    "schedule": {"name": "step"},
    "engine": {"name": "simulated"},
    "codec": {"name": "vq"},
}
ONLY_FUSED = {f"engine.{name}" for name in ("steps_per_dispatch", "barrier", "command_buffers")}
NOT_SIMULATED = {"engine.group_sizes", "engine.ticks_in_flight", *OF_THREADS, *ONLY_FUSED}


@pytest.mark.parametrize(
    ("kind", "chosen", "expected"),
    [
        ("engine.name", "fused", RINGS | OF_THREADS | OF_SIMULATED),
        ("engine.name", "pipeline", RINGS | OF_THREADS | OF_SIMULATED | ONLY_FUSED),
        ("method.name", "backprop", NOT_SIMULATED | {"model.head"}),
        ("method.name", "layerwise", NOT_SIMULATED | OF_METHODS - {"method.laps"}),
        ("method.name", "ddg", NOT_SIMULATED | {"model.head", *OF_METHODS} - OF_DELAYED),
        ("engine.name", "simulated", NOT_SIMULATED),
        ("engine.name", "threads", OF_SIMULATED | {"engine.ticks_in_flight", *ONLY_FUSED}),
        ("engine.order", "ordered", NOT_SIMULATED | {"engine.slowdown"}),
        ("codec.name", "identity", NOT_SIMULATED | OF_VQ | {"codec.dims", "eval.codec"}),
        ("codec.name", "bf16", NOT_SIMULATED | OF_VQ | {"codec.dims"}),
        ("codec.name", "int8", NOT_SIMULATED | OF_VQ),
        ("codec.rule", "minibatch", NOT_SIMULATED | {"codec.smoothing"}),
        ("optimizer.name", "adam", NOT_SIMULATED | {"optimizer.momentum", "optimizer.nesterov"}),
        ("schedule.name", "constant", NOT_SIMULATED | {"schedule.boundaries", "schedule.factor"}),
        ("schedule.name", "cosine", NOT_SIMULATED | {"schedule.boundaries", "schedule.factor"}),
        ("data.name", "imagenette", NOT_SIMULATED),
        ("data.name", "cifar10", NOT_SIMULATED | {"data.workers"}),
        ("data.name", "digits", NOT_SIMULATED | {"data.workers", "data.manual_dir"}),
        ("data.name", "folder", NOT_SIMULATED | {"data.workers", "data.manual_dir"}),
        ("data.name", "synthetic", NOT_SIMULATED | {"data.workers", "data.manual_dir", "data.dir"}),
    ],
)
def test_options_that_do_not_apply_are_ignored_or_refused(kind, chosen, expected):
    base: dict[str, typing.Any] = {}
    for group, leaves in (RICH | {kind.split(".")[0]: RICH.get(kind.split(".")[0], {})}).items():
        base[group] = dict(leaves)
    base[kind.split(".")[0]][kind.split(".")[1]] = chosen
    ignored = set()
    names = {name for name in field_names() if "." in name and not name.endswith(".name")}
    for name in names - {kind, *ONE_KIND}:
        group, _, leaf = name.rpartition(".")
        partner = (
            {"std": [1.0]} if name == "data.mean" else {"mean": [1.0]} if name == "data.std" else {}
        )
        config = base | {group: base.get(group, {}) | {leaf: other(name)} | partner}
        settings = make_settings(config)
        ignored |= {name} & set(settings.ignored)
        if name in settings.ignored:
            with pytest.raises(UserError, match=re.escape(settings.ignored[name])):
                make_settings(config, given=[name])
            # A field without effect may change when the run resumes.
            assert differences(make_settings(base), settings) == []
        else:
            make_settings(config, given=[name])
    if chosen not in ("layerwise", "ddg"):
        expected |= OF_METHODS  # dgl and backprop have no options
    assert ignored == expected | OF_OBJECTIVES | OF_DIAGNOSTICS | {
        "model.init_gain",
        "model.logits",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay.size", 7),
        ("replay.max_reuse", 3),
        ("replay.rule", "uniform"),
        ("checkpoint.replay_every", 4),
        ("engine.finished", "eval"),
        ("model.split", "flops"),
        ("codec.name", "bf16"),
    ],
)
def test_options_of_several_modules_have_no_effect_on_one(name, value):
    config = {"model": {"modules": 1}, "engine": {"name": "threads"}}
    group, leaf = name.split(".")
    config[group] = config.get(group, {}) | {leaf: value}
    settings = make_settings(config)
    with pytest.raises(UserError, match=f"^config.{name}=.*: applies to config.model.modules=2 or"):
        make_settings(config, given=[name])
    assert name in settings.ignored
    config["model"]["modules"] = 2
    assert make_settings(config, given=[name]).ignored == {}


def test_epochs_apply_without_a_number_of_steps():
    config = {"train": {"epochs": 7.0, "steps": 3}}
    reason = "config.train.epochs=7.0: applies to config.train.steps=0, not to 3"
    assert make_settings(config).ignored == {"train.epochs": reason}
    with pytest.raises(UserError, match=f"^{re.escape(reason)}$"):
        make_settings(config, given=["train.epochs"])
    config["train"]["steps"] = 0
    assert make_settings(config, given=["train.epochs"]).ignored == {}


def test_the_message_names_the_kinds_to_which_an_option_applies():
    config = {"engine": {"slowdown": (2, 1, 1, 1)}}
    reason = (
        "config.engine.slowdown=(2.0, 1.0, 1.0, 1.0): "
        "applies to config.engine.name=simulated or threads, not to fused"
    )
    assert make_settings(config).ignored == {"engine.slowdown": reason}
    for given in ("engine.slowdown", "engine"):
        with pytest.raises(UserError, match=f"^{re.escape(reason)}$"):
            make_settings(config, given=[given])
    make_settings({"engine": {"slowdown": ()}}, given=["engine.slowdown"])  # equal to the default
    make_settings(config, given=["engine.name", "seed"])  # set by a file: only logged


def test_ignored_options_of_a_file_are_logged_in_one_line(caplog):
    fields = {"replay__size": 7, "codec__codes": 16, "data__name": "synthetic"}
    with caplog.at_level("INFO", logger="dgl_jax"):
        make_experiment(make_settings(small_config(**fields)), jax.devices()[:1])
    assert [line for line in caplog.messages if "ignored" in line] == [
        "set but ignored: config.replay.size=7: applies to "
        "config.engine.name=simulated or threads, not to fused; "
        "config.codec.codes=16: applies to config.codec.name=vq, not to identity"
    ]


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
