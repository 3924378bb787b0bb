"""Pictures of what a sparse LLaVA kept: patches of an image, words of its answer."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .cache_dynamic_llava import SparsityRecord


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

VEIL, VEIL_SHARE = (0.27, 0.29, 0.34), 0.72  # what dropped patches are blended with
OUTLINE, KEPT, DROPPED, OPEN = "#ff8c00", "#111111", "#a8adb5", "#3f6fb5"
SIDE, TEXT_WIDTH, MARGIN, HEAD = 4.4, 4.8, 0.25, 0.45  # inches
FONT, LINE = 12, 1.75  # points, and line height in font sizes


def plot_kept_tokens(
    image: Image.Image | np.ndarray,
    sparsity: SparsityRecord,
    answer_tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    number: int = 0,
    grid: tuple[int, int] | None = None,
    fit: str = "crop",
    title: str | None = None,
) -> "Figure":
    """Draw the kept patches over an image and, beside it, the kept and dropped words of the answer.

    Dropped patches are dimmed, dropped words are grey. Words that were never judged are blue: the last one of a
    `generate` is not fed back.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)`): The picture that was asked about.
        sparsity ([`SparsityRecord`]): `model.last_sparsity` or `outputs.sparsity`.
        answer_tokens (`Sequence[str]`, *optional*): Texts of the generated tokens, in order, for example
            `tokenizer.convert_ids_to_tokens(ids)`. None draws the image alone.
        row (`int`, defaults to 0): Row of the batch.
        number (`int`, defaults to 0): Which image of the row.
        grid (`tuple[int, int]`, *optional*): Rows and columns of patches; None takes a square. An image of one token
            more than a given grid has a class token first, which is not drawn.
        fit (`str`, defaults to `"crop"`): How the processor brings the picture to the shape of the grid: `"crop"` cuts
            out its centre, `"pad"` adds borders, `"stretch"` changes its proportions.
        title (`str`, *optional*): Text above the picture, such as the question.

    Returns:
        `matplotlib.figure.Figure`: Not known to pyplot; `figure.savefig(path)` writes it, a notebook shows it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the row has no such image, its tokens form no square and no `grid` is given, or there are more
            answer tokens than the record can have judged.

    Example:
    ```python
    >>> ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    >>> figure = plot_kept_tokens(image, model.last_sparsity, processor.tokenizer.convert_ids_to_tokens(ids))
    >>> figure.savefig("kept_tokens.png")
    ```
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_kept_tokens needs matplotlib; run pip install "hf-efficient[quickstart]".') from error
    mask = _find_mask(sparsity, row, number, grid)
    picture = _fit_picture(image, mask.shape, fit)
    decisions = _find_decisions(sparsity, row, answer_tokens)

    figure = Figure(dpi=120, facecolor="white")
    FigureCanvasAgg(figure)  # measures words
    head = HEAD + (0.3 if title else 0.0)
    height = SIDE * min(1.0, mask.shape[0] / mask.shape[1])
    width = SIDE * min(1.0, mask.shape[1] / mask.shape[0])
    words, lines = [], 0
    if answer_tokens is not None:
        words, lines = _flow_words(figure, answer_tokens, decisions, width)
    body = max(height, lines * FONT * LINE / 72)
    total_width = width + 2 * MARGIN + (TEXT_WIDTH + MARGIN if words else 0.0)
    total_height = body + head + MARGIN
    figure.set_size_inches(total_width, total_height)

    def place(x: float, y: float, text: str, **style: Any) -> "Text":
        """Write at `x` inches from the left and `y` from the top."""
        return figure.text(
            x / total_width, 1 - y / total_height, text, va="baseline", parse_math=False, **{"fontsize": 11, **style}
        )

    if title:
        place(MARGIN, 0.35, title, fontsize=12, fontweight="bold", color=KEPT)
    place(MARGIN, head - 0.12, f"{int(mask.sum())} of {mask.size} image tokens kept", color="#444444")
    left, bottom = MARGIN / total_width, 1 - (head + height) / total_height
    axes = figure.add_axes((left, bottom, width / total_width, height / total_height))
    _draw_patches(axes, picture, mask)
    if words:
        start = width + 2 * MARGIN
        summary = f"{sum(decisions)} of {len(decisions)} answer tokens kept, grey ones dropped"
        summary += ", blue not judged" if len(answer_tokens) > len(decisions) else ""
        place(start, head - 0.12, summary, color="#444444")
        for x, line, text, color in words:
            place(start + x, head + (line + 0.7) * FONT * LINE / 72, text, fontsize=FONT, color=color)
    return figure


# ------------------------------------------------------------------------------------------------------- the patches


def _find_mask(sparsity: SparsityRecord, row: int, number: int, grid: tuple[int, int] | None) -> np.ndarray:
    """Kept patches of one image, `(rows, columns)` booleans."""
    if not hasattr(sparsity, "image_index"):
        raise ValueError(
            f"`sparsity` must be a SparsityRecord, got {type(sparsity).__name__}: pass `model.last_sparsity` after a "
            "forward pass or `generate` with sparsity on."
        )
    rows = len(sparsity.image_index)
    if not 0 <= row < rows:
        raise ValueError(f"`row` must be in [0, {rows}), got {row}: choose a row of the batch.")
    images = len(sparsity.image_index[row])
    if not 0 <= number < images:
        raise ValueError(f"`number` must be in [0, {images}), got {number}: row {row} has {images} images.")
    tokens = sparsity.image_sizes[row][number]
    side = math.isqrt(tokens)
    shape = (side, side) if grid is None else tuple(grid)
    extra = tokens - shape[0] * shape[1]
    if grid is None and extra:
        raise ValueError(
            f"`grid` must be given for an image of {tokens} tokens, which form no square, got None: pass (rows, "
            "columns)."
        )
    if extra not in (0, 1):
        raise ValueError(
            f"`grid` must have as many cells as the image has tokens ({tokens}, or one less with a class token), got "
            f"{shape[0]} x {shape[1]}: pass the (rows, columns) of the vision tower."
        )
    kept = np.zeros(tokens, dtype=bool)
    kept[sparsity.image_index[row][number].cpu().numpy()] = True
    return kept[extra:].reshape(shape)


def _fit_picture(image: Image.Image | np.ndarray, shape: tuple[int, int], fit: str) -> np.ndarray:
    """Picture in the proportions of the grid, `(height, width, 3)` in [0, 1]."""
    if fit not in ("crop", "pad", "stretch"):
        raise ValueError(f"`fit` must be 'crop', 'pad' or 'stretch', got {fit!r}.")
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image = image.convert("RGB")
    width, height = image.size
    unit = (min if fit == "crop" else max)(width / shape[1], height / shape[0])
    if fit != "stretch":
        target = max(round(unit * shape[1]), 1), max(round(unit * shape[0]), 1)
        left, top = (width - target[0]) // 2, (height - target[1]) // 2
        canvas = Image.new("RGB", target, (122, 116, 104))  # the mean colour by which LLaVA pads
        canvas.paste(image, (-left, -top))
        image = canvas
    return np.asarray(image, dtype=np.float32) / 255


def _draw_patches(axes: Any, picture: np.ndarray, mask: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    rows, columns = mask.shape
    extent = (0, columns, rows, 0)
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased")
    veil = np.zeros((rows, columns, 4), dtype=np.float32)
    veil[..., :3], veil[..., 3] = VEIL, np.where(mask, 0.0, VEIL_SHARE)
    axes.imshow(veil, extent=extent, aspect="auto", interpolation="nearest")
    line_width = 1.8 if max(mask.shape) <= 12 else 1.1
    axes.add_collection(LineCollection(_outline(mask), colors=OUTLINE, linewidths=line_width, capstyle="projecting"))
    axes.set_xlim(-0.03 * columns / 8, columns * (1 + 0.03 / 8))
    axes.set_ylim(rows * (1 + 0.03 / 8), -0.03 * rows / 8)
    axes.set_axis_off()


def _outline(mask: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Segments, as pairs of (x, y), between kept patches and everything else."""
    padded = np.pad(mask, 1)
    segments = []
    for y, x in zip(*np.nonzero(padded[1:] != padded[:-1])):  # edges below row y of the padded mask
        segments.append(((int(x) - 1, int(y)), (int(x), int(y))))
    for y, x in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1])):
        segments.append(((int(x), int(y) - 1), (int(x), int(y))))
    return segments


# --------------------------------------------------------------------------------------------------------- the words


def _find_decisions(sparsity: SparsityRecord, row: int, tokens: Sequence[str] | None) -> list[bool]:
    """Decisions on the answer tokens that were fed back."""
    if tokens is None:
        return []
    decisions = sparsity.text_keep[row].tolist()
    if len(tokens) > len(decisions) + 1:
        raise ValueError(
            f"`answer_tokens` must hold at most {len(decisions) + 1} tokens, one more than were fed back, got "
            f"{len(tokens)}: pass the generated tokens without the prompt."
        )
    return decisions[: len(tokens)]


def _split_tokens(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Readable text of every token, and whether a space stands before it."""
    marked = any(token.startswith(("\u2581", "\u0120", " ")) for token in tokens)
    words = []
    for token in tokens:
        text = token.replace("\u0120", "\u2581").replace(" ", "\u2581")
        spaced = text.startswith("\u2581") or not marked
        for code, sign in (("<0x0A>", "\u21b5"), ("\n", "\u21b5"), ("\u010a", "\u21b5")):
            text = text.replace(code, sign)
        words.append((text.replace("\u2581", " ").strip(), spaced))
    return words


def _flow_words(
    figure: "Figure", tokens: Sequence[str], decisions: list[bool], width: float
) -> tuple[list[tuple[float, int, str, str]], int]:
    """Break the answer into lines: `(x in inches, line, text, colour)` of each token, and the number of lines."""
    renderer = figure.canvas.get_renderer()
    probe = figure.text(0, 0, "", fontsize=FONT, parse_math=False)

    def measure(text: str) -> float:
        probe.set_text(text)
        return probe.get_window_extent(renderer).width / figure.dpi

    space = measure("a b") - measure("ab")
    placed, x, line = [], 0.0, 0
    for number, (text, spaced) in enumerate(_split_tokens(tokens)):
        length = measure(text) if text else 0.0
        x += space if spaced and x else 0.0
        if x + length > TEXT_WIDTH and x:
            x, line = 0.0, line + 1
        color = OPEN if number >= len(decisions) else KEPT if decisions[number] else DROPPED
        if text:
            placed.append((x, line, text, color))
        x += length
    probe.remove()
    return placed, line + 1


__all__ = ["plot_kept_tokens"]
