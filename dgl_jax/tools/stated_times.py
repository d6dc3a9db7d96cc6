"""Times of blocks that the user states with `--block_times` in place of measured ones."""

import json
import math
from pathlib import Path

from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.profile.flops import Blocks, block_flops
from dgl_jax.profile.timing import BlockTimes


def stated_times(text: str, network: Blocks) -> BlockTimes:
    """Parses the value of `--block_times`.

    Args:
      text: milliseconds of each block, or the name of a JSON file.
      network: the network; single numbers per block are completed with its operations: the times of
        heads and input adapters have the ratio to their operations that the blocks have.

    Raises:
      UserError: the times do not fit the network, or the file cannot be read.
    """
    where, count = f"--block_times={text}", len(network.blocks)
    try:
        if Path(text).suffix == ".json":
            given = json.loads(Path(text).read_text(encoding="utf-8"))
            given = given.get("block_milliseconds", given) if isinstance(given, dict) else given
        else:
            given = [float(part) for part in text.split(",")]
        rows = {
            name: [float(t) / 1e3 for t in row]
            for name, row in (given if isinstance(given, dict) else {"all": given}).items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{where}: neither milliseconds such as 1.5,2,3 nor a JSON file of them ({error})"
        ) from error
    if rows.keys() not in ({"all"}, {"first", "inner", "head"}):
        raise UserError(
            f"{where}: the file has {', '.join(rows) or 'no times'}, "
            "but first, inner and head are needed"
        )
    if wrong := next(
        (
            name
            for name, row in rows.items()
            if len(row) != count or not all(0 < t < math.inf for t in row)
        ),
        None,
    ):
        times = "" if wrong == "all" else f" of {wrong!r}"
        raise UserError(
            f"{where}: the network has {count} blocks, so {count} times{times} above 0 are needed"
        )
    if "all" in rows:
        operations = block_flops(network)
        per_operation = sum(rows["all"]) / (sum(operations.inner) or 1.0)
        rows = {
            "first": [
                t + per_operation * (first - inner)
                for t, first, inner in zip(rows["all"], operations.first, operations.inner)
            ],
            "inner": rows["all"],
            "head": [per_operation * head for head in operations.head],
        }
    seconds = BlockCosts(**{name: tuple(row) for name, row in rows.items()})
    return BlockTimes(seconds, seconds)
