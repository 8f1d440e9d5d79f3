"""The contact sheet: what is stored left, its draws beside it, each where and how it says."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from shardmill.cli.contact_sheet import CELL, COLOURS, INK, PAPER, Draw, Row, draw_sheet
from shardmill.notebook import IMAGENET_DEVIATION, IMAGENET_MEAN

HEADINGS = ("stored", "epoch 1", "epoch 2")


def encoded(picture: PIL.Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def normalised(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    pixels = np.full((224, 224, 3), colour, np.float32) / 255
    np.save(stream, ((pixels - IMAGENET_MEAN) / IMAGENET_DEVIATION).astype(np.float32))
    return stream.getvalue()


def row(colour: tuple[int, int, int], name: str = "red") -> Row:
    stored = PIL.Image.new("RGB", (400, 200), colour)
    draws = [
        Draw(normalised(colour), json.dumps({"box": [100, 0, 300, 200], "mirrored": number == 1}).encode())
        for number in range(2)
    ]
    return Row(name, encoded(stored), draws)


def area_of(sheet: PIL.Image.Image, colour: tuple[int, int, int]) -> int:
    """Pixels of nearly that colour."""
    return int((np.abs(np.asarray(sheet, np.int16) - colour).max(axis=2) <= 2).sum())


def test_a_row_has_the_stored_picture_in_its_shape_and_the_draws_with_their_frames() -> None:
    red = (200, 10, 20)
    sheet = draw_sheet([row(red)], title="t", lines=["l"], headings=HEADINGS)
    pixels = np.asarray(sheet)

    # Half a cell's area, since it is twice as wide as high, and two whole cells; less frames and outlines.
    assert 0.85 * 2.5 * CELL**2 < area_of(sheet, red) < 2.5 * CELL**2
    for colour in COLOURS[:2]:
        assert area_of(sheet, colour) > 4 * 3 * CELL
    assert area_of(sheet, COLOURS[2]) == 0
    assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == PAPER
    assert area_of(sheet, INK) > 50


def test_many_rows_stand_in_two_blocks_side_by_side() -> None:
    blue = (20, 10, 200)
    few, more, most = (draw_sheet([row(blue)] * count, title="t", lines=[], headings=HEADINGS) for count in (3, 6, 7))
    assert few.height == more.height < most.height
    assert 1.9 * few.width < more.width == most.width
    assert area_of(few, blue) * 7 == area_of(most, blue) * 3


@pytest.mark.parametrize("name", ["", "dögs", "猫", "n" * 500, "two words"])
def test_any_class_name_stays_within_its_cell(name: str) -> None:
    plain = np.asarray(draw_sheet([row((0, 200, 0), "")], title="t", lines=[], headings=HEADINGS))
    named = np.asarray(draw_sheet([row((0, 200, 0), name)], title="t", lines=[], headings=HEADINGS))
    columns = np.flatnonzero((plain != named).any(axis=(0, 2)))
    assert bool(len(columns)) == bool(name)
    assert np.ptp(columns) <= CELL if name else True


def test_a_long_title_does_not_run_off_the_sheet() -> None:
    sheet = np.asarray(draw_sheet([row((9, 9, 9))], title="word " * 100, lines=["x" * 1000], headings=HEADINGS))
    assert (sheet[:, -20:] == PAPER).all()
