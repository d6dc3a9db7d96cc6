"""Defines the command line: flags, logging and dispatch on --mode. `launch.py` and the console script call `main`."""

import json
import os
import re
import sys

from absl import app, flags
from ml_collections import config_flags

from dgl_jax import settings, system, workdir, writers
from dgl_jax.errors import UserError, reported, where

_MODES = ["train", "eval", "predict", "export", "plot", "bench", "plan"]
_CONFIG = config_flags.DEFINE_config_file("config", None, "One of configs/*.py; --config.a.b=value overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where a run is written, or read back from.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "newest", "newest, best or a step; for eval, predict and export.")
_INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of a run whose weights a new one starts from.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "What --mode=eval measures.")
_IMAGES = flags.DEFINE_multi_string("images", [], "File, folder or pattern of images for --mode=predict; repeatable.")
_OUTPUT = flags.DEFINE_string("output", None, "File of predict (.csv or .jsonl), folder of export, picture of plan (.png).")
_STEPS = flags.DEFINE_integer("bench_steps", 200, "Steps that --mode=bench times.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", None, "Devices that --mode=plan looks at; one a module by default.", lower_bound=1)
_TIMES = flags.DEFINE_string("block_times", None, "Of plan: ms of each block (1.5,2,3), or a JSON file; measured here by default.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", None, "Of plan: GB/s from one device to another; by default packets take no time.")
_CORES = flags.DEFINE_float("cores", None, "Of plan: processors that the devices share; by default those of a CPU it measures.")
_JSON = flags.DEFINE_boolean("json", False, "Of plan: print JSON.")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Ask XLA for so many CPU devices.", lower_bound=1)


def _config() -> settings.Settings:
    if _CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    return settings.make_settings(_CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))


def _workdir() -> str:
    if not _WORKDIR.value:
        raise UserError(f"--workdir is missing: --mode={_MODE.value} needs the folder of a run")
    return _WORKDIR.value


@reported()
def _dispatch(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"{argv[1]}: not a flag; write --name=value")
    # Imported here: a mistyped flag or --help need not wait for what trains.
    import jax

    from dgl_jax import bench, evaluate, export, plan, plots, predict, train

    writers.log_to_stderr()  # after the imports, which bring log handlers of their own
    if _CPU_DEVICES.value:
        # XLA's pool has a thread a device by default: where all but one wait in a reduction, the last finds none for its own work.
        os.environ.setdefault("NPROC", str(max(system.machine_cpus() or 1, 2 * _CPU_DEVICES.value)))
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    mode, checkpoint = _MODE.value, _CHECKPOINT.value
    if mode == "train":
        try:
            summary = train.train_and_evaluate(_config(), _workdir(), _INIT_FROM.value)
        except train.Interrupted as stopped:
            print(f"\n{stopped}", file=sys.stderr)
            sys.exit(128 + stopped.signum)
        print(json.dumps({"modules": [m["test_accuracy"] for m in summary.modules], "ensemble": summary.ensemble_accuracy}))
    elif mode == "eval":
        print(json.dumps(evaluate.evaluate_run(_workdir(), checkpoint, _SPLIT.value, _CONFIG.value and _config())))
    elif mode == "predict":
        predict.predict_run(_workdir(), checkpoint, _IMAGES.value, _OUTPUT.value)
    elif mode == "export":
        print(export.export_run(_workdir(), checkpoint, _OUTPUT.value))
    elif mode == "plot":
        print(*plots.plot(_workdir()), sep="\n")
    elif mode == "plan":
        chosen = _DEVICES.value, _TIMES.value, _BANDWIDTH.value, _CORES.value, _JSON.value, _OUTPUT.value, _WORKDIR.value
        print(plan.plan_run(_config(), *chosen))
    else:
        print(json.dumps(bench.bench(_config(), _STEPS.value)))


def _parse(argv: list[str]) -> list[str]:
    with reported():
        for argument in argv[1:]:
            if override := re.match(r"--?config\.([^=]+)", argument):
                settings.check_name(override[1])
        try:
            rest = flags.FLAGS(workdir.with_own_config(argv))
            if _CONFIG.value is not None:
                _CONFIG.value.data  # noqa: B018 (a file that could not be read says so at the first look inside)
        except flags.Error as error:
            raise UserError(str(error)) from error
        except Exception as error:
            raise UserError(f"--config: {where(error)}") from error
        return rest


def main() -> None:
    """Runs the command line on `sys.argv`."""
    app.run(_dispatch, flags_parser=_parse)
