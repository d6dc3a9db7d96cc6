"""Everything that needs one accelerator, measured within a given time by one command.

python benchmarks/accelerator/run.py --minutes=14 [--only=c,d] [--data_dir=FOLDER]
"""

import argparse
import datetime
import fnmatch
import importlib
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the package need not be installed

from benchmarks.accelerator import report, session  # noqa: E402
from benchmarks.accelerator.rows import SIZES, Figures, Row  # noqa: E402

# Groups in the order of their priority; the modules define `rows(size)`.
GROUPS = {
    "a": "benchmarks.accelerator.modes",
    "b": "benchmarks.accelerator.resuming",
    "c": "benchmarks.accelerator.speed",
    "d": "benchmarks.accelerator.switches",
    "e": "benchmarks.accelerator.accuracy",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
_RESERVE = 1.5  # seconds at the end to kill a worker and to print the table
_START = 180.0  # most seconds that the first worker may take to find the devices
_LEADING = {"a": 2, "b": 1, "c": 3, "d": 2}  # rows of every group that run first at reduced sizes
_LEAST = 0.5  # a row is not begun if less than this part of its estimated time is left

Rows = Callable[[str], Sequence[Row]]


def shipped(groups: Sequence[str] = tuple(GROUPS)) -> Rows:
    """Returns a function that returns the rows of some groups at a size."""

    def rows(size: str) -> list[Row]:
        modules = [importlib.import_module(GROUPS[group]) for group in groups]
        return [row for module in modules for row in module.rows(SIZES[size])]

    return rows


def describe() -> Figures:
    """Returns versions, machine and devices, on the process that uses the devices."""
    import jax

    from benchmarks import harness
    from dgl_jax import system

    memory = system.device_memory(jax.devices()[0])
    described = harness.environment() | {
        "platform": jax.default_backend(),
        "platform_version": getattr(jax.devices()[0].client, "platform_version", "unknown"),
    }
    return {k: v for k, v in described.items() if k != "command"} | {"memory": memory.limit}


def hasten(size: str) -> None:
    """Makes this process and its children compile with few optimizations, except at the full size.

    Compilation takes most of the time at the smaller sizes, whose figures are no measurements.
    """
    if size != "full":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_disable_most_optimizations", True)


def ordered(rows: Sequence[Row], size: str = "full") -> list[Row]:
    """Returns rows in the order in which they run: by rank, then by group, then as they came.

    At reduced sizes, which only show that the rows work, the first rows of every group come before
    all others, so that every group has figures after a few minutes.
    """
    rows = sorted(rows, key=lambda row: (row.rank, row.group))
    leading: list[Row] = []
    if size != "full":
        for group, count in _LEADING.items():
            leading += [row for row in rows if row.group == group][:count]
    return leading + [row for row in rows if row not in leading]


def perform(
    rows: Sequence[Row], runner: session.Session, results: session.Results, deadline: float
) -> None:
    """Measures rows one after the other until a monotonic time, saving after each of them."""
    results.plan(rows)
    size = SIZES[runner.size]
    for row in rows:
        begin = time.monotonic()
        left, cost = deadline - begin, row.cost * size.cost
        if left < min(cost * _LEAST, 60.0) or left <= 0:
            reason = f"{session.OUT_OF_TIME}: {max(left, 0):.0f} s were left"
            answer = session.Answer({}, f"{reason}, it takes about {cost:.0f} s")
        else:
            answer = runner.measure(row, left, results.figures())
        results.add(row, answer, time.monotonic() - begin)
        if not answer.reason.startswith(session.OUT_OF_TIME):
            shown = answer.reason or ", ".join(f"{k} {v}" for k, v in answer.figures.items())
            print(f"{row.group} {row.name}: {shown[:300]}", flush=True)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--minutes", type=float, default=14.0, help="time for the whole command")
    flags.add_argument("--only", default=",".join(GROUPS), help="groups to measure, such as c,d")
    flags.add_argument(
        "--rows", action="append", help="pattern of the rows' names, such as '*fused*'; repeatable"
    )
    flags.add_argument("--data_dir", default="", help="folder of images for group e")
    flags.add_argument(
        "--size",
        choices=["auto", *SIZES],
        default="auto",
        help="auto: full on an accelerator, small on a CPU",
    )
    flags.add_argument("--output", type=Path, default=ROOT / "runs" / "accelerator.json")
    flags.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(GROUPS):
        flags.error(f"--only={args.only}: no group {', '.join(sorted(unknown))}")
    if not args.minutes > 0:
        flags.error(f"--minutes={args.minutes:g}: must be above 0")
    if problem := session.unwritable(args.output):
        flags.error(f"--output={args.output}: {problem}")
    return args


def about(argv: Sequence[str], args: argparse.Namespace) -> Figures:
    """Returns what the file says besides the rows, before any device is known."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {
        "command": shlex.join(["python", "benchmarks/accelerator/run.py", *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": "unknown",
        "versions": versions,
        "minutes": args.minutes,
        "size": args.size,
        "finished": False,
    }


def main(
    argv: Sequence[str] | None = None,
    rows: Rows | None = None,
    script: str = __file__,
    environment: Callable[[], Figures] = describe,
) -> None:
    """Runs the benchmark, or a worker of it.

    Args:
      argv: command line without the program's name.
      rows: returns all rows at a size; by default the rows of the chosen groups.
      script: file that calls this function with the same rows, to start workers with.
      environment: returns versions and devices, called in a worker.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = arguments(argv)
    groups = args.only.split(",")
    if args.worker:
        if args.host:
            import jax

            jax.config.update("jax_platforms", "cpu")
        return session.serve(rows or shipped(groups), environment, hasten)
    deadline = time.monotonic() + 60 * args.minutes - _RESERVE
    results = session.Results(args.output.resolve(), about(argv, args))
    results.save()
    folder = Path(tempfile.mkdtemp(prefix="dgl_jax_accelerator."))
    log = results.path.with_suffix(".log")
    log.write_text("")
    runner = session.Session(
        script, args.size, folder, log, args.data_dir, (f"--only={args.only}",)
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        machine = runner.environment(min(_START, deadline - time.monotonic()))
        devices = machine.figures.get("devices", [])
        results.about |= {
            "card": devices[0] if devices else f"unknown: {machine.reason}",
            "environment": machine.figures,
        }
        if args.size == "auto":
            if not runner.platform:
                raise SystemExit(f"no devices: {machine.reason}; --size measures nevertheless")
            runner.size = "small" if runner.platform == "cpu" else "full"
            results.about["size"] = runner.size
        chosen = [
            row
            for row in (rows or shipped(groups))(runner.size)
            if row.group in groups
            and any(fnmatch.fnmatchcase(row.name, pattern) for pattern in args.rows or ["*"])
        ]
        if not chosen:
            raise SystemExit(f"no row of the groups {args.only} has a name like {args.rows}")
        perform(ordered(chosen, runner.size), runner, results, deadline)
        results.about["finished"] = True
    finally:
        runner.close()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)
        conclude(results)
    return None


def conclude(results: session.Results) -> None:
    """Writes the file and prints the table."""
    results.save()
    report.show(results.rows)
    print(f"{results.about['card']}, size {results.about['size']}, written: {results.path}")


if __name__ == "__main__":
    main()
