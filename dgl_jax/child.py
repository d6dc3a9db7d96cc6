"""Command line of a child process, which keeps to given processors and ends with its parent.

    python -P dgl_jax/child.py CORES --mode=train ...

CORES are the numbers of the processors, separated by commas; an empty word means all of them. The
parent keeps the other end of standard input open: the system closes it even if the parent is
killed, and the child then stops as on SIGTERM. That works on every system, unlike a signal on the
death of the parent.
"""

import os
import signal
import sys
import threading
from pathlib import Path


def bind(cores: str) -> None:
    """Restricts this process to processors; macOS offers no such call, and nothing is done there.

    Args:
      cores: numbers of the processors, separated by commas; "" for no restriction.
    """
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])


def follow(pipe: int) -> None:
    """Waits until the other end of a pipe is closed, then sends SIGTERM to this process.

    Does nothing if the run has received a signal before, as from a job scheduler that signals all
    processes: a second one would end it without a checkpoint.
    """
    while os.read(pipe, 4096):
        pass
    handler = signal.getsignal(signal.SIGTERM)  # `run.signals.Interruption` while a run trains
    if getattr(handler, "signum", None) is None:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Runs the command line with the flags after the processors."""
    bind(sys.argv.pop(1))
    threading.Thread(target=follow, args=(sys.stdin.fileno(),), daemon=True).start()
    root = str(Path(__file__).parents[1])
    if root not in sys.path:  # a checkout that is not installed
        sys.path.insert(0, root)
    from dgl_jax import cli  # after `bind`: libraries start threads while they are imported

    cli.main()


if __name__ == "__main__":
    main()
