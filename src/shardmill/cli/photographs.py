"""Shards of real photographs for the demo: crops of those that scikit-image brings, or the user's own pictures.

What is packed is a function of the pictures alone: another run writes the same bytes.
"""

import importlib.util
import io
import itertools
import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from shardmill.cli.output import say
from shardmill.client.shards import PICTURES
from shardmill.core.errors import BadRequest
from shardmill.shards import ShardWriter

PHOTOGRAPHS = {
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "cameraman": "camera.png",
    "astronaut": "astronaut.png",
    "rocket": "rocket.jpg",
    "retina": "retina.jpg",
    "coins": "coins.png",
    "tissue": "ihc.png",
    "galaxies": "hubble_deep_field.jpg",
    "bricks": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
}
"""Class → file in scikit-image's wheel. All of them are in the public domain, CC0 or without known restrictions."""

CROPS = 40  # of each photograph
SIDES = (96, 560)  # pixels; the longer side of a crop, unless the photograph is smaller
LARGEST = 1024  # pixels; longer sides of the user's own pictures are scaled down to it
MAX_PICTURES = 480  # of the user's own
SAMPLES_PER_SHARD = 120
STEM = "photographs"
SHOWN_SKIPS = 5  # unreadable pictures that get a line each

# What Pillow raises for files that are not what their name says.
_BAD_PICTURE = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Picture:
    """One sample to be."""

    jpeg: bytes
    size: tuple[int, int]
    label: int


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written."""

    directory: Path
    shards: list[str]
    pictures: int
    size: int
    """Bytes of all shards."""
    classes: list[str]
    """Names by label; a single empty one where there are none."""


def pack_photographs(directory: Path) -> Packed:
    """Cut crops of many sizes from scikit-image's photographs, one class each, and pack them into shards.

    Raises:
        ImportError: scikit-image is not installed.
    """
    files = _bundled_photographs()
    return _pack(_crops(list(files.values())), list(files), directory)


def pack_pictures(source: Path, directory: Path) -> Packed:
    """Pack the pictures below a directory into shards; the directories in it are the classes.

    Raises:
        BadRequest: There is no picture that can be read.
    """
    if not source.is_dir():
        raise BadRequest(f"--images {source}: no such directory")
    by_class = _files_by_class(source)
    found = sum(map(len, by_class.values()))
    if not found:
        raise BadRequest(f"--images {source}: no pictures in it or below ({', '.join(PICTURES)})")
    if found > MAX_PICTURES:
        say(f"{found} pictures in {source}, of which the demo takes {MAX_PICTURES}")
    packed = _pack(itertools.islice(_own_pictures(by_class), MAX_PICTURES), list(by_class), directory)
    if not packed.pictures:
        raise BadRequest(f"--images {source}: none of its {found} pictures can be read")
    return packed


def _bundled_photographs() -> dict[str, Path]:
    """Class → file, of those that the installed scikit-image has."""
    # Not imported: that takes a second, and its functions would download what is missing.
    spec = importlib.util.find_spec("skimage")
    folders = [Path(place) / "data" for place in (spec.submodule_search_locations if spec else None) or ()]
    files = {
        label: folder / name for label, name in PHOTOGRAPHS.items() for folder in folders if (folder / name).is_file()
    }
    if not files:
        raise ImportError(
            "the demo's photographs come with scikit-image: pip install 'shardmill[demo]'; "
            "or show it your own pictures: --images DIR"
        )
    return files


def _crops(photographs: Sequence[Path]) -> Iterator[Picture]:
    """Crops of all photographs in turns; the first of each shows most of it."""
    opened = []
    for path in photographs:
        with PIL.Image.open(path) as file:
            # Grey ones stay so, as they do in data sets.
            opened.append(file.convert("L" if file.mode == "L" else "RGB"))
    for number in range(CROPS):
        for label, photograph in enumerate(opened):
            yield _crop(photograph, label, number)


def _crop(photograph: PIL.Image.Image, label: int, number: int) -> Picture:
    numbers = random.Random(zlib.crc32(b"%d %d" % (label, number)))
    part = 0.88 if number == 0 else 0.35
    width, height = (round(side * numbers.uniform(part, 1)) for side in photograph.size)
    left, top = numbers.randint(0, photograph.width - width), numbers.randint(0, photograph.height - height)
    crop = photograph.crop((left, top, left + width, top + height))
    side = round(SIDES[0] * (SIDES[1] / SIDES[0]) ** (1 if number == 0 else numbers.random()))
    crop.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    return Picture(_jpeg(crop, quality=numbers.randint(75, 95)), crop.size, label)


def _files_by_class(source: Path) -> dict[str, list[Path]]:
    suffixes = {f".{name}" for name in PICTURES}
    found: dict[str, list[Path]] = {}
    for path in sorted(source.rglob("*")):
        below = path.relative_to(source)
        is_hidden = any(part.startswith(".") for part in below.parts)
        if path.suffix.lower() in suffixes and not is_hidden and path.is_file():
            found.setdefault(below.parts[0] if len(below.parts) > 1 else "", []).append(path)
    return dict(sorted(found.items()))


def _own_pictures(by_class: dict[str, list[Path]]) -> Iterator[Picture]:
    """Pictures of all classes in turns, without those that cannot be read."""
    skipped = 0
    for row in itertools.zip_longest(*by_class.values()):
        for label, path in enumerate(row):
            if path is None:
                continue
            try:
                yield _own_picture(path, label)
            except _BAD_PICTURE as error:
                skipped += 1
                if skipped <= SHOWN_SKIPS:
                    reason = "not a picture" if isinstance(error, PIL.UnidentifiedImageError) else error
                    say(f"skipped {path}: {reason}")
    if skipped > SHOWN_SKIPS:
        say(f"skipped {skipped - SHOWN_SKIPS} more that cannot be read")


def _own_picture(path: Path, label: int) -> Picture:
    """An upright JPEG of moderate size as it stands; anything else made one."""
    with warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as file:  # of huge pictures and odd palettes
        is_upright = file.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
        if file.format == "JPEG" and file.mode in ("RGB", "L") and is_upright and max(file.size) <= LARGEST:
            file.load()  # a broken one raises here
            return Picture(path.read_bytes(), file.size, label)
        file.draft("RGB", (LARGEST, LARGEST))
        picture = PIL.ImageOps.exif_transpose(file).convert("RGB")
    picture.thumbnail((LARGEST, LARGEST), PIL.Image.Resampling.LANCZOS)
    return Picture(_jpeg(picture, quality=90), picture.size, label)


def _jpeg(picture: PIL.Image.Image, *, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _pack(pictures: Iterable[Picture], classes: list[str], directory: Path) -> Packed:
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(f"{STEM}-*.tar"):
        old.unlink()
    names: list[str] = []
    count = size = 0
    remaining = iter(pictures)
    while batch := list(itertools.islice(remaining, SAMPLES_PER_SHARD)):
        names.append(f"{STEM}-{len(names):06d}.tar")
        with (directory / names[-1]).open("wb") as file, ShardWriter(file) as writer:
            for picture in batch:
                writer.write({"__key__": f"{count:06d}", "jpg": picture.jpeg, "cls": picture.label})
                count += 1
            writer.close()
            size += file.tell()
    return Packed(directory, names, count, size, classes)
