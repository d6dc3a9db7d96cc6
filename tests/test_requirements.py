"""Version bounds: the constraints file that tests the lowest versions names exactly the bounds of the requirements."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bounds(text: str, operator: str) -> dict[str, str]:
    """Returns version by normalised name for each line `name<operator>version`."""
    lines = re.findall(rf"^([\w.-]+){operator}([\d.]+)", text, re.M)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def problems(requirements: str, constraints: str) -> list[str]:
    """Returns what the constraints lack, or pin to another version than the lower bound."""
    pinned, found = bounds(constraints, "=="), []
    for name, bound in bounds(requirements, ">=").items():
        pin = pinned.get(name, "nothing")
        if pin.removesuffix(".0") != bound.removesuffix(".0") and not re.fullmatch(
            rf"{re.escape(bound)}(\.0)+", pin
        ):
            found.append(f"{name}: bound {bound}, pinned to {pin}")
    return found


def requirements() -> str:
    return "\n".join(
        path.read_text()
        for path in sorted([*ROOT.glob("requirements*.txt"), *ROOT.glob("requirements/*.txt")])
    )


def test_the_lowest_versions_are_the_bounds():
    assert len(bounds(requirements(), ">=")) >= 20
    assert problems(requirements(), (ROOT / "constraints-lowest.txt").read_text()) == []


def test_every_requirement_has_a_lower_bound():
    lines = [line.split("#")[0].strip() for line in requirements().splitlines()]
    named = [line for line in lines if line and not line.startswith("-r")]
    assert [line for line in named if ">=" not in line] == []


@pytest.mark.parametrize(
    ("requirement", "constraint", "found"),
    [
        ("jax>=0.10", "jax==0.10.0", []),
        ("jax>=0.10", "jax==0.10.2", ["jax: bound 0.10, pinned to 0.10.2"]),
        ("importlib_resources>=6.0", "importlib-resources==6.0.0", []),
        ("flax>=0.12", "", ["flax: bound 0.12, pinned to nothing"]),
        ("pillow>=11", "pillow==11.1.0", ["pillow: bound 11, pinned to 11.1.0"]),
    ],
)
def test_other_pins_are_noticed(requirement, constraint, found):
    assert problems(requirement, constraint) == found
