"""Processes that measure the rows, one at a time, and the file with the results.

The first process never touches the accelerator. It starts a worker, sends it one row at a time as a
line of JSON and reads one line per row. A worker that crashes, hangs or runs out of time is killed
together with the processes that it started, and the next row gets a new one.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accelerator import report
from benchmarks.accelerator.rows import ROOT, SIZES, Answer, Figures, Job, Row, Skipped

OUT_OF_TIME = "ran out of time"
_ENVIRONMENT = ""  # in place of a row's name, asks for versions and devices


class Worker:
    """Process that measures rows.

    Args:
      command: starts the process, which calls `serve`.
      log: file that its error output is appended to.
      environment: its environment variables.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self._log, self._start = log, log.stat().st_size if log.exists() else 0
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                text=True,
                start_new_session=True,  # so that it can be killed with all that it starts
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, request: Figures, limit: float) -> Answer | None:
        """Returns the answer to a request; None if there is none within `limit` seconds.

        Raises:
          ChildProcessError: the process ended.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=max(0.0, limit))
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            return None
        if not line:
            raise ChildProcessError(self._ending())
        return Answer(**json.loads(line))

    def _ending(self) -> str:
        status = self._process.wait()
        with self._log.open("rb") as log:
            log.seek(self._start)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["no message"]
        return f"the process ended with status {status}: {lines[-1][:200]}"

    def close(self) -> None:
        """Kills the process and every process that it started, and waits for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


class Session:
    """Measures rows in workers, of which at most one exists at any time.

    Args:
      script: file that calls `serve` when it is started with the flag `--worker`.
      size: name of the sizes to measure at; may be set later.
      folder: folder for the files of the rows.
      log: file for the error output of the workers.
      data_dir: the user's folder of images; "" without one.
      flags: further flags of the workers.
    """

    def __init__(
        self,
        script: str,
        size: str,
        folder: Path,
        log: Path,
        data_dir: str = "",
        flags: Sequence[str] = (),
    ):
        self.size, self.platform = size, ""
        self._script, self._folder, self._log, self._data_dir = script, folder, log, data_dir
        self._flags = flags
        self._worker: Worker | None = None
        self._serves: tuple[str, bool] | None = None

    def environment(self, limit: float) -> Answer:
        """Returns versions and devices; the process is the first row's, unless that needs JAX."""
        answer = self._ask({"row": _ENVIRONMENT}, ("", False), limit)
        self.platform = answer.figures.get("platform", "")
        return answer

    def measure(self, row: Row, left: float, results: Mapping[str, Figures]) -> Answer:
        """Measures one row.

        Args:
          row: the row.
          left: seconds left in the whole benchmark.
          results: figures of earlier rows.
        """
        limit = min(left, row.limit(SIZES[self.size]))
        request = {
            "row": row.name,
            "size": self.size,
            "folder": str(self._folder),
            "data_dir": self._data_dir,
            "platform": self.platform,
            "results": results,
            "deadline": time.monotonic() + limit,  # one clock for all processes of the machine
        }
        answer = self._ask(request, (row.process, row.host), limit)
        if re.match(r"(Jax|Xla)RuntimeError|AcceleratorError|RuntimeError: CUDA", answer.reason):
            self.close()  # after an error of the driver, all later programs may fail
        if answer.reason == OUT_OF_TIME and limit < left:
            return Answer({}, f"took longer than {limit:.0f} s")
        return answer

    def _ask(self, request: Figures, serves: tuple[str, bool], limit: float) -> Answer:
        begin = time.monotonic()
        adopted = self._serves == ("", False) and not serves[1]  # it has only told its environment
        if self._worker is None or not (adopted or self._serves == serves):
            self.close()
            command = [
                sys.executable,
                self._script,
                "--worker",
                *["--host"] * serves[1],
                *self._flags,
            ]
            self._worker = Worker(command, self._log, self._variables())
        self._serves = serves
        try:
            answer = self._worker.ask(request, limit - (time.monotonic() - begin))
        except ChildProcessError as error:
            answer = Answer({}, str(error))
            self.close()
        if answer is None:
            answer = Answer({}, OUT_OF_TIME)
            self.close()
        return answer

    def _variables(self) -> dict[str, str]:
        # Rows of different processes compile many equal programs.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(self._folder / "jax")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | cache | {"PYTHONPATH": os.pathsep.join(paths)}

    def close(self) -> None:
        """Kills the worker, if there is one."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._serves = None


def serve(
    rows: Callable[[str], Sequence[Row]],
    describe: Callable[[], Figures],
    prepare: Callable[[str], None],
) -> None:
    """Measures rows for `Session` until the standard input ends, then kills this process group.

    Args:
      rows: returns all rows at a size.
      describe: returns versions and devices.
      prepare: called with the size before a row is measured.
    """
    # Libraries print to the standard output too, which therefore goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        # The first process has ended: nobody waits for the row that is being measured.
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    shared: dict[Any, Any] = {}
    while True:
        answer = _answer(json.loads(requests.get()), rows, describe, prepare, shared)
        answers.write(json.dumps(answer._asdict(), default=str) + "\n")
        answers.flush()


def _answer(
    request: Figures,
    rows: Callable[[str], Sequence[Row]],
    describe: Callable[[], Figures],
    prepare: Callable[[str], None],
    shared: dict[Any, Any],
) -> Answer:
    name = request["row"]
    print(f"--- {name or 'environment'}", file=sys.stderr, flush=True)
    try:
        if name == _ENVIRONMENT:
            return Answer(describe())
        job = Job(
            SIZES[request["size"]],
            Path(request["folder"]),
            request["data_dir"],
            request["platform"],
            request["results"],
            request["deadline"],
            shared,
        )
        prepare(request["size"])
        row = next(row for row in rows(request["size"]) if row.name == name)
        return Answer(row.measure(job))
    except Skipped as reason:
        return Answer({}, str(reason))
    except SystemExit:  # the package has printed which library is missing
        return Answer({}, "a part of the package could not be imported; the log says why")
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        told = type(error).__name__ == "UserError"  # its text is a line for the user
        return Answer({}, lines[0] if told else f"{type(error).__name__}: {lines[0][:200]}")


def unwritable(path: Path) -> str:
    """Returns why a file of results cannot be written; "" if it can."""
    if path.is_dir():
        return "is a folder; name a file"
    if path.suffix == ".log":
        return "the messages of the rows go to the file with this suffix; use .json"
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"cannot write there ({error.strerror})"


class Results:
    """Figures and reasons by row, written to a file after every change.

    Args:
      path: the file, which is replaced at once and never half-written.
      about: what the file says besides.
    """

    def __init__(self, path: Path, about: Figures):
        self.path, self.about = path, about
        self.rows: dict[str, Figures] = {}

    def plan(self, rows: Sequence[Row]) -> None:
        """Adds rows that have not run yet."""
        for row in rows:
            self.rows[row.name] = {"group": row.group, "reason": "not run yet"}
        self.save()

    def add(self, row: Row, answer: Answer, seconds: float) -> None:
        """Stores the answer of a row, and derives the figures that need several rows."""
        entry: Figures = {"group": row.group, "seconds": round(seconds, 1)}
        self.rows[row.name] = entry | (
            {"reason": answer.reason} if answer.reason else {"figures": answer.figures}
        )
        report.derive(self.rows)
        self.save()

    def figures(self) -> dict[str, Figures]:
        """Returns the figures of all rows that have some."""
        return {name: entry["figures"] for name, entry in self.rows.items() if "figures" in entry}

    def save(self) -> None:
        """Writes the file, replacing an earlier one at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n")
        os.replace(new, self.path)
