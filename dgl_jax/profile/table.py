"""Makes the table of what each module costs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dgl_jax.core.module import count_parameters
from dgl_jax.profile.flops import module_flops
from dgl_jax.spec import TrainSpec
from dgl_jax.types import nbytes


@dataclass(frozen=True)
class ModuleCost:
    """A row of the table.

    Attributes:
      first_block, blocks: where the module begins in the network, and how many blocks it has.
      parameters, body_parameters: with and without the head.
      body_gflops, head_gflops: of the forward pass, an image; two operations a multiply-add of convolutions and dot products.
      activation_bytes: handed on, an image; None where nothing is.
      wire_bytes: the same as it is sent: encoded, with label, id and a share of the codebooks.
      share: of the tick, which lasts as long as the slowest module's turn.
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
    share: float


def module_costs(spec: TrainSpec, seconds: Sequence[float] = ()) -> list[ModuleCost]:
    """Makes the rows of the table; `seconds` of each module's turn give its share of the tick, without them the operations do."""
    operations = module_flops(spec)
    turns = seconds or [body + head for body, head in operations]
    if not any(turns):
        turns = [1.0] * len(turns)  # a network without convolutions and products
    traffic = spec.traffic() if spec.method.sends else None
    rows = []
    for k, (module, state, (body, head)) in enumerate(
        zip(spec.modules, spec.abstract_states(), operations)
    ):
        sends = traffic is not None and k + 1 < len(spec.modules)
        own = dataclasses.replace(state, params=state.params["body"])
        rows.append(
            ModuleCost(
                module.name,
                module.first,
                len(module.blocks),
                count_parameters(state),
                count_parameters(own),
                body / spec.batch_size / 1e9,
                head / spec.batch_size / 1e9,
                nbytes(spec.hops[k].activations) / spec.batch_size if sends else None,
                traffic.wire[k] if traffic and sends else None,
                turns[k] / max(turns),
            )
        )
    return rows


def table(rows: Sequence[ModuleCost]) -> list[str]:
    """The rows as aligned lines of text, under a heading."""
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
                f"{100 * row.share:.0f} %",
            ]
        )
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in cells
    ]
