"""Ticks per second on three hosts with slow links, as measured and as predicted by a plan.

python benchmarks/hosts/run.py [--write]

The hosts are network namespaces of this machine (`network.py`; needs root), each with one process
and one CPU device. In every repeat the link is calibrated (`calibrate.py`), blocks and heads are
measured alone, and `launch.py --distributed` trains with each engine and codec.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
from network import Network, Unavailable

from dgl_jax import system
from dgl_jax.profile.timing import BlockTimes, block_times
from dgl_jax.profile.turn_timing import CodecCost, augmentation_time, codec_costs
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.run.parts import make_blocks
from dgl_jax.tools.bench import module_times
from dgl_jax.tools.pipeline import Link, fused_rate, make_pipeline, reductions

ROOT = Path(__file__).resolve().parents[2]
HOSTS = 3
LIMITS = {"pipeline": 0.2, "fused": 0.3}  # how far a prediction may be off
NEVER = 10**6
CODECS = ("identity", "vq")


class Hosts:
    """Processes on all hosts, which end with the `with` block.

    Args:
      net: the hosts.
      command: returns the command line on a host.
      folder: folder for their output.
    """

    def __init__(self, net: Network, command: Callable[[int], Sequence[str]], folder: Path):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.logs = [folder / f"host{host}.log" for host in range(net.hosts)]
        self.running = []
        for host, log in enumerate(self.logs):
            with log.open("w") as file:
                self.running.append(
                    subprocess.Popen(
                        net.command(host, *command(host)),
                        **{"stdout": file, "stderr": file, "env": environment, "cwd": ROOT},
                    )
                )

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()

    def wait(self, seconds: float, done: Callable[[], bool]) -> None:
        """Waits until `done`; raises RuntimeError if a process fails or the time is over."""
        end = time.monotonic() + seconds
        while not done():
            codes = [process.poll() for process in self.running]
            if any(codes) or time.monotonic() > end:
                text = "\n".join(log.read_text()[-2000:] for log in self.logs)
                raise RuntimeError(f"exit codes {codes} after at most {seconds:g} s:\n{text}")
            time.sleep(0.1)


def calibrate(net: Network, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measures small messages and sums between the hosts, in milliseconds."""
    script, address = Path(__file__).with_name("calibrate.py"), f"{net.address(0)}:8000"
    command = lambda host: [sys.executable, str(script), address, str(HOSTS), str(host)]  # noqa: E731
    with Hosts(net, command, folder) as hosts:
        hosts.wait(args.limit, lambda: all(p.poll() == 0 for p in hosts.running))
        (line,) = [x for x in hosts.logs[0].read_text().splitlines() if x.startswith("{")]
    times: dict[str, float] = json.loads(line)
    return times


def fields(engine: str, codec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of a run."""
    return {
        "data__name": "synthetic",
        "data__batch_size": args.batch_size,
        "data__image_size": 32,
        "model__name": "cnn6",
        "model__width": args.width,
        "model__modules": HOSTS,
        # The faster convolutions of the CPU gather all images on each device of a group.
        "model__ops": "auto" if engine == "pipeline" else "xla",
        "engine__name": engine,
        "codec__name": codec,
        "train__steps": args.steps if engine == "pipeline" else args.fused_steps,
        "log__every": 50 if engine == "pipeline" else 1,
        "eval__every": NEVER,
        "checkpoint__every": NEVER,
    }


def train(net: Network, engine: str, codec: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains on the hosts and returns ticks per second and megabytes sent per tick.

    The speed is the one of the last three quarters of the steps, from the run's own meter; the
    bytes are all that the hosts have sent since their start. The processes are ended after the last
    step, before they evaluate.
    """
    chosen = fields(engine, codec, args)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in chosen.items()]
    steps = chosen["train__steps"]
    sent = lambda: sum(map(net.sent, range(HOSTS)))  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        common = [
            *(sys.executable, str(ROOT / "launch.py"), "--distributed", "--cpu_devices=1"),
            *(f"--coordinator={net.address(0)}:8000", f"--num_processes={HOSTS}"),
            *("--config=configs/cifar10.py", f"--workdir={folder}/run", *flags),
        ]

        def rows() -> dict[int, float]:
            """Returns the images per second since the first step, by step."""
            path = Path(folder) / "run" / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
            return {e["step"]: e["images_per_second"] for e in entries if "images_per_second" in e}

        before = sent()
        with Hosts(net, lambda host: [*common, f"--process_id={host}"], Path(folder)) as hosts:
            hosts.wait(args.limit, lambda: steps in rows())
            speeds, bytes_ = rows(), sent() - before
    begin = min(step for step in speeds if step >= max(2, steps / 4))
    seconds = [(step - 1) * args.batch_size / speeds[step] for step in (begin, steps)]
    return {
        "ticks_per_second": (steps - begin) / (seconds[1] - seconds[0]),
        "megabytes_per_tick": bytes_ / steps / 1e6,
    }


