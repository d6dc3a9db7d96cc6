"""Parts that dgl_jax does not have, each one file and one registration: import this module by `config.plugins`.

python launch.py --config=configs/digits.py --workdir=runs/plugin --config.plugins=examples.plugin \\
    --config.objective.name=reconstruction
"""

from examples.plugin import (
    echo,
    lookahead,
    maximum,
    mirror,
    newest_half,
    reconstruction,
    replayed,
    serial,
    signs,
    strided,
    stripes,
    tokens,
)

__all__ = [
    "echo",
    "lookahead",
    "maximum",
    "mirror",
    "newest_half",
    "reconstruction",
    "replayed",
    "serial",
    "signs",
    "strided",
    "stripes",
    "tokens",
]
