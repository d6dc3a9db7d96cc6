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


def with_ops(part: _Part, ops: str) -> _Part:
    """Returns a linen module that uses the given formulation of the operations.

    Args:
      part: a linen module. Sets its field `ops`, if it has one, and the same field of modules that
        its other fields hold, directly or in tuples or lists. Layers that a module creates inside
        its methods are not reached: pass `self.ops` to them there.
      ops: see `dgl_jax.ops`; `auto` changes nothing.

    Raises:
      ValueError: `ops` is unknown.
    """
    if ops not in OPS:
        raise ValueError(f"ops={ops!r}: must be one of {', '.join(OPS)}")
    return part if ops == "auto" else _replaced(part, ops)


def _replaced(part: _Part, ops: str) -> _Part:
    if type(part) in (tuple, list):
        return type(part)(_replaced(each, ops) for each in part)  # type: ignore[call-arg, attr-defined]
    if not isinstance(part, nn.Module):
        return part
    names = [
        f.name for f in dataclasses.fields(part) if f.init and f.name not in ("parent", "name")
    ]
    fields = {name: _replaced(getattr(part, name), ops) for name in names}
    if fields.get("ops") in OPS:  # a user's field `ops` may mean something else
        fields["ops"] = ops
    return part.clone(**fields)
