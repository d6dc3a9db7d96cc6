"""A replay rule: any packet of the newer half of the ring, equally likely."""

import numpy as np

from dgl_jax.replay import RuleKind, register_rule


def newest_half(uses: np.ndarray, newest: int, size: int, limit: int, seed: tuple[int, ...]) -> int:
    """Returns the age of the packet to read; see `dgl_jax.replay.Rule`."""
    allowed = np.flatnonzero(uses[: -(-len(uses) // 2)] < limit)
    if not len(allowed):  # of the older ones the newest that may be read
        return int(np.flatnonzero(uses < limit)[0])
    return int(np.random.default_rng(seed).choice(allowed))


register_rule("newest_half", RuleKind(newest_half))
