"""Optional questions to the operating system, JAX and XLA; None means the answer is unknown.

Accelerator plug-ins answer less than the CPU backend: `cost_analysis()` and `memory_analysis()` may
return None, `memory_stats()` may lack keys, and any of them may raise. macOS has no CPU affinity,
Windows no `resource`, some file systems no locks. Only this file asks such questions, and its
functions never raise.
"""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_POOL = 16  # fewest threads of XLA's CPU pool; machines with more processors get one per processor


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device in bytes; None if unknown.

    Attributes:
      free: bytes that programs can still allocate.
      limit: bytes that programs can allocate in total.
      peak: most bytes that were ever in use.
    """

    free: int | None = None
    limit: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class ProgramPlan:
    """Memory that XLA plans for a compiled program, in bytes.

    Attributes:
      arguments: inputs, including donated ones.
      outputs: results, including those that reuse the memory of donated inputs.
      donated: the part of `outputs` that reuses the memory of donated inputs.
      temporary: scratch memory.
    """

    arguments: int
    outputs: int
    donated: int
    temporary: int


def usable_cpus() -> list[int] | None:
    """Returns the numbers of the processors that this process may use."""
    return _answer(lambda: os.sched_getaffinity(0), sorted)


def machine_cpus() -> int | None:
    """Returns the number of processors of the machine."""
    return _answer(os.cpu_count)


def cpu_count() -> int | None:
    """Returns the number of processors this process may use, or else that of the machine."""
    usable = usable_cpus()
    return len(usable) if usable else machine_cpus()


def pool_threads() -> int:
    """Returns the usual number of threads of XLA's CPU pool, unless NPROC chooses another.

    XLA splits the sums of weight gradients over these threads, so their number decides how the sums
    are rounded.
    """
    return max(_POOL, cpu_count() or 1)


def cpu_devices_of_environment() -> int:
    """Returns the number of CPU devices that the environment asks JAX or XLA for; 0 if none."""
    name = "--xla_force_host_platform_device_count"
    flags = re.findall(rf"{name}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    asked = _answer(lambda: int(os.environ.get("JAX_NUM_CPU_DEVICES", "")))
    return max(asked or 0, int(flags[-1]) if flags else 0)


def environment() -> dict[str, str]:
    """Returns a copy of the environment variables, to start a child process with."""
    return dict(os.environ)


def hide_loader_errors() -> None:
    """Hides false errors about stored programs; call it before JAX is imported.

    When jaxlib 0.10 loads a program, it may warn of illegal instructions although the program was
    compiled on this machine: it takes two preferences of LLVM for instructions (openxla/xla issue
    44565). Such errors can only be hidden together with all others that XLA logs for the CPU, which
    it also raises. Nothing is hidden if TF_CPP_MIN_LOG_LEVEL differs from JAX's default, 1, or an
    accelerator's plug-in is installed.
    """
    plugins = _answer(lambda: [*importlib.metadata.entry_points(group="jax_plugins")])
    accelerator = plugins or any(
        _answer(partial(importlib.util.find_spec, name)) for name in ("jax_plugins", "libtpu")
    )
    version = _answer(lambda: importlib.metadata.version("jaxlib")) or ""
    # A parent process that has imported JAX passes the default on.
    usual = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1"
    if version.startswith("0.10.") and usual and not accelerator:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def cpu_threads() -> int | None:
    """Returns the number of threads in XLA's pool for CPU devices; None before JAX has devices.

    The number affects the rounding of long sums.
    """
    return _answer(_thread_names, lambda names: names.count("tf_XLAEigen") or None)


def processor() -> str:
    """Returns a text that differs between processors that do not have the same instructions."""
    text = (_answer(_cpuinfo) or platform.processor()).lower()
    # The lines of x86 and ARM that describe the model and its extensions, without clock speeds.
    kinds = ("model", "flags", "features", "cpu family", "cpu implementer", "cpu part")
    lines = {line for line in text.splitlines() if line.startswith(kinds)}
    return "\n".join([platform.machine(), *sorted(lines or {text})])


def free_memory() -> int | None:
    """Returns the bytes of host memory that can be allocated without swapping."""
    available = _answer(
        _meminfo, lambda text: 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    )
    if available is not None:
        return available
    pages, size = (_answer(partial(_sysconf, name)) for name in ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE"))
    # -1 means that the system does not know.
    return pages * size if pages and size and min(pages, size) > 0 else None


def process_peak() -> int | None:
    """Returns the most bytes of host memory that this process has ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _answer(_usage, lambda usage: unit * usage.ru_maxrss)


def process_age() -> float | None:
    """Returns the seconds since this process was started."""

    def read(texts: tuple[str, str]) -> float:
        stat, uptime = texts
        # The 22nd field: the name of the command, which is the second, may contain spaces.
        ticks = int(stat.rpartition(")")[2].split()[19])
        return max(0.0, float(uptime.split()[0]) - ticks / _sysconf("SC_CLK_TCK"))

    return _answer(_process_start, read)


