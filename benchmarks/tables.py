"""A table of measurements: rows by name, a column a quantity, each median with its interval."""

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Estimate
from benchmarks.results import Result


def number(value: float) -> str:
    """Three or four digits, no exponent where people read, but for what would else be 0."""
    magnitude = abs(value)
    if 0 < magnitude < 5e-4:
        return f"{value:.1e}"
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude >= 100:
        return f"{value:.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 0.1 else f"{value:.3f}"


def spread(estimate: Estimate) -> str:
    """`median (low to high)`; the median alone where there was one repeat."""
    if estimate.repeats == 1:
        return number(estimate.median)
    return f"{number(estimate.median)} ({number(estimate.low)} to {number(estimate.high)})"


def rows(result: Result, group: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one table, as text; an empty cell where a quantity was not measured."""
    members = [m for m in result.of(group) if not m.detail]
    quantities = list(dict.fromkeys(m.quantity for m in members))
    cells = {(m.name, m.quantity): spread(m.estimate) for m in members}
    names = list(dict.fromkeys(m.name for m in members))
    return [group, *quantities], [[name, *(cells.get((name, q), "") for q in quantities)] for name in names]


def show(result: Result, console: Console) -> None:
    """All tables and notes on the console."""
    for group in result.groups():
        header, body = rows(result, group)
        table = Table(header[0], box=None, pad_edge=False)
        for quantity in header[1:]:
            table.add_column(quantity, justify="right")
        for row in body:
            table.add_row(*row)
        console.print(table)
        console.print()
    for note in result.notes:
        console.print(f"- {note}", markup=False, highlight=False)
