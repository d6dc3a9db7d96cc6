"""Command line: flags, logging and dispatch on --mode.

`launch.py` and the console script `dgl-jax` call `main`.
"""

import contextlib
import json
import logging
import os
import re
import sys

from dgl_jax import config as configuration
from dgl_jax import system
from dgl_jax.config.fields import expand
from dgl_jax.errors import UserError, explain, needed, reported, where
from dgl_jax.run import workdir
from dgl_jax.tools import config_files, early_errors, flag_modes

with reported(), needed("the command line"):
    from absl import app, flags
    from ml_collections import config_flags

_LOG = logging.getLogger(__name__)


class _Path(flags.ArgumentParser):
    """Flag parser for a path; expands `~` to the home directory."""

    syntactic_help = "a path"

    def __init__(self, flag: str):
        self._flag = flag

    def parse(self, argument: str) -> str:
        """Returns the path with `~` expanded."""
        return expand(argument, f"--{self._flag}")

    def flag_type(self) -> str:
        """Returns the type name that `--help` prints."""
        return "path"


def _define_path(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE(_Path(name), name, None, text, serializer=flags.ArgumentSerializer())


_MODES = ["train", "eval", "predict", "export", "plot", "bench", "plan", "sweep", "report"]
_COMMAND_LINE: list[str] = []  # set by `_parse`, which reports flag files that cannot be read
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, or the name of one in configs/ (digits); --config.a.b=value sets a field.",
    sys_argv=_COMMAND_LINE,
)
_WORKDIR = _define_path("workdir", "Folder of the run, to write or to read.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "Command to run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "newest",
    "Checkpoint to load in eval, predict and export: newest, best or a step.",
)
_INIT_FROM = _define_path("init_from", "Workdir of a run whose weights initialize a new run.")
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "Split that --mode=eval measures."
)
_IMAGES = flags.DEFINE_multi(
    _Path("images"),
    flags.ArgumentSerializer(),
    "images",
    [],
    "File, folder or glob pattern of images for --mode=predict; repeatable.",
)
_OUTPUT = _define_path(
    "output",
    "Output file of predict (.csv or .jsonl), folder of export, picture of plan (.png), or page of "
    "report (.html).",
)
_STEPS = flags.DEFINE_integer("bench_steps", 200, "bench: number of steps to time.", lower_bound=1)
_MODULES = flags.DEFINE_boolean(
    "bench_modules", True, "bench: also time each module's program alone."
)
_DEVICES = flags.DEFINE_integer(
    "devices", None, "plan: number of devices; default: one per module.", lower_bound=1
)
_TIMES = _define_path(
    "block_times",
    "plan: milliseconds of each block (1.5,2,3), or a JSON file; default: measured here.",
)
_BANDWIDTH = flags.DEFINE_float(
    "bandwidth", None, "plan: GB/s from one device to another; default: messages take no time."
)
_LATENCY = flags.DEFINE_float(
    "latency", 0.0, "plan: milliseconds that a message travels to another device, one way."
)
_MESSAGE_COST = flags.DEFINE_float(
    "message_cost", 0.0, "plan: milliseconds for which a host is busy with each message."
)
_CORES = flags.DEFINE_float(
    "cores",
    None,
    "plan: processors that the devices share; default: all processors if measured on a CPU.",
)
_JSON = flags.DEFINE_boolean("json", False, "plan: print JSON.")
_CACHE = flags.DEFINE(
    _Path("compilation_cache"),
    "compilation_cache",
    None,
    "Folder where compiled programs are stored for later runs, or off; by default "
    "~/.cache/dgl_jax/xla, or what JAX is configured to use.",
    serializer=flags.ArgumentSerializer(),
)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Number of CPU devices to create.", lower_bound=1
)

_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Train in several processes: the same command on every host."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, for --distributed; default: from the cluster (SLURM, GKE, TPU, "
    "Kubernetes, Open MPI).",
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes, with --coordinator.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0, with --coordinator.", lower_bound=0
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds after which a process that died ends the others.", lower_bound=5
)

_SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Python file with get_sweep, which yields the rows of --mode=sweep, or the name of one in "
    "configs/claims/; FILE:ARGUMENT passes an argument to it.",
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "sweep: number of runs at the same time; default: the number of accelerators, on a CPU 1.",
    lower_bound=1,
)
_ESTIMATE = flags.DEFINE_boolean(
    "estimate", True, "sweep: measure a few steps before the start to estimate time and disk."
)


