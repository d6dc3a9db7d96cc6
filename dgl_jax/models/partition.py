"""Where a network is cut into modules. Plain Python."""

from itertools import pairwise

from dgl_jax.errors import UserError


def cuts(split: str, num_blocks: int, modules: int) -> tuple[int, ...]:
    """The first block of each module: the first entry is 0, module k ends where module k + 1 begins.

    Args:
      split: 'count' for as many blocks a module as equally as possible, the larger modules first; or the first blocks
        themselves, such as '0,2,4'.
      num_blocks: blocks of the network.
      modules: how many modules to cut it into.

    Raises:
      UserError: more modules than blocks, or a list that does not describe `modules` modules.
    """
    if not 1 <= modules <= num_blocks:
        raise UserError(
            f"config.model.modules={modules}: the network has {num_blocks} blocks and each module needs at least one; "
            f"1 to {num_blocks} would work"
        )
    if split == "count":
        size, larger = divmod(num_blocks, modules)
        return tuple(k * size + min(k, larger) for k in range(modules))
    works = f"'count' would work, or config.model.modules={modules} first blocks such as '{_example(num_blocks, modules)}'"
    try:
        starts = tuple(int(part) for part in split.split(","))
    except ValueError:
        raise UserError(f"config.model.split={split!r}: neither 'count' nor a list of whole numbers; {works}") from None
    problem = None
    if len(starts) != modules:
        problem = f"a list of {len(starts)} first blocks, where config.model.modules={modules}"
    elif starts[0] != 0:
        problem = "the first module must begin at block 0"
    elif any(b <= a for a, b in pairwise(starts)):
        problem = "the first blocks must increase"
    elif starts[-1] >= num_blocks:
        problem = f"the last block of this network is {num_blocks - 1}"
    if problem:
        raise UserError(f"config.model.split={split!r}: {problem}; {works}")
    return starts


def _example(num_blocks: int, modules: int) -> str:
    return ",".join(map(str, cuts("count", num_blocks, modules)))
