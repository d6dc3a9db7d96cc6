"""Lookup of the file that `--config` names, and expansion of `~` in the paths of a command line."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgl_jax.config.fields import expand
from dgl_jax.data import cache
from dgl_jax.errors import UserError
from dgl_jax.run import workdir
from dgl_jax.run.workdir import with_own_config
from dgl_jax.tools.config_files import SHIPPED, resolve, with_files, with_plugins

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process, without the current directory on its path."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_shipped_configurations_are_the_folder_at_the_root():
    assert SHIPPED.resolve() == (ROOT / "configs").resolve()


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py", "configs/digits"])
def test_a_shipped_configuration_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == f"{SHIPPED / 'digits.py'}"
    assert resolve(f"{name}:an:argument") == f"{SHIPPED / 'digits.py'}:an:argument"


def test_user_files_take_precedence_over_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("digits.py", "configs/digits.py", "mine.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
        assert resolve(name) == name
    assert resolve("~/mine.py") == str(tmp_path / "mine.py")
    (tmp_path / "digits").mkdir()  # a directory, such as a workdir, is not a configuration
    assert resolve("digits") == f"{SHIPPED / 'digits.py'}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit",
            "--config=digit: neither a file nor a configuration of dgl_jax; did you mean digits",
        ),
        ("configs/digit.py", "did you mean digits"),
        ("zzz", "there are: cifar10, cifar10_modern, "),
        (
            "~nobody-of-that-name/x.py",
            "--config=~nobody-of-that-name/x.py: the home directory ~nobody-of-that-name is not ",
        ),
    ],
)
def test_a_mistyped_name_lists_similar_ones(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_shared_settings_are_not_a_configuration(tmp_path, monkeypatch):
    assert (SHIPPED / "bases" / "__init__.py").exists()
    monkeypatch.chdir(tmp_path)
    for name in ("bases", "bases.py", "configs/bases", "configs/bases.py"):
        with pytest.raises(
            UserError, match=f"--config={name}: neither a file nor a configuration of dgl_jax"
        ):
            resolve(name)


@pytest.mark.parametrize(
    "flags",
    [["--workdir=run"], ["-workdir=run"], ["--workdir", "run"], ["--workdir=a", "--workdir=run"]],
)
def test_both_forms_of_the_workdir_give_its_configuration(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    override = "--config.data.batch_size=32"
    with pytest.raises(UserError, match=f"^{override}: which configuration?"):
        with_own_config(["launch.py", *flags, override])
    (tmp_path / "run" / "config.json").write_text("{}")
    name, added, *rest = with_own_config(["launch.py", *flags, override])
    assert (name, rest) == ("launch.py", [*flags, override])
    assert added == f"--config={workdir.__file__}:run"


@pytest.mark.parametrize("flags", [["--mode=sweep"], ["--mode", "sweep"]])
def test_both_forms_of_the_mode_give_the_default_configuration(flags):
    line = ["launch.py", *flags, "--config.seed=1"]
    assert with_own_config(line) == [line[0], f"--config={workdir.__file__}:", *line[1:]]


def test_both_forms_of_the_plugins_are_imported():
    for flags in (["--config.plugins=json,math"], ["--config.plugins", "(json, math)"]):
        *_, last = with_plugins(["launch.py", *flags])
        assert last.removeprefix("--config.plugins=") == "('json', 'math')"


def test_both_forms_of_the_flag_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = f"{SHIPPED / 'digits.py'}"
    argv = [
        "launch.py",
        "--config.seed=1",
        "--config=digits",
        "-config=digits",
        "--config",
        "digits",
        "digits",
    ]
    expected = [
        "launch.py",
        "--config.seed=1",
        f"--config={digits}",
        f"-config={digits}",
        "--config",
        digits,
        "digits",
    ]
    assert with_files(argv) == expected


@pytest.mark.medium
def test_a_copied_configuration_needs_no_package_called_configs(tmp_path):
    """Checks a copy of a configuration that builds on another one, in a fresh process."""
    shutil.copy(SHIPPED / "cifar10_modern.py", tmp_path / "mine.py")
    code = (
        "import sys; sys.path.insert(0, '.'); import mine; "
        "print(mine.get_config().train.ema, 'configs' in sys.modules)"
    )
    done = python(code, cwd=tmp_path)
    assert done.stdout == "0.999 False\n", done.stderr


FLAGS = """
import json
from dgl_jax import cli
cli._parse(["dgl-jax", *json.loads({arguments!r})])
flags = cli._WORKDIR, cli._INIT_FROM, cli._OUTPUT, cli._IMAGES, cli._TIMES
print(json.dumps([flag.value for flag in flags]))
"""


def test_tilde_is_expanded_in_every_path_of_a_command_line():
    paths = [
        "--workdir=~/a",
        "--init_from",
        "~",
        "--output=~/b.csv",
        "--images=~/*.png",
        "--images=x~",
        "--block_times=~/t",
    ]
    done = python(FLAGS.format(arguments=json.dumps(paths)), HOME="/homes/h")
    expected = ["/homes/h/a", "/homes/h", "/homes/h/b.csv", ["/homes/h/*.png", "x~"], "/homes/h/t"]
    assert json.loads(done.stdout) == expected, done.stderr


@pytest.fixture
def homeless(monkeypatch):
    """Simulates a user without HOME and without a system entry, as in some containers."""

    def nobody(_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_an_unknown_home_directory_is_reported(homeless, tmp_path, monkeypatch):
    with pytest.raises(
        UserError,
        match="--workdir=~/runs: the home directory ~ is not known here; write the path in full",
    ):
        expand("~/runs", "--workdir")
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()  # a directory whose name is a tilde
    assert expand("~", "--workdir") == "~"
    assert expand("/a/~", "--workdir") == "/a/~"


def test_without_a_home_the_cache_is_in_the_temporary_directory(homeless, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache.cache_dir() == tmp_path / f"dgl_jax-{os.getuid()}"


def test_with_a_read_only_home_the_cache_is_in_the_temporary_directory(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for home in ("/", "", str(tmp_path / "nowhere")):
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr(os, "access", lambda *_: False)  # root could write everywhere
        assert cache.cache_dir() == tmp_path / f"dgl_jax-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path))
    existing = tmp_path / ".cache" / "dgl_jax"
    existing.mkdir(parents=True)  # an existing cache is used even if it is read-only
    assert cache.cache_dir() == existing


def test_with_an_unreadable_home_the_cache_is_in_the_temporary_directory(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("/.cache"))
    assert cache.cache_dir() == tmp_path / f"dgl_jax-{os.getuid()}"  # ~/.cache cannot be written

    def stat(path, *args, **kwargs):
        if "/home/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return os_stat(path, *args, **kwargs)

    os_stat = os.stat
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache.cache_dir() == tmp_path / f"dgl_jax-{os.getuid()}"
