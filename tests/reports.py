"""Reports of a folder of runs, and the texts of their tables."""

from written_runs import write_run

from dgl_jax.tools.report_groups import Report, make_report
from dgl_jax.tools.report_runs import read_runs
from dgl_jax.tools.report_tables import Table


def report_of(root) -> Report:
    runs, notes = read_runs(root)
    return make_report("title", runs, notes)


def texts(table: Table, *titles: str) -> list[list[str]]:
    """Returns the texts of some columns of a table."""
    columns, rows = table
    places = [[column.title for column in columns].index(title) for title in titles]
    return [[row[n].text for n in places] for row in rows]


def bold(table: Table) -> list[str]:
    return [cell.text for row in table[1] for cell in row if cell.best]


def grid(root, heads, rates):
    """Writes a run for each head and learning rate; accuracies rise with the place in the grid."""
    for m, head in enumerate(heads):
        for n, rate in enumerate(rates):
            accuracy = 0.1 + 0.1 * (m * len(rates) + n)
            fields = {"model__head": head, "optimizer__learning_rate": rate}
            write_run(root / f"{head}-{rate}", [0.1, accuracy], 0.5, **fields)
