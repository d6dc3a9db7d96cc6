"""MkDocs hooks: notebooks become pages, and links that leave `docs/` are resolved.

A notebook is rendered from its stored outputs; it is not run. Pages are also read in the
repository, where they may link to files beside `docs/`. On the site such a picture is copied, and
such a link leads to the repository if `repo_url` is set in `mkdocs.yml`; otherwise only its text
remains.
"""

import base64
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Code, which is left alone; else a link or an image, with its text and target.
_LINK = re.compile(r"`+[^`]*`+|(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook, and the pictures outside `docs/` that pages show."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, pictures = render(json.loads(file.content_string), Path(file.src_uri).stem)
        files.append(File.generated(config, _page_of(file.src_uri), content=text))
        for name, content in pictures.items():
            uri = posixpath.join(posixpath.dirname(file.src_uri), name)
            files.append(File.generated(config, uri, content=content))
    root = Path(config.docs_dir).parent
    for file in [file for file in files if file.is_documentation_page()]:
        for _, outside in _outside(file):
            source = root / outside
            if source.suffix in (".png", ".svg", ".jpg") and source.is_file():
                copied = File.generated(config, f"pictures/{outside}", abs_src_path=str(source))
                if files.get_file_from_path(copied.src_uri) is None:
                    files.append(copied)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves links to notebooks and to files outside `docs/`."""
    here = posixpath.dirname(page.file.src_uri)

    def resolve(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, anchor = (target or "").partition("#")[::2]
        if not path or ":" in path:
            return match[0]
        if path.endswith(".ipynb") and _page_of(path) != posixpath.basename(page.file.src_uri):
            return f"[{text}]({_page_of(path)}{anchor and '#' + anchor})"
        outside = _beside_docs(here, path)
        if outside is None:
            return match[0]
        if mark:
            return f"![{text}]({posixpath.relpath(f'pictures/{outside}', here or '.')})"
        return f"[{text}]({config.repo_url}/blob/main/{outside})" if config.repo_url else text

    return outside_code(markdown, lambda line: _LINK.sub(resolve, line))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Returns the text with `change` applied to each line outside fenced blocks of code."""
    lines, fence = [], ""
    for line in markdown.splitlines():
        if marker := re.match(r"\s*(```+|~~~+)", line):
            fence = "" if fence and marker[1].startswith(fence) else fence or marker[1]
            lines.append(line)
        else:
            lines.append(line if fence else change(line))
    return "\n".join(lines) + "\n"


def _outside(file: File) -> list[tuple[str, str]]:
    """Returns (target, path from the root) of each link of a page that leaves `docs/`."""
    targets: list[tuple[str, str]] = []

    def look(line: str) -> str:
        for match in _LINK.finditer(line):
            outside = _beside_docs(posixpath.dirname(file.src_uri), match[3] or "")
            if outside is not None:
                targets.append((match[3], outside))
        return line

    outside_code(file.content_string, look)
    return targets


def _beside_docs(here: str, target: str) -> str | None:
    """Returns the path of a file outside `docs/` from the root; None for any other target."""
    path = posixpath.normpath(posixpath.join("docs", here, target.partition("#")[0]))
    return None if ":" in target or path == "docs" or path.startswith(("docs/", "..")) else path


def _page_of(notebook: str) -> str:
    return notebook.removesuffix(".ipynb") + ".md"


def render(notebook: Mapping[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by file name.

    Args:
      notebook: the parsed file, of format 4.
      stem: name of the file without suffix; pictures are called `<stem>_<number>.png`.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{data.get('text/plain', ['Figure'])[0]}]({name})")
            elif text := "".join(output.get("text") or data.get("text/plain") or []):
                parts.append(f'```text title="Output"\n{_ESCAPES.sub("", text).rstrip()}\n```')
    return "\n\n".join(parts) + "\n", pictures
