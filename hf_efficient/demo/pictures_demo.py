"""What the tabs of the demo share: reading what visitors upload, drawing patches, pieces of the page."""

import base64
import html
import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from hf_efficient.results import format_number


MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MIN_SIDE, MAX_SIDE = 8, 1024  # pixels; larger pictures are made smaller before anything else
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
DRAWN = 448  # side of a drawn square in pixels, about
VEIL, VEIL_SHARE, OUTLINE = (70, 74, 86), 0.78, (255, 140, 0)  # what dropped patches are blended with; kept ones' edge


def read_picture(path: str | None) -> Image.Image:
    """Read what a visitor uploaded.

    Args:
        path (`str`, *optional*): The file; None if nothing was uploaded.

    Returns:
        `PIL.Image.Image`: Upright, RGB on white, its longer side at most `MAX_SIDE` pixels.

    Raises:
        ValueError: If there is no file, it is no picture, broken, too small or too large; the message says which.
    """
    if not path:
        raise ValueError("There is no picture yet: upload one or choose an example below.")
    file = Path(path)
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file.name} has {size / 2**20:.0f} MB, at most {MAX_BYTES // 2**20} are read: shrink it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            picture = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(file.name, "far too many")) from error
    except Exception as error:  # Pillow's readers raise whatever a broken file brings about
        raise ValueError(f"{file.name} is not a picture that can be read: use PNG, JPEG or WebP.") from error
    if math.prod(picture.size) > MAX_PIXELS:
        raise ValueError(_too_large(file.name, f"{picture.width} x {picture.height}"))
    if min(picture.size) < MIN_SIDE:
        raise ValueError(
            f"{file.name} has {picture.width} x {picture.height} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed."
        )
    try:
        picture.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG: decode a smaller one at once
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits a pixel, grey
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        if picture.has_transparency_data:
            colours = picture.convert("RGBA")
            picture = Image.new("RGBA", colours.size, "white")
            picture.alpha_composite(colours)
        return picture.convert("RGB")
    except Exception as error:
        raise ValueError(f"{file.name} is broken, it ends early or was damaged: save or upload it again.") from error


def _too_large(name: str, pixels: str) -> str:
    return f"{name} has {pixels} pixels, at most {MAX_PIXELS // 10**6} million are read: shrink it."


def crop_square(picture: Image.Image, side: int) -> Image.Image:
    """Cut out the largest square in the middle and bring it to a size.

    Args:
        picture (`PIL.Image.Image`): Any picture.
        side (`int`): Pixels of the result's sides.

    Returns:
        `PIL.Image.Image`
    """
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def draw_patches(picture: Image.Image, mask: np.ndarray, *, grey: bool = False) -> Image.Image:
    """Draw which patches of a picture are kept: dropped ones dimmed, kept areas outlined.

    Args:
        picture (`PIL.Image.Image`): The picture; its middle is cut out in the proportions of the mask.
        mask (`np.ndarray` of shape `(rows, columns)`): True = kept.
        grey (`bool`, defaults to `False`): Whether the picture loses its colours, so that only the outline has one.

    Returns:
        `PIL.Image.Image`: RGB, the longer side about `DRAWN` pixels, every patch of the same whole number of pixels.
    """
    rows, columns = mask.shape
    cell = max(4, DRAWN // max(rows, columns))
    drawn = ImageOps.fit(picture.convert("RGB"), (columns * cell, rows * cell), Image.Resampling.BICUBIC)
    if grey:
        drawn = drawn.convert("L").convert("RGB")
    if mask.all():
        return drawn
    dimmed = Image.blend(drawn, Image.new("RGB", drawn.size, VEIL), VEIL_SHARE)
    kept = Image.fromarray(mask.astype(np.uint8) * 255).resize(drawn.size, Image.Resampling.NEAREST)
    drawn = Image.composite(drawn, dimmed, kept)
    pen = ImageDraw.Draw(drawn)
    padded = np.pad(mask, 1)
    for row, column in zip(*np.nonzero(mask)):
        left, top, right, bottom = column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1
        around = padded[row : row + 3, column : column + 3]
        edges = (
            (around[0, 1], (left, top, right, top + 1)),
            (around[2, 1], (left, bottom - 1, right, bottom)),
            (around[1, 0], (left, top, left + 1, bottom)),
            (around[1, 2], (right - 1, top, right, bottom)),
        )
        for neighbour_kept, box in edges:
            if not neighbour_kept:
                pen.rectangle(box, fill=OUTLINE)
    return drawn


# ------------------------------------------------------------------------------------------- pieces of the page


STYLE = """
.hfe { font-size: 1rem; line-height: 1.45; color: var(--body-text-color); }
.hfe h3 { font-size: 1.05rem; margin: 1.1rem 0 .4rem; }
.hfe p { margin: .4rem 0; max-width: 46rem; }
.hfe .soft, .hfe figcaption { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); font-size: .92rem; }
.hfe .note { border-left: 3px solid var(--color-accent); padding: .2rem 0 .2rem .7rem; }
.hfe .trouble { border: 1px solid var(--error-border-color); background: var(--error-background-fill);
  color: var(--error-text-color); border-radius: 6px; padding: .6rem .8rem; overflow-wrap: anywhere; }
.hfe .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); }
.hfe .cards > * { min-width: 0; }
.hfe figure { margin: 0; } .hfe figure img { width: 100%; max-width: 28rem; height: auto; border-radius: 4px; }
.hfe .answer { font-size: 1.08rem; margin: .3rem 0 .8rem; overflow-wrap: anywhere; }
.hfe .gone { opacity: .55; text-decoration: line-through; }
.hfe .scroll { overflow-x: auto; }
.hfe .scroll :is(table, thead, tbody, tr) { border: 0; }
.hfe .scroll table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; margin: .6rem 0; }
.hfe .scroll th, .hfe .scroll td { padding: .3rem .6rem; text-align: right; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
.hfe .scroll th { font-weight: 600; }
.hfe .scroll :is(th, td):first-child { text-align: left; padding-left: 0; }
.hfe .scroll :is(th, td):last-child { padding-right: 0; }
.hfe .scroll td.bar { width: 38%; min-width: 2.5rem; }
.hfe .guesses { display: flex; flex-wrap: wrap; gap: 1rem; } .hfe .guesses > * { flex: 1 1 15rem; min-width: 0; }
.hfe .guesses > :first-child { flex: 0 1 9rem; } .hfe .guesses h3 { margin-top: 0; }
.hfe .guesses :is(th, td) { padding: .3rem; }
@media (max-width: 480px) { .hfe .scroll table { font-size: .8rem; } .hfe .scroll :is(th, td) { padding: .3rem; } }
.hfe-shown img { width: 100% !important; height: 100% !important; object-fit: contain; }
.hfe .bar span { display: block; position: relative; height: .8rem; border-radius: 2px;
  background: var(--border-color-primary); }
.hfe .bar i { position: absolute; inset: 0 auto 0 0; border-radius: 2px; background: var(--color-accent); }
"""


def paragraph(text: str, kind: str = "") -> str:
    """Set a sentence.

    Args:
        text (`str`): Plain text; it is escaped.
        kind (`str`, defaults to `""`): `"note"`, `"soft"`, `"trouble"` or nothing.

    Returns:
        `str`: HTML.
    """
    role = ' role="alert"' if kind == "trouble" else ""
    return f'<p class="{kind}"{role}>{html.escape(text)}</p>'


def block(*parts: str) -> str:
    """Put pieces of the page into one.

    Args:
        *parts (`str`): HTML.

    Returns:
        `str`: HTML with the demo's style; nothing if all parts are empty.
    """
    inner = "\n".join(part for part in parts if part)
    return f'<div class="hfe">{inner}</div>' if inner else ""


def figure(picture: Image.Image, alt: str, caption: str) -> str:
    """Set a picture with a line below it.

    Args:
        picture (`PIL.Image.Image`): Embedded as PNG.
        alt (`str`): What can be seen, as plain text.
        caption (`str`): Plain text.

    Returns:
        `str`: HTML.
    """
    memory = io.BytesIO()
    picture.save(memory, format="PNG")
    data = base64.b64encode(memory.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def table(columns: list[str], rows: list[list[Any]], bars: dict[int, list[float]] | None = None) -> str:
    """Set a table; the first column is words, which may break after a point, the others are numbers.

    Args:
        columns (`list[str]`): Headings.
        rows (`list[list]`): Cells, escaped; floats with four significant digits.
        bars (`dict[int, list[float]]`, *optional*): Column -> share in `[0, 1]` of every row, drawn instead of its
            cell.

    Returns:
        `str`: HTML.
    """
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = []
    for number, row in enumerate(rows):
        cells = []
        for column, value in enumerate(row):
            if bars and column in bars:
                width = 100 * min(1.0, max(0.0, bars[column][number]))
                cells.append(f'<td class="bar"><span><i style="width:{width:.1f}%"></i></span></td>')
            else:
                cells.append(f"<td>{_escape_cell(format_number(value), column == 0)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def _escape_cell(text: str, breaks: bool) -> str:
    """Escape; names of modules get places where a narrow page may break them."""
    return re.sub(r"\.(?=\w)", ".<wbr>", html.escape(text)) if breaks else html.escape(text)
