"""The documentation: code and commands run, links resolve, and the reference is up to date."""

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from page_setups import SETUPS
from pages import LINKED, PAGES, ROOT, Block, Command, blocks, broken_links, commands, slugify

from dgl_jax.config import CheckpointSettings, LogSettings, OptimizerSettings
from dgl_jax.config.fields import number
from docs import generate_config

BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [
    command
    for block in BLOCKS
    if block.language == "sh" and block.mark != "skip because"
    for command in commands(block)
]
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"][
    "optional-dependencies"
]
HARMLESS = ("cd", "ls", "source", ".", "tensorboard", "head", "tail", "cat", "mkdir", "git")


def run_page(directory: Path, *arguments: str | Path) -> None:
    """Runs `run_page.py` in a directory and a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # NPROC of the test session is too small for the commands that use eight devices.
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_page.py"), *map(str, arguments)],
        cwd=directory,
        env=env | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def with_code(*languages: str) -> list[object]:
    """Returns the pages that have blocks in one of the languages, as parameters of a test."""
    pages = dict.fromkeys(block.page for block in BLOCKS if block.language in languages)
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.slow
@pytest.mark.parametrize("page", with_code("python", "sh"))
def test_code_of_a_page_runs(page, tmp_path):
    run_page(tmp_path, page)


def test_commands_of_all_pages_are_parsed(tmp_path):
    pages = {command.block.page: None for command in COMMANDS if command.arguments is not None}
    assert len(pages) > 10
    run_page(tmp_path, "--parse", *pages)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\n1 / 0\n```", "page.md:2: ZeroDivisionError"),
        ("<!-- test: setup nothing -->\n```python\n1\n```", "has no set-up nothing"),
        ("```sh\ndgl-jax --config=digits --config.codec.nam=vq --workdir=x\n```", "codec.name"),
        ("```sh\npython launch.py --config=digits --workdi=x\n```", "workdi"),
    ],
    ids=["python", "set-up", "field", "flag"],
)
def test_twin_wrong_code_is_reported(text, message, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_page(tmp_path, *(["--parse"] if "```sh" in text else []), page)


def test_every_setup_is_used():
    used = {block.value for block in BLOCKS if block.mark == "setup"}
    assert used == set(SETUPS)


def wrong(command: Command) -> str | None:
    """Returns what is wrong with a command other than the project's own; None if nothing is."""
    program, *arguments = command.words
    if command.arguments is not None or program in HARMLESS:
        return None
    if program == "make":
        targets = [a for a in arguments if "=" not in a]
        missing = [t for t in targets if not re.search(rf"^{re.escape(t)}:", MAKEFILE, re.M)]
        return f"no target {missing}" if missing else None
    if program == "pip" or command.words[1:3] == ("-m", "pip"):
        named = re.findall(r"(?:^|[ \"'])(?:\.|dgl_jax)\[([\w,]+)\]", " ".join(arguments))
        extras = {extra for names in named for extra in names.split(",")} - set(EXTRAS)
        listed = [a for a in arguments if a.endswith(".txt") and not (ROOT / a).is_file()]
        return f"no extra or file {[*extras, *listed]}" if extras or listed else None
    if program.startswith("python") and arguments[:2] == ["-m", "venv"]:
        return None
    if program.startswith("python") and arguments and arguments[0].endswith(".py"):
        return None if (ROOT / arguments[0]).is_file() else f"no file {arguments[0]}"
    return "neither checked nor known to be harmless"


def test_other_commands_are_real():
    assert [f"{c}: {problem}" for c in COMMANDS if (problem := wrong(c))] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make train test PYTHON=python3.13", None),
        ("make trian", "no target ['trian']"),
        ('pip install ".[imagenet]"', None),
        ('pip install ".[image]"', "no extra or file ['image']"),
        ("pip install -r requirement.txt", "no extra or file ['requirement.txt']"),
        ("python benchmarks/replay/run.py --write", None),
        ("python benchmarks/replay/ran.py", "no file benchmarks/replay/ran.py"),
        ("launch digits", "neither checked nor known to be harmless"),
    ],
)
def test_wrong_commands_are_noticed(line, problem):
    (command,) = commands(Block(ROOT / "README.md", 1, "sh", line))
    assert wrong(command) == problem


