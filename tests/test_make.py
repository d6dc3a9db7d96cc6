"""Tests which environments the Makefile and `.ci/run` use, with scripts as interpreters."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


# Without the variables of a `make` that runs this test.
ENVIRONMENT = {"PATH": os.environ["PATH"]}


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


def test_every_interpreter_and_constraints_file_has_its_own_environment(tmp_path):
    def environment(version: str, *arguments: str) -> str:
        python = script(tmp_path / version, f"echo {version}")
        command = ["make", "--dry-run", "test", f"PYTHON={python}", *arguments]
        lines = subprocess.check_output(command, cwd=ROOT, env=ENVIRONMENT, text=True).splitlines()
        assert lines[-1].endswith("/bin/python -m pytest -n 2 --durations=30")
        # Created by this interpreter, and tested in.
        folder = lines[-1].removesuffix("/bin/python -m pytest -n 2 --durations=30")
        assert lines[0] == f"{python} -m venv {folder}"
        return folder

    assert environment("3.11.7-0") == ".venv/3.11.7-0"
    assert environment("3.13.0-0") == ".venv/3.13.0-0"
    assert environment("3.13.0-1") == ".venv/3.13.0-1"  # another installation of the same version
    lowest = environment("3.11.7-0", "CONSTRAINTS=constraints-lowest.txt")
    assert lowest == ".venv/3.11.7-0-constraints-lowest"


def test_missing_interpreter_is_one_line():
    command = ["make", "--dry-run", "test", "PYTHON=no_such_python"]
    made = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False
    )
    assert made.returncode == 2
    assert made.stderr.splitlines()[-1].endswith(
        "PYTHON=no_such_python: no such interpreter.  Stop."
    )


def checks(
    folder: Path, *, command: str, pyenv: str, status: int = 0, **environment: str
) -> tuple[int, list[str]]:
    """Runs `.ci/run` with a `make` that does nothing; returns the exit status and the output.

    Args:
      folder: for the interpreters and commands.
      command: versions that are a command, such as "3.11 3.13".
      pyenv: versions that pyenv has installed.
      status: exit status of `make`.
      **environment: further environment variables.
    """
    for version in command.split():
        script(folder / "bin" / f"python{version}", f"echo {version}")
    for version in pyenv.split():
        script(folder / "pyenv/versions" / f"{version}.1" / "bin/python", f"echo {version}")
    script(folder / "bin/make", 'echo make "$@"', f"exit {status}")
    script(folder / "bin/chromium")
    (folder / "bin/dirname").symlink_to(shutil.which("dirname"))
    environment |= {"PATH": str(folder / "bin"), "PYENV_ROOT": str(folder / "pyenv")}
    command_line = [shutil.which("bash"), str(ROOT / ".ci/run")]
    ran = subprocess.run(
        command_line, env=environment, cwd=folder, text=True, capture_output=True, check=False
    )
    return ran.returncode, (ran.stdout + ran.stderr).replace(f"{folder}/", "").splitlines()


LOWEST = [
    "make lint docs PYTHON=bin/python3.11",
    "make versions test PYTHON=bin/python3.11 CONSTRAINTS=constraints-lowest.txt",
]


def test_both_ends_of_the_supported_versions_are_checked(tmp_path):
    status, lines = checks(tmp_path, command="3.11 3.13", pyenv="", CI="true")
    assert (status, lines) == (0, [*LOWEST, "make versions test-fast PYTHON=bin/python3.13"])


def test_interpreters_are_also_found_below_pyenv(tmp_path):
    status, lines = checks(tmp_path, command="3.11 3.12", pyenv="3.12 3.13", CI="true")
    newest = "pyenv/versions/3.13.1/bin/python"
    assert (status, lines) == (0, [*LOWEST, f"make versions test-fast PYTHON={newest}"])


def test_missing_newest_python_fails_only_in_continuous_integration(tmp_path):
    status, lines = checks(tmp_path / "ci", command="3.11", pyenv="3.12", CI="true")
    assert (status, lines) == (1, [*LOWEST, "error: no Python 3.13 found"])
    status, lines = checks(tmp_path / "local", command="3.11", pyenv="3.12")
    skipped = "no Python 3.13 found: the newest versions were not tested"
    assert (status, lines) == (0, [*LOWEST, skipped])


def test_missing_oldest_python_fails(tmp_path):
    assert checks(tmp_path, command="3.13", pyenv="") == (1, ["error: no Python 3.11 found"])


def test_failed_check_ends_the_run(tmp_path):
    status, lines = checks(tmp_path, command="3.11 3.13", pyenv="", status=3)
    assert (status, lines) == (3, LOWEST[:1])
