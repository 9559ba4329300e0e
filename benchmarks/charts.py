"""Bars with their intervals, in one look for all benchmarks; drawn without a display."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Measurement, Result
from benchmarks.tables import number

ACCENT, PLAIN = "#4c9a00", "#7f8ea3"
BAR_INCHES = 0.34
BARS_A_PAIR = 1.6  # height of two bars that belong together, in bars


def figure(result: Result, title: str, heights: Sequence[int], columns: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a row of axes for each number of bars in `heights`; its caption says on what it was measured."""
    inches = [0.95 + BAR_INCHES * bars for bars in heights]
    total = sum(inches) + 0.9
    chart = Figure(figsize=(5.6 * columns + 1.4, total), layout="constrained")
    axes = chart.subplots(len(heights), columns, squeeze=False, height_ratios=inches)
    chart.suptitle(title, fontsize=13, fontweight="bold")
    chart.supxlabel(caption(result), fontsize=8, color="#555555")
    return chart, [list(row) for row in axes]


def caption(result: Result) -> str:
    """Where, with what, when, in one line."""
    env = result.environment
    commit = (env["commit"] or "no commit")[:10] + (" with changes" if env["dirty"] else "")
    quick = " · quick form" if result.quick else ""
    where = env["gpu"]["name"] if env["gpu"] else f"{env['cpu']}, {env['cores']} cores"
    return f"{where} · torch {env['versions']['torch']} · {commit} · {result.created[:10]}{quick}"


def bars(axes: Axes, measurements: Sequence[Measurement], label: str, accent: Sequence[str] = ()) -> None:
    """A horizontal bar a measurement, the first on top, with its interval and its median as text."""
    names = [m.name for m in measurements]
    estimates = [m.estimate for m in measurements]
    medians = [e.median for e in estimates]
    errors = [[e.median - e.low for e in estimates], [e.high - e.median for e in estimates]]
    colours = [ACCENT if name in accent else PLAIN for name in names]
    axes.barh(range(len(names)), medians, color=colours, height=0.7)
    axes.errorbar(medians, range(len(names)), xerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    reach = max([*(e.high for e in estimates), 0.0])
    depth = min([*(e.low for e in estimates), 0.0])
    span = (reach - depth) or 1.0
    for row, e in enumerate(estimates):
        axes.text(max(e.high, 0.0) + 0.015 * span, row, number(e.median), va="center", fontsize=8)
    _frame(axes, names, label, depth, reach)


def _frame(axes: Axes, names: Sequence[str], label: str, depth: float, reach: float) -> None:
    """The look of every panel: a row a name, from the top; room for the numbers at the bars' ends."""
    span = (reach - depth) or 1.0
    axes.set_xlim(depth - (0.03 * span if depth else 0), reach + 0.14 * span)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def paired_bars(axes: Axes, series: Mapping[str, Sequence[Measurement]], label: str) -> None:
    """Two series by name, two thin bars a row; rows are those of the first series."""
    (first, members), (second, others) = series.items()
    rows = {m.name: row for row, m in enumerate(members)}
    reach, depth = 0.0, 0.0
    for title, part, shift, colour in ((first, members, -0.2, ACCENT), (second, others, 0.2, PLAIN)):
        places = [rows[m.name] + shift for m in part]
        estimates = [m.estimate for m in part]
        medians = [e.median for e in estimates]
        errors = [[e.median - e.low for e in estimates], [e.high - e.median for e in estimates]]
        axes.barh(places, medians, color=colour, height=0.38, label=title)
        axes.errorbar(medians, places, xerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
        for place, e in zip(places, estimates, strict=True):
            axes.annotate(
                number(e.median), (max(e.high, 0.0), place), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
        reach, depth = max(reach, *(e.high for e in estimates)), min(depth, *(e.low for e in estimates))
    _frame(axes, list(rows), label, depth, reach)
    axes.legend(fontsize=7, loc="lower right", framealpha=0.9)
