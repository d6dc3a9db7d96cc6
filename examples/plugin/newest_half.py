"""Replay rule that reads messages from the newer half of the ring with equal probability."""

import numpy as np

from dgl_jax.replay import RuleKind, register_rule


def newest_half(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Returns the age of the message to read; see `dgl_jax.replay.Rule`."""
    allowed = np.flatnonzero(uses[: -(-len(uses) // 2)] < limit)
    if not len(allowed):  # fall back to the newest readable message of the older half
        return int(np.flatnonzero(uses < limit)[0])
    return int(np.random.default_rng(seed).choice(allowed))


register_rule("newest_half", RuleKind(newest_half))
