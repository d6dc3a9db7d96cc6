"""Makes the CPU backend of this process behave like the plug-in of an accelerator.

Optional queries return None or raise an exception, `jax.lax.platform_dependent` takes its `default`
branch, and functions written for CPUs raise an error when they are traced. As a script it runs the
command line in such a process:

    python tests/accelerator.py none|error FLAGS
"""

import os
import resource
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import pytest

from dgl_jax import system
from dgl_jax.codecs import kmeans
from dgl_jax.ops import remat
from dgl_jax.ops.cpu import chunks, im2col, pooling, winograd

ANSWERS = ("none", "error")
# Functions that only programs for a CPU may contain.
FOR_CPUS = {
    im2col: ("convolve", "kernel_gradient"),
    remat: ("_plus_zero",),
    chunks: ("chunk", "sum_chunks", "map_chunks"),
    pooling: ("max_of_four", "max_of_three", "windows"),
    kmeans: ("_running_minimum",),
    winograd: ("convolve", "input_gradient", "kernel_gradient"),
}


def behave(patch: pytest.MonkeyPatch, answer: str, default: bool = True) -> None:
    """Replaces functions of JAX, the operating system and this package until `patch` is undone.

    Args:
      patch: makes the replacements.
      answer: "none" if optional queries return None, "error" if they raise an exception.
      default: take the `default` branch of `platform_dependent`. False for the twin, which traces a
        function for CPUs.
    """

    def no_answer(*args: Any, **options: Any) -> None:
        if answer == "error":
            raise NotImplementedError("UNIMPLEMENTED: this plug-in does not answer")

    def no_answer_to_package(original: Any) -> Any:
        """Returns a function that still answers JAX, Python and other libraries."""

        def query(*args: Any, **options: Any) -> Any:
            from_package = sys._getframe(1).f_globals["__name__"].startswith("dgl_jax")
            return no_answer() if from_package else original(*args, **options)

        return query

    for stage in (jax.stages.Lowered, jax.stages.Compiled):
        patch.setattr(stage, "cost_analysis", no_answer)
    patch.setattr(jax.stages.Compiled, "memory_analysis", no_answer)
    patch.setattr(jax.Device, "memory_stats", no_answer)
    patch.setattr(jax.Device, "device_kind", property(no_answer_to_package(lambda device: "cpu")))
    local = jax.local_devices
    patch.setattr(
        jax,
        "local_devices",
        lambda *args, backend=None: no_answer() if backend == "cpu" else local(*args),
    )
    patch.setattr(system, "open", no_answer, raising=False)  # for files below /proc
    patch.setattr(resource, "getrusage", no_answer)
    for name in ("sched_getaffinity", "cpu_count", "sysconf"):
        patch.setattr(os, name, no_answer_to_package(getattr(os, name)))

    if default:
        patch.setattr(
            jax.lax, "platform_dependent", lambda *args, default, **branches: default(*args)
        )
    for module, names in FOR_CPUS.items():
        for name in names:
            patch.setattr(module, name, _refuse(f"{module.__name__}.{name}"))


def _refuse(name: str) -> Any:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError(f"{name} is for CPUs")

    return refused


def main() -> None:
    """Runs the command line, or as a child process of a sweep the command line of `child.py`."""
    from dgl_jax import child, cli
    from dgl_jax.tools import jobs

    run = child.main
    if sys.argv[1] in ANSWERS:
        os.environ["EMULATED_ANSWER"] = sys.argv.pop(1)
        run = cli.main
    jobs._CHILD = Path(__file__)
    behave(pytest.MonkeyPatch(), os.environ["EMULATED_ANSWER"])
    run()


if __name__ == "__main__":
    main()
