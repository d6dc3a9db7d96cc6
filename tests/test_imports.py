"""Tests of the import rules and of the size of the package.

A room is a file or folder directly inside the package.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import dgl_jax
from dgl_jax import ops

PACKAGE = Path(dgl_jax.__file__).parent
# A room imports only from rooms before it in this list, and files of a folder from each other.
ROOMS = (
    "system",
    "waits",
    "errors",
    "config",
    "types",
    "ops",
    "models",
    "objectives",
    "core",
    "tasks",
    "codecs",
    "replay",
    "data",
    "spec",
    "schedule",
    "methods",
    "diagnostics",
    "profile",
    "engines",
    "run",
    "train",
    "evaluate",
    "tools",
    "testing",
    "cli",
    "child",
)
# Inside these folders a file imports only from files in earlier groups.
LEVELS = {
    "config": (("registry",), ("fields",), ("groups",), ("settings",)),
    "ops": (("choice", "cpu"), ("remat", "pooling", "batch_norm", "conv")),
    "core": (
        ("rngs", "program_cache", "apply", "drawing"),
        ("orthogonal", "optimizer"),
        ("module",),
        ("ema", "step"),
    ),
    "methods": (
        ("base",),
        ("post", "downward"),
        ("dgl", "backprop", "layerwise", "delayed"),
        ("ddg", "deep_supervision", "dni", "fdg", "features_replay"),
    ),
    "engines": (
        ("world", "transfer", "flight"),
        ("placement",),
        ("pace", "feed"),
        ("base",),
        ("dispatches", "advance"),
        ("program", "collect"),
        ("synchronous",),
        ("fused", "pipeline", "asynchronous"),
        ("simulated", "worker"),
        ("threads",),
    ),
    "profile": (("flops", "compiling"), ("timing", "memory", "table"), ("turn_timing",)),
}
# Imports for annotations alone, against that order.
TYPES = {("config/groups.py", "dgl_jax.config.settings.Settings")}
# Rooms with stricter rules than the order: the only rooms, or files of a room, from which they may
# import.
ONLY = {
    "system": set(),
    "waits": set(),
    "errors": {"system"},
    "config": {"errors"},
    "types": set(),
    "ops": set(),
    "models": {"config.registry", "errors", "ops", "types"},
    "objectives": {"config", "errors", "models", "ops", "types"},
    "core": {"config", "errors", "objectives", "ops", "types"},
    "tasks": {"config", "core", "errors", "types"},
    "codecs": {"config", "core", "errors"},
    "replay": {"config.registry", "errors", "system", "types"},
    "schedule": set(),
    "methods": {
        "codecs",
        "config",
        "core",
        "errors",
        "models",
        "objectives",
        "schedule",
        "spec",
        "tasks",
        "types",
    },
    "diagnostics": {"codecs", "core", "methods", "spec", "types"},
}
# The only names that other rooms may import from these folders.
DOORS = {"ops": ops.__all__}
# Libraries that only these files and folders may import.
LIBRARIES = {
    "tensorboardX": ("run/writers.py",),
    "orbax": ("run/checkpoint.py",),
    "jax._src": ("engines/world.py",),
    "jax.experimental.multihost_utils": ("engines/world.py",),
    "tensorflow_datasets": ("data",),
    "grain": ("data",),
    "cv2": ("data",),
    "simplejpeg": ("data",),
    "rich": ("run/progress.py", "tools/bars.py"),
    "matplotlib": ("run/axes.py", "tools"),
    "safetensors": ("tools/export.py",),
}
# Files that import only the standard library and the two rooms below.
PLAIN = ("schedule.py", "tools/timeline.py", "models/partition.py")
PLAIN_ROOMS = ("dgl_jax.schedule", "dgl_jax.errors")
# Names that no file may use, except for the pairs of file and name in ALLOWED.
FORBIDDEN = (
    "tensorflow",
    "torch",
    "clu",
    "absl.flags",
    "os.environ",
    "os.getenv",
    "os.environb",
    "os.putenv",
)
ALLOWED = {
    # Grain passes absl's flags to its workers, so they must be marked as parsed; none is read.
    ("data/streaming.py", "absl.flags"),
    ("cli.py", "absl.flags"),
    ("system.py", "os.environ"),  # copied for child processes
    ("cli.py", "os.environ"),  # sets the number of XLA's threads before XLA starts
    ("run/axes.py", "os.environ"),  # hides MPLBACKEND while matplotlib is imported
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted names that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                "." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names
            )


def attributes(tree: ast.AST) -> Iterator[str]:
    """Yields the attributes of plain names that a file uses, such as os.environ."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def is_inside(name: str, target: str) -> bool:
    return name == target or name.startswith(target + ".")


