"""Asks the operating system, JAX and XLA what they may leave unanswered; None means unknown.

Accelerator plug-ins answer less than the CPU's: `cost_analysis()` and `memory_analysis()` may be None, `memory_stats()` lack keys,
and any of them may raise. macOS has no CPU affinity, Windows no `resource`. No other file asks; a caller never sees an exception.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory; None where unknown.

    Attributes:
      free: that programs can still take.
      limit: that they can take in all.
      peak: most that was ever in use.
    """

    free: int | None = None
    limit: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class ProgramPlan:
    """Bytes that XLA plans for a compiled program.

    Attributes:
      arguments: taken by its inputs, donated ones included.
      outputs: taken by its results, those in donated inputs included.
      donated: of `outputs`, in the place of donated inputs.
      temporary: scratch.
    """

    arguments: int
    outputs: int
    donated: int
    temporary: int


def usable_cpus() -> list[int] | None:
    """Returns the numbers of the processors that this process may use."""
    return _answer(lambda: os.sched_getaffinity(0), sorted)


def machine_cpus() -> int | None:
    """Returns how many processors the machine has."""
    return _answer(os.cpu_count)


def cpu_count() -> int | None:
    """Returns how many processors this process may use; those of the machine where no more is known."""
    usable = usable_cpus()
    return len(usable) if usable else machine_cpus()


def cpu_threads() -> int | None:
    """Returns how many threads XLA's pool for CPU devices has, once JAX has devices: they decide how long sums are rounded."""
    return _answer(_thread_names, lambda names: names.count("tf_XLAEigen") or None)


def free_memory() -> int | None:
    """Returns the bytes of host memory that can be taken without swapping."""
    available = _answer(
        _meminfo, lambda text: 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    )
    if available is not None:
        return available
    pages, size = (_answer(partial(_sysconf, name)) for name in ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE"))
    return (
        pages * size if pages and size and min(pages, size) > 0 else None
    )  # -1: the system does not tell


def process_peak() -> int | None:
    """Returns the most bytes of host memory that this process has ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _answer(_usage, lambda usage: unit * usage.ru_maxrss)


def device_kind(device: Any) -> str:
    """Returns the name of a device's model, such as "NVIDIA H100 80GB HBM3"; that of its platform where it has none."""
    return _answer(lambda: device.device_kind, str) or str(device.platform)


def device_memory(device: Any) -> DeviceMemory:
    """Returns the memory of a JAX device; a CPU's is the host's."""
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


def host_device() -> Any | None:
    """Returns JAX's first CPU device; None where JAX_PLATFORMS leaves out the CPU, as JAX_PLATFORMS=cuda does."""
    return _answer(_cpu_devices, lambda devices: devices[0])


def fullest_device() -> tuple[str, DeviceMemory] | None:
    """Returns name and memory of the device of this process with the least free; None where none tells."""

    def read(devices: Any) -> list[tuple[str, DeviceMemory]]:
        return [(f"{device.platform}:{device.id}", device_memory(device)) for device in devices]

    known = [
        (name, memory)
        for name, memory in _answer(_local_devices, read) or ()
        if memory.free is not None
    ]
    return min(known, key=lambda found: found[1].free or 0, default=None)


def program_plan(program: Any) -> ProgramPlan | None:
    """Returns the memory plan of a compiled JAX program (`jax.stages.Compiled`)."""

    def read(plan: Any) -> ProgramPlan:
        names = ("argument_size", "output_size", "alias_size", "temp_size")
        return ProgramPlan(*(int(getattr(plan, f"{name}_in_bytes")) for name in names))

    return _answer(lambda: program.memory_analysis(), read)


def _answer(ask: Callable[[], Any], read: Callable[[Any], T] = lambda answer: answer) -> T | None:
    """Returns what is read out of an answer; None where it is None, holds something else, or asking raises."""
    try:
        answer = ask()
        return None if answer is None else read(answer)
    except Exception:  # plug-ins raise kinds of their own
        return None


def _local_devices() -> Any:
    import jax  # here: a mistyped flag need not wait for it

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


def _sysconf(name: str) -> int:
    return os.sysconf(name)


def _usage() -> Any:
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF)


def cache_dir() -> Path:
    """Returns where the project keeps what it can make again: prepared data sets (`tfds/`), decoded images, labels.

    Below the home directory; where there is none that can be written, as under a user without one in a container, below the
    system's directory of temporary files.
    """
    home = Path(os.path.expanduser("~"))
    kept = home / ".cache" / "dgl_jax"
    if home.is_absolute() and (kept.is_dir() or os.access(home, os.W_OK)):
        return kept
    return Path(tempfile.gettempdir()) / f"dgl_jax-{os.getuid()}"
