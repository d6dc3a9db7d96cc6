"""The one exception a user is meant to read, and one line of every other."""

import errno
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgl_jax import system


class UserError(Exception):
    """A mistake that the user can correct: its text names the field or file, the value, and what would work.

    `launch.py` prints the text as one line and exits with status 2; library users catch it by this name.
    """


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, of the system or of a storage library, means that no space is left."""
    text = str(error)
    return (
        getattr(error, "errno", None) in (28, 122)
        or "No space left" in text
        or "Disk quota exceeded" in text
    )


# What the system says of a path, and no defect of the program.
_OF_A_PATH = (
    *(
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    ),
    *(errno.ELOOP, errno.EIO, errno.ESTALE, errno.EINVAL, errno.ENXIO, errno.ETXTBSY, errno.EBUSY),
)


def of_a_path(error: OSError) -> str | None:
    """Returns the line for a path that cannot be read or written as it is; None if the error means something else."""
    if error.errno not in _OF_A_PATH or error.filename is None:
        return None
    return f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror})"


def explain(error: BaseException) -> str | None:
    """What an exception means for the user, as the line to print; None where it is a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        return f"the disk is full; free some space and run the same line again ({error})"
    if isinstance(error, OSError) and (text := of_a_path(error)):
        return text
    return not_opened(error) or out_of_memory(error)


def where(error: BaseException) -> str:
    """One line on what went wrong in a Python file of the user's, with the place."""
    if isinstance(error, UserError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[-1].strip()
    if missing := re.fullmatch(r"\[Errno 2\] .*: '(.+)'", text):
        path = Path(missing[1])
        beside = ", ".join(sorted(other.name for other in path.parent.glob(f"[!_]*{path.suffix}")))
        return f"{path}: no such file" + (f"; {path.parent} has {beside}" if beside else "")
    if isinstance(error, OSError):
        return text
    of_libraries = ("ml_collections", "absl", "importlib", "launch.py", "cli.py")
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not any(name in f.filename for name in of_libraries)
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


@contextmanager
def reported() -> Iterator[None]:
    """Ends the program as the command line does: a mistake gets one line and exit status 2, a defect its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same line goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)  # at once: threads that still work are left behind
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


# Where a library belongs to an extra of pyproject.toml; all others come with the package itself.
_EXTRAS = {
    "grain": "imagenet",
    "cv2": "imagenet",
    "simplejpeg": "imagenet",
    "tensorboardX": "tensorboard",
}


# Of the libraries whose name in pip is not that of the module.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}


@contextmanager
def needed(what: str) -> Iterator[None]:
    """Turns a library that is missing inside the block into one line with the command that installs it.

    Args:
      what: the mode, flag or field that needs it.

    Raises:
      UserError: a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "dgl_jax"):  # a defect of the package
            raise
        name = _DISTRIBUTIONS.get(library, library)
        raise UserError(
            f"{what} needs {name}, which is not installed: {_install(library, name)}"
        ) from error


def require(what: str, *libraries: str) -> None:
    """Checks that libraries are installed, without importing them: before a long run, not at its end.

    Args:
      what: the mode, flag or field that needs them.
      libraries: names of modules.

    Raises:
      UserError: one is not installed.
    """
    with needed(what):
        for library in libraries:
            if sys.modules.get(library) is None and importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(name=library)


def _install(library: str, name: str) -> str:
    """Returns the command that brings a library, at a version that is known to work where the package names one."""
    if extra := _EXTRAS.get(library):
        root = Path(__file__).parents[1]
        checkout = (root / "pyproject.toml").is_file()
        return (
            f'pip install {"-e " if checkout else ""}"{root if checkout else "dgl_jax"}[{extra}]"'
        )
    return f"pip install {name}"


