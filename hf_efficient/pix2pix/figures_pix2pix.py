"""Pictures in files, and sample sheets: rows of pictures under column titles, drawn with Pillow alone."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a damaged file
_MARGIN, _TITLE = 4, 18  # pixels between pictures and for a line of text


def sample_sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, row_titles: Sequence[str] | None = None
) -> Image.Image:
    """Arrange pictures in a grid.

    Args:
        rows (`list[list[PIL.Image.Image]]`): Pictures, one list for each row, fitted into the size of the first.
        titles (`list[str]`): Title of each column.
        row_titles (`list[str]`, *optional*): A line of text under each row.

    Returns:
        `PIL.Image.Image`: The sheet, RGB on white.

    Raises:
        ValueError: If there is no row, or a row has another number of pictures than there are titles.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one row of pictures, got none.")
    for number, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"Row {number} must hold one picture for each of {len(titles)} titles, got {len(row)}.")
    width, height = rows[0][0].size
    line = _TITLE if row_titles else 0
    sheet_width = len(titles) * (width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, _TITLE + len(rows) * (height + line + _MARGIN) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * (width + _MARGIN), 2), _fit(draw, font, title, width), "black", font)
    for number, row in enumerate(rows):
        top = _TITLE + _MARGIN + number * (height + line + _MARGIN)
        for column, picture in enumerate(row):
            picture = picture.convert("RGB")
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (_MARGIN + column * (width + _MARGIN), top))
        if row_titles:
            draw.text((_MARGIN, top + height + 1), _fit(draw, font, row_titles[number], sheet_width), "black", font)
    return sheet


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Read a picture as it is seen.

    Args:
        path (`str` or `os.PathLike`): Its file.

    Returns:
        `PIL.Image.Image`: Upright, of the file's mode.

    Raises:
        ValueError: If the file cannot be read as a picture; the sentence names it.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except UNREADABLE as error:
        raise ValueError(f"{path} is {say_unreadable(error)}") from error


def say_unreadable(error: Exception) -> str:
    """Say what a picture is that cannot be read.

    Args:
        error (`Exception`): One of `UNREADABLE`, raised by Pillow.

    Returns:
        `str`: Words that go on a sentence, such as "no readable picture: image file is truncated".
    """
    if isinstance(error, UnidentifiedImageError):
        return "no picture"
    return f"no readable picture: {getattr(error, 'strerror', None) or error}"


def refuse_unreadable(where: str, error: Exception, then: str = "") -> ValueError:
    """Build the error for an image of a data set that cannot be read.

    Args:
        where (`str`): Its row, and what else tells where it stands.
        error (`Exception`): One of `UNREADABLE`; the words of a `ValueError` or of a missing file stay.
        then (`str`, *optional*): What to do after the image is replaced.

    Returns:
        `ValueError`: One sentence with what to do.
    """
    named = isinstance(error, ValueError) or getattr(error, "filename", None)
    what = f"{where}: {str(error).rstrip('.')}" if named else f"{where} holds {say_unreadable(error)}"
    return ValueError(f"{what}; replace it or take it out of the data{then}.")


def save_picture(picture: Image.Image, path: str | os.PathLike) -> Path:
    """Write a picture that is there whole or not at all.

    Args:
        picture (`PIL.Image.Image`): The picture.
        path (`str` or `os.PathLike`): File to write; its ending names the format.

    Returns:
        `pathlib.Path`: The file.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, picture.save)


def write_whole(path: str | os.PathLike, write: Callable[[str], Any]) -> Path:
    """Write a file that is there whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file.
        write (`Callable`): Writes its content to the path that it is called with, which ends like `path`.

    Returns:
        `pathlib.Path`: The file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=".saving-", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def to_picture(pixels: np.ndarray) -> Image.Image:
    """Turn network values into a picture.

    Args:
        pixels (`np.ndarray` of shape `(1 or 3, height, width)`): Values in `[-1, 1]`; others are clipped.

    Returns:
        `PIL.Image.Image`: Grey or RGB.
    """
    values = ((np.asarray(pixels, np.float32) + 1) * 127.5).clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))


def _fit(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, text: str, width: int) -> str:
    """Cut a text to the width of its column."""
    while text and draw.textlength(text, font) > width:
        text = text[:-1]
    return text
