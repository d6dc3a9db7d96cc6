"""Child processes of a sweep, and the share of the machine that each of them gets."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dgl_jax import system
from dgl_jax.errors import UserError

_ROOT = Path(__file__).parents[2]
_CHILD = _ROOT / "dgl_jax" / "child.py"  # executed, not imported
_PROBE = """
import json, sys
sys.path.insert(0, {root!r})
from dgl_jax.errors import reported
with reported():
    import jax
    print(json.dumps([jax.default_backend(), jax.local_device_count()]))
"""


@dataclass(frozen=True)
class Share:
    """Part of the machine that one job may use; empty: all of it.

    Attributes:
      cores: numbers of its processors.
      devices: its devices, as in CUDA_VISIBLE_DEVICES.
    """

    cores: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Returns the environment of a child process with this share."""
        # All children have the same number of threads, whatever their processors: it decides how
        # sums are rounded, and results must not depend on the number of jobs.
        variables = {"NPROC": str(system.pool_threads())} | system.environment()
        if self.devices:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return variables


def backend() -> tuple[str, int]:
    """Returns the platform and the number of devices that a run would have here.

    A short child process asks JAX: this process would keep the memory of an accelerator.

    Raises:
      UserError: JAX cannot open its devices.
    """
    code = _PROBE.format(root=str(_ROOT))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    if done.returncode != 0:
        raise UserError(last.removeprefix("error: ") or "JAX cannot open its devices here")
    platform, count = json.loads(last)
    return platform, count


def shares(platform: str, devices: int, jobs: int | None) -> list[Share]:
    """Divides the machine into equal parts, one for each job.

    Args:
      platform: JAX's name of the platform.
      devices: number of devices of this platform.
      jobs: number of jobs; None for one per GPU, or one in all on another platform.

    Raises:
      UserError: there are too few devices or processors for the jobs.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs={jobs}: must be at least 1")
    if platform == "cpu":
        cores, number = system.usable_cpus(), system.cpu_count() or 1
        jobs = jobs or 1
        if jobs > number:
            raise UserError(
                f"--jobs={jobs}: there are {number} processors here, and every job needs one; use "
                f"at most --jobs={number}"
            )
        if cores is None or jobs == 1:
            return [Share()] * jobs
        return [Share(cores=tuple(part)) for part in _parts(cores, jobs)]
    jobs = jobs or (devices if platform == "gpu" else 1)
    if jobs == 1:
        return [Share()]
    if platform != "gpu":
        raise UserError(
            f"--jobs={jobs}: on {platform.upper()} devices only one process can run at a time; use "
            "--jobs=1"
        )
    if jobs > devices:
        reason = (
            "there is one GPU, and a run takes most of its memory"
            if devices == 1
            else f"there are {devices} GPUs, and every job needs one"
        )
        raise UserError(f"--jobs={jobs}: {reason}; use at most --jobs={devices}")
    names = system.environment().get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(names) != devices:
        names = [str(index) for index in range(devices)]
    # Equal parts: the number of devices of a run decides how its sums are rounded.
    each = devices // jobs
    return [Share(devices=tuple(names[j * each : (j + 1) * each])) for j in range(jobs)]


def _parts(cores: Sequence[int], count: int) -> list[Sequence[int]]:
    bounds = [j * len(cores) // count for j in range(count + 1)]
    return [cores[begin:end] for begin, end in pairwise(bounds)]


class Job:
    """Child process that runs the command line with given flags.

    Args:
      flags: flags of the command line.
      share: part of the machine that it may use.
      log: file that its output is appended to.
    """

    def __init__(self, flags: Sequence[str], share: Share, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._begin, self._end = time.monotonic(), math.inf
        with log.open("ab") as output:
            self._first = output.tell()
            cores = ",".join(map(str, share.cores))
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_CHILD), cores, *flags],
                stdin=subprocess.PIPE,  # see dgl_jax/child.py
                stdout=output,
                stderr=subprocess.STDOUT,
                env=share.environment(),
                # Ctrl-C on the terminal then reaches the sweep alone. A child that received it
                # twice would quit without a checkpoint.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Returns the number of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, negative if a signal ended it; None while it is running."""
        code = self._process.poll()
        if code is not None and self._process.stdin:
            self._process.stdin.close()
            self._end = min(self._end, time.monotonic())
        return code

    def seconds(self) -> float:
        """Returns the duration of the process so far, or until its end was noticed."""
        return min(time.monotonic(), self._end) - self._begin

    def stop(self) -> None:
        """Asks the run to write a checkpoint and to end; a second call changes nothing."""
        if self._process.stdin:
            self._process.stdin.close()

    def kill(self) -> None:
        """Ends the process at once and waits for its end."""
        self._process.kill()
        self._process.wait()
        self.poll()

    def lines(self) -> list[str]:
        """Returns the lines that this process has written, without empty ones."""
        with self._log.open("rb") as file:
            file.seek(self._first)
            text = file.read().decode("utf-8", "replace")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def error(self) -> str:
        """Returns the last line of a failed process, or the signal that ended it."""
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            return f"ended by {name}{hint}"
        lines = self.lines()
        # A child reports a mistake by a line of this form; libraries may write others after it.
        mistakes = [line for line in lines if line.startswith("error: ")]
        last = (mistakes if code == 2 else lines)[-1:] or [f"exit code {code}, without a message"]
        return last[0].removeprefix("error: ")
