"""All results as one page: Markdown that refers to the plots beside the JSON files, HTML that carries them inside."""

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import gpu, tables, variants
from benchmarks.results import Result
from trainer.presets import PRESETS

TITLE, NOT_YET = "Benchmarks", "not yet measured"
INTRODUCTION = (
    "Written by `python -m benchmarks.report` from the JSON files in this folder's `results/`; no number was typed by "
    "hand. A number is the median of its repeats; in brackets the interval into which the median of a rerun falls, as "
    "often as is said for its number of rounds, on a machine whose state does not change."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
.where { color: #666 }
"""


def heading(result: Result) -> str:
    """Which benchmark, of what, on what."""
    subject = f" of {result.subject}" if result.subject else ""
    quick = " (quick form: that it runs, not how fast)" if result.quick else ""
    return f"{result.benchmark}{subject} on {hardware(result)}{quick}"


def hardware(result: Result) -> str:
    """The card, or the processor with its cores."""
    env = result.environment
    return env["gpu"]["name"] if env["gpu"] else f"{env['cpu']}, {env['cores']} cores"


def facts(result: Result) -> str:
    """What of, when, which commit, driver, versions, images and repeats, in a line."""
    env, configuration = result.environment, result.configuration
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    commit = (env["commit"] or "unknown")[:10] + (", with changes" if env["dirty"] else "")
    driver = f"driver {env['driver']}, CUDA {env['cuda']}. " if env["driver"] else ""
    files = configuration["files"]
    size = f"{files['mean_width']:.0f} x {files['mean_height']:.0f}, {files['mean_kilobytes']:.0f} KB"
    images = f"{files['files']:,} {configuration['data']} files, mean {size}. "
    held = {e.repeats: e.coverage for e in (m.estimate for m in result.measurements) if e.repeats > 1}
    intervals = ", ".join(f"{coverage:.0%} with {n} rounds" for n, coverage in sorted(held.items()))
    return (
        f"{result.setting}. {env['cpu']}, {env['cores']} cores. {driver}{versions}. {images}"
        f"{result.created}, commit {commit}. "
        + (f"Intervals hold: {intervals}. " if intervals else "")
        + f"Warm-up: {result.warm_up}. Cores used by others at the start: {env['busy_cores']}."
    )


def markdown(found: Sequence[tuple[Path, Result]], folder: Path) -> str:
    """The page for `folder`/REPORT.md."""
    parts = [f"# {TITLE}", INTRODUCTION]
    for file, result in found:
        parts += [f"## {heading(result)}", facts(result)]
        plot = file.with_suffix(".png")
        if plot.exists():
            parts.append(f"![{heading(result)}]({os.path.relpath(plot, folder)})")
        for group in result.groups():
            parts.append(markdown_table(*tables.rows(result, group)))
        parts.append("\n".join(f"- {note}" for note in _notes(result)))
    for title, header, body in unmeasured([result for _, result in found]):
        parts += [f"## {title}", markdown_table(header, body)]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown, numbers to the right."""
    cells = [header, ["---", *("---:" for _ in header[1:])], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def html_page(found: Sequence[tuple[Path, Result]]) -> str:
    """The page as one file that needs no other."""
    parts = [f"<h1>{TITLE}</h1>", f"<p>{html.escape(INTRODUCTION.replace('`', ''))}</p>"]
    for file, result in found:
        parts += [f"<h2>{html.escape(heading(result))}</h2>", f'<p class="where">{html.escape(facts(result))}</p>']
        plot = file.with_suffix(".png")
        if plot.exists():
            data = base64.b64encode(plot.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(heading(result))}" src="data:image/png;base64,{data}">')
        parts += [_html_table(*tables.rows(result, group)) for group in result.groups()]
        parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in _notes(result)) + "</ul>")
    for title, header, rows in unmeasured([result for _, result in found]):
        parts += [f"<h2>{html.escape(title)}</h2>", _html_table(header, rows)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
        f"</head><body>\n{body}\n</body></html>\n"
    )


def unmeasured(found: Sequence[Result]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table of variants that no GPU has filled yet."""
    full = [r for r in found if r.benchmark == "variants" and r.environment["gpu"] and not r.quick]
    measured = {group for r in full for group in r.groups()}
    return [
        (
            f"variants of {arch} on a GPU",
            [arch, *variants.QUANTITIES],
            [
                [row, *(NOT_YET for _ in variants.QUANTITIES)]
                for row in variants.ROWS
                if arch.startswith("vit_") or row not in variants.VIT_ROWS
            ],
        )
        for arch in (PRESETS[name]().model.arch for name in variants.PRESETS)
        if arch not in measured
    ]


def _html_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _notes(result: Result) -> list[str]:
    return [*result.notes, gpu.sentence(result.gpu)]


def headlines(found: Sequence[tuple[Path, Result]]) -> str:
    """The README's table: a row a headline; quick forms stay out."""
    rows = []
    for _, result in found:
        if result.quick:
            continue
        commit = (result.environment["commit"] or "unknown")[:10] + ("+" if result.environment["dirty"] else "")
        what = f"{result.benchmark} {result.subject}".strip()
        for m in result.measurements:
            if m.headline:
                name = m.name if result.benchmark != "ablation" else f"{m.group}: {m.name}"
                value = f"{tables.spread(m.estimate)} {m.quantity}"
                rows.append([f"{what}: {name}", value, result.setting, hardware(result), commit])
    if not rows:
        return "Not yet measured."
    return markdown_table(["what", "median (interval of a rerun)", "with", "on", "commit"], rows)
