"""Tests of the storage of compiled programs, and of the time that a run reports for compiling."""

import json
import logging
import os
import random
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import FIELDS, records

from dgl_jax import system
from dgl_jax.errors import UserError
from dgl_jax.run import compiling
from dgl_jax.run.compiling import Compiling, store_programs

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """Sets JAX's options for the cache to their defaults; the open cache of the session stays."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (None, True, 1.0)):
        jax.config.update(name, value)
    monkeypatch.setattr(system, "cache_dir", lambda: tmp_path / "home")
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def chosen_folder() -> Path:
    return Path(jax.config.jax_compilation_cache_dir)


def test_programs_are_stored_in_the_cache_of_the_project(unset, tmp_path):
    store_programs(None, "16")
    assert chosen_folder().parent == tmp_path / "home" / "xla"
    assert chosen_folder().is_dir()
    assert not list(chosen_folder().iterdir())
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1


def test_folder_can_be_chosen_and_turned_off(unset, tmp_path):
    store_programs(str(tmp_path / "here"), "16")
    assert chosen_folder().parent == tmp_path / "here"
    store_programs("off", "16")
    assert not jax.config.jax_enable_compilation_cache
    assert not (tmp_path / "home").exists()


def test_settings_of_jax_take_precedence(unset, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    store_programs(None, "16")
    assert chosen_folder() == tmp_path / "jax"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    store_programs(None, "16")
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    store_programs(None, "16")
    assert jax.config.jax_compilation_cache_dir is not None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0


def test_machines_have_separate_folders(unset, tmp_path, monkeypatch):
    def folder(threads: str) -> Path:
        jax.config.update("jax_compilation_cache_dir", None)
        store_programs(str(tmp_path), threads)
        return chosen_folder()

    here = folder("16")
    assert folder("16") == here
    assert folder("8") != here
    text = Path("/proc/cpuinfo").read_text()
    monkeypatch.setattr(system, "_cpuinfo", lambda: text.replace("MHz\t\t: ", "MHz\t\t: 9"))
    assert folder("16") == here
    monkeypatch.setattr(system, "_cpuinfo", lambda: text.replace(" sse2", ""))
    assert folder("16") != here
    monkeypatch.setattr(system, "_cpuinfo", lambda: 1 / 0)
    assert folder("16") != here


@pytest.mark.parametrize("place", ["file", "below a file", "read only"])
def test_unusable_folder_is_one_log_line(place, unset, tmp_path, caplog):
    (tmp_path / "file").touch()
    folder = {"file": "file", "below a file": "file/xla", "read only": "/proc/xla"}[place]
    with caplog.at_level(logging.WARNING):
        store_programs(str(tmp_path / folder), "16")
    (message,) = caplog.messages
    assert "cannot write there" in message
    assert str(tmp_path / folder) in message
    assert jax.config.jax_compilation_cache_dir is None


def test_default_folder_of_another_user_is_not_used(unset, monkeypatch, caplog):
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with caplog.at_level(logging.WARNING):
        store_programs(None, "16")
    assert "belongs to another user" in caplog.text
    assert jax.config.jax_compilation_cache_dir is None


def test_least_recently_used_programs_are_deleted(tmp_path):
    machine, other = "0123456789abcdef", "f" * 16
    for age, name in enumerate((f"{machine}/new", f"{other}/middle", f"{machine}/old")):
        path = tmp_path / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    # Files of the user in the same folder are not programs, however old they are.
    foreign = [tmp_path / name for name in ("a-cache", "runs/b-cache", f"{machine}/c", "d/e/f")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (1e8, 1e8))

    def left():
        return sorted(p.name for p in set(tmp_path.glob("*/*-cache")) - set(foreign))

    for limit, names in (
        (300, ["middle-cache", "new-cache", "old-cache"]),
        (299, ["middle-cache", "new-cache"]),
        (150, ["new-cache"]),
        (0, []),
    ):
        compiling._shrink(tmp_path, limit)
        assert left() == names
        assert all(path.exists() for path in foreign)


def test_stored_programs_are_found_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    with pytest.raises(UserError, match=r"^--compilation_cache=: must be a folder, or off$"):
        compiling.store_programs("", "16")
    compiling.store_programs(str(tmp_path), "16")
    (programs,) = tmp_path.iterdir()
    stored = [path.name for path in Path(jax.config.jax_compilation_cache_dir).iterdir()]
    assert stored  # of this session
    assert all(name.endswith("-cache") for name in stored)
    for name in stored[:3]:
        (programs / name).write_bytes(b"")
    compiling._shrink(tmp_path, -1)
    assert list(programs.iterdir()) == []


def test_meter_counts_programs_and_hits():
    x = jnp.ones(3)  # computed before

    def compiled(function) -> str:
        with closing(Compiling()) as meter:
            jax.jit(function)(x)
        jax.jit(lambda y: y - 4321.25)(x)  # a closed meter counts nothing
        return meter.summary().split(" (")[1]

    number = random.random()  # a program that no earlier session has stored

    def function(y):
        return jnp.sin(y) * number

    assert compiled(function) == "1 programs, 0 from the cache)"
    jax.clear_caches()
    assert compiled(function) == "1 programs, 1 from the cache)"


def test_meter_counts_nested_and_overlapping_spans_once():
    meter = Compiling()
    for begin, end in ((0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 9.0)):
        meter._add_span(compiling._TRACE[0], begin, end)
    meter._add_span(compiling._COMPILE, 4.0, 8.0)
    meter.close()
    assert meter.summary().startswith("tracing 5.0 s, compiling 4.0 s (1 programs")


def command(workdir: Path, cache: Path) -> list[str]:
    fields = FIELDS | {"train.steps": 6}
    return [
        *(sys.executable, "launch.py", "--config=digits", f"--workdir={workdir}"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
        f"--compilation_cache={cache}",
    ]


def programs(log: str) -> tuple[int, int]:
    """Returns the numbers of all programs, and of those from the cache, that a log reports."""
    (counts,) = re.findall(
        r"first step after [\d.]+ s: tracing [\d.]+ s, compiling [\d.]+ s "
        r"\((\d+) programs, (\d+) from the cache\)",
        log,
    )
    return int(counts[0]), int(counts[1])


@pytest.mark.slow
def test_runs_with_stored_programs_equal_the_first_one(tmp_path):
    cache = tmp_path / "cache"

    def run(*names: str) -> list[tuple[int, int, str]]:
        """Starts runs at the same time; returns what each reports, and its log."""
        processes = [
            subprocess.Popen(
                command(tmp_path / name, cache),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in names
        ]
        logs = [process.communicate(timeout=300)[1] for process in processes]
        assert not any(process.returncode for process in processes), logs
        return [(*programs(log), log) for log in logs]

    run("first", "second")
    entries = [path for path in cache.rglob("*-cache")]
    assert len(entries) > 10
    ((count, hits, log),) = run("third")
    assert hits == count
    assert "Error" not in log
    assert "SIGILL" not in log
    for path in entries:
        path.write_bytes(path.read_bytes()[:-100])
    ((count, hits, log),) = run("fourth")
    assert "Error reading persistent compilation cache entry" in log
    assert hits < count
    parameters = [records(tmp_path / name) for name in ("first", "second", "third", "fourth")]
    assert all(lines == parameters[0] for lines in parameters)
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "third")
    ]
    assert summaries[0]["modules"] == summaries[1]["modules"]
