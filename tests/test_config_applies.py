"""Options that do not apply to the chosen kinds: refused on the command line, ignored in a file."""

import re
import typing

import jax
import pytest
from runs import small_config
from test_config import ONE_KIND, other

from dgl_jax.config import differences, field_names, make_settings
from dgl_jax.config.registry import HEADS
from dgl_jax.errors import UserError
from dgl_jax.models import HeadKind, register_head
from dgl_jax.run.build import make_experiment

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
        ("method.name", "backprop", NOT_SIMULATED | {"model.head", "model.pointwise"}),
        ("method.name", "layerwise", NOT_SIMULATED | OF_METHODS - {"method.laps"}),
        (
            "method.name",
            "ddg",
            NOT_SIMULATED | {"model.head", "model.pointwise", *OF_METHODS} - OF_DELAYED,
        ),
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


def test_pointwise_applies_to_heads_with_such_convolutions(monkeypatch):
    def make(head, **groups):
        model = {"head": head, "pointwise": "dot"}
        return make_settings({"model": model, **groups}, given=["model.pointwise"])

    assert make("mlp_sr").ignored == {}
    reason = "config.model.pointwise='dot': applies to config.model.head=mlp_sr"
    with pytest.raises(UserError, match=f"^{re.escape(reason)}, not to linear$"):
        make("linear")
    with pytest.raises(UserError, match=r"applies to config\.method\.name=.*, not to backprop$"):
        make("mlp_sr", method={"name": "backprop"})
    monkeypatch.setattr(HEADS, "_kinds", dict(HEADS.items()))
    register_head("of_a_user", HeadKind(lambda classes, dtype: None, pointwise=True))
    assert make("of_a_user").ignored == {}
    with pytest.raises(UserError, match=f"{re.escape(reason)} or of_a_user, not to cnn$"):
        make("cnn")


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
