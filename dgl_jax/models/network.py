"""Description of a network: its blocks in order, and the classifier after the last block."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from flax import linen as nn

from dgl_jax.ops import OPS

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Network:
    """Network without parameters; hashable, and equal to a network built in the same way.

    Attributes:
      blocks: linen modules called as `block(x, train)`, from features to features: maps
        [B, H, W, C] or tokens [B, T, C].
      classifier: linen module called as `classifier(x, train)` that returns logits [B, classes].
        It is the head of the last module.
    """

    blocks: tuple[nn.Module, ...]
    classifier: nn.Module

    @property
    def halvings(self) -> int:
        """Returns how many times 2x2 pooling halves the height and width of an image."""
        return sum(getattr(part, "pool", False) is True for part in (*self.blocks, self.classifier))


# Fields of linen modules that the configuration group `model` sets, with their values; the first
# value of each is the default.
CHOICES = {"ops": OPS, "logits": ("float32", "model"), "pointwise": ("conv", "dot")}


def with_choices(part: _Part, **choices: str) -> _Part:
    """Returns a linen module that uses the given formulations of its layers.

    Args:
      part: a linen module. Sets its fields of these names, if it has them, and the same fields of
        modules that its other fields hold, directly or in tuples or lists. Layers that a module
        creates inside its methods are not reached: pass `self.ops` to them there.
      **choices: values by name of the field: `ops`, see `dgl_jax.ops`; `logits` and `pointwise`,
        see `MLPHead`. Their defaults change nothing.

    Raises:
      ValueError: a value is unknown.
    """
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(CHOICES[name])}")
    changed = {name: value for name, value in choices.items() if value != CHOICES[name][0]}
    return _replaced(part, changed) if changed else part


def _replaced(part: _Part, choices: dict[str, str]) -> _Part:
    if type(part) in (tuple, list):
        return type(part)(_replaced(each, choices) for each in part)  # type: ignore[call-arg, attr-defined]
    if not isinstance(part, nn.Module):
        return part
    names = [
        f.name for f in dataclasses.fields(part) if f.init and f.name not in ("parent", "name")
    ]
    fields = {name: _replaced(getattr(part, name), choices) for name in names}
    # A user's field of the same name may mean something else.
    known = {n: value for n, value in choices.items() if fields.get(n) in CHOICES[n]}
    return part.clone(**fields | known)
