r"""Claim: quantized messages cost little accuracy, at up to 32 times fewer bytes.

    python launch.py --mode=sweep --sweep=configs/claims/codecs.py:small \
        --workdir=runs/asynchronous
    python launch.py --mode=report --workdir=runs/asynchronous

The runs of the claim `asynchronous` with a codec on every hop. The rows without a codec are rows of
that claim, so that both sweeps share a workdir. At N = 256 codes, `vq` sends one byte per D values
and stage. The paper on quantized DGL has published no numbers.
"""

from typing import Any

from dgl_jax.configs.claims import _common as common
from dgl_jax.configs.claims import asynchronous


def vq(dims: int, stages: int = 1) -> dict[str, Any]:
    """Returns the fields of vector quantization of `dims` values at a time."""
    return {"codec.name": "vq", "codec.dims": dims, "codec.stages": stages}


ROWS: common.Variants = {
    "synchronous": {},
    "bf16": {"codec.name": "bf16"},
    "int8": {"codec.name": "int8"},
    **{f"vq,D={dims}": vq(dims) for dims in (2, 4, 8, 16)},
    "vq,D=16,stages=2": vq(16, 2),
    "S=1.2,M=50": asynchronous.slowed(1.2, 50),
    "S=1.2,M=50,vq,D=8": asynchronous.slowed(1.2, 50) | vq(8),
}
CHOSEN: dict[str, float] = {
    "synchronous": 0.03,
    "bf16": 0.01,
    "int8": 0.03,
    "vq,D=2": 0.01,
    "vq,D=4": 0.03,
    "vq,D=8": 0.03,
    "vq,D=16": 0.03,
    "vq,D=16,stages=2": 0.03,
    "S=1.2,M=50": 0.01,
    "S=1.2,M=50,vq,D=8": 0.03,
}


def get_sweep(size: str | None = None) -> common.Rows:
    """Yields the rows of the claim; see `common.sweep`."""
    return common.sweep(asynchronous.base, ROWS, size, CHOSEN)
