"""Messages between two processes over bare TCP, and the share of a tick that they take.

python benchmarks/transport/run.py [--write]

With --write the tables in README.md and docs/benchmarks.md are replaced as well.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
from messages import COUNTS, IN_FLIGHT, KIB

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 300  # seconds until processes that hang are killed
WAYS = (
    ("one way", "put", "one way"),
    ("one way", "put, paced", "one way, paced as in a run"),
    ("round trip", "put", "round trip"),
)
CODECS = ("identity", "vq")


def together(commands: Sequence[Sequence[str]], threads: int) -> str:
    """Runs commands at the same time and returns what the first one prints.

    Raises:
      RuntimeError: a process failed, or took longer than `LIMIT`.
    """
    env = {"JAX_PLATFORMS": "cpu", "NPROC": str(threads), "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *command],
                stdout=log if i else subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | env,
                cwd=ROOT,
            )
            for i, (command, log) in enumerate(zip(commands, logs))
        ]
        for process in running:
            stack.callback(process.kill)  # does nothing once it has ended
        try:
            output, _ = running[0].communicate(timeout=LIMIT)
            codes = [process.wait(timeout=LIMIT) for process in running]
        except subprocess.TimeoutExpired:
            for process in running:
                process.send_signal(signal.SIGABRT)  # prints what its threads were doing
            codes = [process.wait() for process in running]
        if any(codes):
            texts = [(log.seek(0), log.read()[-8000:])[1] for log in logs]
            raise RuntimeError(f"exit codes {codes}:\n" + "\n".join(texts))
    return output


def free_address() -> str:
    """Returns an address of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def messages(args: argparse.Namespace) -> dict[str, Any]:
    """Sends messages of all sizes in all ways; returns the results by size and way."""
    script, address = str(HERE / "messages.py"), free_address()
    shared = [f"--coordinator={address}", f"--repeats={args.repeats}"]
    commands = [[script, *shared, f"--process_id={i}"] for i in range(2)]
    spent = json.loads(together(commands, args.threads))
    rows: dict[str, Any] = {}
    for size in COUNTS:
        for way, name, title in WAYS:
            crossings = 2 if way == "round trip" else 1
            megabytes = crossings * size / 1e6
            times = spent[str(size)][way]
            row: dict[str, Any] = {
                key: {
                    "milliseconds": harness.quartiles([1e3 * t for t in seconds]),
                    "megabytes_per_second": harness.quartiles([megabytes / t for t in seconds], 1),
                }
                for key, seconds in (("put", times[name]), ("tcp", times["tcp"]))
            }
            row["rate_over_tcp"] = harness.quartiles(harness.ratios(times["tcp"], times[name]))
            rows.setdefault(str(size), {})[title] = row
    return rows


