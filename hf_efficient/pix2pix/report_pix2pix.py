"""The robustness report as a page that opens from disk: tables, plots and sample sheets in one file."""

import base64
import html
import io
import json
from importlib import import_module
from pathlib import Path

from PIL import Image

from .figures_pix2pix import save_picture, write_whole
from .robustness_pix2pix import FIGURES, PAPER_PIXEL_DISSIMILARITY, RobustnessReport, format_figure


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d5d66; --page: #fff; --line: #d8d8de; --band: #f3f3f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --soft: #a5a5b0; --page: #17171b; --line: #3a3a42; --band: #222228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, figcaption { max-width: 44rem; } figcaption, .soft { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid var(--line); } tbody tr:nth-child(even) { background: var(--band); }
td.home { outline: 2px solid currentColor; outline-offset: -3px; }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); }
svg .axis { stroke: var(--line); } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
ul.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
ul.key svg { display: inline-block; width: 2.2rem; height: .8rem; margin-right: .4rem; vertical-align: middle; }
"""
_COLOURS = (
    "#8a8a94",
    "#2f7ed8",
    "#d9622b",
    "#2a9d5c",
    "#a35bd1",
    "#c9a227",
    "#c2407f",
    "#2aa3a3",
)  # readable on white and on black
_DASHES = ("", "7 4", "2 4", "10 3 2 3", "4 2", "1 3")
_MARKS = ("circle", "square", "diamond")
_IDENTICAL = "none for identical images"


def write_report(report: RobustnessReport, folder: Path, title: str) -> Path:
    """Write the page, its data, the plot for a card and the sample sheets.

    Args:
        report ([`RobustnessReport`]): What was measured.
        folder (`pathlib.Path`): Folder to write.
        title (`str`): Heading of the page.

    Returns:
        `pathlib.Path`: `index.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, sheet in report.samples.items():
        file, number = _file_name(name), 1
        while file.lower() in taken:  # also where upper and lower case are one
            number += 1
            file = f"{_file_name(name)}_{number}"
        taken.add(file.lower())
        save_picture(sheet, folder / f"samples_{file}.png")
    save_picture(plot_curves(report), folder / "robustness.png")
    _write_text(folder / "robustness.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return _write_text(folder / "index.html", render_page(report, title))


def render_page(report: RobustnessReport, title: str) -> str:
    """Render the whole page, pictures included.

    Args:
        report ([`RobustnessReport`]): What was measured.
        title (`str`): Heading.

    Returns:
        `str`: HTML that needs no other file.
    """
    features = (
        f"KID and feature cosine compare features of {report.feature_network}."
        if report.feature_network
        else "No feature network was given, so KID and feature cosine were not measured."
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{report.images} test photographs, each turned into a cartoon in {len(report.methods)} ways and "
        f"translated back. {html.escape(features)} Severity 0 is the photograph itself.</p>",
        "<h2>By severity</h2>",
        _legend(report),
        '<div class="plots">',
        *(_plot(report, name) for name in report.figures),
        "</div>",
        "<h2>Trained on one, tested on all</h2>",
        "<p>Means over the severities above 0. A framed cell is the cartoonizer that the model was trained on.</p>",
        *(_matrix(report, name) for name in report.figures),
        "<h2>From clean to cartoon</h2>",
        "<p>How far each figure moves from the photograph itself (severity 0) to the mean of its cartoons.</p>",
        *(_gap(report, name) for name in report.figures),
        "<h2>Beside the paper</h2>",
        _paper(report),
        "<h2>Every figure</h2>",
        _all_rows(report),
        "<h2>Samples</h2>",
        *(_sample(name, sheet) for name, sheet in report.samples.items()),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def plot_curves(report: RobustnessReport) -> Image.Image:
    """Draw every figure by severity as one picture for a card: a column a figure, a row a cartoonizer.

    Args:
        report ([`RobustnessReport`]): What was measured.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        figure_class = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib; run pip install "hf-efficient[pix2pix]".') from error
    names = report.figures
    methods = report.methods
    figure = figure_class(figsize=(3 * len(names), 2.3 * len(methods) + 0.6), layout="constrained", dpi=100)
    axes = figure.subplots(len(methods), len(names), squeeze=False, sharex=True, sharey="col")
    for axis, name in zip(axes[0], names):
        axis.set_title(plot_title(report, name))
    for axis in axes[-1]:
        axis.set_xlabel("severity")
    for row, method in zip(axes, methods):
        for axis, name in zip(row, names):
            for number, model in enumerate(report.models):
                curve = report.curve(model, method, name)
                colour = _COLOURS[number % len(_COLOURS)]
                label = model if axis is axes[0][0] else None
                axis.plot(curve.keys(), curve.values(), "-o", color=colour, markersize=3, label=label)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{method} cartoons")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    return Image.open(memory).convert("RGB")


def plot_title(report: RobustnessReport, name: str) -> str:
    """Title of a plot; where a curve starts late because images are identical, it says so.

    Args:
        report ([`RobustnessReport`]): What was measured.
        name (`str`): Name of the figure.

    Returns:
        `str`: One line or two.
    """
    title = FIGURES.get(name, (name,))[0]
    return f"{title}\n({_IDENTICAL})" if _has_gap(report, name) else title


def _has_gap(report: RobustnessReport, name: str) -> bool:
    """Whether some images had no error, and so no PSNR."""
    return name == "psnr" and any(row[name] is None for row in report.rows)


def _caption(name: str) -> str:
    title, higher = FIGURES.get(name, (name, None))
    better = "" if higher is None else ", higher is better" if higher else ", lower is better"
    return html.escape(title + better)


def _style(report: RobustnessReport, model: str, method: str) -> tuple[str, str, str]:
    """Colour and dash tell the model, the mark tells the cartoonizer."""
    number, kind = report.models.index(model), report.methods.index(method)
    return _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)], _MARKS[kind % len(_MARKS)]


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    if kind == "square":
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{colour}"/>'
    return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z" fill="{colour}"/>'


def _legend(report: RobustnessReport) -> str:
    entries = []
    for model in report.models:
        for method in report.methods:
            colour, dash, mark = _style(report, model, method)
            line = f'<line x1="0" y1="6" x2="34" y2="6" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            picture = f'<svg viewBox="0 0 34 12" aria-hidden="true">{line}{_mark(mark, 17, 6, colour)}</svg>'
            entries.append(f"<li>{picture}{html.escape(model)}, {html.escape(method)}</li>")
    return f'<ul class="key">{"".join(entries)}</ul>'


def _plot(report: RobustnessReport, name: str) -> str:
    """Draw one figure by severity as SVG whose text follows the theme."""
    curves = {(m, c): report.curve(m, c, name) for m in report.models for c in report.methods}
    values = [value for curve in curves.values() for value in curve.values()]
    if not values:  # PSNR where every image is identical
        return ""
    severities = sorted({severity for curve in curves.values() for severity in curve})
    low, high = min(values), max(values)
    span, steps = (high - low) or abs(high) or 1.0, max(len(severities) - 1, 1)

    def place(severity: int, value: float) -> tuple[float, float]:
        return 62 + 286 * severities.index(severity) / steps, 196 - 172 * (value - low) / span

    title = html.escape(FIGURES.get(name, (name,))[0])
    parts = [f'<svg viewBox="0 0 360 236" role="img" aria-label="{title} by severity">']
    for value in (low, low + span / 2, low + span):
        y = place(severities[0], value)[1]
        parts.append(f'<line class="axis" x1="58" y1="{y:.1f}" x2="352" y2="{y:.1f}"/>')
        shown = f"{value:.3g}" if abs(value) > span / 1000 else "0"  # a rounding error has a long name
        parts.append(f'<text x="54" y="{y + 4:.1f}" font-size="11" text-anchor="end">{shown}</text>')
    for severity in severities:
        x = place(severity, low)[0]
        parts.append(f'<text x="{x:.1f}" y="214" font-size="11" text-anchor="middle">{severity}</text>')
    parts.append('<text x="205" y="231" font-size="11" text-anchor="middle">severity</text>')
    for (model, method), curve in curves.items():
        colour, dash, mark = _style(report, model, method)
        points = [place(severity, value) for severity, value in sorted(curve.items())]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [_mark(mark, x, y, colour) for x, y in points]
    note = f"; {_IDENTICAL}" if _has_gap(report, name) else ""
    return f"<figure>{''.join(parts)}</svg><figcaption>{_caption(name)}{note}</figcaption></figure>"


def _table(columns: list[str], rows: list[list[str]], framed: list[int | None] | None = None) -> str:
    """Set a table of plain text; `framed` names for each row the column of a cell that gets a frame."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = []
    for row, home in zip(rows, framed or [None] * len(rows)):
        marks = ['<td class="home">' if column == home else "<td>" for column in range(len(row))]
        cells = [f"{mark}{html.escape(cell)}</td>" for mark, cell in zip(marks, row)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _matrix(report: RobustnessReport, name: str) -> str:
    rows, framed = [], []
    for model, values in report.cross_matrix(name).items():
        home = report.trained_on.get(model)
        rows.append([model, *(f"{values[method]:.4g}" if method in values else "" for method in report.methods)])
        framed.append(1 + report.methods.index(home) if home in values else None)
    if not rows:
        return ""
    return f"<p>{_caption(name)}</p>" + _table(["model", *report.methods], rows, framed)


def _gap(report: RobustnessReport, name: str) -> str:
    gaps = report.clean_gap(name)
    if not gaps:
        return ""
    rows = [
        [model, *(f"{values[method]:+.4g}" if method in values else "" for method in report.methods)]
        for model, values in gaps.items()
    ]
    return f"<p>{_caption(name)}</p>" + _table(["model", *report.methods], rows)


def _paper(report: RobustnessReport) -> str:
    rows = [[f"paper, batch size {size}", f"{value:.5f}"] for size, value in PAPER_PIXEL_DISSIMILARITY.items()]
    for model, values in report.cross_matrix("pixel_dissimilarity").items():
        rows += [[f"{model}, {method} cartoons", f"{value:.5f}"] for method, value in values.items()]
    note = (
        '<p class="soft">Cosine dissimilarity of pixels. The paper (arXiv 2101.09793) used other photographs and its '
        "own cartoons, so only the order of magnitude compares.</p>"
    )
    return note + _table(["run", "cosine dissimilarity"], rows)


def _all_rows(report: RobustnessReport) -> str:
    columns = ["model", "cartoonizer", "severity", *(FIGURES.get(name, (name,))[0] for name in report.figures)]
    rows = [
        [
            row["model"],
            row["method"],
            str(row["severity"]),
            *(format_figure(name, row[name]) for name in report.figures),
        ]
        for row in report.rows
    ]
    return _table(columns, rows)


def _sample(name: str, sheet: Image.Image) -> str:
    memory = io.BytesIO()
    sheet.save(memory, format="PNG")
    data = base64.b64encode(memory.getvalue()).decode()
    text = html.escape(name)
    return (
        f'<figure><div class="scroll" tabindex="0"><img src="data:image/png;base64,{data}" alt="Samples: {text}" '
        f'width="{sheet.width}" height="{sheet.height}"></div><figcaption>{text}</figcaption></figure>'
    )


def _file_name(title: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in title).strip("_")


def _write_text(path: Path, text: str) -> Path:
    return write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
