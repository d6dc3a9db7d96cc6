"""The notebooks of the documentation: they run and learn; stored outputs hold nothing private."""

import getpass
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: Any) -> list[Any]:
    """Returns the outputs of all cells."""
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def printed(notebook: Any) -> str:
    """Returns what the cells print."""
    return "".join(out.text for out in outputs(notebook) if out.output_type == "stream")


def accuracies(text: str) -> list[float]:
    """Returns the percentages in a text."""
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def problems(notebook: Any) -> list[str]:
    """Returns what stored outputs must not be or hold."""
    result = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.execution_count is None:
            result.append(f"not run: {cell.source[:40]!r}")
    if not outputs(notebook):
        result.append("no output is kept")
    for out in outputs(notebook):
        if out.output_type == "error" or out.get("name") == "stderr":
            result.append(f"error output: {out.get('text', out.get('evalue'))!r}")
        if len(out.get("data", {}).get("image/png", "")) > 40_000 * 4 / 3:
            result.append("a picture of more than 40 kB")
        if "text/html" in out.get("data", {}):
            result.append("HTML, which the site does not show")
    text = json.dumps(notebook)
    private = {getpass.getuser(), socket.gethostname(), str(ROOT), str(Path.home())}
    for word in {word for word in private if len(word) > 4}:
        if word in text:
            result.append(f"names {word}")
    if match := re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users|var|usr)/[^\s\"']*", text):
        result.append(f"the path {match[0]}")
    if set(notebook.metadata) - {"kernelspec", "language_info"}:
        result.append(f"metadata {set(notebook.metadata)}")
    return result


@each_notebook
def test_outputs_are_kept_and_nothing_private(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert min(accuracies(printed(notebook))) > 90


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cell: cell.update(execution_count=None), "not run"),
        (lambda cell: cell.outputs[0].update(name="stderr"), "error output"),
        (lambda cell: cell.outputs[0].update(text="/home/me/runs"), "the path /home/me/runs"),
    ],
    ids=["not run", "stderr", "path"],
)
def test_twin_what_must_not_be_kept_is_noticed(change, problem):
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    change(next(cell for cell in notebook.cells if cell.get("outputs")))
    assert any(text.startswith(problem) for text in problems(notebook))


@pytest.mark.slow
@pytest.mark.full_compile
@each_notebook
def test_a_notebook_runs_and_learns(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    stored = accuracies(printed(notebook))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
    measured = accuracies(printed(notebook))
    assert len(measured) == len(stored)
    assert max(abs(a - b) for a, b in zip(measured, stored)) < 3  # per cent; other CPUs round so
    assert os.listdir(tmp_path)  # runs were written here, not beside the notebook
