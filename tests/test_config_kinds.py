"""Kinds in the configuration: names equal the registries, and each engine and method is built."""

import re

import jax
import pytest
from runs import small_config, spec_of

from dgl_jax.config import differences, fields_of, make_settings
from dgl_jax.config.registry import CODECS, DATA_SETS, ENGINES, HEADS, METHODS, NETWORKS
from dgl_jax.engines import Engine, FusedEngine, PipelineEngine, SimulatedEngine, ThreadsEngine
from dgl_jax.errors import UserError
from dgl_jax.run.build import DatasetInfo, make_engine, make_experiment

WITH_HEADS = ("dgl", "layerwise", "deep_supervision")
WITHOUT_HEADS = ("backprop", "dni", "cdni", "ddg", "features_replay", "fdg")


def test_name_fields_choose_from_the_registries():
    registries = {
        "data.name": DATA_SETS,
        "model.name": NETWORKS,
        "model.head": HEADS,
        "engine.name": ENGINES,
        "codec.name": CODECS,
    }
    for name, kinds in registries.items():
        group, _, leaf = name.partition(".")
        assert fields_of(group)[leaf].metadata["kinds"] is kinds
    assert [*ENGINES] == ["fused", "pipeline", "simulated", "threads"]
    assert {*METHODS} == {*WITH_HEADS, *WITHOUT_HEADS}


def engine_of(name: str, method: str = "dgl") -> Engine:
    settings = make_settings(
        {
            "engine": {"name": name},
            "method": {"name": method},
            "model": {"width": 4, "modules": 2},
            "data": {"batch_size": 8},
        }
    )
    info = DatasetInfo("synthetic", ("a", "b"), (8, 8, 3), (0.5,) * 3, (0.2,) * 3)
    return make_engine(settings, spec_of(settings, info), jax.devices(), 10)


@pytest.mark.medium
def test_every_engine_name_builds_its_engine():
    engines = [FusedEngine, PipelineEngine, SimulatedEngine, ThreadsEngine]
    assert [type(engine_of(name)) for name in ENGINES] == engines


@pytest.mark.medium
def test_a_method_decides_which_modules_have_heads_and_which_engines_run_it():
    for method in METHODS:
        first, last = engine_of("fused", method).spec.modules
        assert (first.objective is None) == (method in WITHOUT_HEADS)
        assert last.objective is not None
    with pytest.raises(
        UserError,
        match=r"^config\.engine\.name=pipeline: config\.method\.name=backprop runs under fused$",
    ):
        engine_of("pipeline", "backprop")


@pytest.mark.parametrize(
    ("was", "now", "allowed"),
    [
        ("fused", "pipeline", True),
        ("pipeline", "fused", True),
        ("fused", "simulated", False),
        ("simulated", "pipeline", False),
        ("threads", "simulated", False),
        ("threads", "threads", True),
    ],
)
def test_a_resumed_run_may_change_to_an_engine_with_the_same_checkpoints(was, now, allowed):
    old, new = (make_settings({"engine": {"name": name}}) for name in (was, now))
    changed = differences(old, new)
    assert changed[:1] == ([] if allowed else [f"config.engine.name (was {was!r}, is now {now!r})"])


def test_a_resumed_run_may_not_change_its_method():
    old, new = (make_settings({"method": {"name": name}}) for name in ("dgl", "backprop"))
    assert differences(old, new) == ["config.method.name (was 'dgl', is now 'backprop')"]


@pytest.mark.parametrize("modules", [1, 2])
def test_choices_without_effect_on_a_single_module_are_logged(modules, caplog):
    fields = {"model__modules": modules, "codec__name": "int8", "objective__name": "pred_sim"}
    settings = make_settings(small_config(**fields, codec__dims=4))
    with caplog.at_level("INFO", logger="dgl_jax"):
        make_experiment(settings, jax.devices()[:1])
    logged = [line for line in caplog.messages if "no effect" in line]
    names = "config.objective.name=pred_sim"
    assert logged == [f"no effect with a single module: {names}"] * (modules == 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.head", "linear"), ("codec.name", "int8"), ("objective.context_input", True)],
)
def test_what_only_several_modules_use_is_refused_or_ignored_with_one(field, value):
    group, leaf = field.split(".")
    several, one = ({group: {leaf: value}, "model": {"modules": n}} for n in (2, 1))
    for fields in (several, one):
        fields["model"] |= {leaf: value} if group == "model" else {}
    assert make_settings(several, given=[field]).ignored == {}
    reason = f"config.{field}={value!r}: applies to config.model.modules=2 or more, not to 1"
    assert make_settings(one).ignored == {field: reason}
    assert differences(make_settings({"model": {"modules": 1}}), make_settings(one)) == []
    with pytest.raises(UserError, match=f"^{re.escape(reason)}$"):
        make_settings(one, given=[field])