def device_kind(device: Any) -> str:
    """Returns the model name of a device, such as "NVIDIA H100 80GB HBM3", or else its platform."""
    return _answer(lambda: device.device_kind, str) or str(device.platform)


def device_memory(device: Any) -> DeviceMemory:
    """Returns the memory of a JAX device; for a CPU device that of the host."""
    if device.platform == "cpu":
        return DeviceMemory(free=free_memory(), peak=process_peak())
    stats = _answer(lambda: device.memory_stats(), dict) or {}
    limit, used, peak = (
        _answer(partial(stats.get, key), int)
        for key in ("bytes_limit", "bytes_in_use", "peak_bytes_in_use")
    )
    return DeviceMemory(
        None if limit is None or used is None else max(0, limit - used), limit, peak
    )


def peak_memory(devices: Iterable[Any]) -> dict[str, int | None] | None:
    """Returns the most bytes ever in use on each JAX device, such as `{"gpu:0": 1048576}`.

    Args:
      devices: JAX devices of one platform.

    Returns:
      Bytes by platform and number, None for a device that does not tell; None instead of the
      dictionary for CPU devices, which have no memory of their own.
    """
    ordered = sorted(devices, key=lambda device: device.id)
    if any(device.platform == "cpu" for device in ordered):
        return None
    return {f"{device.platform}:{device.id}": device_memory(device).peak for device in ordered}


def host_device() -> Any | None:
    """Returns JAX's first CPU device; None if JAX_PLATFORMS excludes the CPU (such as `cuda`)."""
    return _answer(_cpu_devices, lambda devices: devices[0])


def fullest_device() -> tuple[str, DeviceMemory] | None:
    """Returns name and memory of the local device with the least free memory; None if unknown."""

    def read(devices: Any) -> list[tuple[str, DeviceMemory]]:
        return [(f"{device.platform}:{device.id}", device_memory(device)) for device in devices]

    known = [
        (name, memory)
        for name, memory in _answer(_local_devices, read) or ()
        if memory.free is not None
    ]
    return min(known, key=lambda entry: entry[1].free or 0, default=None)


def program_plan(program: Any) -> ProgramPlan | None:
    """Returns the memory plan of a compiled JAX program (`jax.stages.Compiled`)."""

    def read(plan: Any) -> ProgramPlan:
        names = ("argument_size", "output_size", "alias_size", "temp_size")
        return ProgramPlan(*(int(getattr(plan, f"{name}_in_bytes")) for name in names))

    return _answer(lambda: program.memory_analysis(), read)


def _answer(ask: Callable[[], Any], read: Callable[[Any], T] = lambda answer: answer) -> T | None:
    """Returns `read(ask())`; None if the answer is None or malformed, or if either call raises."""
    try:
        answer = ask()
        return None if answer is None else read(answer)
    except Exception:  # plug-ins raise exception types of their own
        return None


def _local_devices() -> Any:
    import jax  # not at the top, so that a mistyped flag is reported without this slow import

    return jax.local_devices()


def _thread_names() -> list[str]:
    names = []
    for task in os.listdir("/proc/self/task"):
        with (
            suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{task}/comm") as file,
        ):
            names.append(file.read().strip())
    return names


def _cpu_devices() -> Any:
    import jax

    return jax.local_devices(backend="cpu")


def _meminfo() -> str:
    with open("/proc/meminfo") as file:
        return file.read()


def _cpuinfo() -> str:
    with open("/proc/cpuinfo") as file:
        return file.read()


def _process_start() -> tuple[str, str]:
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        stat = file.read()
    with open("/proc/uptime", encoding="utf-8") as file:
        return stat, file.read()


def _sysconf(name: str) -> int:
    return os.sysconf(name)


def _usage() -> Any:
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF)


def flock(file: IO[Any], name: str, seconds: float | None = None) -> bool:
    """Locks an open file against other processes until it is closed.

    Args:
      file: the file.
      name: what is locked, for the log: where files cannot be locked, a line says so.
      seconds: how long to wait for another process; None: until it ends.

    Returns:
      False if another process holds the lock.
    """
    import fcntl  # missing on Windows

    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if deadline is None or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
            continue
        except OSError as error:  # such as a network file system without locks
            _LOG.warning("%s: cannot be locked (%s)", name, error.strerror)
        return True


def cache_dir() -> Path:
    """Returns the project's cache directory: prepared data sets (`tfds/`), decoded images, labels.

    It is `~/.cache/dgl_jax`. Without a writable home directory, as for some users in containers, it
    lies in the system's directory for temporary files.
    """
    home = Path(os.path.expanduser("~"))
    cache = home / ".cache" / "dgl_jax"
    if home.is_absolute():
        # `os.path` answers False where `Path` raises, below a home of another user.
        parent = cache.parent if os.path.isdir(cache.parent) else home
        if os.path.isdir(cache) or os.access(parent, os.W_OK):
            return cache
    return Path(tempfile.gettempdir()) / f"dgl_jax-{os.getuid()}"
