"""Example plugins: user-defined parts, each in one file with one registration.

List this package in `config.plugins` to import it:

python launch.py --config=configs/digits.py --workdir=runs/plugin \\
    --config.plugins=examples.plugin --config.objective.name=reconstruction
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
