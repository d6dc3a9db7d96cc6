"""Report of the runs below a folder: an HTML page and a Markdown page beside it."""

import os
from pathlib import Path

from dgl_jax.errors import UserError
from dgl_jax.run.writers import check_writable, write_atomically, writing
from dgl_jax.tools.report_groups import make_report
from dgl_jax.tools.report_html import page
from dgl_jax.tools.report_runs import read_runs
from dgl_jax.tools.report_tables import markdown


def report_runs(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Writes the report of all runs below a folder.

    Args:
      workdir: folder that is searched for runs at any depth; it may hold running ones.
      output: HTML file to write; by default `report.html` in the folder. The Markdown page has the
        same name with the ending .md.

    Returns:
      The paths of the HTML and of the Markdown page.

    Raises:
      UserError: the folder does not exist or holds no run, or the files cannot be written.
    """
    root = Path(workdir)
    target = Path(output) if output is not None else root / "report.html"
    if target.suffix.lower() != ".html":
        raise UserError(f"--output={target}: must end in .html, for example report.html")
    if not root.is_dir():
        raise UserError(f"--workdir={root}: no such folder; name one with runs below it")
    files = [target, target.with_suffix(".md")]
    name = f"--output={target}"
    for file in files:
        check_writable(file, name)
    runs, notes = read_runs(root)
    if not runs:
        raise UserError(
            f"--workdir={root}: no run below this folder (no config.json); train one first"
        )
    report = make_report(root.resolve().name or str(root), runs, notes)
    with writing(name):
        contents = (page(report), markdown(report))
        write_atomically(
            {file: text.encode("utf-8", "replace") for file, text in zip(files, contents)}
        )
    return files
