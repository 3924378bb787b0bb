"""What a pruning removed, as a table and as a picture."""

import os
import uuid
from pathlib import Path
from typing import Any


def format_widths(report: dict[str, Any]) -> str:
    """Filters of every layer before and after, with the totals, as plain text.

    Args:
        report (`dict`): `KDFSPruner.report`, or the content of `kdfs_report.json`.

    Returns:
        `str`: A table with one line per layer.
    """
    rows = [("layer", "filters before", "after", "kept")]
    for layer in report["layers"]:
        share = layer["after"] / layer["before"]
        rows.append((layer["name"], str(layer["before"]), str(layer["after"]), f"{share:.0%}"))
    for name, title in (("flops", "multiply-adds"), ("parameters", "parameters")):
        before, after = report[name]["before"], report[name]["after"]
        rows.append((title, f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(row))
        for row in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    latency = report["latency_seconds_batch_1"]
    lines.append(
        f"latency, batch 1, {latency['threads']} thread(s): {1e3 * latency['before']:.2f} ms before, "
        f"{1e3 * latency['after']:.2f} ms after ({report['verdict']})"
    )
    return "\n".join(lines)


def shorten_names(names: list[str]) -> list[str]:
    """Leave out the parts, between dots, with which all names begin and end.

    Args:
        names (`list[str]`): Names of layers.

    Returns:
        `list[str]`: As many, still different from each other; of a single name nothing is left out.
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    for end in (0, -1):
        while min(len(part) for part in parts) > 1 and len({part[end] for part in parts}) == 1:
            parts = [part[1:] if end == 0 else part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def plot_widths(report: dict[str, Any], file: str | os.PathLike) -> Path:
    """Draw the filters of every layer, kept ones in colour, as a PNG.

    Args:
        report (`dict`): `KDFSPruner.report`, or the content of `kdfs_report.json`.
        file (`str` or `os.PathLike`): The picture; it appears whole or not at all.

    Returns:
        `Path`: `file`.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib; install `hf-efficient[kdfs]`.") from error
    layers = report["layers"]
    figure = Figure(figsize=(min(16, 3 + 0.3 * len(layers)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = range(len(layers))
    axes.bar(positions, [layer["before"] for layer in layers], color="#d5d8dc", label="before")
    axes.bar(positions, [layer["after"] for layer in layers], color="#2471a3", label="after")
    axes.set_ylabel("filters")
    size = 8 if len(layers) <= 60 else 5
    names = shorten_names([layer["name"] for layer in layers])
    axes.set_xticks(list(positions), names, rotation=90, fontsize=size)
    axes.set_title(f"{report['flops']['reduction']:.1%} of the multiply-adds removed")
    axes.legend()
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{uuid.uuid4().hex}.png")
    figure.savefig(unfinished, dpi=120)
    os.replace(unfinished, target)
    return target
