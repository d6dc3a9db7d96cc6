"""Errors of a distributed run's process that is not yet connected to the other processes."""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from dgl_jax import system
from dgl_jax.errors import explain

_FLAGS = ("distributed", "coordinator", "num_processes", "process_id", "cpu_devices", "mode")


@contextmanager
def told(argv: Sequence[str]) -> Iterator[None]:
    """Tells the other processes if this one leaves the `with` block with an error of its user.

    Without it they would wait several minutes for a process in whose command line a flag is wrong.

    Args:
      argv: command line, which need not be correct; without `--distributed` nothing is told.
    """
    try:
        yield
    except SystemExit as leaving:
        flags, error = _flags(argv), leaving.__cause__
        distributed = (flags.distributed or "false").lower() not in ("false", "0", "f", "no", "n")
        trains = (flags.mode or "train") == "train"  # no other mode has several processes
        if distributed and trains and leaving.code == 2 and isinstance(error, Exception):
            _tell(flags, explain(error) or str(error))
        raise


def _flags(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the flags of several processes, whatever else the command line contains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _FLAGS:
        parser.add_argument(f"--{name}", nargs="?", const="true")
    parser.add_argument("--nodistributed", dest="distributed", action="store_const", const="false")
    return parser.parse_known_args([re.sub(r"^-(?=\w)", "--", flag) for flag in argv[1:]])[0]


def _tell(flags: argparse.Namespace, message: str) -> None:
    def join() -> None:
        processes, process = (
            None if text is None else int(text) for text in (flags.num_processes, flags.process_id)
        )
        on_cpu = bool(flags.cpu_devices) or environment.get("JAX_PLATFORMS") == "cpu"
        bind = "JAX_COORDINATOR_BIND_ADDRESS" not in environment
        world.join(flags.coordinator, processes, process, bind=bind, on_cpu=on_cpu)

    environment = system.environment()
    with suppress(Exception):  # such as a library that is missing
        from dgl_jax.engines import world  # imports JAX

        world.fail_early(join, " ".join(message.split()))
