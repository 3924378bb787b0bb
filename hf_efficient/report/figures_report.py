"""The picture of an efficiency report: every measure of every phase as a share of the baseline."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_efficient.results import whole_file

from .measure_report import Phase
from .model_report import EfficiencyReport, describe_kept, with_prefix


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
# measure -> field of a cost, colour, factor of its figures (None: a decimal prefix) and their unit
_MEASURES = {
    "MACs": ("macs", "#6f7b88", None, "MACs"),
    "paper FLOPs": ("paper_flops", "#b3bac2", None, "FLOPs"),
    "wall time": ("wall_seconds", "#1f6fb2", 1e3, "ms a {}"),
    "CPU time": ("cpu_seconds", "#7db3dc", 1e3, "ms a {}"),
    "cache": ("cache_bytes", "#2e8b57", 1e-3, "kB"),
    "peak": ("peak_bytes", "#b58d3d", 1e-6, "MB"),
}
_CLOCKS = {"wall time": "wall", "CPU time": "cpu"}
_MOST = 2.0  # shares are cut off there; their figures stand beside
_ROUGH = 1e6  # bytes; below it the resident memory of a process says nothing
_DARK, _LIGHT = "#222222", "#8a8f98"


def draw_report(report: EfficiencyReport) -> "Figure":
    """Draw a report: one group of bars a phase; the line at 1 is the baseline. matplotlib must be there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The picture needs matplotlib; run pip install "hf-efficient[quickstart]".') from error

    compared = [phase for phase in report.phases if phase.baseline is not None]
    phases = compared or report.phases
    verdict = textwrap.wrap(f"Verdict: {report.verdict}", 100)
    facts = [f"baseline: {report.baseline}, {report.parameters['baseline']:,} parameters"] if report.baseline else []
    facts += [f"kept {text}" for text in describe_kept(report.kept)]
    facts = [line for fact in facts for line in textwrap.wrap(fact, 105)]
    head, foot = 0.5 + 0.2 * len(facts), 0.65 + 0.2 * len(verdict)
    body = sum(0.42 + 0.3 * len(_bars(phase)) for phase in phases)
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
    _draw(axes, phases, bool(compared))
    return figure


def _bars(phase: Phase) -> list[tuple[str, float, float | None, str]]:
    """`(measure, model, baseline, text)` of everything that was measured in a phase."""
    bars = []
    for name, (field, _, scale, unit) in _MEASURES.items():
        value, reference = getattr(phase.model, field), phase.baseline and getattr(phase.baseline, field)
        if value is None or (phase.baseline is not None and not reference):
            continue
        if name == "peak" and "cpu" in phase.clocks and max(value, reference or 0) < _ROUGH:
            continue
        figures = " \u2192 ".join(_figure(number, scale) for number in (reference, value) if number is not None)
        bars.append((name, value, reference, f"{figures} {unit.format(phase.unit)}"))
    return bars


def _figure(number: float, scale: float | None) -> str:
    if scale is None:
        return with_prefix(number)
    return f"{number * scale:,.0f}" if number * scale >= 1000 else f"{number * scale:.3g}"


def _draw(axes: "Axes", phases: Sequence[Phase], compared: bool) -> None:
    """Draw shares of the baseline, or milliseconds where there is none; bars end at twice the baseline."""
    top, longest, ticks = 0.0, 1.0 if compared else 0.0, {}
    for phase in phases:
        style = {"fontsize": 9.5, "fontweight": "bold", "color": _DARK, "parse_math": False}
        axes.annotate(phase.name, (0, top - 0.25), (5, 0), textcoords="offset points", **style)
        top += 0.35
        for name, value, reference, text in _bars(phase):
            ratio = phase.speedup(_CLOCKS[name]) if compared and name in _CLOCKS else None
            length = 1e3 * value if name in _CLOCKS else 0.0
            if compared:
                share = value / reference if ratio is None else 1 / ratio.median
                length, text = min(share, _MOST), f"{share:.2f}   {text}"
            axes.barh(top, length, height=0.72, color=_MEASURES[name][1])
            longest = max(longest, length)
            if ratio is not None and phase.judged:
                ends = [min(1 / ratio.high, _MOST), min(1 / ratio.low, _MOST)]
                axes.plot(ends, [top, top], "-|", color=_DARK, linewidth=1.1, markersize=5)
                longest = max(longest, ends[1])
            axes.text(1.02, top, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
            ticks[top] = name
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
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_color(_LIGHT)


def check_ending(file: str | os.PathLike) -> Path:
    """Refuse a picture file of a kind that is not written here with a `ValueError`."""
    target = Path(file)
    if target.suffix.lower() not in ENDINGS:
        raise ValueError(f"The picture must end in {', '.join(ENDINGS)}, got {target.name!r}.")
    return target


def save_figure(figure: "Figure", file: str | os.PathLike) -> Path:
    """Write a figure so that its file, named as [`check_ending`] wants it, appears whole or not at all."""
    target = check_ending(file)
    with whole_file(target) as unfinished:
        figure.savefig(unfinished)
    return target
