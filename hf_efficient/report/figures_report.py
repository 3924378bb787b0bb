"""The picture of an efficiency report: every measure of every phase as a share of the baseline."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .measure_report import Phase


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .model_report import EfficiencyReport

ENDINGS = (".png", ".svg", ".pdf")
_COLOURS = {
    "MACs": "#6f7b88",
    "paper FLOPs": "#b3bac2",
    "wall time": "#1f6fb2",
    "CPU time": "#7db3dc",
    "cache": "#2e8b57",
    "peak": "#b58d3d",
}
_TIMES = {"wall time": "wall", "CPU time": "cpu"}
MOST = 2.0  # shares are cut off there; their figures stand beside
_ROUGH = 1e6  # bytes; below it the resident memory of a process says nothing
_DARK, _LIGHT = "#222222", "#8a8f98"


def draw_report(report: "EfficiencyReport") -> "Figure":
    """Draw a report: one group of bars a phase; the line at 1 is the baseline.

    Args:
        report ([`EfficiencyReport`]): What to draw.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The picture needs matplotlib; run pip install -e ".[quickstart]".') from error
    from .model_report import describe_kept

    compared = [phase for phase in report.phases if phase.baseline is not None]
    bars = [bar for phase in compared or report.phases for bar in _bars(phase)]
    groups = len(compared or report.phases)
    verdict = textwrap.wrap(f"Verdict: {report.verdict}", 100)
    facts = [f"baseline: {report.baseline}, {report.parameters['baseline']:,} parameters"] if report.baseline else []
    facts += [f"kept {text}" for text in describe_kept(report.kept)]
    facts = [line for fact in facts for line in textwrap.wrap(fact, 105)]
    head, foot = 0.5 + 0.2 * len(facts), 0.65 + 0.2 * len(verdict)
    body = 0.3 * len(bars) + 0.42 * groups
    height = head + body + foot
    figure = Figure(figsize=(8.5, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)

    def write(y: float, text: str, **style: object) -> None:
        """Write a line at the left, `y` inches from the top; nothing in it is markup."""
        figure.text(0.2 / 8.5, 1 - y / height, text, va="baseline", parse_math=False, **{"fontsize": 9, **style})

    write(0.32, f"{report.name}, {report.parameters['model']:,} parameters", fontsize=11, fontweight="bold")
    for line, fact in enumerate(facts):
        write(0.56 + 0.2 * line, fact, color="#555555")
    for line, text in enumerate(verdict):
        write(height - 0.2 * (len(verdict) - line) + 0.07, text, color=_DARK)
    axes = figure.add_axes((1.15 / 8.5, foot / height, 4.7 / 8.5, body / height))
    _draw(axes, compared or report.phases, bool(compared))
    return figure


def _bars(phase: Phase) -> list[tuple[str, float, float | None, str]]:
    """`(measure, model, baseline, text)` of everything that was measured in a phase."""
    own, base = phase.model, phase.baseline
    measures = {
        "MACs": (own.macs, base and base.macs, 1, "MACs"),
        "paper FLOPs": (own.paper_flops, base and base.paper_flops, 1, "FLOPs"),
        "wall time": (own.wall_seconds, base and base.wall_seconds, 1e3, f"ms a {phase.unit}"),
        "CPU time": (own.cpu_seconds, base and base.cpu_seconds, 1e3, f"ms a {phase.unit}"),
        "cache": (own.cache_bytes, base and base.cache_bytes, 1e-3, "kB"),
        "peak": (own.peak_bytes, base and base.peak_bytes, 1e-6, "MB"),
    }
    bars = []
    for name, (value, reference, scale, unit) in measures.items():
        if value is None or (base is not None and not reference):
            continue
        if name == "peak" and "cpu" in phase.clocks and max(value, reference or 0) < _ROUGH:
            continue
        figures = [number for number in (reference, value) if number is not None]
        bars.append((name, value, reference, " \u2192 ".join(_figure(n, scale, name) for n in figures) + f" {unit}"))
    return bars


def _figure(number: float, scale: float, name: str) -> str:
    from .model_report import with_prefix

    if name in ("MACs", "paper FLOPs"):
        return with_prefix(number)
    scaled = number * scale
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.3g}"


def _draw(axes: "Axes", phases: Sequence[Phase], compared: bool) -> None:
    """Draw shares of the baseline, or milliseconds where there is none; bars end at twice the baseline."""
    top, ticks, names, longest = 0.0, [], [], 1.0 if compared else 0.0
    for phase in phases:
        _head(axes, top, phase)
        top += 0.35
        for name, value, reference, text in _bars(phase):
            ratio = phase.speedup(_TIMES[name]) if compared and name in _TIMES else None
            length = 1e3 * value if name in _TIMES else 0.0
            if compared:
                share = value / reference if ratio is None else 1 / ratio.median
                length, text = min(share, MOST), f"{share:.2f}   {text}"
            axes.barh(top, length, height=0.72, color=_COLOURS[name])
            longest = max(longest, length)
            if ratio is not None and phase.judged:
                ends = [min(1 / ratio.high, MOST), min(1 / ratio.low, MOST)]
                axes.plot(ends, [top, top], "-|", color=_DARK, linewidth=1.1, markersize=5)
                longest = max(longest, ends[1])
            axes.text(1.02, top, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
            ticks.append(top)
            names.append(name)
            top += 0.88
        top += 0.75
    label = "milliseconds, median; there was no baseline"
    if compared:
        axes.axvline(1, color=_DARK, linewidth=1, linestyle=":")
        label = "share of the baseline (dotted line)"
        label += "; lines: where the median lies, about 95 %" if phases[0].judged else ""
    axes.set_xlim(0, 1.04 * longest)
    axes.set_xlabel(label, fontsize=8.5)
    axes.set_ylim(top - 0.75, -0.75)
    axes.set_yticks(ticks, names, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_color(_LIGHT)


def _head(axes: "Axes", top: float, phase: Phase) -> None:
    style = {"fontsize": 9.5, "fontweight": "bold", "color": _DARK, "parse_math": False}
    axes.annotate(phase.name, (0, top - 0.25), (5, 0), textcoords="offset points", **style)


def check_ending(file: str | os.PathLike) -> Path:
    """Refuse a picture file of a kind that is not written here.

    Raises:
        ValueError: If the name ends in none of .png, .svg, .pdf.
    """
    target = Path(file)
    if target.suffix.lower() not in ENDINGS:
        raise ValueError(f"The picture must end in {', '.join(ENDINGS)}, got {target.name!r}.")
    return target


def save_figure(figure: "Figure", file: str | os.PathLike) -> Path:
    """Write a figure so that its file appears whole or not at all.

    Args:
        figure (`Figure`): What to write.
        file (`str` or `os.PathLike`): Ending in .png, .svg or .pdf.

    Returns:
        `Path`: `file`.

    Raises:
        ValueError: If the ending is another one.
    """
    target = check_ending(file)
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        figure.savefig(unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target