def predict(
    experiment: Experiment,
    seconds: Sequence[float],
    processor: Sequence[float],
    codec: Sequence[CodecCost],
    small: dict[str, float],
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Returns ticks per second and the idle share of the devices, as planned."""
    spec, settings = experiment.spec, experiment.settings
    delay, bandwidth, cores = args.delay / 1e3, args.megabits / 8e3, system.cpu_count()
    if settings.engine.name == "pipeline":
        # The host in the middle receives a message and sends one in every tick.
        link = Link(bandwidth, delay, small["messages"] / 2e3)
        processor = [used + small["processor"] / 1e3 for used in processor]
        pipeline, groups = make_pipeline(settings, seconds, processor, HOSTS, link, cores)
        rate = pipeline.with_codec(codec, groups).steady(spec.traffic().wire)[0]
    else:
        rounds = 2 * (HOSTS - 1)
        link = Link(bandwidth, delay, max(0.0, small["all_reduce"] / 1e3 / rounds - delay))
        sums = reductions(spec, each_array=True)
        rate = fused_rate(seconds, processor, sums, HOSTS, link, cores, codec)
    share = 1 if settings.engine.name == "pipeline" else HOSTS  # hosts of a module
    busy = sum(turn + share * cost.on(share).seconds for turn, cost in zip(seconds, codec))
    return rate, 1.0 - rate * busy / HOSTS


def predictions(
    experiment: Experiment, times: BlockTimes, small: dict[str, float], args: argparse.Namespace
) -> dict[str, float]:
    """Returns what `--mode=plan` predicts, and for `pipeline` also a prediction from its programs.

    `--mode=plan` adds the times of blocks, heads, augmentation and codec, each measured alone. The
    hosts share the processors of this machine, so what their messages take of them is added.
    """
    spec = experiment.spec
    starts = [module.first for module in spec.modules]
    coding = codec_costs(spec, jax.devices()[0], concurrency=args.concurrency)
    augmentation = augmentation_time(spec, jax.devices()[0], concurrency=args.concurrency)
    seconds, processor = (costs.modules(starts) for costs in times)
    seconds[0] += augmentation.seconds
    processor[0] += augmentation.processor
    rate, idle = predict(experiment, seconds, processor, coding, small, args)
    rates = {"predicted": rate, "predicted_idle": idle}
    if experiment.settings.engine.name == "pipeline":
        state = experiment.engine.init()
        elapsed = module_times(experiment, state, args.calls, args.concurrency)
        seconds, processor = [e.seconds for e in elapsed], [e.processor for e in elapsed]
        included = [CodecCost()] * len(elapsed)
        rates["predicted_from_programs"], _ = predict(
            experiment, seconds, processor, included, small, args
        )
    return rates


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--megabits", type=float, default=100.0, help="what each host sends")
    flags.add_argument("--delay", type=float, default=20.0, help="milliseconds, one way")
    flags.add_argument("--engines", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--batch_size", type=int, default=66)
    flags.add_argument("--steps", type=int, default=200, help="steps of a run with `pipeline`")
    flags.add_argument("--fused_steps", type=int, default=4)
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--limit", type=float, default=400.0, help="seconds that a run may take")
    flags.add_argument("--calls", type=int, default=10, help="calls of each program per repeat")
    args = flags.parse_args()
    args.concurrency = min(system.cpu_count() or 1, HOSTS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts are removed
    # XLA's pool has as many threads as in the processes that `launch.py` starts.
    os.environ.setdefault("NPROC", str(system.pool_threads()))
    jax.config.update("jax_num_cpu_devices", HOSTS)
    cases = [(engine, codec) for engine in args.engines for codec in CODECS]
    experiments = {
        case: make_experiment(harness.settings(**fields(*case, args)), jax.devices())
        for case in cases
    }
    networks = {case: make_blocks(each.settings, each.info) for case, each in experiments.items()}
    measured: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    small: list[dict[str, float]] = []
    try:
        with (
            Network(HOSTS, args.megabits, args.delay) as net,
            tempfile.TemporaryDirectory() as logs,
        ):
            switch = net.switch
            for repeat in range(args.repeats):
                small.append(calibrate(net, Path(logs), args))
                print(repeat, small[-1], flush=True)
                times: dict[str, BlockTimes] = {}  # by engine
                for case in cases:
                    if case[0] not in times:
                        times[case[0]] = block_times(
                            networks[case],
                            experiments[case].spec.optimizer,
                            jax.devices()[0],
                            concurrency=args.concurrency,
                        )
                    row = train(net, *case, args)
                    row |= predictions(experiments[case], times[case[0]], small[-1], args)
                    # Seconds of a tick in which a device is busy.
                    work = (1.0 - row["predicted_idle"]) / row["predicted"]
                    row |= {"idle": 1.0 - row["ticks_per_second"] * work}
                    measured[case].append(row)
                    print(repeat, *case, {k: round(v, 4) for k, v in row.items()}, flush=True)
    except Unavailable as error:
        print(f"skipped: three hosts on one machine: {error}")
        return
    results, rows = {}, []
    for (engine, codec), runs in measured.items():
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        ratio = harness.quartiles(harness.ratios(columns["predicted"], columns["ticks_per_second"]))
        within = abs(ratio["median"] - 1) <= LIMITS[engine]
        programs = "-"
        if "predicted_from_programs" in columns:
            over = harness.ratios(columns["predicted_from_programs"], columns["ticks_per_second"])
            programs = harness.shown(harness.quartiles(over))
        results[f"{engine} {codec}"] = {
            **{name: harness.quartiles(values, 4) for name, values in columns.items()},
            "predicted_over_measured": ratio,
            "within": within,
        }
        rows.append(
            [
                *(f"`{engine}`", f"`{codec}`"),
                harness.shown(harness.quartiles(columns["ticks_per_second"])),
                f"{100 * statistics.median(columns['idle']):.0f} %",
                f"{statistics.median(columns['megabytes_per_tick']):.3g}",
                f"{harness.shown(ratio)} {'yes' if within else 'NO'}",
                programs,
            ]
        )
    header = ["engine", "codec", "ticks/s", "idle", "MB per tick", "predicted over measured"]
    harness.table([*header, "from programs, over measured"], rows)
    link = {k: harness.quartiles([each[k] for each in small], 2) for k in small[0]}
    print(f"switch: {switch}; milliseconds of the link: {link}")
    settings = {key: value for key, value in vars(args).items() if key != "write"}
    result = {"settings": settings, "switch": switch, "calibration": link, "results": results}
    harness.finish(__file__, result, args.write)


if __name__ == "__main__":
    main()
