"""Tests that constraints-lowest.txt pins exactly the lower bounds of the requirements."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bounds(text: str, operator: str) -> dict[str, str]:
    """Returns version by normalized name for each line `name<operator>version`."""
    lines = re.findall(rf"^([\w.-]+){operator}([\d.]+)", text, re.M)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def problems(requirements: str, constraints: str) -> list[str]:
    """Returns a line for each requirement that is not pinned, or not pinned to its lower bound."""
    pinned, lines = bounds(constraints, "=="), []
    for name, bound in bounds(requirements, ">=").items():
        pin = pinned.get(name, "nothing")
        if pin.removesuffix(".0") != bound.removesuffix(".0") and not re.fullmatch(
            rf"{re.escape(bound)}(\.0)+", pin
        ):
            lines.append(f"{name}: bound {bound}, pinned to {pin}")
    return lines


def requirements() -> str:
    return "\n".join(
        path.read_text()
        for path in sorted([*ROOT.glob("requirements*.txt"), *ROOT.glob("requirements/*.txt")])
    )


def test_lowest_versions_equal_the_bounds():
    assert len(bounds(requirements(), ">=")) >= 20
    assert problems(requirements(), (ROOT / "constraints-lowest.txt").read_text()) == []


def test_every_requirement_has_a_lower_bound():
    lines = [line.split("#")[0].strip() for line in requirements().splitlines()]
    named = [line for line in lines if line and not line.startswith("-r")]
    assert [line for line in named if ">=" not in line] == []


@pytest.mark.parametrize(
    ("requirement", "constraint", "expected"),
    [
        ("jax>=0.10", "jax==0.10.0", []),
        ("jax>=0.10", "jax==0.10.2", ["jax: bound 0.10, pinned to 0.10.2"]),
        ("importlib_resources>=6.0", "importlib-resources==6.0.0", []),
        ("flax>=0.12", "", ["flax: bound 0.12, pinned to nothing"]),
        ("pillow>=11", "pillow==11.1.0", ["pillow: bound 11, pinned to 11.1.0"]),
    ],
)
def test_wrong_pins_are_reported(requirement, constraint, expected):
    assert problems(requirement, constraint) == expected
