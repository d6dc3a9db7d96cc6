"""What a model is: blocks in order, and the classifier behind the last."""

from dataclasses import dataclass

from flax import linen as nn


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
