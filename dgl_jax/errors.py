"""`UserError`, and the helpers that turn other exceptions into one line for the user."""

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
    """Mistake that the user can correct.

    The text is one line that names the field or file, the value, and what would work. The command
    line prints it and exits with status 2; library users can catch the class.
    """


class ModuleFailed(UserError):
    """Failure of a module that ends the run; the text does not tell where the run can resume."""


def is_disk_full(error: BaseException) -> bool:
    """Returns True if an exception of the system or of a storage library reports a full disk."""
    text = str(error)
    return (
        getattr(error, "errno", None) in (28, 122)
        or "No space left" in text
        or "Disk quota exceeded" in text
    )


# Errors about a path that the user can correct, as opposed to a bug in the program.
_PATH_ERRORS = (
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
    """Returns one line for a path that cannot be read or written, or None for other errors."""
    if error.errno not in _PATH_ERRORS or error.filename is None:
        return None
    # The second name is where a file written under another name would go.
    name = os.fsdecode(error.filename2 or error.filename)
    return f"{name}: cannot be read or written ({error.strerror})"


# What JAX raises, when it is imported, about its environment variables.
_JAX_VARIABLE = re.compile(r"invalid truth value .* for environment|Invalid value .* for JAX flag")


def explain(error: BaseException) -> str | None:
    """Returns the line that explains an exception to the user, or None if it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        return f"the disk is full; free some space and run the same command again ({error})"
    if isinstance(error, OSError) and (text := of_a_path(error)):
        return text
    if isinstance(error, ValueError) and _JAX_VARIABLE.match(str(error)):
        return f"{error}; JAX reads it from the environment"
    return not_opened(error) or out_of_memory(error)


def where(error: BaseException) -> str:
    """Returns one line on an exception raised in user code, with file and line number."""
    if isinstance(error, UserError):
        return str(error)
    text = (str(error).strip().splitlines() or [""])[-1].strip()
    if missing := re.fullmatch(r"\[Errno 2\] .*: '(.+)'", text):
        path = Path(missing[1])
        others = ", ".join(sorted(other.name for other in path.parent.glob(f"[!_]*{path.suffix}")))
        return f"{path}: no such file" + (f"; {path.parent} has {others}" if others else "")
    if isinstance(error, OSError):
        return text
    not_user_code = ("ml_collections", "absl", "importlib", "launch.py", "cli.py")
    frames = [
        entry
        for entry in traceback.extract_tb(error.__traceback__)
        if not any(name in entry.filename for name in not_user_code)
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


@contextmanager
def reported() -> Iterator[None]:
    """Prints a user mistake as one line and exits with status 2; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)  # a normal exit would wait for worker threads that are still running
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from error


# Extra of pyproject.toml that installs a library; libraries not listed have no extra.
_EXTRAS = {
    "grain": "imagenet",
    "cv2": "imagenet",
    "simplejpeg": "imagenet",
    "tensorboardX": "tensorboard",
}

# Names in pip that differ from the name of the imported module.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-python-headless",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}