def problems(path: Path, source: str) -> list[str]:
    """Returns one line for each import of a file that breaks a rule.

    Args:
      path: path of the file inside the package.
      source: text of the file.
    """
    room, stem = path.parts[0].removesuffix(".py"), path.stem
    rank, lines = ROOMS.index(room), []
    tree = ast.parse(source)
    for name in imports(tree):
        if name.startswith("."):
            lines.append(f"{path}: relative import {name}")
        if is_inside(name, "dgl_jax") and name != "dgl_jax.__version__":
            other = [*name.split("."), ""][1]
            if other == room:
                if (str(path), name) in TYPES:
                    continue
                lines += _problems_inside_folder(path, stem, name)
            elif other not in ROOMS:
                lines.append(f"{path}: {name} is in no room")
            elif ROOMS.index(other) > rank:
                lines.append(f"{path}: {name} is a later room")
            elif other in DOORS and name.split(".")[2:] and name.split(".")[2] not in DOORS[other]:
                lines.append(f"{path}: {name} is private to {other}")
            elif room in ONLY and not any(is_inside(name, f"dgl_jax.{o}") for o in ONLY[room]):
                lines.append(f"{path}: {room} may not import {other}")
        lines += [
            f"{path}: only {' and '.join(owners)} may import {library}"
            for library, owners in LIBRARIES.items()
            if is_inside(name, library) and not any(path.is_relative_to(owner) for owner in owners)
        ]
        if str(path) in PLAIN and not (
            name.split(".")[0] in sys.stdlib_module_names or name.startswith(PLAIN_ROOMS)
        ):
            lines.append(f"{path}: this file is plain Python and may not import {name}")
    used = (*imports(tree), *attributes(tree))
    forbidden = [
        name
        for name in used
        if any(is_inside(name, other) for other in FORBIDDEN) and (str(path), name) not in ALLOWED
    ]
    return lines + [f"{path}: {name}" for name in forbidden]


def _problems_inside_folder(path: Path, stem: str, name: str) -> list[str]:
    room = path.parts[0]
    if room not in LEVELS or stem == "__init__":
        return []
    level = {file: n for n, files in enumerate(LEVELS[room]) for file in files}
    stem, other = (path.parts[1].removesuffix(".py"), name.split(".")[2])
    if stem == other:  # files of the same subfolder
        return []
    if other not in level or stem not in level:
        return [f"{path}: {stem if stem not in level else other} is missing in LEVELS of {room}"]
    return [] if level[other] < level[stem] else [f"{path}: {other} does not come before {stem}"]


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", [path for path in FILES if path != Path("__init__.py")], ids=str)
def test_imports_follow_the_rules(path):
    assert problems(path, (PACKAGE / path).read_text()) == []


