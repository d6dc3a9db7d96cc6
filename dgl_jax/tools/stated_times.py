"""Times of blocks that the user states with `--block_times` in place of measured ones."""

import json
import math
from pathlib import Path

from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.profile.flops import Blocks, block_flops
from dgl_jax.profile.timing import BlockTimes


def stated_times(text: str, network: Blocks, modules: int) -> BlockTimes:
    """Parses the value of `--block_times`.

    Args:
      text: milliseconds of each block, or the name of a JSON file.
      network: the network; single numbers per block are completed with its operations: the times of
        heads and input adapters have the ratio to their operations that the blocks have.
      modules: number of modules.

    Raises:
      UserError: the times do not fit the network, or the file cannot be read.
    """
    where, count = f"--block_times={text}", len(network.blocks)
    try:
        if Path(text).suffix == ".json":
            given = json.loads(Path(text).read_text(encoding="utf-8"))
            given = given.get("block_milliseconds", given) if isinstance(given, dict) else given
        else:
            given = text.split(",")
        given = given if isinstance(given, dict) else {"all": given}
        tables = {
            name: [
                tuple(float(t) / 1e3 for t in row) for row in (rows if name == "heads" else [rows])
            ]
            for name, rows in given.items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: neither milliseconds such as 1.5,2,3 nor a JSON file of them ({error})"
        ) from error
    if tables.keys() not in ({"all"}, {"first", "inner", "heads"}):
        raise UserError(
            f"{where}: the file has {', '.join(tables) or 'no times'}, "
            "but first, inner and heads are needed"
        )
    if (found := len(tables.get("heads", [()]))) not in (1, modules):
        raise UserError(
            f"{where}: the file has {found} rows of heads, and config.model.modules={modules}; "
            "one row is needed, or one for each module"
        )
    for name, table in tables.items():
        if not all(len(row) == count and all(0 < t < math.inf for t in row) for row in table):
            times = "" if name == "all" else f" of {name!r}"
            raise UserError(
                f"{where}: the network has {count} blocks, so {count} times{times} above 0 are "
                "needed"
            )
    if "all" in tables:
        (inner,), operations = tables["all"], block_flops(network)
        per_operation = sum(inner) / (sum(operations.inner) or 1.0)
        adapting = (a - b for a, b in zip(operations.first, operations.inner))
        first = tuple(t + per_operation * extra for t, extra in zip(inner, adapting))
        heads = tuple(tuple(per_operation * n for n in row) for row in operations.heads)
        seconds = BlockCosts(first, inner, heads)
    else:
        (first,), (inner,) = tables["first"], tables["inner"]
        seconds = BlockCosts(first, inner, tuple(tables["heads"]))
    return BlockTimes(seconds, seconds)
