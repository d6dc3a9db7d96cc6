"""Table of the costs of each module, for logs and the command line."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dgl_jax.core.module import count_parameters
from dgl_jax.profile.flops import module_flops
from dgl_jax.spec import TrainSpec
from dgl_jax.types import nbytes


@dataclass(frozen=True)
class ModuleCost:
    """Costs of one module: a row of the table.

    Attributes:
      name: name of the module, such as "module_0".
      first_block: index of the module's first block in the network.
      blocks: number of blocks.
      parameters: number of parameters, including the head.
      body_parameters: number of parameters without the head.
      body_gflops: 10^9 operations of the body's forward pass per image, see `flops.py`.
      head_gflops: 10^9 operations of the head's forward pass per image.
      activation_bytes: bytes per image of the activations for the next module; None if the module
        sends nothing.
      wire_bytes: bytes per image that are sent: encoded activations, context and a share of the
        codebooks; None if the module sends nothing.
      state_bytes: bytes on each of the module's devices between two updates: parameters, batch
        statistics, optimizer state, codebooks, copies of other parameters and waiting messages.
      share: duration of the module's turn relative to the tick, which lasts as long as the turn of
        the slowest module.
    """

    name: str
    first_block: int
    blocks: int
    parameters: int
    body_parameters: int
    body_gflops: float
    head_gflops: float
    activation_bytes: float | None
    wire_bytes: float | None
    state_bytes: int
    share: float


def module_costs(spec: TrainSpec, seconds: Sequence[float] = ()) -> list[ModuleCost]:
    """Computes the rows of the table.

    Args:
      spec: the training run.
      seconds: duration of each module's turn, for its share of the tick; if empty, the share
        follows from the floating-point operations.
    """
    operations = module_flops(spec)
    turns = seconds or [body + head for body, head in operations]
    if not any(turns):
        turns = [1.0] * len(turns)  # a network without convolutions and dot products
    traffic = spec.traffic() if spec.method.sends else None
    rows = []
    for k, (module, state, (body, head)) in enumerate(
        zip(spec.modules, spec.abstract_states(), operations)
    ):
        sends = traffic is not None and k + 1 < len(spec.modules)
        body_state = dataclasses.replace(state, params=state.params["body"])
        rows.append(
            ModuleCost(
                module.name,
                module.first,
                len(module.blocks),
                count_parameters(state),
                count_parameters(body_state),
                body / spec.batch_size / 1e9,
                head / spec.batch_size / 1e9,
                nbytes(spec.hops[k].activations) / spec.batch_size if sends else None,
                traffic.wire[k] if traffic and sends else None,
                nbytes(state),
                turns[k] / max(turns),
            )
        )
    return rows


def table(rows: Sequence[ModuleCost]) -> list[str]:
    """Formats rows as aligned lines of text below a heading."""
    small = max(row.body_gflops for row in rows) < 0.01
    unit, scale = ("MFLOP", 1e3) if small else ("GFLOP", 1.0)
    cells = [
        [
            "module",
            "blocks",
            "parameters",
            f"{unit} body",
            f"{unit} head",
            "bytes out",
            "on the wire",
            "state bytes",
            "share of tick",
        ]
    ]
    for row in rows:
        last = row.first_block + row.blocks - 1
        sent = [
            f"{bytes_:,.0f}" if bytes_ is not None else "-"
            for bytes_ in (row.activation_bytes, row.wire_bytes)
        ]
        blocks = f"{row.first_block}-{last}" if row.blocks > 1 else f"{last}"
        operations = [f"{scale * gflops:.4g}" for gflops in (row.body_gflops, row.head_gflops)]
        cells.append(
            [
                row.name,
                blocks,
                f"{row.parameters:,}",
                *operations,
                *sent,
                f"{row.state_bytes:,}",
                f"{100 * row.share:.0f} %",
            ]
        )
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Formats cells as lines; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in cells
    ]