_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|(CUDA_ERROR|hipError)_?OUT_?OF_?MEMORY|CU(BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


_BUSY = re.compile(
    r"TPU is already in use|ALREADY_IN_USE|CUDA_ERROR_DEVICES?_UNAVAILABLE|busy or unavailable|CUDA_ERROR_OUT_OF_MEMORY"
    r"|Device or resource busy"
)


_BYTES = r"(\d+(?:\.\d+)?) ?(bytes|[KMGTPE]?i?B\b|[KMGTPE]\b)?"


_ASKED = re.compile(rf"(?:allocat\w*|reserve|request for|used) {_BYTES}", re.IGNORECASE)


_FREE = re.compile(rf"there are {_BYTES} free", re.IGNORECASE)


_LIMIT = re.compile(rf"used {_BYTES} of {_BYTES}", re.IGNORECASE)


_UNITS = "BKMGTPE"


_INSTALL = {"cuda": '"jax[cuda13]"', "gpu": '"jax[cuda13]"', "tpu": '"jax[tpu]"'}


def out_of_memory(error: BaseException) -> str | None:
    """Returns what was asked for, what is free and what helps; None where the error is of another kind."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _MEMORY.search(text):
        return None
    asked, free, limit = _ASKED.search(text), _FREE.search(text), _LIMIT.search(text)
    said = [f"{_bytes(*asked.groups())} asked for"] if asked else []
    if limit:
        said.append(f"the device has {_bytes(*limit.groups()[2:])}")
    elif free:
        said.append(f"{_bytes(*free.groups())} free")
    elif isinstance(error, MemoryError):
        said += (
            [f"{readable(host)} free on this machine"]
            if (host := system.free_memory()) is not None
            else []
        )
    elif fullest := system.fullest_device():
        name, memory = fullest
        of = f" of {readable(memory.limit)}" if memory.limit is not None else ""
        said.append(f"{readable(memory.free or 0)}{of} free on {name}")
    return (
        f"out of memory ({', '.join(said) if asked else '; '.join([_first(text), *said])}); a smaller config.data.batch_size, "
        "a larger config.train.accumulate or config.model.remat=True needs less"
    )


def not_opened(error: BaseException) -> str | None:
    """Returns why the devices cannot be had, and what helps; None where the error is of another kind."""
    text = str(error)
    failed = re.search(
        r"Unable to initialize backend '(\w+)': (.*?)( \(set JAX_PLATFORMS=|$)", text, re.DOTALL
    )
    if not failed and not _is_unanswered(error) and not _BUSY.search(text):
        return None
    asked = _platforms()
    platform = failed[1] if failed else asked
    reason = _first(failed[2] if failed else text)
    if _BUSY.search(text):
        if not failed and "CUDA_ERROR_OUT_OF_MEMORY" in text:
            return None  # while a program runs: its own memory is used up
        return (
            f"another process holds the {platform.upper() or 'device'} ({reason}): end it or wait for it"
            + (
                ""
                if "TPU" in text
                else " (nvidia-smi lists it), take another with CUDA_VISIBLE_DEVICES"
            )
            + ", or set JAX_PLATFORMS=cpu"
        )
    setting = f"JAX_PLATFORMS={asked}" if asked else f"backend {platform}"
    why = f" ({reason})" if reason else ""
    if package := next(
        (_INSTALL[name] for name in (asked or platform).split(",") if name in _INSTALL), None
    ):
        return (
            f"{setting}: JAX cannot open it here{why}; where the hardware is there, pip install -U {package} brings the rest; "
            "JAX_PLATFORMS=cpu does without"
        )
    return (
        f"{setting}: JAX cannot open it here{why}; JAX_PLATFORMS=cpu, or none, takes what there is"
    )


def readable(number: float) -> str:
    """Returns a number of bytes as text: 17179869184 as "16.0 GiB"."""
    power = 0
    while number >= 1024 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {_UNITS[power]}iB" if power else f"{number:.0f} bytes"


def _bytes(number: str, unit: str | None) -> str:
    """Returns what an error message says of bytes in one form: "2.00G", "2147483648 bytes" and "2 GiB" as "2.0 GiB"."""
    power = _UNITS.find((unit or "B")[0].upper())
    return readable(float(number) * 1024**power)


def _first(text: str) -> str:
    """Returns the first line of an error message, cut."""
    return (text.strip().splitlines() or [""])[0][:200]


def _platforms() -> str:
    """Returns what JAX_PLATFORMS names."""
    import jax  # here, as this file is for errors: it may itself be what fails

    return getattr(jax.config, "jax_platforms", None) or ""


def _is_unanswered(error: BaseException) -> bool:
    """Returns whether JAX found no backend of the names it was given, which it asserts never happens."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, AssertionError)
        and bool(frames)
        and frames[-1].filename.endswith("xla_bridge.py")
    )