@contextmanager
def needed(purpose: str) -> Iterator[None]:
    """Turns a failed import inside the block into one line with the command that installs it.

    Args:
      purpose: mode, flag or field that needs the library; the error message begins with it.

    Raises:
      UserError: if a library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "dgl_jax"):  # a bug of this package
            raise
        name = _DISTRIBUTIONS.get(library, library)
        raise UserError(
            f"{purpose} needs {name}, which is not installed: {_install(library, name)}"
        ) from error


def require(purpose: str, *libraries: str) -> None:
    """Checks that libraries are installed without importing them.

    Call it before a long run, so that the run does not fail at its end.

    Args:
      purpose: mode, flag or field that needs the libraries; the error message begins with it.
      libraries: names of importable modules.

    Raises:
      UserError: if a library is not installed.
    """
    with needed(purpose):
        for library in libraries:
            if sys.modules.get(library) is None and importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(name=library)


def _install(library: str, name: str) -> str:
    """Returns the pip command that installs a library, through an extra if one contains it."""
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
    r"TPU is already in use|ALREADY_IN_USE|CUDA_ERROR_DEVICES?_UNAVAILABLE"
    r"|busy or unavailable|CUDA_ERROR_OUT_OF_MEMORY|Device or resource busy"
)
# The three forms in which XLA and NumPy write memory sizes into their messages.
_BYTES = r"(\d+(?:\.\d+)?) ?(bytes|[KMGTPE]?i?B\b|[KMGTPE]\b)?"
_ASKED = re.compile(rf"(?:allocat\w*|reserve|request for|used) {_BYTES}", re.IGNORECASE)
_FREE = re.compile(rf"there are {_BYTES} free", re.IGNORECASE)
_LIMIT = re.compile(rf"used {_BYTES} of {_BYTES}", re.IGNORECASE)
_UNITS = "BKMGTPE"
_INSTALL = {"cuda": '"jax[cuda13]"', "gpu": '"jax[cuda13]"', "tpu": '"jax[tpu]"'}


def out_of_memory(error: BaseException) -> str | None:
    """Returns one line on bytes asked for, bytes free and remedies, or None for other errors."""
    text = str(error)
    if not isinstance(error, MemoryError) and not _MEMORY.search(text):
        return None
    asked, free, limit = _ASKED.search(text), _FREE.search(text), _LIMIT.search(text)
    facts = [f"{_bytes(*asked.groups())} asked for"] if asked else []
    if limit:
        facts.append(f"the device has {_bytes(*limit.groups()[2:])}")
    elif free:
        facts.append(f"{_bytes(*free.groups())} free")
    elif isinstance(error, MemoryError):
        facts += (
            [f"{readable(host)} free on this machine"]
            if (host := system.free_memory()) is not None
            else []
        )
    elif fullest := system.fullest_device():
        name, memory = fullest
        limit_text = f" of {readable(memory.limit)}" if memory.limit is not None else ""
        facts.append(f"{readable(memory.free or 0)}{limit_text} free on {name}")
    return (
        f"out of memory ({', '.join(facts) if asked else '; '.join([_first(text), *facts])}); "
        "a smaller config.data.batch_size, a larger config.train.accumulate or "
        "config.model.remat=True needs less"
    )


def not_opened(error: BaseException) -> str | None:
    """Returns one line on why the devices cannot be opened, or None for other errors."""
    text = str(error)
    failed = re.search(
        r"Unable to initialize backend '([^']*)': (.*?)( \(set JAX_PLATFORMS=|$)", text, re.DOTALL
    ) or re.match(r"Unknown backend:? '?(\w+)'?(.*)", text, re.DOTALL)
    if not failed and not _is_unanswered(error) and not _BUSY.search(text):
        return None
    asked = _platforms()
    platform = failed[1] if failed else asked
    reason = _first(failed[2] if failed else text)
    if _BUSY.search(text):
        if not failed and "CUDA_ERROR_OUT_OF_MEMORY" in text:
            return None  # raised by a running program, which has filled the device itself
        return (
            f"another process holds the {platform.upper() or 'device'} ({reason}): "
            "end it or wait for it"
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
        (
            _INSTALL[name]
            for name in map(str.strip, (asked or platform).split(","))
            if name in _INSTALL
        ),
        None,
    ):
        return (
            f"{setting}: JAX cannot open it here{why}; if the machine has such a device, run "
            f"pip install -U {package}; otherwise set JAX_PLATFORMS=cpu"
        )
    return (
        f"{setting}: JAX cannot open it here{why}; "
        "set JAX_PLATFORMS=cpu, or unset it to use what is available"
    )


def readable(number: float) -> str:
    """Formats a number of bytes for people: 17179869184 as "16.0 GiB"."""
    power = 0
    while number >= 1024 and power < len(_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {_UNITS[power]}iB" if power else f"{number:.0f} bytes"


def _bytes(number: str, unit: str | None) -> str:
    """Formats a matched number and unit alike: "2.00G" and "2147483648 bytes" as "2.0 GiB"."""
    power = _UNITS.find((unit or "B")[0].upper())
    return readable(float(number) * 1024**power)


def _first(text: str) -> str:
    """Returns the first line of an error message, at most 200 characters."""
    return (text.strip().splitlines() or [""])[0][:200]


def _platforms() -> str:
    """Returns the platforms that JAX_PLATFORMS asks for, or an empty string."""
    import jax  # imported here: this file must load even if the import of JAX is what fails

    return getattr(jax.config, "jax_platforms", None) or ""


def _is_unanswered(error: BaseException) -> bool:
    """Returns True if JAX found none of the backends it was asked for, an AssertionError."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, AssertionError)
        and bool(frames)
        and frames[-1].filename.endswith("xla_bridge.py")
    )
