"""Storage of compiled programs for later processes, and a meter of the time spent compiling."""

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from dgl_jax import system
from dgl_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_LIMIT = 2 * 2**30  # bytes of stored programs
_SECONDS = 0.0  # a run has few small programs, and together they take a second to compile
_TRACE = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
_COMPILE = "/jax/core/compile/backend_compile_duration"  # or reading the program from the cache
_HIT = "/jax/compilation_cache/cache_hits"
_imports = ""  # how long they took, in the line on the first step


def store_programs(chosen: str | None, threads: str) -> None:
    """Makes JAX store compiled programs in a folder, where later processes find them.

    A folder that cannot be written is reported, and then nothing is stored.

    Args:
      chosen: folder of the programs, "off" for none; None for the default, which leaves JAX's
        compilation cache alone if it has been set up or turned off elsewhere. Each kind of machine
        has a subfolder, so that machines can share the folder: programs for the CPU contain
        instructions that another processor may lack, and JAX does not compare processors.
      threads: number of threads of XLA's CPU pool, which the programs are compiled for.

    Raises:
      UserError: `chosen` is empty.
    """
    if chosen == "":
        raise UserError("--compilation_cache=: must be a folder, or off")
    config: Any = jax.config
    if chosen == "off":
        config.update("jax_enable_compilation_cache", False)
    if not config.jax_enable_compilation_cache or (
        chosen is None and config.jax_compilation_cache_dir is not None
    ):
        return
    folder = system.cache_dir() / "xla" if chosen is None else Path(chosen)
    machine = f"{system.processor()} {system.cpu_count()} {threads}"
    programs = folder / hashlib.sha256(machine.encode()).hexdigest()[:16]
    try:
        programs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=programs):
            pass
        if chosen is None and folder.parent.stat().st_uid != os.getuid():
            # Without a home directory it is a fixed name in /tmp, and programs are executed.
            raise PermissionError("it belongs to another user")
    except OSError as error:
        reason = error.strerror or error
        _LOG.warning(
            "%s: cannot write there (%s); compiled programs are not stored", folder, reason
        )
        return
    _shrink(folder, _LIMIT)
    config.update("jax_compilation_cache_dir", str(programs))
    if config.jax_persistent_cache_min_compile_time_secs == 1.0:  # JAX's default
        config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)


def imports_took(seconds: float | None) -> None:
    """Lets the line on the first step report the time that a command took before it began."""
    global _imports
    _imports = "" if seconds is None else f", after {seconds:.1f} s of imports"


def _shrink(folder: Path, limit: int) -> None:
    """Deletes the least recently used programs until the others fit into `limit` bytes.

    JAX's option for this needs another library and reads the folder for each program it stores.

    Args:
      folder: folder whose subfolders hold programs; its other files are left alone.
      limit: bytes.
    """
    files, total = [], 0
    programs = (p for p in folder.glob("*/*-cache") if re.fullmatch("[0-9a-f]{16}", p.parent.name))
    for path in programs:
        with suppress(OSError):  # another process may delete files too
            stat = path.stat()
            if path.is_file():
                files.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
                total += stat.st_size
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


class Compiling:
    """Meter of the time that this process spends tracing and compiling programs."""

    def __init__(self) -> None:
        self._begin, self._open, self._hits = time.monotonic(), True, 0
        self._traced: list[tuple[float, float]] = []
        self._compiled: list[tuple[float, float]] = []
        monitoring.register_event_time_span_listener(self._add_span)
        monitoring.register_event_listener(self._add_event)

    def log_first_step(self) -> bool:
        """Logs the time since the meter was made, and closes the meter; later calls do nothing.

        Returns:
          True at the first call.
        """
        if not self._open:
            return False
        self.close()
        seconds = time.monotonic() - self._begin
        _LOG.info("first step after %.1f s: %s%s", seconds, self.summary(), _imports)
        return True

    def summary(self) -> str:
        """Returns the seconds spent so far, and the number of programs."""
        compiling = _covered(self._compiled)
        tracing = _covered([*self._compiled, *self._traced]) - compiling
        return (
            f"tracing {tracing:.1f} s, compiling {compiling:.1f} s "
            f"({len(self._compiled)} programs, {self._hits} from the cache)"
        )

    @property
    def missed(self) -> int:
        """Returns the number of programs that were compiled and not read from the cache."""
        return len(self._compiled) - self._hits

    def close(self) -> None:
        """Stops measuring; later calls do nothing."""
        if self._open:
            self._open = False
            monitoring.unregister_event_time_span_listener(self._add_span)
            monitoring.unregister_event_listener(self._add_event)

    def _add_span(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event == _COMPILE:
            self._compiled.append((start_time, end_time))
        elif event in _TRACE:
            self._traced.append((start_time, end_time))

    def _add_event(self, event: str, **_: Any) -> None:
        self._hits += event == _HIT


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of the union of time spans: they nest, and threads overlap."""
    total, reached = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