def _config() -> configuration.Settings:
    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    return configuration.make_settings(
        _CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
    )


def _workdir() -> str:
    if not _WORKDIR.value:
        raise UserError(f"--workdir is missing: --mode={_MODE.value} needs the folder of a run")
    return _WORKDIR.value


@reported()
def _dispatch(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"{argv[1]}: not a flag; write --name=value")
    mode, checkpoint = _MODE.value, _CHECKPOINT.value
    flag_modes.check(mode, (name for name in flags.FLAGS if flags.FLAGS[name].present))
    _check_distributed(mode)
    # Check the flags first: the imports of a mode below take seconds.
    folder = _workdir() if mode not in ("bench", "plan") else _WORKDIR.value
    with needed(f"--mode={mode}"):
        if mode == "train":
            _train(folder)
        elif mode == "eval":
            override = _config() if _CONFIG.value is not None else None
            from dgl_jax import evaluate

            _start()
            _print(json.dumps(evaluate.evaluate_run(folder, checkpoint, _SPLIT.value, override)))
        elif mode == "predict":
            from dgl_jax.tools import predict

            _start()
            predict.predict_run(folder, checkpoint, _IMAGES.value, _OUTPUT.value)
        elif mode == "export":
            from dgl_jax.run import writers
            from dgl_jax.tools import export

            _start()
            writers.write_stdout(f"{export.export_run(folder, checkpoint, _OUTPUT.value)}\n")
        elif mode == "plot":
            from dgl_jax.run import plots, writers

            _start()
            writers.write_stdout("".join(f"{path}\n" for path in plots.plot(folder)))
        elif mode == "sweep":
            _sweep(folder)
        elif mode == "report":
            from dgl_jax.run import writers
            from dgl_jax.tools import report

            paths = report.report_runs(folder, _OUTPUT.value)
            writers.write_stdout("".join(f"{path}\n" for path in paths))
        elif mode == "plan":
            config = _config()
            from dgl_jax.tools import plan

            _start()
            chosen = (
                _DEVICES.value,
                _TIMES.value,
                _BANDWIDTH.value,
                _CORES.value,
                _JSON.value,
                _OUTPUT.value,
                folder,
                _LATENCY.value,
                _MESSAGE_COST.value,
            )
            _print(plan.plan_run(config, *chosen))
        else:
            config = _config()
            from dgl_jax.tools import bench

            _start()
            _print(json.dumps(bench.bench(config, _STEPS.value, _MODULES.value)))


def _check_distributed(mode: str) -> None:
    """Raises UserError if a flag of several processes does not apply."""
    given = {"coordinator": _COORDINATOR, "num_processes": _PROCESSES, "process_id": _PROCESS}
    if not _DISTRIBUTED.value:
        for name in (*given, "heartbeat"):
            if (flag := flags.FLAGS[name]).present:
                raise UserError(f"--{name}={flag.value}: applies only with --distributed")
        return
    if mode != "train":
        raise UserError(
            f"--distributed: applies to --mode=train; --mode={mode} runs in one process"
        )
    missing = [f"--{name}" for name, flag in given.items() if flag.value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"{', '.join(missing)}: missing; --coordinator, --num_processes and --process_id "
            "belong together; without all of them the cluster's environment is asked"
        )
    count = _PROCESSES.value
    if _PROCESS.value is not None and count is not None and _PROCESS.value >= count:
        raise UserError(f"--process_id={_PROCESS.value}: must be less than --num_processes={count}")


