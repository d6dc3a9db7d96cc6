"""Defines the command line: flags, logging and dispatch on --mode. `launch.py` and the console script `dgl-jax` call `main`."""

import json
import logging
import os
import re
import sys

from dgl_jax import config as configuration
from dgl_jax import system
from dgl_jax.errors import UserError, explain, needed, reported, where
from dgl_jax.fields import expand
from dgl_jax.run import workdir
from dgl_jax.tools import config_files

with reported(), needed("the command line"):
    from absl import app, flags
    from ml_collections import config_flags


_LOG = logging.getLogger(__name__)
_POOL = 16  # threads of XLA's pool on the CPU, or more where there are more processors


class _Path(flags.ArgumentParser):
    """Takes a path, in which `~` is the home directory."""

    syntactic_help = "a path"

    def __init__(self, flag: str):
        self._flag = flag

    def parse(self, argument: str) -> str:
        """Returns the path, expanded."""
        return expand(argument, f"--{self._flag}")

    def flag_type(self) -> str:
        """Returns what `--help` calls such a value."""
        return "path"


def _define_path(name: str, text: str) -> flags.FlagHolder:
    return flags.DEFINE(_Path(name), name, None, text, serializer=flags.ArgumentSerializer())


_MODES = ["train", "eval", "predict", "export", "plot", "bench", "plan"]
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A configuration file, or the name of one in configs/ (digits); --config.a.b=value overrides a field.",
)
_WORKDIR = _define_path("workdir", "Where a run is written, or read back from.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "newest", "newest, best or a step; for eval, predict and export."
)
_INIT_FROM = _define_path("init_from", "Workdir of a run whose weights a new one starts from.")
_SPLIT = flags.DEFINE_enum(
    "split", "test", ["train", "validation", "test"], "What --mode=eval measures."
)
_IMAGES = flags.DEFINE_multi(
    _Path("images"),
    flags.ArgumentSerializer(),
    "images",
    [],
    "File, folder or pattern of images for --mode=predict; repeatable.",
)
_OUTPUT = _define_path(
    "output", "File of predict (.csv or .jsonl), folder of export, picture of plan (.png)."
)
_STEPS = flags.DEFINE_integer("bench_steps", 200, "Steps that --mode=bench times.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices that --mode=plan looks at; one a module by default.", lower_bound=1
)
_TIMES = _define_path(
    "block_times", "Of plan: ms of each block (1.5,2,3), or a JSON file; measured here by default."
)
_BANDWIDTH = flags.DEFINE_float(
    "bandwidth", None, "Of plan: GB/s from one device to another; by default packets take no time."
)
_CORES = flags.DEFINE_float(
    "cores",
    None,
    "Of plan: processors that the devices share; by default those of a CPU it measures.",
)
_JSON = flags.DEFINE_boolean("json", False, "Of plan: print JSON.")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", None, "Ask XLA for so many CPU devices.", lower_bound=1
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
    # What the command line lacks is said at once; only then comes what the mode needs, which takes seconds to import.
    folder = _workdir() if mode not in ("bench", "plan") else _WORKDIR.value
    with needed(f"--mode={mode}"):
        if mode == "train":
            _train(_config(), folder)
        elif mode == "eval":
            override = _config() if _CONFIG.value is not None else None
            from dgl_jax import evaluate

            _start()
            print(json.dumps(evaluate.evaluate_run(folder, checkpoint, _SPLIT.value, override)))
        elif mode == "predict":
            from dgl_jax.tools import predict

            _start()
            predict.predict_run(folder, checkpoint, _IMAGES.value, _OUTPUT.value)
        elif mode == "export":
            from dgl_jax import export
            from dgl_jax.run import writers

            _start()
            writers.write_stdout(f"{export.export_run(folder, checkpoint, _OUTPUT.value)}\n")
        elif mode == "plot":
            from dgl_jax.run import plots, writers

            _start()
            writers.write_stdout("".join(f"{path}\n" for path in plots.plot(folder)))
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
            )
            print(plan.plan_run(config, *chosen))
        else:
            config = _config()
            from dgl_jax.tools import bench

            _start()
            print(json.dumps(bench.bench(config, _STEPS.value)))


def _train(config: configuration.Settings, folder: str) -> None:
    from dgl_jax import train
    from dgl_jax.run.signals import Interrupted

    _start()
    try:
        summary = train.train_and_evaluate(config, folder, _INIT_FROM.value)
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    print(
        json.dumps(
            {
                "modules": [m["test_accuracy"] for m in summary.modules],
                "ensemble": summary.ensemble_accuracy,
            }
        )
    )


def _start() -> None:
    """Sets up logging and devices, once the imports are done: they bring log handlers of their own."""
    from dgl_jax.run import progress

    progress.log_to_stderr()
    # XLA splits the sums of weight gradients over the threads of its pool, which decides how they are rounded: there must be as
    # many whatever the number of devices. Its own choice is a thread a processor or a device: where all devices but one wait in a
    # reduction, the last finds none for its own work, hence two a device.
    devices, usual = _CPU_DEVICES.value or 1, max(_POOL, system.cpu_count() or 1)
    threads = max(usual, 2 * devices)
    if threads > usual and "NPROC" not in os.environ:
        text = "--cpu_devices=%d: %d threads, not %d as up to %d devices have: rounding differs from theirs"
        _LOG.warning(text, devices, threads, usual, usual // 2)
    os.environ.setdefault("NPROC", str(threads))
    if _CPU_DEVICES.value:
        import jax

        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)


def _parse(argv: list[str]) -> list[str]:
    with reported():
        argv = _with_plugins(argv)
        try:
            rest = flags.FLAGS(workdir.with_own_config(config_files.with_files(argv)))
            if _CONFIG.value is not None:
                _CONFIG.value.data  # noqa: B018 (a file that could not be read says so at the first look inside)
        except UserError:
            raise
        except Exception as error:
            for argument in argv[1:]:
                if override := re.match(r"--?config\.([^=]+)", argument):
                    configuration.check_name(
                        override[1]
                    )  # now that the kinds of all plugins are known
            if isinstance(error, flags.Error):
                raise UserError(str(error)) from error
            raise UserError(f"--config: {explain(error) or where(error)}") from error
        return rest


def _with_plugins(argv: list[str]) -> list[str]:
    """Imports what `--config.plugins` names, whose kinds may have fields that the line sets; returns the line with a tuple."""
    line = list(argv)
    for place, argument in enumerate(argv):
        if given := re.match(r"(--?config\.plugins=)(.*)", argument):
            names = tuple(re.findall(r"[\w.]+", given[2]))
            configuration.import_plugins(names)
            line[place] = f"{given[1]}{names!r}"
    return line


def main() -> None:
    """Runs the command line on `sys.argv`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # plugins may lie where the command is run
    for flag in flags.FLAGS.get_key_flags_for_module(
        __name__
    ):  # else --help leaves them to --helpfull
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(_dispatch, flags_parser=_parse)
