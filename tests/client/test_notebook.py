"""Pictures for notebooks: what is drawn, without any display."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from shardmill.client.shards import StreamedSample, describe_sample
from shardmill.core.errors import BadRequest
from shardmill.notebook import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    display_loader_images,
    displayable,
    draw_before_after,
    picture_of,
)

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture
def pixels() -> Array:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def encoded(pixels: Array) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def saved(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def images_of(figure: Any) -> list[Array]:
    """What the axes of a figure show."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.get_images()]


def test_normalised_pixels_are_turned_back(pixels: Array) -> None:
    plain = pixels.astype(np.float32) / 255
    normalised = (plain - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_DEVIATION, np.float32)
    np.testing.assert_allclose(displayable(normalised), plain, atol=1e-5)


def test_pixels_that_can_be_drawn_stay_as_they_are(pixels: Array) -> None:
    assert displayable(pixels) is pixels
    plain = pixels.astype(np.float32) / 255
    np.testing.assert_array_equal(displayable(plain), plain)
    np.testing.assert_allclose(displayable(pixels.astype(np.float32)), plain)


def test_any_other_numbers_are_stretched() -> None:
    stretched = displayable(np.array([[-500.0, 0.0], [250.0, 500.0]]))
    assert (stretched.min(), stretched.max()) == (0, 1)
    assert displayable(np.full((2, 2), -7.0)).max() == 0


def test_a_sample_gives_its_picture_in_either_layout(pixels: Array) -> None:
    np.testing.assert_array_equal(picture_of(StreamedSample("k", {"cls": b"3", "png": encoded(pixels)})), pixels)
    np.testing.assert_array_equal(picture_of(StreamedSample("k", {"npy": saved(pixels)})), pixels)
    np.testing.assert_array_equal(picture_of(StreamedSample("k", {"npy": saved(pixels.transpose(2, 0, 1))})), pixels)
    assert picture_of(StreamedSample("k", {"cls": b"3"})) is None


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_loader_shows_the_first_pictures_of_its_first_batch(pixels: Array, layout: str) -> None:
    batch = np.stack([pixels, pixels[::-1], pixels[:, ::-1]])
    images = batch if layout == "NHWC" else batch.transpose(0, 3, 1, 2)
    figure = display_loader_images([(images, np.array([5, 6, 7]))], objects=2)
    shown = images_of(figure)
    assert len(shown) == 2
    np.testing.assert_array_equal(shown[1], batch[1])
    assert [axes.get_title() for axes in figure.axes] == ["5", "6"]


def test_before_and_after_stand_side_by_side(pixels: Array, tmp_path: Path) -> None:
    before = [StreamedSample("a", {"png": encoded(pixels)}), StreamedSample("b", {"png": encoded(pixels)})]
    after = [StreamedSample("a", {"npy": saved(pixels[:16])})]
    figure = draw_before_after(before, after)
    assert [axes.get_title() for axes in figure.axes] == ["a", "transformed", "b", "transformed: no picture"]
    assert [image.shape for image in images_of(figure)] == [(32, 48, 3), (16, 48, 3), (32, 48, 3)]
    figure.savefig(tmp_path / "sheet.png")
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 100
    with pytest.raises(BadRequest, match="pictures"):
        draw_before_after([StreamedSample("a", {"cls": b"1"})], [])


def test_a_sample_is_described_field_by_field(pixels: Array) -> None:
    sample = StreamedSample(
        "0001", {"npy": saved(pixels), "cls": b"7", "png": encoded(pixels), "bin": bytes(range(256))}
    )
    key, npy, cls, png, binary = describe_sample(sample)
    assert key == "0001"
    assert npy.endswith("32x48x3 uint8")
    assert cls.endswith("1  7")
    assert png.endswith("48x32 RGB")
    assert binary.endswith("256")
