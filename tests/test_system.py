"""Optional questions to the system: correct answers, None if unknown, and no other file asks."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dgl_jax import system
from dgl_jax.system import DeviceMemory, ProgramPlan

ROOT = Path(__file__).parent.parent
QUESTIONS = (
    r"\bcost_analysis\b|\bmemory_analysis\b|\bmemory_stats\b|\bdevice_kind\b|meminfo"
    r"|sched_getaffinity|\bcpu_count\b|getrusage|local_devices\(backend|\bimport resource\b"
    r"|\bsysconf\b"
)
# `accelerator.py` replaces the answers, this file tests them, and the benchmark sets its CPU
# affinity before anything may be imported.
MAY_ASK = {
    "dgl_jax/system.py",
    "tests/test_system.py",
    "tests/accelerator.py",
    "benchmarks/vq_speed/run.py",
}


def asks(text):
    """Returns the optional questions in a file, except calls of `system`."""
    return re.findall(QUESTIONS, re.sub(r"\bsystem\.\w+|\bsystem, \"\w+\"", "", text))


def test_only_system_asks_optional_questions():
    folders = ("dgl_jax", "tests", "benchmarks", "examples", "configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files.append(ROOT / "launch.py")
    assert len(files) > 100
    questions = {str(path.relative_to(ROOT)): asks(path.read_text()) for path in files}
    assert {name: asked for name, asked in questions.items() if asked and name not in MAY_ASK} == {}


@pytest.mark.parametrize(
    "source",
    [
        "plan = program.memory_analysis()",
        "device.device_kind",
        "min(16, len(os.sched_getaffinity(0)))",
        "os.cpu_count() or 1",
        "import resource",
        'open("/proc/meminfo")',
    ],
)
def test_twin_a_question_elsewhere_is_noticed(source):
    assert asks(source)
    assert not asks("system.device_kind(d); system.cpu_count()")


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 0),
        ({"JAX_NUM_CPU_DEVICES": "12"}, 12),
        ({"JAX_NUM_CPU_DEVICES": "abc"}, 0),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3 --xla_a=b"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_NUM_CPU_DEVICES": "2"}, 3),
    ],
)
def test_devices_may_be_asked_for_in_the_environment(variables, count, monkeypatch):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert system.cpu_devices_of_environment() == count


def test_answers_on_this_machine_are_correct():
    assert system.usable_cpus() == sorted(os.sched_getaffinity(0))
    assert system.cpu_count() == len(os.sched_getaffinity(0))
    assert system.machine_cpus() == os.cpu_count()
    assert system.free_memory() > 2**20
    assert (
        system.process_peak() >= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - 2**20
    )
    (device, *_) = jax.devices()
    assert system.device_kind(device) == "cpu"
    memory = system.device_memory(device)
    assert (memory.free > 2**20, memory.limit, memory.peak > 2**20) == (True, None, True)
    program = jax.jit(lambda x, y: (x + 1, jnp.sort(y)), donate_argnums=0)
    shapes = (jax.ShapeDtypeStruct((n,), "float32") for n in (1024, 256))
    plan = system.program_plan(program.lower(*shapes).compile())
    assert (plan.arguments, plan.donated) == (4096 + 1024, 4096)
    assert plan.outputs == pytest.approx(4096 + 1024, abs=64)  # plus a few pointers


def test_age_of_a_process_counts_from_its_start(monkeypatch):
    before = time.monotonic()
    code = "import time; from dgl_jax import system; print(system.process_age())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert 0 < float(child.stdout) <= time.monotonic() - before + 2 * tick
    # The 22nd field counts from the start of the machine, in ticks of 1/100 s; names may be odd.
    stat = "12 (a) b (c) S " + " ".join(["7"] * 18) + " 250 8 9\n"
    monkeypatch.setattr(system, "_process_start", lambda: (stat, "10.25 99.0\n"))
    monkeypatch.setattr(system, "_sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    assert system.process_age() == 7.75
    monkeypatch.setattr(system, "_process_start", lambda: ("12 (a) S 7", "10.25\n"))
    assert system.process_age() is None


class Device:
    """Fake device with given answers; an answer that is a function is called."""

    platform = "cuda"

    def __init__(self, stats=None, kind=None):
        self._stats, self._kind = stats, kind

    def memory_stats(self):
        return _value(self._stats)

    @property
    def device_kind(self):
        return _value(self._kind)


def _value(answer):
    return answer() if callable(answer) else answer


def fails():
    raise NotImplementedError("UNIMPLEMENTED: not on this plug-in")


@pytest.mark.parametrize(
    ("stats", "memory"),
    [
        (
            {"bytes_limit": 1000, "bytes_in_use": 300, "peak_bytes_in_use": 500},
            DeviceMemory(700, 1000, 500),
        ),
        ({"bytes_limit": 1000, "bytes_in_use": 1200}, DeviceMemory(0, 1000)),
        ({"bytes_limit": 1000}, DeviceMemory(None, 1000)),
        ({"bytes_in_use": 300, "peak_bytes_in_use": 0}, DeviceMemory(None, None, 0)),
        ({"bytes_limit": None, "bytes_in_use": 3}, DeviceMemory()),
        ({}, DeviceMemory()),
        (None, DeviceMemory()),
        (3, DeviceMemory()),
        (fails, DeviceMemory()),
    ],
)
def test_device_memory_is_none_where_stats_are_missing(stats, memory):
    assert system.device_memory(Device(stats)) == memory


def test_peak_memory_is_asked_of_every_device_except_the_cpu():
    known, unknown, host = (Device({"peak_bytes_in_use": 500}), Device(None), Device(None))
    known.id, unknown.id, host.id, host.platform = 1, 0, 0, "cpu"
    assert system.peak_memory([known, unknown]) == {"cuda:0": None, "cuda:1": 500}
    assert system.peak_memory([host]) is None


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5e", "TPU v5e"), (None, "cuda"), ("", "cuda"), (fails, "cuda")]
)
def test_device_kind_falls_back_to_the_platform(kind, name):
    assert system.device_kind(Device(kind=kind)) == name


def plan(**fields):
    sizes = {
        f"{name}_size_in_bytes": n
        for n, name in enumerate(("argument", "output", "alias", "temp"), 1)
    } | fields
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))


def test_program_plan_is_none_if_the_analysis_is_incomplete():
    assert system.program_plan(plan()) == ProgramPlan(1, 2, 3, 4)
    assert system.program_plan(plan(temp_size_in_bytes=None)) is None
    assert system.program_plan(SimpleNamespace(memory_analysis=lambda: None)) is None
    assert system.program_plan(SimpleNamespace(memory_analysis=lambda: SimpleNamespace())) is None
    assert system.program_plan(SimpleNamespace(memory_analysis=fails)) is None


def test_answers_fall_back_on_systems_that_know_less(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert system.usable_cpus() is None
    assert system.cpu_count() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.cpu_count() is None
    monkeypatch.setitem(__import__("sys").modules, "resource", None)  # Windows
    assert system.process_peak() is None
    monkeypatch.setattr(system, "_meminfo", lambda: "MemTotal: 3 kB\n")
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert system.free_memory() == 5 * 4096
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    assert system.free_memory() is None
    monkeypatch.delattr(os, "sysconf")
    assert system.free_memory() is None
    monkeypatch.setattr(
        system, "_meminfo", lambda: "MemTotal: 9 kB\nMemAvailable:    7 kB\nSwap: 1 kB\n"
    )
    assert system.free_memory() == 7 * 1024


def test_host_device_is_none_without_a_cpu_backend(monkeypatch):
    assert system.host_device().platform == "cpu"

    def unknown(backend):
        raise RuntimeError(f"Unknown backend {backend}")  # JAX_PLATFORMS=cuda

    monkeypatch.setattr(jax, "local_devices", unknown)
    assert system.host_device() is None


@pytest.mark.parametrize(
    ("version", "plugin", "chosen", "level"),
    [
        ("0.10.0", None, None, "3"),
        ("0.10.2", None, "1", "3"),
        ("0.12.0", None, None, None),
        ("0.10.0", "entry point", None, None),
        ("0.10.0", "jax_plugins", None, None),
        ("0.10.0", "libtpu", None, None),
        ("0.10.0", None, "0", "0"),
    ],
)
def test_errors_of_xla_are_hidden_only_where_they_are_false(
    monkeypatch, version, plugin, chosen, level
):
    monkeypatch.setattr(os, "environ", {} if chosen is None else {"TF_CPP_MIN_LOG_LEVEL": chosen})
    entries = ["cuda"] if plugin == "entry point" else []
    metadata = SimpleNamespace(version=lambda _: version, entry_points=lambda group: entries)
    util = SimpleNamespace(find_spec=lambda name: name if name == plugin else None)
    monkeypatch.setattr(system, "importlib", SimpleNamespace(metadata=metadata, util=util))
    system.hide_loader_errors()
    assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == level


def test_process_peak_converts_the_unit_of_each_platform(monkeypatch):
    monkeypatch.setattr(system, "_usage", lambda: SimpleNamespace(ru_maxrss=5))
    for platform, bytes_ in (("linux", 5 * 1024), ("darwin", 5)):
        monkeypatch.setattr(system.sys, "platform", platform)
        assert system.process_peak() == bytes_


def test_keyboard_interrupt_is_not_suppressed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        system.device_memory(Device(interrupted))
