"""Starts a command in several processes that form a world of JAX, with a limit on their time."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds; then all processes are killed


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Ended:
    """Result of a process.

    Attributes:
      code: exit code; negative if a signal ended the process.
      output: its standard output.
      log: its standard error.
    """

    code: int
    output: str
    log: str

    def errors(self) -> list[str]:
        """Returns the lines that report an error."""
        return re.findall(r"^error: (.*)", self.log, re.MULTILINE)


class Processes:
    """Running processes of one world.

    Args:
      commands: command line of each process.
      environment: additional environment variables.
    """

    def __init__(self, commands: Sequence[Sequence[str]], **environment: str):
        self.lines: list[list[str]] = [[] for _ in commands]
        self._changed = threading.Condition()
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
        self.running = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=ROOT,
            )
            for command in commands
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(i,), daemon=True)
            for i in range(len(commands))
        ]
        self._timer = threading.Timer(LIMIT, self.kill)
        for thread in [*self._readers, self._timer]:
            thread.start()

    def _read(self, i: int) -> None:
        for line in self.running[i].stderr:
            with self._changed:
                self.lines[i].append(line)
                self._changed.notify_all()

    def wait_for(self, i: int, text: str) -> None:
        """Waits until a process has logged a text."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(text in line for line in self.lines[i]), timeout=LIMIT
            ), f"process {i} never logged {text!r}:\n{''.join(self.lines[i])}"

    def kill(self, i: int | None = None, signum: int = signal.SIGKILL) -> None:
        """Sends a signal to one process, or to all."""
        for process in self.running if i is None else [self.running[i]]:
            if process.poll() is None:
                process.send_signal(signum)

    def end(self) -> list[Ended]:
        """Waits for all processes and returns what they left behind."""
        outputs = [process.stdout.read() for process in self.running]
        codes = [process.wait() for process in self.running]
        self._timer.cancel()
        for thread in self._readers:
            thread.join()
        return [
            Ended(code, output, "".join(lines))
            for code, output, lines in zip(codes, outputs, self.lines)
        ]


def distributed(count: int, *flags: str, each: Callable[[int], Sequence[str]] = lambda i: ()):
    """Returns the command lines of `launch.py` in `count` processes.

    Args:
      count: number of processes.
      flags: flags of all processes.
      each: further flags of a process, given its number.
    """
    port = free_port()
    return [
        [
            *(sys.executable, str(ROOT / "launch.py"), "--distributed", "--cpu_devices=1"),
            *(f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"),
            *("--heartbeat=10", *flags, *each(i)),
        ]
        for i in range(count)
    ]
