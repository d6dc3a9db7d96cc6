"""Command line: flags, logging and dispatch on --mode; everything else lives in the package."""

import json
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags

from dgl_jax import settings, writers
from dgl_jax.errors import UserError

_MODES = ["train", "eval", "predict", "export", "plot", "bench"]
_CONFIG = config_flags.DEFINE_config_file("config", None, "One of configs/*.py; --config.a.b=value overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where a run is written, or read back from.")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "newest", "newest, best or a step; for eval, predict and export.")
_INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of a run whose weights a new one starts from.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "What --mode=eval measures.")
_IMAGES = flags.DEFINE_multi_string("images", [], "File, folder or pattern of images for --mode=predict; repeatable.")
_OUTPUT = flags.DEFINE_string("output", None, "File of predict (.csv or .jsonl), folder of export.")
_STEPS = flags.DEFINE_integer("bench_steps", 200, "Steps that --mode=bench times.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Ask XLA for so many CPU devices.", lower_bound=1)


def _config() -> settings.Settings:
    try:
        config = _CONFIG.value
        if config is not None:
            config.data  # noqa: B018 (a file that could not be read says so at the first look inside)
    except OSError as error:
        raise UserError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error
    if config is None:
        raise UserError("--config is missing; for example --config=configs/digits.py")
    return settings.make_settings(config)


def _workdir() -> str:
    if not _WORKDIR.value:
        raise UserError(f"--workdir is missing: --mode={_MODE.value} needs the folder of a run")
    return _WORKDIR.value


def _dispatch() -> None:
    # Imported here: a mistyped flag or --help need not wait for what trains.
    from dgl_jax import bench, evaluate, export, plots, predict, train

    if _CPU_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    if _MODE.value == "train":
        try:
            summary = train.train_and_evaluate(_config(), _workdir(), _INIT_FROM.value)
        except train.Interrupted as stopped:
            print(f"\n{stopped}", file=sys.stderr)
            sys.exit(128 + stopped.signum)
        print(json.dumps({"modules": [m["test_accuracy"] for m in summary.modules], "ensemble": summary.ensemble_accuracy}))
    elif _MODE.value == "eval":
        config = _config() if _CONFIG.value else None
        print(json.dumps(evaluate.evaluate_run(_workdir(), _CHECKPOINT.value, _SPLIT.value, config)))
    elif _MODE.value == "predict":
        predict.predict_run(_workdir(), _CHECKPOINT.value, _IMAGES.value, _OUTPUT.value)
    elif _MODE.value == "export":
        print(export.export_run(_workdir(), _CHECKPOINT.value, _OUTPUT.value))
    elif _MODE.value == "plot":
        print(*plots.plot(_workdir()), sep="\n")
    else:
        print(json.dumps(bench.bench(_config(), _STEPS.value)))


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with one line and exit status 2 for a mistake."""
    names = settings.field_names()
    groups = {name.split(".")[0] for name in names}
    try:
        for argument in argv[1:]:
            override = re.match(r"--?config\.([^=]+)", argument)
            if override and override[1] not in names and override[1] not in groups:
                raise UserError(f"--config.{override[1]}: no such field; {settings.nearest(override[1], names)}")
        return flags.FLAGS(argv)
    except (flags.Error, UserError, AttributeError, TypeError, ValueError) as error:
        _fail(error)


def _main(_: Sequence[str]) -> None:
    writers.log_to_stderr()
    try:
        _dispatch()
    except UserError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
