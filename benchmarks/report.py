"""Turn results into pages, or two results into what changed.

python -m benchmarks.report                              results/*.json -> REPORT.md, REPORT.html, README's table
python -m benchmarks.report --compare OLD.json NEW.json  what changed beyond noise
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import page, results, tables
from benchmarks.comparison import Change, compare, lost_and_found, unlike
from benchmarks.results import Result, ResultError
from dali_pipes.replacing import write_atomically

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


@dataclass(frozen=True)
class Report:
    """One page from all results, and the README's table; or a comparison of two."""

    results: Path = Path("benchmarks/results")
    """Folder of the JSON files."""
    out: Path = Path("benchmarks")
    """Folder for REPORT.md and REPORT.html."""
    readme: Path = Path("README.md")
    """File whose table between the markers is replaced."""
    compare: tuple[Path, Path] | None = None
    """Two JSON files, old and new: print what changed, write nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 wrong use."""
    flags = tyro.cli(Report, prog="python -m benchmarks.report", args=argv)
    try:
        if flags.compare is not None:
            old, new = (results.read(file) for file in flags.compare)
            show_changes(old, new, Console(highlight=False, width=None if sys.stdout.isatty() else 140))
        else:
            write_pages(flags)
    except (ResultError, OSError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


def write_pages(flags: Report) -> None:
    """Write both pages and the README's table.

    Raises:
        ResultError: there are no results, one cannot be read, or the README has no place for the table.
    """
    found = [(file, results.read(file)) for file in sorted(flags.results.glob("*.json")) if not _is_check(file)]
    if not found:
        raise ResultError(f"{flags.results} holds no results; run python -m benchmarks.loader first")
    # Everything that can fail comes before the first write.
    readme = with_table(flags.readme, page.headlines(found))
    flags.out.mkdir(parents=True, exist_ok=True)
    write_atomically(flags.out / "REPORT.md", page.markdown(found, flags.out).encode())
    write_atomically(flags.out / "REPORT.html", page.html_page(found).encode())
    write_atomically(flags.readme, readme.encode())
    print(f"{len(found)} results -> {flags.out}/REPORT.md, {flags.out}/REPORT.html, table in {flags.readme}")


def _is_check(file: Path) -> bool:
    """Whether it is gpu_check's file, which holds short forms: their numbers say little."""
    return file.name.startswith("gpu_check")


def with_table(readme: Path, table: str) -> str:
    """The README's text with the table between the markers.

    Raises:
        ResultError: a marker is missing, or they are in the wrong order.
    """
    text = readme.read_text()
    start, stop = text.find(BEGIN), text.find(END)
    if start < 0 or stop < start:
        raise ResultError(f"{readme} has no place for the table; add the lines {BEGIN} and {END}")
    return f"{text[: start + len(BEGIN)]}\n{table}\n{text[stop:]}"


def show_changes(old: Result, new: Result, console: Console) -> None:
    """Print what changed, and what makes the two unlike.

    Raises:
        ResultError: there is nothing to compare.
    """
    for difference in unlike(old, new):
        console.print(f"not alike: {difference}", markup=False)
    commits = [(r.environment["commit"] or "unknown")[:10] for r in (old, new)]
    console.print(f"old: {old.created}, commit {commits[0]}; new: {new.created}, commit {commits[1]}", markup=False)
    for age, rows in zip(("old", "new"), lost_and_found(old, new), strict=True):
        for row in rows:
            console.print(f"only in the {age} one: {row}", markup=False)
    changes = compare(old, new)
    if not changes:
        raise ResultError("the two results share no measurement that can be better or worse")
    console.print(_table(changes))
    judged = [1 - c.ratio.confidence for c in changes if c.ratio and not c.verdict.startswith("not judged")]
    if judged:
        console.print(
            f"Each interval holds the true ratio with {1 - max(judged):.0%} or more if the machine was the same. "
            f"Equal code would show up to {sum(judged):.1f} changes among {len(judged)} on average.",
            markup=False,
        )


def _table(changes: Sequence[Change]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("measurement", "quantity", "old", "new", "new / old", "interval", "verdict"):
        table.add_column(title, justify="left" if title in ("measurement", "quantity", "verdict") else "right")
    for c in changes:
        table.add_row(
            f"{c.new.group}: {c.new.name}",
            c.new.quantity,
            tables.number(c.old.estimate.median),
            tables.number(c.new.estimate.median),
            f"{c.ratio.value:.3f}" if c.ratio else "",
            f"{c.ratio.low:.3f} to {c.ratio.high:.3f}" if c.ratio and c.ratio.confidence else "",
            c.verdict,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
