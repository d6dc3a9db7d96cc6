"""Tests that the plans in docs/several_gpus.md are what `--mode=plan` prints."""

import re
from ast import literal_eval
from itertools import pairwise
from typing import Any

import pytest
from pages import ROOT, blocks, commands

from dgl_jax.config import Settings, make_settings
from dgl_jax.configs.cifar10 import get_config
from dgl_jax.tools import plan as planning
from dgl_jax.tools.plan_text import plan_lines

PAGE = ROOT / "docs" / "several_gpus.md"
BLOCKS = blocks(PAGE)
PLANS = [
    (command, shown.code)
    for block, shown in pairwise(BLOCKS)
    for command in (commands(block) if block.language == "sh" else ())
    if command.flag("mode") == "plan"
]
ROWS = re.findall(
    r"^\| (\d) \| (\d) \| `(\w+)` \| (equal|`\(.*?\)`) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \|$",
    PAGE.read_text(),
    re.M,
)


def settings(**fields: Any) -> Settings:
    """Returns the settings of CIFAR-10 with other values of fields, as `group.field`."""
    config = get_config()
    for name, value in fields.items():
        group, _, leaf = name.partition(".")
        setattr(config[group], leaf, value)
    return make_settings(config)


def value(text: str) -> Any:
    try:
        return literal_eval(text)
    except ValueError:
        return text


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the memory, for which programs are compiled; the page does not show it."""
    monkeypatch.setattr(planning, "module_memory", lambda spec: None)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), PLANS, ids=["groups", "slow link"])
def test_plans_of_the_page_are_printed(command, shown):
    given = [word.removeprefix("--config.") for word in command.words if "--config." in word]
    fields = {name: value(text) for name, _, text in (field.partition("=") for field in given)}
    numbers, _ = planning.plan(
        settings(**fields),
        int(command.flag("devices")),
        command.flag("block_times"),
        float(command.flag("bandwidth")),
    )
    printed = plan_lines(numbers | {"timeline": None})
    assert [line for line in shown.splitlines() if line not in printed] == []


@pytest.mark.slow
def test_table_of_layouts_is_predicted(monkeypatch):
    monkeypatch.setattr(planning, "_with_codecs", lambda spec, _: {"identity": spec})
    command, _ = PLANS[0]
    predicted = []
    for devices, modules, split, sizes, *_ in ROWS:
        groups = () if sizes == "equal" else literal_eval(sizes.strip("`"))
        fields = {"model.modules": int(modules), "model.split": split, "engine.name": "pipeline"}
        numbers, _ = planning.plan(
            settings(**fields, **({"engine.group_sizes": groups} if groups else {})),
            int(devices),
            command.flag("block_times"),
            float(command.flag("bandwidth")),
        )
        rate, idle = f"{numbers['ticks_per_second']:.4g}", f"{100 * numbers['idle_share']:.0f}"
        predicted.append((devices, modules, split, sizes, rate, f"{numbers['speedup']:.2f}", idle))
    assert predicted == ROWS
    assert len(ROWS) == 8
