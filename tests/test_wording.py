"""The wording of docstrings, comments, messages and pages: plain English, one word per meaning."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("dgl_jax", "configs", "examples", "benchmarks", "tests", "docs")
FILES = sorted(
    {
        ROOT / "launch.py",
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(
            path
            for folder in FOLDERS
            for suffix in ("py", "md")
            for path in (ROOT / folder).rglob(f"*.{suffix}")
        ),
    }
)
# These files quote what they forbid.
EXCEPT = {Path(__file__)}

_LEAST_WORDS = 4
# Words that begin a fragment, which continues the signature instead of saying something.
FRAGMENTS = set(
    [
        "What",
        "Of",
        "Whether",
        "Those",
        "How",
        "Where",
        "Which",
        "That",
        "Such",
        "For",
        "As",
        "One",
        "None",
        "True",
        "False",
        "It",
        "In",
        "From",
        "To",
        "By",
        "With",
        "Without",
        "If",
        "When",
        "But",
        "And",
        "Or",
        "At",
        "On",
    ]
)
_COUNTED = (
    "updates turns images packets messages reads steps batches milliseconds ms seconds bytes "
    "devices loss layer worker"
)
_UNITS = "module second step tick message packet worker layer turn batch hop"
BANNED = [
    re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE)  # also over the end of a line
    for pattern in (
        r"\bfor want of\b",
        r"\bso many\b",
        r"\bas (they are|it is)\b",
        r"\bpackets?\b",
        r"\b(go|goes|going|went) on\b",
        r"\banew\b",
        r"\bthereof\b",
        r"\blately\b",
        r"\bhand(s|ed)? on\b",
        r"\bunder way\b",
        r"\bof now\b",
        r"\bthe like\b",
        r"\blearns? no more\b",
        r"\bis that of\b",
        r"\bthose of\b",
        rf"\b({'|'.join(_COUNTED.split())}) a ({'|'.join(_UNITS.split())})\b",
    )
]


def banned(text: str, line: int) -> Iterator[tuple[int, str]]:
    """Yields line and words of each banned pattern in a text that begins at a line."""
    for pattern in BANNED:
        for match in pattern.finditer(text):
            yield line + text.count("\n", 0, match.start()), f"write {match[0]!r} differently"


def opening(node: ast.AST) -> str | None:
    """Returns what is wrong with the beginning of a docstring; None if nothing is wrong."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    text = ast.get_docstring(node) if isinstance(node, documented) else None
    if text is None:
        return None
    words = text.split()
    if len(words) < _LEAST_WORDS:
        return f"says too little: {text!r}"
    first = words[0].strip(".,:;`'\"")
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if function and not any("property" in ast.unparse(d) for d in node.decorator_list):
        is_verb = re.fullmatch(r"[A-Z][a-z-]*s", first) and first not in {*FRAGMENTS, "This", "Its"}
        return None if is_verb else f"begins with no verb: {text.splitlines()[0]!r}"
    return f"is a fragment: {text.splitlines()[0]!r}" if first in FRAGMENTS else None


def problems(path: Path, text: str) -> list[str]:
    """Returns "path:line: problem" for each docstring and pattern of a Python or Markdown file."""
    result: set[tuple[int, str]] = set()
    if path.suffix == ".md":
        result |= set(banned(text, 1))
    else:
        for node in ast.walk(ast.parse(text)):
            if problem := opening(node):
                result.add((node.body[0].lineno, problem))  # type: ignore[attr-defined]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                result |= set(banned(node.value, node.lineno))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                result |= set(banned(token.string, token.start[0]))
    return [f"{path}:{line}: {problem}" for line, problem in sorted(result)]


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_wording(folder):
    files = [
        path
        for path in FILES
        if path not in EXCEPT and str(path.relative_to(ROOT).parent).split("/")[0] == folder
    ]
    assert files
    places = [p for path in files for p in problems(path.relative_to(ROOT), path.read_text())]
    assert places == [], f"{len(places)} places:\n" + "\n".join(places)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ('def f():\n    """Of a ring in memory."""', "begins with no verb"),
        ('def f():\n    """The nearest of all entries."""', "begins with no verb"),
        ('def f():\n    """This returns the nearest entry."""', "begins with no verb"),
        ('def f():\n    """Returns it."""', "says too little"),
        ('class C:\n    """What a codec is made of."""', "is a fragment"),
        ('"""Of codecs, and what they do."""', "is a fragment"),
        ("x = 1  # a packet of the ring", "write 'packet' differently"),
        ('x = "12 updates a second"', "write 'updates a second' differently"),
        ('x = """one\n\nthe run goes on"""', "write 'goes on' differently"),
    ],
)
def test_other_wording_is_noticed(source, problem):
    (message,) = problems(Path("x.py"), source)
    assert problem in message


def test_plain_wording_is_left_alone():
    source = '''"""Ring of messages in host memory."""


class Ring:
    """Ring of messages at a module's entrance."""

    @property
    def size(self):
        """Number of messages it holds."""

    def read(self):
        """Returns the oldest message."""

    def _add(self):
        pass
'''
    assert problems(Path("x.py"), source) == []
    assert problems(Path("x.md"), "Two updates per second.\n") == []


def test_the_line_of_a_problem_is_given():
    assert problems(Path("x.md"), "one\n\ntwo packets\n") == ["x.md:3: write 'packets' differently"]
    assert problems(Path("x.py"), 'x = """\n\nanew"""')[0].startswith("x.py:3:")
