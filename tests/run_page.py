"""Runs the code of a page in the current directory, in the order of the page.

    python run_page.py PAGE                # Python blocks in one namespace, commands made small
    python run_page.py --parse PAGE ...    # parses the commands alone, of each page in a new folder

Each command of the project runs in a process of its own, forked from one that has imported the
package and has not yet started JAX. Exits with status 1 and the place of the first failure of each
page.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT, Block, Command, blocks, commands
from PIL import Image

_IMPORTED = [
    "dgl_jax.cli",
    "dgl_jax.train",
    "dgl_jax.evaluate",
    "dgl_jax.tools.export",
    "dgl_jax.run.axes",
    "tensorflow_datasets",
]
_NEEDS_NETWORK = ("cifar10", "cifar100", "imagenet", "imagenette")
_SMALL_RUN = ("--config.train.steps=2", "--config.model.width=8", "--config.model.head=linear")


def run_command(arguments: list[str], output: str) -> None:
    """Runs the command line in this process; its standard output goes to a file if one is named."""
    from dgl_jax import cli

    sys.argv[:] = ["dgl-jax", *arguments]
    if output:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    cli.main()


def parse_command(arguments: list[str], output: str) -> None:
    """Parses the command line as `cli.main` does, and writes mode and configuration as JSON."""
    from dgl_jax import cli

    sys.path.append(os.getcwd())
    sys.argv[:] = ["dgl-jax", *arguments]
    rest = cli._parse(sys.argv)
    assert rest[1:] == [], f"{rest[1:]}: not flags"
    settings = cli._config().to_dict() if cli._CONFIG.value is not None else None
    Path(output).write_text(json.dumps({"mode": cli._MODE.value, "config": settings}))


def _call(function: Callable[[list[str], str], None], arguments: list[str], output: str) -> None:
    """Runs a function in a process of its own; raises AssertionError if it fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    process = context.Process(target=function, args=(arguments, output))
    process.start()
    process.join()
    assert process.exitcode == 0, f"ends with status {process.exitcode}"


def parsed(command: Command, known: dict[str, list[str]]) -> dict[str, Any]:
    """Returns mode and configuration of a command, by the project's own parser.

    Args:
      command: a command line of the project.
      known: by workdir, the arguments that configured it so far; this command's are added.
    """
    arguments = list(command.arguments or ())
    given = [a for a in arguments if a.startswith("--config")]
    workdir = command.flag("workdir") or ""
    if command.flag("config"):
        known.setdefault(workdir, given)
    elif given:  # such a line means the configuration of the run
        arguments = [*known.get(workdir, ["--config=digits"]), *arguments]
    with contextlib.suppress(FileNotFoundError):
        os.remove("parsed.json")
    _call(parse_command, arguments, "parsed.json")
    return json.loads(Path("parsed.json").read_text())


def small(command: Command, settings: dict[str, Any]) -> list[str]:
    """Returns the arguments that make a command take seconds: two updates, no data to download."""
    arguments = list(command.arguments or ())
    if settings["config"] is None or settings["mode"] not in ("train", "bench", "plan"):
        return arguments
    config = settings["config"]
    fields: dict[str, Any] = {"train.steps": 2, "log.every": 1}
    fields["model.width"] = max(8, *np.ravel(config["codec"].get("dims", 8)).tolist())
    if not any("modules" in a or "slowdown" in a or "devices" in a for a in arguments):
        fields["model.modules"] = min(2, config["model"]["modules"])
    if config["method"]["name"] == "dgl" and config["model"].get("head") == "mlp_sr":
        fields["model.head"] = "linear"
    if config["data"]["name"] in _NEEDS_NETWORK:
        arguments = [a for a in arguments if not a.startswith("--config.data.")]
        data = {"name": "synthetic", "image_size": 16, "train_examples": 40, "batch_size": 8}
        fields |= {f"data.{name}": value for name, value in data.items()} | {"data.augment": "none"}
    elif config["data"]["name"] == "folder":
        fields["data.batch_size"] = 4
    arguments = [a for a in arguments if not a.startswith("--config.train.epochs=")]
    arguments += [f"--config.{name}={value}" for name, value in fields.items()]
    return arguments + (["--bench_steps=2"] if settings["mode"] == "bench" else [])


