"""What a model is: blocks in order, and the classifier behind the last."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from flax import linen as nn

from dgl_jax.ops import OPS

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Network:
    """Descriptions only, no parameters: hashable, equal when built alike.

    Each of `blocks` and `classifier` is a linen module whose `apply` takes features and `train: bool`: a map (B, H, W, C),
    or tokens (B, T, C). A block gives such features, the classifier logits (B, classes). Cut into modules, the last one's
    head is `classifier`.
    """

    blocks: tuple[nn.Module, ...]
    classifier: nn.Module

    @property
    def halvings(self) -> int:
        """How many times the network halves height and width."""
        return sum(getattr(part, "pool", False) is True for part in (*self.blocks, self.classifier))


def with_ops(part: _Part, ops: str) -> _Part:
    """Returns a module that computes with this choice of operations.

    Args:
      part: a linen module. Its field `ops` is set, if it has one, and that of modules in its other fields, alone or in tuples or
        lists; what it makes inside its methods must be given `self.ops` there.
      ops: see `dgl_jax.ops`; `auto` changes nothing.

    Raises:
      ValueError: there is no such choice.
    """
    if ops not in OPS:
        raise ValueError(f"ops={ops!r}: there are {', '.join(OPS)}")
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
    if fields.get("ops") in OPS:  # a field of this name and another meaning stays
        fields["ops"] = ops
    return part.clone(**fields)
