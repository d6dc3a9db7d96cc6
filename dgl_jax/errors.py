"""The one exception a user is meant to read, and one line of every other."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgl_jax.device_errors import not_opened, out_of_memory


class UserError(Exception):
    """A mistake that the user can correct: its text names the field or file, the value, and what would work.

    `launch.py` prints the text as one line and exits with status 2; library users catch it by this name.
    """


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, of the system or of a storage library, means that no space is left."""
    text = str(error)
    return getattr(error, "errno", None) in (28, 122) or "No space left" in text or "Disk quota exceeded" in text


# What the system says of a path, and no defect of the program.
_OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
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
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(name in f.filename for name in of_libraries)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


@contextmanager
def reported() -> Iterator[None]:
    """Ends the program as the command line does: a mistake gets one line and exit status 2, a defect its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same line goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(130)  # at once: threads that still work are left behind
    except Exception as error:
        if (text := explain(error)) is None:
            raise
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
