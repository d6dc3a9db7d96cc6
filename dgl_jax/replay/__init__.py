"""Replay rings of messages at module entrances, and rules that choose the message to read."""

from dgl_jax.config.registry import RULES
from dgl_jax.replay.ring import Ring, RingSpec, Sample, Tally, check_memory
from dgl_jax.replay.rules import Rule, RuleKind

register_rule = RULES.register

__all__ = [
    "RULES",
    "Ring",
    "RingSpec",
    "Rule",
    "RuleKind",
    "Sample",
    "Tally",
    "check_memory",
    "register_rule",
]