def prepare(command: Command, settings: dict[str, Any]) -> None:
    """Provides the run or the images that a command reads, unless the page has made them."""
    if settings["mode"] == "report":  # the page has trained the runs below its folder
        return
    workdir = command.flag("workdir")
    if settings["mode"] == "sweep":  # its folder must hold no run
        return
    reads_run = command.flag("config") is None or settings["mode"] in ("predict", "export", "plot")
    for folder in (workdir if reads_run else None, command.flag("init_from")):
        if folder and not Path(folder, "config.json").exists():
            _copy_small_run(Path(folder))
    images = command.flag("images")
    if images and not any(Path().glob(images)):
        _save_images(Path(images))
    if settings["config"] and settings["config"]["data"]["name"] == "folder":
        for part in ("train", "test"):
            for label in ("cats", "dogs"):
                _save_images(Path(settings["config"]["data"]["dir"], part, label))


def _copy_small_run(folder: Path) -> None:
    """Provides a finished run, which the first page that needs one trains for all of them."""
    kept = Path(os.environ.get("DGL_JAX_TEST_HOME") or tempfile.mkdtemp()) / "small_run"
    if not kept.exists():
        new = kept.with_name(f"small_run.{os.getpid()}")
        _call(run_command, ["--config=digits", f"--workdir={new}", *_SMALL_RUN], os.devnull)
        new.rename(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def _save_images(folder: Path, count: int = 12) -> None:
    """Writes small pictures of noise, unless the folder is there."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a block in the namespace of its page, or with a set-up in an empty directory."""
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    if block.mark != "setup":
        exec(code, namespace)
        return
    from page_setups import SETUPS

    assert block.value in SETUPS, f"page_setups.py has no set-up {block.value}"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        steps = SETUPS[block.value](block.code)
        exec(code, names := next(steps))
        next(steps, None)
    namespace |= names


def run(page: Path, parse_only: bool) -> None:
    """Runs all blocks of a page.

    Raises:
      RuntimeError: a block failed; the message names its place.
    """
    for name in ("examples", "benchmarks", "configs", "launch.py"):
        os.symlink(ROOT / name, name)
    namespace: dict[str, Any] = {"__name__": "page"}
    known: dict[str, list[str]] = {}
    for block in blocks(page):
        place: Any = block
        if block.mark == "skip because":
            continue
        try:
            if block.mark == "file":
                Path(block.value).parent.mkdir(parents=True, exist_ok=True)
                Path(block.value).write_text(block.code)
            elif block.language == "python" and not parse_only:
                run_python(block, namespace)
            elif block.language == "sh":
                for command in commands(block):
                    if command.arguments is not None:
                        place = command
                        _run_command(command, known, parse_only)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{place}: {error!r}") from error


def _run_command(command: Command, known: dict[str, list[str]], parse_only: bool) -> None:
    settings = parsed(command, known)
    # Of what needs ImageNet's archives, or is as large, the command line alone is checked.
    large = settings["config"] and settings["config"]["data"]["name"].startswith("imagenet")
    if not parse_only and not large:
        prepare(command, settings)
        _call(run_command, small(command, settings), command.output)


def main(arguments: list[str]) -> None:
    """Runs the command line above."""
    if arguments[0] != "--parse":
        run(Path(arguments[0]), parse_only=False)
        return
    failures = []
    for page in arguments[1:]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            try:
                run(Path(page), parse_only=True)
            except RuntimeError as failure:
                failures.append(str(failure))
    if failures:
        raise RuntimeError("\n".join(failures))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RuntimeError as failure:
        traceback.print_exc()
        sys.exit(str(failure))
