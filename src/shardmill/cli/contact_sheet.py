"""One picture of many: stored pictures, each beside what a transform drew from it.

Pillow draws it alone, so that the demo needs no plotting library.
"""

import io
import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from shardmill.notebook import IMAGENET_DEVIATION, IMAGENET_MEAN

CELL = 160  # pixels; every picture is fitted into a square of it
GAP = 8  # between pictures
ROW = CELL + 46 + GAP  # with two lines of caption
MARGIN = 28
TITLE = 40  # height of the first line
LINE = 28  # of those below it
BETWEEN_BLOCKS = 40
ONE_BLOCK = 3  # rows; more of them stand in two blocks side by side
FRAME = 4  # width of the line around a draw
SMALLEST_FONT = 14

PAPER = (255, 255, 255)
INK = (28, 32, 36)
PALE_INK = (96, 104, 112)
MAT = (240, 242, 244)  # behind a stored picture that is no square
COLOURS = ((230, 97, 1), (0, 122, 204), (20, 150, 70))
"""Of draws, by their number."""

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels


@dataclass(frozen=True, slots=True)
class Draw:
    """What a transform made of a picture."""

    npy: bytes
    """Float32, shape (height, width, 3), normalised with ImageNet's mean and deviation."""
    crop: bytes
    """JSON: `box` in the stored picture (left, top, right, bottom; pixels) and `mirrored`."""


@dataclass(frozen=True, slots=True)
class Row:
    """A stored picture and the draws from it."""

    name: str
    stored: bytes
    """An encoded picture."""
    draws: Sequence[Draw]


def draw_sheet(rows: Sequence[Row], *, title: str, lines: Sequence[str], headings: Sequence[str]) -> PIL.Image.Image:
    """Draw the contact sheet.

    Args:
        rows: At least one; all with as many draws.
        title: First line.
        lines: Below it, smaller.
        headings: Of the columns: the stored picture, then each draw.
    """
    middle = len(rows) if len(rows) <= ONE_BLOCK else math.ceil(len(rows) / 2)
    blocks = [block for block in (rows[:middle], rows[middle:]) if block]
    block_width = len(headings) * (CELL + GAP) - GAP
    width = 2 * MARGIN + len(blocks) * (block_width + BETWEEN_BLOCKS) - BETWEEN_BLOCKS
    top = MARGIN + TITLE + len(lines) * LINE + GAP
    height = top + LINE + max(map(len, blocks)) * ROW - GAP + MARGIN
    sheet = PIL.Image.new("RGB", (width, height), PAPER)
    pen = PIL.ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN - 8), title, 34, INK, width - 2 * MARGIN)
    for number, line in enumerate(lines):
        _write(pen, (MARGIN, MARGIN + TITLE + number * LINE), line, 19, PALE_INK, width - 2 * MARGIN)
    for number, block in enumerate(blocks):
        left = MARGIN + number * (block_width + BETWEEN_BLOCKS)
        for column, heading in enumerate(headings):
            colour = INK if column == 0 else _colour(column - 1)
            _write(pen, (left + column * (CELL + GAP), top), heading, 19, colour, CELL)
        for position, row in enumerate(block):
            _draw_row(sheet, row, left, top + LINE + position * ROW)
    return sheet


def save_sheet(sheet: PIL.Image.Image, path: Path) -> None:
    """Write it as a PNG, replacing an older one at once."""
    partial = path.with_name(f".{path.name}.part")
    sheet.save(partial, "PNG", optimize=True)
    partial.replace(path)


def _draw_row(sheet: PIL.Image.Image, row: Row, left: int, top: int) -> None:
    pen = PIL.ImageDraw.Draw(sheet)
    stored = PIL.Image.open(io.BytesIO(row.stored))
    boxes = _draw_stored(sheet, stored, left, top)
    size = f"{stored.width}x{stored.height}, {math.ceil(len(row.stored) / 1024)} KiB"
    _write_caption(pen, left, top, row.name, size)
    for number, draw in enumerate(row.draws):
        crop = json.loads(draw.crop)
        place = left + (number + 1) * (CELL + GAP)
        sheet.paste(_denormalised(draw.npy).resize((CELL, CELL), PIL.Image.Resampling.LANCZOS), (place, top))
        pen.rectangle((place, top, place + CELL - 1, top + CELL - 1), outline=_colour(number), width=FRAME)
        pen.rectangle(boxes(crop["box"]), outline=_colour(number), width=FRAME - 1)
        part = _area(crop["box"]) / (stored.width * stored.height)
        _write_caption(pen, place, top, f"{part:.0%} of it", "mirrored" if crop["mirrored"] else "")


def _draw_stored(sheet: PIL.Image.Image, stored: PIL.Image.Image, left: int, top: int) -> Callable[[Box], Box]:
    """Fit the stored picture into its cell; returns where a box of it lies on the sheet."""
    scale = CELL / max(stored.size)
    width, height = (max(1, round(side * scale)) for side in stored.size)
    corner = (left + (CELL - width) // 2, top + (CELL - height) // 2)
    PIL.ImageDraw.Draw(sheet).rectangle((left, top, left + CELL - 1, top + CELL - 1), MAT)
    sheet.paste(stored.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS), corner)

    def place(box: Box) -> Box:
        x0, y0, x1, y1 = (round(corner[axis % 2] + side * scale) for axis, side in enumerate(box))
        return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)

    return place


def _denormalised(npy: bytes) -> PIL.Image.Image:
    pixels = np.load(io.BytesIO(npy), allow_pickle=False)
    restored = pixels * np.array(IMAGENET_DEVIATION, np.float32) + np.array(IMAGENET_MEAN, np.float32)
    return PIL.Image.fromarray((restored.clip(0, 1) * 255).round().astype(np.uint8))


def _area(box: Box) -> int:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _colour(number: int) -> Colour:
    return COLOURS[number % len(COLOURS)]


def _write_caption(pen: PIL.ImageDraw.ImageDraw, left: int, top: int, first: str, second: str) -> None:
    _write(pen, (left, top + CELL + 2), first, 17, INK, CELL)
    _write(pen, (left, top + CELL + 22), second, 17, PALE_INK, CELL)


def _write(
    pen: PIL.ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: Colour, width: int
) -> None:
    """One line of text: made smaller, then cut, to fit into a width in pixels."""
    text = _plain(text)
    while size > SMALLEST_FONT and PIL.ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    font = PIL.ImageFont.load_default(size)
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}...") > width:
            text = text[:-1]
        text = f"{text}..."
    pen.text(place, text, colour, font)


def _plain(text: str) -> str:
    """Pillow's own font has ASCII only: other letters without their marks, else a question mark."""
    letters = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return letters.encode("ascii", "replace").decode()