def _join() -> None:
    """Joins the other processes of the run; call it before anything asks JAX for devices."""
    import jax

    from dgl_jax.engines import world
    from dgl_jax.run import progress

    world.join(
        *(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
        heartbeat=_HEARTBEAT.value,
        bind="JAX_COORDINATOR_BIND_ADDRESS" not in os.environ,
        on_cpu=bool(_CPU_DEVICES.value) or getattr(jax.config, "jax_platforms", None) == "cpu",
    )
    if world.count() > 1:
        progress.log_to_stderr(world.index())


def _train(folder: str) -> None:
    from dgl_jax import train
    from dgl_jax.engines import world
    from dgl_jax.run.signals import Interrupted

    _start()
    if _DISTRIBUTED.value:
        _join()
    with world.together():
        try:
            summary = train.train_and_evaluate(_config(), folder, _INIT_FROM.value)
        except Interrupted as stopped:
            print(f"\n{stopped}", file=sys.stderr)
            sys.exit(128 + stopped.signum)
        result = {
            "modules": [m["test_accuracy"] for m in summary.modules],
            "ensemble": summary.ensemble_accuracy,
        }
        if world.first():
            _print(json.dumps(result))


def _sweep(folder: str) -> None:
    if not _SWEEP.value:
        raise UserError("--sweep is missing; for example --sweep=configs/claims/digits.py")
    given = _CONFIG.value and config_flags.get_config_filename(flags.FLAGS["config"])
    if given and given.partition(":")[0] != workdir.__file__:  # which stands for no file
        raise UserError(
            "--config: does not apply to --mode=sweep, whose file holds the configuration of each "
            "row; --config.a.b=value sets a field in all rows"
        )
    fields = config_flags.get_override_values(flags.FLAGS["config"]) if given else {}
    from dgl_jax.run import progress
    from dgl_jax.tools import rows, sweep

    progress.log_to_stderr()
    _set_threads()
    # The children open the devices; this process must not take their memory.
    flags_of_rows = [
        f"--{flag.name}={flag.value}" for flag in (_CPU_DEVICES, _CACHE) if flag.value is not None
    ]
    result = sweep.sweep(
        rows.overridden(rows.load(_SWEEP.value), fields),
        folder,
        _JOBS.value,
        estimate=_ESTIMATE.value,
        name=_SWEEP.value,
        flags=flags_of_rows,
        given=fields,
    )
    _print(json.dumps(result.names()))
    sys.exit(result.exit_code)


def _print(text: str) -> None:
    from dgl_jax.run import writers

    writers.write_stdout(f"{text}\n")


def _start() -> None:
    """Sets up logging and devices; call it after the imports, which install log handlers."""
    from dgl_jax.run import compiling, progress

    progress.log_to_stderr()
    _set_threads()
    compiling.imports_took(system.process_age())
    compiling.store_programs(_CACHE.value, os.environ["NPROC"])
    if _CPU_DEVICES.value:
        import jax

        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)


def _set_threads() -> None:
    """Sets the number of threads of XLA's CPU pool, which XLA reads when it starts."""
    # XLA splits the sums of weight gradients over the threads of its pool, so the number of threads
    # decides how they are rounded and must not depend on the number of devices. With XLA's default
    # (one thread per processor or device), devices that wait in a reduction can occupy all threads
    # while the last device still needs one for its own work, hence two per device.
    devices = _CPU_DEVICES.value or system.cpu_devices_of_environment()
    usual = system.pool_threads()
    threads = max(usual, 2 * devices)
    if threads > usual and "NPROC" not in os.environ:
        text = (
            "%d CPU devices: uses %d threads instead of the %d for up to %d devices, "
            "so results are rounded differently"
        )
        _LOG.warning(text, devices, threads, usual, usual // 2)
    os.environ.setdefault("NPROC", str(threads))


def _parse(argv: list[str]) -> list[str]:
    with reported():
        try:
            argv = argv[:1] + flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
            _COMMAND_LINE[:] = argv
            argv = config_files.with_plugins(argv)
            rest = flags.FLAGS(workdir.with_own_config(config_files.with_files(argv)))
            config = _CONFIG.value
            if config is not None and not hasattr(config, "items"):  # raises if it was not read
                raise UserError(f"--config: get_config returns {config!r}, not a ConfigDict")
        except UserError:
            raise
        except Exception as raised:
            error = config_files.original(raised)
            for argument in argv[1:]:
                if override := re.match(r"--?config\.([^=]+)", argument):
                    # Only now have all plugins registered their kinds and fields.
                    configuration.check_name(override[1])
            if isinstance(error, flags.Error):
                raise UserError(str(error).removeprefix("ERROR:: ")) from error
            raise UserError(f"--config: {explain(error) or where(error)}") from error
        return rest


def main() -> None:
    """Runs the command line on `sys.argv`."""
    system.hide_loader_errors()
    with contextlib.suppress(FileNotFoundError):  # the current directory has been deleted
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # plugins may be in it
    # Without this, --help lists only the flags of the main script and --helpfull the others.
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    with early_errors.told(sys.argv):
        app.run(_dispatch, flags_parser=_parse)
