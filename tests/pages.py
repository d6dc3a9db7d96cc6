"""Reads the Markdown pages of the project: blocks of code with their marks, links and headings.

A block of code may have a mark on the line above its fence:

    <!-- test: skip because REASON -->     it is not run
    <!-- test: setup NAME -->              it is run with the names of a set-up in `page_setups.py`
    <!-- test: file NAME -->               it is written to a file of the page's directory, not run
"""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Pages whose code is run, in the order of the site; and further pages whose links are checked.
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LINKED = (
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
)
_MARK = re.compile(r"\s*<!-- test: (skip because|setup|file) (.+?) -->\s*")
_FENCE = re.compile(r"(\s*)(```+|~~~+)\s*(\w*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code in a page.

    Attributes:
      page: the file.
      line: number of the first line of code.
      language: such as `python` or `sh`; "" if the fence names none.
      code: the lines, without the indentation of the fence.
      mark: `skip because`, `setup` or `file`; "" without a mark.
      value: what follows the mark.
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str = ""
    value: str = ""

    def __str__(self) -> str:
        return f"{os.path.relpath(self.page, ROOT)}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """Returns the fenced blocks of a page in their order.

    Args:
      page: the file.
      text: replaces the contents of the file.
    """
    result: list[Block] = []
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    opened: re.Match[str] | None = None
    first = 0
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, first = fence, number
        elif opened and fence and fence[2].startswith(opened[2]) and not fence[3]:
            code = [text.removeprefix(opened[1]) for text in lines[first : number - 1]]
            mark = _MARK.fullmatch(lines[first - 2]) if first > 1 else None
            kind, value = mark.groups() if mark else ("", "")
            source = "\n".join(code) + "\n"
            result.append(Block(page, first + 1, opened[3], source, kind, value))
            opened = None
    assert opened is None, f"{page}:{first}: the block of code has no end"
    return result


def prose(page: Path) -> str:
    """Returns the text of a page with blocks and spans of code, and comments, blanked out."""
    text = page.read_text(encoding="utf-8")
    for pattern in (r"^(\s*)(```+)(?s:.*?)^\s*\2[ \t]*$", r"<!--(?s:.*?)-->"):
        text = re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.M)
    text = re.sub(r"^ {4,}(?![-*\d]).*$", "", text, flags=re.M)  # indented code
    return re.sub(r"(`+)(?!`)(?:(?!\n\n)(?s:.))*?(?<!`)\1(?!`)", "`code`", text)


@dataclass(frozen=True)
class Command:
    """Command of a `sh` block.

    Attributes:
      block: where it is.
      words: the command and its arguments, without variables in front, redirections and comments.
      output: file that the standard output is redirected to; "" for none.
    """

    block: Block
    words: tuple[str, ...]
    output: str = ""

    @property
    def arguments(self) -> list[str] | None:
        """Returns the arguments of the project's command line; None for another command."""
        if self.words[0] == "dgl-jax":
            return list(self.words[1:])
        if self.words[0].startswith("python") and self.words[1:2] == ("launch.py",):
            return list(self.words[2:])
        return None

    def flag(self, name: str) -> str | None:
        """Returns the value of a flag that is written as `--name=value`."""
        values = [w.partition("=")[2] for w in self.words if w.startswith(f"--{name}=")]
        return values[-1] if values else None

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join(self.words)}"


def commands(block: Block) -> list[Command]:
    """Returns the commands of a `sh` block: continued lines are joined, comments left out."""
    result = []
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|;)\s", line):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            output = ""
            if len(words) > 2 and words[-2] == ">":
                *words, _, output = words
            if words:
                result.append(Command(block, tuple(words), output))
    return result


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page, as GitHub and the site write them."""
    anchors: set[str] = set()
    for text in re.findall(r"^#+\s+(.+?)\s*#*$", _without_blocks(page), re.M):
        slug = base = slugify(text)
        number = 0
        while slug in anchors:
            number += 1
            slug = f"{base}-{number}"
        anchors.add(slug)
    return anchors | set(re.findall(r"""<a (?:id|name)=["']([^"']+)""", prose(page)))


def _without_blocks(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^(\s*)(```+)(?s:.*?)^\s*\2[ \t]*$", "", text, flags=re.M)


def slugify(heading: str) -> str:
    """Returns the anchor of a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[^\w\- ]", "", re.sub(r"[*`]", "", text).strip().lower())
    return text.replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    """Yields the targets of the links and pictures of a page."""
    text = prose(page)
    for match in re.finditer(r"\]\(\s*<?([^()\s>]+(?:\([^()]*\))?)>?(?:\s+\"[^\"]*\")?\s*\)", text):
        yield match[1]
    for match in re.finditer(r"""<(?:img|a)\b[^>]*?\b(?:src|href)=["']([^"']+)""", text):
        yield match[1]
    for match in re.finditer(r"^\[[^\]]+\]:\s*(\S+)$", text, re.M):
        yield match[1]


def broken_links(page: Path) -> list[str]:
    """Returns the relative links of a page that lead nowhere, anchors included."""
    broken = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue  # the network is not asked
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        missing = not file.exists() or not file.is_relative_to(ROOT)
        if missing or (anchor and not _has_anchor(file, anchor)):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    return broken


def _has_anchor(file: Path, anchor: str) -> bool:
    if file == ROOT / "docs" / "api.md" and anchor.startswith("dgl_jax"):
        return True  # made by mkdocstrings; `make docs` checks it
    return file.suffix == ".md" and anchor in headings(file)
