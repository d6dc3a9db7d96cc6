"""Concurrent compilation of lowered programs."""

import logging
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dgl_jax import system

_LOG = logging.getLogger(__name__)
_MOST_THREADS = 16  # compiling a deep module can take more than 1 GB of host memory
# Names in the text of a program that depend on the position of its module in the network.
_NAMES = re.compile(r'module @\w+|jax\.result_info = "[^"]*"')


def most_threads() -> int:
    """Returns the number of programs that may compile at the same time on this machine."""
    return min(system.cpu_count() or 1, _MOST_THREADS)


def compile_all(
    lowered: Iterable[Any], description: str, meanwhile: Callable[[], object] = lambda: None
) -> list[Any]:
    """Compiles programs concurrently, and those that differ only in names once.

    Tracing holds the GIL, and XLA releases it: if `lowered` is a generator, a program is traced
    while earlier ones compile.

    Args:
      lowered: programs (`jax.stages.Lowered`).
      description: description of the programs for the log.
      meanwhile: called while the last programs compile.

    Returns:
      The compiled programs (`jax.stages.Compiled`), one entry per program of `lowered`; equal
      programs share one object. No thread is left compiling.

    Raises:
      Exception: the first error in the order of `lowered`, as raised by tracing or compiling.
    """
    _LOG.info("compiling the programs of %s", description)
    begin = time.perf_counter()
    threads = ThreadPoolExecutor(most_threads())
    distinct: dict[str, Future[Any]] = {}
    futures = []
    try:
        for program in lowered:
            text = _NAMES.sub("", program.as_text())
            if text not in distinct:
                distinct[text] = threads.submit(program.compile)
            futures.append(distinct[text])
        meanwhile()
        compiled = [future.result() for future in futures]
    finally:
        threads.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - begin
    _LOG.info("compiled %d programs of %s in %.1f s", len(distinct), description, seconds)
    return compiled
