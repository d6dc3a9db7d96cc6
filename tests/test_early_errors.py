"""Errors that a process of a distributed run finds before it is connected to the others."""

import os
import threading

import pytest

from dgl_jax.engines import world
from dgl_jax.errors import UserError, reported
from dgl_jax.tools.early_errors import told

WORLD = ("--coordinator=host:1", "--num_processes=3", "--process_id=2")


@pytest.fixture
def reports(monkeypatch):
    """Returns what is reported to other processes: how this one would join, and the message."""
    seen = []

    def join(*where, bind, on_cpu):
        assert bind
        seen.append((*where, on_cpu))

    def fail_early(join, message):
        join()
        seen.append(message)

    monkeypatch.setattr(world, "join", join)
    monkeypatch.setattr(world, "fail_early", fail_early)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    return seen


def leave(*flags):
    with pytest.raises(SystemExit) as leaving, told(["launch.py", *flags]), reported():
        raise UserError("a   mistake\nin two lines")
    return leaving.value.code


def test_the_others_are_told_with_the_flags_of_a_wrong_command_line(reports):
    flags = ("--no_such_flag", "word", "--distributed", *WORLD, "--cpu_devices=1", "--workdir=x")
    assert leave(*flags) == 2
    assert reports == [("host:1", 3, 2, True), "a mistake in two lines"]


def test_other_ways_to_write_the_flags(reports):
    leave("-distributed=true", "-coordinator", "host:1", "--num_processes", "3", "--process_id=0")
    assert reports == [("host:1", 3, 0, False), "a mistake in two lines"]


def test_the_environment_of_a_cluster_is_used_without_an_address(reports):
    leave("--distributed")
    assert reports[0] == (None, None, None, False)


def test_an_unusable_address_leaves_the_exit_code(reports):
    assert leave("--distributed", "--coordinator=host:1", "--process_id=two") == 2
    assert reports == []


@pytest.mark.parametrize(
    "flags",
    [
        WORLD,
        ("--distributed=false", *WORLD),
        ("--distributed", "--nodistributed", *WORLD),
        ("--distributed", "--mode=eval", *WORLD),
        (),
    ],
)
def test_a_run_of_one_process_tells_nobody(reports, flags):
    assert leave(*flags) == 2
    assert reports == []


def test_an_ordinary_exit_tells_nobody(reports):
    for code in (0, 130):
        with pytest.raises(SystemExit), told(["launch.py", "--distributed", *WORLD]):
            raise SystemExit(code)
    assert reports == []


def test_a_process_waits_for_the_others_only_for_a_while(monkeypatch, capsys):
    """Exits with 2 though the others never come, and prints nothing more."""
    codes, never = [], threading.Event()
    monkeypatch.setattr(world._State, "told", False)
    monkeypatch.setattr(os, "_exit", codes.append)
    world.fail_early(never.wait, "a mistake", seconds=0.01)
    assert codes == [2]
    assert world._State.told
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(world, "_SILENT_SECONDS", 0.01)
    world.fail_early(never.wait, "a mistake", seconds=0.02)
    assert capsys.readouterr() == ("", "telling the other processes (0.02 s at most)\n")
    never.set()