def test_list_of_rooms_is_complete():
    rooms = {path.parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms == set(ROOMS)
    assert len(ROOMS) == len(rooms)


# Rooms with a separate limit on their lines of code: the parts of training, without `data`.
CORE = (
    "types",
    "ops",
    "models",
    "objectives",
    "core",
    "tasks",
    "codecs",
    "replay",
    "spec",
    "schedule",
    "methods",
    "engines",
)


def code_lines(source: str) -> int:
    """Returns the number of lines without docstrings, comments and blank lines."""
    docstring_lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstring_lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = (
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in layout
    )
    return len(
        {n for token in tokens for n in range(token.start[0], token.end[0] + 1)} - docstring_lines
    )


def test_code_lines_equal_count_by_hand():
    source = '"""One\ntwo."""\n\nimport os  # three\n\n\n'
    source += 'def f():\n    """Four."""\n    # five\n    return (\n        1\n    )\n'
    assert code_lines(source) == 5


def test_package_stays_small(capsys):
    sizes: dict[str, int] = {}
    for path in FILES:
        text = (PACKAGE / path).read_text()
        assert len(text.splitlines()) <= 400, f"{path} has more than 400 lines"
        room = path.parts[0].removesuffix(".py")
        sizes[room] = sizes.get(room, 0) + code_lines(text)
    core, package = sum(sizes[room] for room in CORE), sum(sizes.values())
    with capsys.disabled():
        print(f"\nlines of code: core {core}, package {package}")
    # Lines of at most 100 characters; the limit is raised by what each new feature needs.
    assert core < 7_620
    assert package < 17_660


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("core/step.py", "def f():\n    from dgl_jax.engines import Report", "later room"),
        ("core/step.py", "import dgl_jax.engines.placement", "later room"),
        ("core/step.py", "from dgl_jax import codecs", "later room"),
        ("core/step.py", "from dgl_jax.models import cuts", "core may not import models"),
        ("models/cnn.py", "from dgl_jax.ops.conv import conv_general_dilated", "private to ops"),
        ("models/cnn.py", "from dgl_jax.ops import pooling", "private to ops"),
        ("core/step.py", "import dgl_jax.ops.cpu.winograd", "private to ops"),
        ("codecs/vq.py", "from dgl_jax.models import cuts", "codecs may not import models"),
        ("models/cnn.py", "from dgl_jax.config import Settings", "models may not import config"),
        ("config/fields.py", "import dgl_jax.config.settings", "does not come before"),
        ("schedule.py", "import jax", "plain Python"),
        ("tools/timeline.py", "from dgl_jax.engines import Report", "plain Python"),
        (
            "engines/program.py",
            "from dgl_jax.engines.fused import FusedEngine",
            "does not come before",
        ),
        (
            "engines/pipeline.py",
            "from dgl_jax.engines.fused import FusedEngine",
            "does not come before",
        ),
        ("engines/other.py", "from dgl_jax.engines.fused import FusedEngine", "missing in LEVELS"),
        ("models/cnn.py", "from .. import core", "relative"),
        ("tools/bench.py", "from dgl_jax.nowhere import x", "no room"),
        ("run/loop.py", "import tensorboardX", "only run/writers.py may"),
        ("train.py", "from orbax.checkpoint import v1", "only run/checkpoint.py may"),
        ("tools/bench.py", "import tensorflow_datasets as tfds", "only data may"),
        ("data/folder.py", "import tensorflow as tf", "tensorflow"),
        ("train.py", "from absl import flags", "absl.flags"),
        ("data/source.py", "from absl import flags", "absl.flags"),
        ("tools/predict.py", "import cv2", "only data may"),
        ("train.py", "import os\nos.environ['A'] = '1'", "os.environ"),
        ("train.py", "from os import getenv", "os.getenv"),
    ],
)
def test_forbidden_imports_are_reported(path, source, problem):
    (line,) = problems(Path(path), source)
    assert problem in line


def test_ordinary_imports_are_allowed():
    source = "import os\nfrom absl import logging\nimport tensorflow_datasets\nos.path.join('a')"
    source += "\nfrom dgl_jax.config import nearest\nfrom dgl_jax.ops import after"
    assert problems(Path("data/tfds_sets.py"), source) == []
