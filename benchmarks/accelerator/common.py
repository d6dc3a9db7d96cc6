"""Settings, experiments and child processes that the groups of rows share."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import images
from benchmarks.accelerator.rows import ROOT, Figures, Skipped
from dgl_jax.config import Settings, make_settings
from dgl_jax.profile.flops import module_flops
from dgl_jax.spec import TrainSpec

Fields = Mapping[str, Any]


def configured(fields: Fields, strict: bool = True) -> Settings:
    """Returns checked settings: the defaults, and fields by their dotted names.

    Raises:
      UserError: a field does not exist, has no such value or, if `strict`, does not apply.
    """
    images.register()
    groups: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    return make_settings(groups, list(fields) if strict else ())


def counted(spec: TrainSpec) -> Figures:
    """Counts the floating-point operations of the forward pass on one batch, bodies and heads."""
    bodies, heads = zip(*module_flops(spec))
    return {"body_flops": sum(bodies), "head_flops": sum(heads)}


# What JAX, PyTorch, cuBLAS and cuDNN say when memory is exhausted.
_FULL = (
    "resource_exhausted",
    "out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "unable to allocate",
)


def fitting(batch: int, attempt: Callable[[int], Figures]) -> Figures:
    """Returns `attempt(batch)`, with the batch halved while it does not fit in memory."""
    while True:
        try:
            return attempt(batch)
        except Exception as error:
            text = str(error).lower()
            if batch <= 2 or not any(words in text for words in _FULL):
                raise
        batch //= 2
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def launching(fields: Fields, workdir: Path, *flags: str, config: str = "cifar10") -> list[str]:
    """Returns the command line of `launch.py` for a shipped configuration with other fields."""
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT}/configs/{config}.py"]
    return [*command, *settings, f"--workdir={workdir}", *flags]


def start(command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen:
    """Starts a child that uses the accelerator; the cache of the workers is not passed on to it.

    Args:
      command: the command line.
      log: file for its error output.
      **variables: further environment variables.
    """
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment | variables, stdout=errors, stderr=errors
        )


def finish(child: subprocess.Popen, log: Path, statuses: Sequence[int] = (0,)) -> None:
    """Waits for a child and copies its output to that of this process.

    Raises:
      Skipped: its exit status is not in `statuses`.
    """
    child.wait()
    text = log.read_text(errors="replace").strip()
    print(text, file=sys.stderr, flush=True)
    if child.returncode not in statuses:
        last = (text.splitlines() or ["no message"])[-1]
        raise Skipped(f"launch.py ended with status {child.returncode}: {last[:200]}")
