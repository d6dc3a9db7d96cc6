"""Writes the costs of the rows of a claim beside their accuracies.

    python results/costs.py CLAIM

CLAIM is the name of a file in configs/claims/ whose page results/CLAIM.md exists and whose runs are
in results/CLAIM.jsonl. Counts operations, and compiles every program for the CPU without running
it, with XLA's own operations (`model.ops=xla`), as on an accelerator. Writes a table into the page,
between the marks `costs`, and results/CLAIM_costs.png.
"""

import importlib
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from make import COLORS, HERE, Row, make_row, unpack
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgl_jax import system
from dgl_jax.config import Settings, make_settings
from dgl_jax.core.module import count_parameters
from dgl_jax.data.info import DatasetInfo
from dgl_jax.profile.flops import count, module_flops
from dgl_jax.profile.memory import module_memory
from dgl_jax.run.build import choose_cuts, make_spec
from dgl_jax.run.parts import make_blocks
from dgl_jax.spec import TrainSpec
from dgl_jax.tools.report_runs import read_runs

INFO = DatasetInfo("cifar10", tuple("0123456789"), (32, 32, 3), (0.5,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class Costs:
    """Costs of a row.

    Attributes:
      training: floating-point operations of an update of all modules, per image.
      operations: floating-point operations of the forward pass per image, of all modules.
      largest: those of the largest module.
      memory: bytes of arguments and temporary buffers of the largest program.
      parameters: number of parameters in training.
      sent: bytes per image between modules.
    """

    training: float
    operations: float
    largest: float
    memory: float
    parameters: int
    sent: float


def costs(settings: Settings) -> Costs:
    """Returns the costs of a run on CIFAR-10."""
    spec = make_spec(settings, INFO, choose_cuts(settings, make_blocks(settings, INFO)))
    operations = [sum(pair) / spec.batch_size for pair in module_flops(spec)]
    alone, (step, *arguments) = module_memory(spec), _update(spec)
    memory = (
        _memory(step, *arguments)
        if alone is None
        else max(program.arguments + program.temporary for program in alone)
    )
    if not spec.method.sends:  # the network is one program
        operations = [sum(operations)]
    return Costs(
        count(step, *arguments)[0] / spec.batch_size,
        sum(operations),
        max(operations),
        memory,
        sum(count_parameters(state) for state in spec.abstract_states()),
        sum(spec.traffic().wire),
    )


def _update(spec: TrainSpec) -> tuple[Any, ...]:
    """Returns the program that updates all modules at once, and the shapes of its arguments."""
    step = spec.method.fused(spec, [(k, "step") for k in range(len(spec.modules))])
    return step, spec.abstract_states(), spec.batch()


def _memory(step: Any, *arguments: Any) -> float:
    """Returns the bytes of a compiled program whose first argument is donated."""
    lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    plan = system.program_plan(lowered.compile())
    return math.nan if plan is None else plan.arguments + plan.temporary


def table(rows: list[tuple[Row, Costs]]) -> list[str]:
    """Returns the lines of a Markdown table; the first row is the unit of operations."""
    update, unit = rows[0][1].training, rows[0][1].operations
    lines = [
        "| row | test accuracy, % | training operations | forward, all modules | largest module "
        "| memory, MiB | parameters | bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, cost in rows:
        cells = [
            f"`{row.name}`",
            row.text(),
            f"{cost.training / update:.2f}",
            f"{cost.operations / unit:.2f}",
            f"{cost.largest / unit:.2f}",
            f"{cost.memory / 2**20:.0f}",
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.sent:,.0f}" if cost.sent else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def picture(rows: list[tuple[Row, Costs]], path: Path) -> None:
    """Draws test accuracy against operations and against memory."""
    unit = rows[0][1].training
    figure = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for place, (row, cost) in enumerate(rows):
        style = {"color": COLORS[place % len(COLORS)], "marker": "os^D"[place // len(COLORS)]}
        for axes, x in zip(panels, (cost.training / unit, cost.memory / 2**20)):
            axes.plot([x], [sum(row.accuracies()) / len(row.runs)], label=row.name, ls="", **style)
    panels[0].set(xlabel="training operations, relative to the first row")
    panels[0].set(ylabel="test accuracy of the last module, %")
    panels[1].set(xlabel="memory of the largest program, MiB")
    for axes in panels:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def main() -> None:
    claim = sys.argv[1]
    module = importlib.import_module(f"dgl_jax.configs.claims.{claim}")
    with tempfile.TemporaryDirectory() as folder:
        unpack(HERE / f"{claim}.jsonl", Path(folder))
        runs, _ = read_runs(Path(folder))
    settings = {}
    for name, config in module.get_sweep("rates"):
        config.model.ops = "xla"
        settings[name.rpartition("/lr=")[0]] = make_settings(config)
    rows = [make_row(name, runs) for name in module.ROWS]
    priced = [(row, costs(settings[row.name])) for row in rows if row.runs]
    picture(priced, HERE / f"{claim}_costs.png")
    page, begin, end = HERE / f"{claim}.md", "<!-- costs -->\n", "<!-- end of costs -->\n"
    old = page.read_text()
    head, tail = old.partition(begin)[0], old.partition(end)[2]
    lines = "\n".join(table(priced))
    print(lines)
    image = f"![Accuracy against costs]({claim}_costs.png)"
    page.write_text(f"{head}{begin}\n{lines}\n\n{image}\n\n{end}{tail}")


if __name__ == "__main__":
    main()
