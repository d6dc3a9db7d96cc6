"""Settings, experiments and child processes that the groups of rows share."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator.rows import ROOT, Figures, Skipped
from dgl_jax.config import Settings, make_settings
from dgl_jax.data import Shard
from dgl_jax.data.info import DatasetInfo
from dgl_jax.profile.flops import module_flops
from dgl_jax.run.build import Experiment, choose_cuts, make_blocks, make_engine, make_spec
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch

Fields = Mapping[str, Any]
_CLASSES = 1000
_WHOLE = Shard()


def configured(fields: Fields) -> Settings:
    """Returns checked settings: the defaults, and fields by their dotted names.

    Raises:
      UserError: a field does not exist, does not apply or has no such value.
    """
    groups: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    return make_settings(groups, [name for name in fields if not name.endswith(".name")])


def counted(spec: TrainSpec) -> Figures:
    """Counts the floating-point operations of the forward pass on one batch, bodies and heads."""
    bodies, heads = zip(*module_flops(spec))
    return {"body_flops": sum(bodies), "head_flops": sum(heads)}


class Repeated:
    """Source of one batch of noise that is repeated without end, on the host.

    Args:
      info: shapes and classes of the examples.
      batch_size: examples per batch.
    """

    def __init__(self, info: DatasetInfo, batch_size: int):
        random = np.random.default_rng(0)
        shape = (batch_size, *info.example_shape)
        labels = random.integers(len(info.class_names), size=batch_size, dtype=np.int32)
        context = {"label": labels, "id": np.arange(batch_size, dtype=np.int32)}
        self._batch = Batch(random.integers(256, size=shape, dtype=np.uint8), context, np.int32(0))

    def batch(self, step: int, shard: Shard = _WHOLE) -> Batch:
        """Returns the batch under another number."""
        return self._batch._replace(step=np.asarray(step, np.int32))

    def batches(self, start: int, shard: Shard = _WHOLE) -> Iterator[Batch]:
        """Yields the batch under the numbers from `start` on."""
        step = start
        while True:
            yield self.batch(step)
            step += 1


def imagenet_like(fields: Fields, side: int) -> Experiment:
    """Builds a run on noise of the size of ImageNet's images, with 1,000 classes."""
    settings = configured({"data.name": "synthetic", "train.steps": 1} | dict(fields))
    info = DatasetInfo(
        "noise", tuple(map(str, range(_CLASSES))), (side, side, 3), (0.5,) * 3, (0.25,) * 3
    )
    spec = make_spec(settings, info, choose_cuts(settings, make_blocks(settings, info)))
    engine = make_engine(settings, spec, jax.devices()[:1], 1)
    source: Any = Repeated(info, spec.batch_size)
    return Experiment(settings, source, info, spec, engine, lambda step: 0.0, 1)


def fitting(batch: int, attempt: Callable[[int], Figures]) -> Figures:
    """Returns `attempt(batch)`, with the batch halved while it does not fit in memory."""
    while True:
        try:
            return attempt(batch)
        except Exception as error:
            text = str(error).lower()
            if batch <= 2 or not ("resource_exhausted" in text or "out of memory" in text):
                raise
        batch //= 2
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def launching(fields: Fields, workdir: Path, *flags: str) -> list[str]:
    """Returns the command line of `launch.py` for a run with these fields."""
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, str(ROOT / "launch.py"), f"--config={ROOT}/configs/cifar10.py"]
    return [*command, *settings, f"--workdir={workdir}", *flags]


def start(command: Sequence[str], log: Path, **variables: str) -> subprocess.Popen:
    """Starts a child that uses the accelerator.

    Programs are not cached for it: a user's two runs compile independently, too.

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
