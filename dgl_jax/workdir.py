"""The folder of a run: its lock, and what it says of its configuration and its end."""

import dataclasses
import fcntl
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgl_jax.device_errors import not_opened, out_of_memory
from dgl_jax.errors import UserError, is_disk_full, of_a_path
from dgl_jax.paths import expand
from dgl_jax.settings import Settings, differences
from dgl_jax.stored import load_settings

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_LOG = logging.getLogger(__name__)

_ASYNCHRONOUS = ("staleness", "reuse", "ring_bytes")


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds; accuracies are fractions, null for heads that were not trained."""

    engine: str
    config_hash: str
    seed: int
    epochs: float
    steps: int
    modules: list[dict[str, Any]]
    ensemble_accuracy: float | None
    images_per_second: float | None
    wire_bytes_per_image: list[float]
    raw_bytes_per_image: list[float]
    wire: str
    codebook_share: list[float]  # of the bytes on the wire
    codec_error: list[float]
    wall_seconds: float
    dataset: str
    versions: dict[str, str]
    cpu_threads: int | None = None  # of XLA's pool, which decide how sums are rounded; None: of an accelerator, or unknown
    staleness: list[float] | None = None  # asynchronous engines: mean age of the packets read, in updates of their producer
    reuse: list[float] | None = None  # and reads a packet, one entry a module
    ring_bytes: list[int] | None = None  # held by the ring at each module's entrance, codebooks included

    def to_dict(self) -> dict[str, Any]:
        """As summary.json holds it: what only asynchronous engines have is left out elsewhere."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None or k not in _ASYNCHRONOUS}


def get_config(workdir: str) -> "ConfigDict":
    """A run's configuration: this file is a configuration file itself, `--config=dgl_jax/workdir.py:runs/digits`."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(load_settings(Path(workdir) / "config.json")))


def with_own_config(argv: list[str]) -> list[str]:
    """Command lines that override fields and name the workdir of a run, but no configuration: they mean that run's.

    Raises:
      UserError: there is no such run.
    """
    override = next((argument for argument in argv if re.match(r"--?config\.", argument)), None)
    if override is None or any(re.match(r"--?config(=|$)", argument) for argument in argv):
        return argv
    flag = re.compile(r"--?workdir=(.+)")
    workdir = next((expand(match[1], "--workdir") for argument in argv if (match := flag.match(argument))), None)
    if workdir is None or not (Path(workdir) / "config.json").is_file():
        raise UserError(f"{override}: which configuration? add --config=configs/..., or --workdir=DIR of a run that has one")
    return [argv[0], f"--config={__file__}:{workdir}", *argv[1:]]


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps a second training off it; the system lets go of the lock when the process ends, however."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--workdir={workdir}: another training is running there") from None
        yield


@contextmanager
def reporting(workdir: Path) -> Iterator[None]:
    """Turns a full disk, a path that cannot be used and used-up memory into one line; the last says what the run can go on from.

    Raises:
      UserError: in their place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"{workdir}: the disk is full; free some space and run the same line again") from error
        if isinstance(error, OSError) and (text := of_a_path(error)):
            raise UserError(text) from error
        if not_opened(error) or (text := out_of_memory(error)) is None:
            raise
        kept = "no checkpoint was written yet"
        if steps := _steps(workdir):
            kept = (
                f"the checkpoint of step {max(steps)} is good, and the run goes on from there under another "
                "config.train.accumulate or config.model.remat; another config.data.batch_size is another run"
            )
        raise UserError(f"{text}; {kept}") from error


def check(workdir: Path, settings: Settings) -> None:
    """Checks that the workdir can hold this run, and holds no run of another configuration.

    Raises:
      UserError: it does, with the fields that differ; or nobody can tell, as its config.json is missing or damaged; or
        checkpoints could not be read back from there.
    """
    from dgl_jax.checkpoint import check_path

    check_path(workdir, "--workdir")
    check_path(workdir / "checkpoints")
    if not holds_checkpoint(workdir):  # nothing would be lost
        return
    changed = differences(load_settings(workdir / "config.json").to_dict(), settings)
    if changed:
        raise UserError(
            f"--workdir={workdir}: holds a run of another configuration: {'; '.join(changed)}; "
            "use another workdir, or start from its weights with --init_from"
        )


def holds_checkpoint(workdir: Path) -> bool:
    """Tells whether there is something to go on from, whole or not."""
    return bool(_steps(workdir))


def _steps(workdir: Path) -> list[int]:
    from dgl_jax.checkpoint import checkpoint_steps  # here: the command line reads its flags before JAX is imported

    return checkpoint_steps(workdir / "checkpoints")


def finished(workdir: Path, settings: Settings) -> Summary | None:
    """Returns the summary of a run that has nothing left to do under these settings."""
    summary = read_summary(workdir)
    if summary is None or not (workdir / "config.json").exists():
        return None
    before = load_settings(workdir / "config.json").train
    asked = settings.train
    if asked == before or (asked.steps and asked.steps <= summary.steps):
        return summary
    more = asked.epochs > summary.epochs + 1e-3 if not asked.steps else True
    return None if more else summary


def read_summary(workdir: Path) -> Summary | None:
    """Reads `summary.json`; one that cannot be read counts as none."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = Summary(**json.loads(path.read_text(encoding="utf-8")))
        numbers = (summary.epochs, summary.steps, *(module["updates"] for module in summary.modules))
        if all(isinstance(number, int | float) for number in numbers):
            return summary
        reason = "its numbers are none"
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error)
    _LOG.warning("%s cannot be read (%s): the run is tested again", path, reason.splitlines()[0])
    return None
