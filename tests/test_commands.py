"""Commands computed from settings, parsed again by the command line's own flags."""

import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags
from plugin_runs import config as plugin_config
from runs import small_config

from dgl_jax import cli
from dgl_jax.config import Settings, default_config, make_settings
from dgl_jax.errors import UserError
from dgl_jax.tools import commands, flag_modes
from dgl_jax.tools.commands import command_of, shell_command
from dgl_jax.tools.config_files import SHIPPED, with_files


def parsed(line: list[str]) -> Settings:
    """Returns the settings that the command line makes from the flags of a configuration."""
    line = with_files(["launch.py", *line])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
    values(line)
    return make_settings(holder.value, config_flags.get_override_values(values["config"]))


def changed(name: str, **fields):
    """Returns the configuration of a shipped file with fields changed, `__` for the dot."""
    config = commands._load(f"configs/{name}.py", ()).copy_and_resolve_references()
    for field, value in fields.items():
        group, _, leaf = field.rpartition("__")
        setattr(config[group] if group else config, leaf, value)
    return config


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("[!_]*.py")))
def test_shipped_configuration_needs_no_other_flag(name):
    settings = make_settings(changed(name))
    (flag,) = command_of(settings)
    assert parsed([flag]).hash() == settings.hash()


CASES = {
    "seed": changed("digits", seed=3),
    "small": small_config(),
    "defaults": default_config(),
    "numbers": changed("cifar10", optimizer__learning_rate=1e-7, optimizer__weight_decay=0.0),
    "tuples": changed("cifar10", schedule__boundaries=(2e-3, 1.5), data__mean=(), data__std=()),
    "one value": changed("cifar10", schedule__boundaries=(7.0,)),
    "no values": changed("cifar10", schedule__boundaries=()),
    "mean": changed("digits", data__mean=(0.1,), data__std=(1.0,)),
    "bool": changed("imagenet_vgg13_modern", model__remat=True, optimizer__nesterov=False),
    "codec": changed("digits", codec__name="vq", codec__codes=16, model__split="0,1,2,3"),
    "kinds": changed("cifar10", engine__name="simulated", replay__size=3, seed=1),
    "path": changed("cifar10", data__dir="a folder/with 'quotes', and $signs"),
    "method": changed("digits", method__name="backprop"),
    "schedule": changed("cifar10_modern", schedule__name="step", schedule__boundaries=(1.0,)),
}


@pytest.mark.parametrize("case", CASES)
def test_command_has_the_hash_of_the_settings(case):
    settings = make_settings(CASES[case])
    line = command_of(settings)
    assert parsed(line).hash() == settings.hash()
    # Each flag is needed: without any of them it is another run.
    for n in range(1, len(line)):
        with suppress(UserError):
            assert parsed(line[:n] + line[n + 1 :]).hash() != settings.hash(), line[n]


def test_command_changes_the_nearest_configuration():
    assert command_of(make_settings(changed("cifar10", model__width=16, seed=2))) == [
        "--config=configs/cifar10.py",
        "--config.seed=2",
        "--config.model.width=16",
    ]


def test_field_without_effect_that_the_command_line_refuses_is_left_out():
    settings = make_settings(changed("digits", replay__size=3))
    assert list(settings.ignored) == ["replay.size"]
    assert command_of(settings) == ["--config=configs/digits.py"]
    settings = make_settings(small_config(method__name="backprop"))
    assert list(settings.ignored) == ["model.head"]
    assert not any("model.head" in flag for flag in command_of(settings))
    # The same value has an effect in an asynchronous engine.
    settings = make_settings(changed("digits", replay__size=3, engine__name="simulated"))
    assert command_of(settings)[1:] == ["--config.engine.name=simulated", "--config.replay.size=3"]


def test_shell_command_is_quoted(tmp_path):
    settings = make_settings(changed("digits", data__mean=(0.5,), data__std=(0.25,)))
    line = shell_command(settings, tmp_path / "a run")
    assert "'--config.data.mean=(0.5,)'" in line
    python, script, *rest, workdir = shlex.split(line)
    assert (python, script, workdir) == ("python", "launch.py", f"--workdir={tmp_path / 'a run'}")
    assert parsed(rest).hash() == settings.hash()


@pytest.mark.medium
@pytest.mark.usefixtures("plugin_kinds")
def test_plugins_come_with_the_options_they_register():
    settings = make_settings(plugin_config(model__adapter="echo"))
    line = command_of(settings)
    assert "--config.plugins=examples.plugin" in line
    # A new process, because here the plugin is imported already.
    code = "import sys; from dgl_jax import cli; cli._parse(sys.argv); print(cli._config().hash())"
    process = subprocess.run(
        [sys.executable, "-c", code, *line],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split() == [settings.hash()], process.stderr


def test_flags_of_other_modes_are_refused():
    flag_modes.check("eval", ["mode", "workdir", "split", "checkpoint", "config"])
    flag_modes.check("plan", ["devices", "output"])
    with pytest.raises(UserError, match=r"^--devices: applies to --mode=plan, not to --mode=eval$"):
        flag_modes.check("eval", ["split", "devices"])
    with pytest.raises(
        UserError, match=r"^--checkpoint: applies to --mode=eval, predict or export"
    ):
        flag_modes.check("plot", ["checkpoint"])
    with pytest.raises(UserError, match=r"^--workdir: .* or report, not to --mode=bench$"):
        flag_modes.check("bench", ["workdir"])
    flag_modes.check("predict", ["config", "config.plugins"])
    with pytest.raises(UserError, match=r"^--config.seed: .* or sweep, not to --mode=predict$"):
        flag_modes.check("predict", ["config.seed"])


def test_modes_of_flags_are_the_documented_ones():
    page = Path(__file__).resolve().parents[1] / "docs" / "command_line.md"
    rows = re.findall(r"^\| (`--\w+.*?) \| (.*?) \|", page.read_text(), re.M)
    documented = {
        name: tuple(re.findall(r"`(\w+)`", modes))
        for names, modes in rows
        for name in re.findall(r"`--(\w+(?:\.GROUP)?)", names)
    }
    assert documented.pop("workdir") == ("bench",), "all but"
    several = ("distributed", "coordinator", "num_processes", "process_id")
    assert {documented.pop(name) for name in several} == {("train",)}  # see `_check_distributed`
    limited = {name: modes for name, modes in documented.items() if modes}
    assert limited == {n: modes for n, modes in flag_modes.MODES.items() if n != "workdir"}
    assert set(flag_modes.MODES) - {"config.GROUP"} <= set(cli.flags.FLAGS)
