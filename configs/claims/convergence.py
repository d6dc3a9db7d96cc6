r"""Claim: modules converge although their inputs drift, and the drift weighted by the steps fades.

    python launch.py --mode=sweep --sweep=configs/claims/convergence.py:small \
        --workdir=runs/convergence
    python launch.py --mode=report --workdir=runs/convergence

Two comparisons, with diagnostics in every run (docs/theory.md). The 6-layer network of the claim
`asynchronous`: synchronous, with one module slowed by S, with vector quantization at 8 and 32 times
fewer bytes, and `layerwise`, whose inputs do not drift. The 4-layer network of the claim
`sequential`: `dgl` beside `layerwise`, at an equal number of updates per module.

Published (four layers, width 64, one seed): the sequential solver leads early in training at equal
epochs per layer, and DGL leads by 0.7 points at layer 4 in the end.
"""

from collections.abc import Mapping
from typing import Any

from dgl_jax.configs.claims import _common as common
from dgl_jax.configs.claims import asynchronous, codecs, sequential

_PROBED = {"diagnostics.enabled": True}
_LAYERWISE = {"method.name": "layerwise"}


def _probed(variants: Mapping[str, dict[str, Any]]) -> common.Variants:
    return {name: fields | _PROBED for name, fields in variants.items()}


SIX = _probed(
    {
        "six/synchronous": {},
        "six/S=1.2,M=50": asynchronous.slowed(1.2, 50),
        "six/S=2,M=50": asynchronous.slowed(2.0, 50),
        "six/vq,8x": codecs.vq(2),
        "six/vq,32x": codecs.vq(8),
        "six/layerwise": _LAYERWISE,
    }
)
FOUR = _probed({"four/dgl": {}, "four/layerwise": _LAYERWISE})
ROWS: common.Variants = SIX | FOUR
CHOSEN: dict[str, float] = {
    f"four/{name}": sequential.CHOSEN[name] for name in ("dgl", "layerwise")
}


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    for base, variants in ((asynchronous.base, SIX), (sequential.base, FOUR)):
        for name, config in common.sweep(base, variants, size, CHOSEN):
            # About 20 probes at the small size, 100 at the full one.
            config.diagnostics.every = 200
            if size != "full":
                config.diagnostics.every, config.train.epochs = 35, 10.0
            yield name, config