def trained(codec: str, processes: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains two modules in one or two processes; returns the summary and the ticks per second."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    never = args.steps + 1  # logs, evaluations and checkpoints come only at the end
    command = [
        *("launch.py", "--config=configs/digits.py", f"--workdir={workdir}"),
        f"--compilation_cache={folder / 'programs'}",
        *("--config.data.name=synthetic", "--config.data.validation_fraction=0"),
        f"--config.data.batch_size={args.batch_size}",
        *("--config.model.name=cnn6", f"--config.model.width={args.width}"),
        *("--config.model.modules=2", "--config.model.split=0,3"),
        *("--config.engine.name=pipeline", f"--config.codec.name={codec}"),
        f"--config.train.steps={args.steps}",
        *(f"--config.{group}.every={never}" for group in ("log", "eval", "checkpoint")),
    ]
    if processes == 1:
        commands = [[*command, "--cpu_devices=2"]]
    else:
        world = ["--distributed", "--cpu_devices=1", f"--coordinator={free_address()}"]
        world += [f"--num_processes={processes}", "--heartbeat=20"]
        commands = [[*command, *world, f"--process_id={i}"] for i in range(processes)]
    together(commands, args.threads)
    summary = json.loads((workdir / "summary.json").read_text())
    return summary | {"ticks_per_second": summary["images_per_second"] / args.batch_size}


def shares(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with each codec in one and in two processes, in turns; returns rows by codec."""
    variants = [(codec, processes) for codec in CODECS for processes in (1, 2)]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.runs):
            first = repeat % len(variants)
            for codec, processes in variants[first:] + variants[:first]:
                run = trained(codec, processes, args, Path(folder))
                runs[codec, processes].append(run)
                print(repeat, codec, processes, round(run["ticks_per_second"], 2), flush=True)
    rows = {}
    for codec in CODECS:
        one, two = ([r["ticks_per_second"] for r in runs[codec, count]] for count in (1, 2))
        alone, both = (runs[codec, count][0] for count in (1, 2))
        rows[codec] = {
            "wire_bytes_per_tick": args.batch_size * both["wire_bytes_per_image"][0],
            "ticks_per_second_one_process": harness.quartiles(one, 2),
            "ticks_per_second_two_processes": harness.quartiles(two, 2),
            "share_of_a_tick": harness.quartiles([1 - x for x in harness.ratios(two, one)]),
            "equal_accuracy": alone["ensemble_accuracy"] == both["ensemble_accuracy"],
        }
    return rows


def name_of(size: str) -> str:
    """Returns the size of a message as text, such as "2 MiB"."""
    kib = int(size) // KIB
    return f"{kib} KiB" if kib < KIB else f"{kib // KIB} MiB"


def tables(result: dict[str, Any]) -> str:
    """Returns the two tables of README.md, with the date."""
    about = result["environment"]
    versions = about["versions"]
    date, python = about["date"][:10], versions["python"]
    lines = [f"Measured {date} with Python {python} and JAX {versions['jax']}.", ""]
    rows = [
        [
            name_of(size),
            title,
            *(
                text
                for key in ("put", "tcp")
                for text in (
                    harness.shown(row[key]["milliseconds"]),
                    f"{row[key]['megabytes_per_second']['median']:.0f}",
                )
            ),
            harness.shown(row["rate_over_tcp"]),
        ]
        for size, ways in result["messages"].items()
        for title, row in ways.items()
    ]
    header = ["message", "way", "`put`, ms", "MB/s", "TCP, ms", "MB/s", "rate over TCP"]
    harness.table(header, rows, lines.append)
    lines.append("")
    rows = [
        [
            f"`{codec}`",
            f"{row['wire_bytes_per_tick'] / 1e3:.1f}",
            harness.shown(row["ticks_per_second_one_process"]),
            harness.shown(row["ticks_per_second_two_processes"]),
            percent(row["share_of_a_tick"]),
        ]
        for codec, row in result["shares"].items()
    ]
    header = ["codec", "kB sent in a tick", "one process, ticks/s", "two processes, ticks/s"]
    harness.table([*header, "share of a tick, %"], rows, lines.append)
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """Returns the two tables of docs/benchmarks.md."""
    lines: list[str] = []
    rows = [
        [
            name_of(size),
            *(
                text
                for way in ("one way", "round trip")
                for text in (
                    f"{ways[way]['put']['megabytes_per_second']['median']:.0f}",
                    harness.shown(ways[way]["rate_over_tcp"]),
                )
            ),
        ]
        for size, ways in result["messages"].items()
    ]
    header = ["message", "one way, MB/s", "over TCP", "round trip, MB/s", "over TCP"]
    harness.table(header, rows, lines.append)
    lines.append("")
    rows = [
        [codec, f"{row['wire_bytes_per_tick'] / 1e3:.1f}", percent(row["share_of_a_tick"])]
        for codec, row in result["shares"].items()
    ]
    harness.table(["codec", "kB sent in a tick", "share of a tick, %"], rows, lines.append)
    return "\n".join(lines)


def percent(share: dict[str, float]) -> str:
    """Formats quartiles of a share in percent."""
    return harness.shown({key: 100 * value for key, value in share.items()})


def replace_tables(page: Path, text: str) -> None:
    """Replaces what is between the two marks of a page."""
    begin, end = "<!-- tables of transport -->\n", "<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}")


def main() -> None:
    """Measures messages and shares, and prints the tables."""
    flags = harness.parser(__doc__)
    flags.add_argument("--repeats", type=int, default=25, help="repeats of the messages")
    flags.add_argument("--runs", type=int, default=3, help="runs of each way of training")
    flags.add_argument("--steps", type=int, default=300, help="steps of a run")
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=64)
    flags.add_argument("--threads", type=int, default=16, help="NPROC of every process")
    args = flags.parse_args()
    chosen = {k: v for k, v in vars(args).items() if k != "write"}
    chosen |= {
        "in_flight": IN_FLIGHT,
        "messages_per_repeat": {str(k): v for k, v in COUNTS.items()},
    }
    result = {"settings": chosen, "messages": messages(args), "shares": shares(args)}
    harness.finish(__file__, result, args.write)
    result |= {"environment": harness.environment()}
    print(tables(result))
    if args.write:
        replace_tables(HERE / "README.md", tables(result))
        replace_tables(ROOT / "docs" / "benchmarks.md", headline(result))


if __name__ == "__main__":
    main()