def test_a_page_is_read_as_it_is_written():
    text = """
<!-- test: setup one -->
```python
a = b[0](c)
```
- item
  ```sh
  FLAG=1 dgl-jax --config=digits \\
    --mode=plan > plan.json  # measured
  $ make test && make lint
  ```
````text
```python
````
"""
    python, shell, plain = blocks(ROOT / "page.md", text)
    assert (python.line, python.mark, python.value) == (4, "setup", "one")
    assert python.code == "a = b[0](c)\n"
    assert (plain.language, plain.code) == ("text", "```python\n")
    plan, test, lint = commands(shell)
    assert plan.arguments == ["--config=digits", "--mode=plan"]
    assert plan.output == "plan.json"
    assert (test.words, lint.words) == (("make", "test"), ("make", "lint"))
    assert test.arguments is None


def test_anchors_are_those_of_the_site():
    assert slugify("How `vq` works: C / D groups") == "how-vq-works-c--d-groups"
    assert slugify("A [link](design.md) in *one*") == "a-link-in-one"


def test_links_lead_somewhere():
    assert [problem for page in LINKED for problem in broken_links(page)] == []


def test_twin_broken_links_are_reported(tmp_path):
    page = ROOT / "docs" / "_links.md"
    lines = ("# One `two`", "[a](#one-two) [b](#three) [c](index.md) [d](index.md#nowhere)")
    code = ("`[e](code.md)`", "```python", "x[0](y)", "```", "![f](none.png) [g](https://x.y/z)")
    try:
        page.write_text("\n".join((*lines, *code)))
        broken = broken_links(page)
    finally:
        page.unlink()
    assert [problem.split()[1] for problem in broken] == [
        "#three",
        "index.md#nowhere",
        "none.png",
    ]


def test_the_reference_is_up_to_date():
    text = generate_config.PAGE.read_text()
    assert text == generate_config.page(), "run `make reference`"
    for group in ("seed", "plugins", "data", "model", "codec", "engine", "checkpoint", "log"):
        assert f"\n## {group}\n" in text
    assert "| `codec.codes` | int | 1 to 65,536 | `256` | `codec.name`: `vq` |" in text


def test_twin_a_changed_default_is_noticed(monkeypatch):
    (f,) = (f for f in dataclasses.fields(LogSettings) if f.name == "every")
    monkeypatch.setattr(f, "default", 51)
    assert generate_config.page() != generate_config.PAGE.read_text()


def test_a_field_without_a_description_is_an_error(monkeypatch):
    monkeypatch.setattr(generate_config, "descriptions", lambda cls: {})
    with pytest.raises(ValueError, match=r"config\.seed \(Settings\), config\.plugins"):
        generate_config.page()


def test_descriptions_are_read_from_where_a_field_is_declared():
    @dataclasses.dataclass(frozen=True)
    class Options(OptimizerSettings):
        """Options of a test.

        Attributes:
          one, two: both of them, described
            on two lines: really.
          three (int): third value
        """

        one: int = number(1, 0, 2)
        two: int = number(1, 0, 2)
        three: int = number(1, 0, 2)

    both = "Both of them, described on two lines: really."
    assert generate_config.descriptions(Options) == {
        "one": both,
        "two": both,
        "three": "Third value.",
    }


def test_conditions_name_the_kinds_that_fit():
    (entry,) = (
        entry
        for _, cls, entries in generate_config.groups()
        if cls is CheckpointSettings
        for entry in entries
        if entry.name == "checkpoint.replay_every"
    )
    assert generate_config.conditions(entry) == (
        "`engine.name`: `simulated`, `threads` and `model.modules`: `2 or more`"
    )


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r":\s+(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [p.stem for p in (ROOT / "docs").iterdir() if p.suffix in (".md", ".ipynb")]
    assert sorted(navigation) == sorted(pages)


def test_the_api_page_names_every_register_function():
    listed = set(
        re.findall(r"`dgl_jax\.[\w.]+\.(register_\w+)`", (ROOT / "docs/api.md").read_text())
    )
    doors = re.findall(
        r"^(?:def )?((?:register_\w+(?:, )?)+)(?: =|\()",
        "\n".join(path.read_text() for path in (ROOT / "dgl_jax").rglob("*.py")),
        re.M,
    )
    assert listed == {name for names in doors for name in names.split(", ")}


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", page.read_text()
        )
        assert loaded == [], page
    assert 'id="dgl_jax.local_step"' in (tmp_path / "api.html").read_text()
    assert "test accuracy" in (tmp_path / "quickstart.html").read_text()
