"""Makes this process's CPU behave like the plug-in of an accelerator.

Optional questions are answered by None or by an exception, programs take the `default` of a choice by platform, and what is made
for a CPU refuses to be traced. As a script it runs the command line so: python tests/accelerator.py none|error FLAGS
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
# Formulations for a CPU; a new name here is one more thing that nobody may trace elsewhere.
FOR_CPUS = {
    im2col: ("convolve", "kernel_gradient"),
    remat: ("_plus_zero",),
    chunks: ("chunk", "sum_chunks", "map_chunks"),
    pooling: ("max_of_four", "max_of_three", "windows"),
    kmeans: ("_running_minimum",),
    winograd: ("convolve", "input_gradient", "kernel_gradient"),
}


def behave(patch: pytest.MonkeyPatch, answer: str, default: bool = True) -> None:
    """Changes JAX and the system until `patch` is undone.

    Args:
      answer: none or error: what optional questions get.
      default: take the `default` of a choice by platform; false for the twin that traces what is made for a CPU.
    """

    def unanswered(*args: Any, **options: Any) -> None:
        if answer == "error":
            raise NotImplementedError("UNIMPLEMENTED: this plug-in does not answer")

    def to_others(original: Any) -> Any:
        """Answers JAX itself, Python and other libraries, which know their platforms."""

        def ask(*args: Any, **options: Any) -> Any:
            ours = sys._getframe(1).f_globals["__name__"].startswith("dgl_jax")
            return unanswered() if ours else original(*args, **options)

        return ask

    for stage in (jax.stages.Lowered, jax.stages.Compiled):
        patch.setattr(stage, "cost_analysis", unanswered)
    patch.setattr(jax.stages.Compiled, "memory_analysis", unanswered)
    patch.setattr(jax.Device, "memory_stats", unanswered)
    patch.setattr(jax.Device, "device_kind", property(to_others(lambda device: "cpu")))
    local = jax.local_devices
    patch.setattr(
        jax,
        "local_devices",
        lambda *args, backend=None: unanswered() if backend == "cpu" else local(*args),
    )
    patch.setattr(system, "open", unanswered, raising=False)  # of /proc
    patch.setattr(resource, "getrusage", unanswered)
    for name in ("sched_getaffinity", "cpu_count", "sysconf"):
        patch.setattr(os, name, to_others(getattr(os, name)))

    if default:
        patch.setattr(
            jax.lax, "platform_dependent", lambda *args, default, **of_platforms: default(*args)
        )
    for module, names in FOR_CPUS.items():
        for name in names:
            patch.setattr(module, name, _refused(f"{module.__name__}.{name}"))


def _refused(name: str) -> Any:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError(f"{name} is for CPUs")

    return refuse


if __name__ == "__main__":
    from dgl_jax import cli

    behave(pytest.MonkeyPatch(), sys.argv[1])
    sys.argv[:2] = ["launch.py"]
    cli.main()
