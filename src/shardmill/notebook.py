"""Pictures of shards and loaders, for notebooks: each function returns the matplotlib figure it drew.

Nothing blocks and no display is needed; in a notebook the figure shows at the end of the cell.
"""

import importlib.util
import io
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shardmill.client.shards import PICTURES, StreamedSample, read_stream
from shardmill.core.errors import BadRequest
from shardmill.core.specs import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shardmill.client import Client

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
ARRAYS = ("npy",)
COLUMNS = 4  # pictures side by side
INCHES = 3.0  # of one picture

Array = Any  # numpy is imported where it is used: plain clients need not wait for it


def display_shard_images(
    client: "Client", bucket: str, tar_name: str, objects: int = 2, etl_name: str = ""
) -> "Figure":
    """Draw the first pictures of a shard, as it is or transformed.

    Args:
        client: The node.
        bucket: `provider://name`.
        tar_name: Key of the shard.
        objects: How many samples.
        etl_name: A transform: its name (newest version) or a uuid.
    """
    transform_id = _resolve(client, etl_name) if etl_name else None
    count = objects if transform_id is not None else None
    with client.bucket(bucket).object(tar_name).get(transform_id, count=count) as reader:
        samples = list(itertools.islice(read_stream(reader), objects))
    pictures = [(sample.key, picture) for sample in samples if (picture := picture_of(sample)) is not None]
    if not pictures:
        fields = sorted({name for sample in samples for name in sample.fields})
        raise BadRequest(f"{bucket}/{tar_name} has no pictures in its first samples, only {', '.join(fields)}")
    title = tar_name if transform_id is None else f"{tar_name} through {transform_id}"
    return _draw(pictures, title)


def display_loader_images(data_loader: Iterable[Any], objects: int = 2) -> "Figure":
    """Draw the first pictures of a loader's first batch.

    Args:
        data_loader: Gives batches whose first item (or the batch itself) holds pictures: a torch tensor or numpy array
            of shape (N, C, H, W) or (N, H, W, C).
        objects: How many pictures.
    """
    batch = next(iter(data_loader))
    images, labels = batch, None
    if isinstance(batch, tuple | list):
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    elif isinstance(batch, dict):
        images, labels = next(iter(batch.values())), None
    pictures = []
    for number, image in enumerate(itertools.islice(images, objects)):
        label = "" if labels is None else str(getattr(labels[number], "item", lambda n=number: labels[n])())
        pictures.append((label, displayable(_channels_last(_as_array(image)))))
    return _draw(pictures, "first batch")


def draw_before_after(before: Sequence[StreamedSample], after: Sequence[StreamedSample]) -> "Figure":
    """Draw samples side by side with what a transform made of them."""
    made = {sample.key: sample for sample in after}
    pictures = []
    for sample in before:
        for label, item in ((sample.key, sample), ("transformed", made.get(sample.key))):
            picture = picture_of(item) if item is not None else None
            pictures.append((label if picture is not None else f"{label}: no picture", picture))
    if all(picture is None for _, picture in pictures):
        raise BadRequest("neither the samples nor what the transform made of them hold pictures")
    return _draw(pictures, "")


def check_drawing() -> None:
    """Fail now rather than after the work whose outcome is to be drawn.

    Raises:
        ImportError: Names the extra that is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("drawing needs matplotlib: pip install 'shardmill[notebook]'")


def picture_of(sample: StreamedSample) -> Array | None:
    """The first picture of a sample as uint8 or float 0 … 1, shape (H, W, 3) or (H, W); None if there is none."""
    import numpy as np

    for name, payload in sample.fields.items():
        kind = name.rpartition(".")[2]
        if kind in ARRAYS:
            array = np.load(io.BytesIO(payload), allow_pickle=False)
            if array.ndim in (2, 3):
                return displayable(_channels_last(array))
        elif kind in PICTURES:
            return np.asarray(_open_picture(payload))
    return None


def displayable(image: Array) -> Array:
    """Pixels that can be drawn: uint8 as it is; numbers outside 0 … 1 are taken for normalised and turned back.

    Those that ImageNet's mean and deviation bring back into 0 … 1 are (x × deviation + mean); others are stretched.
    """
    import numpy as np

    if image.dtype == np.uint8:
        return image
    pixels = np.asarray(image, np.float32)
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    if low >= 0 and high <= 1:
        return pixels
    if low >= 0 and high <= 255 and high > 3:
        return pixels / 255
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        restored = pixels * np.array(IMAGENET_DEVIATION, np.float32) + np.array(IMAGENET_MEAN, np.float32)
        # Rounding of bicubic resizing overshoots a little.
        if restored.min() > -0.1 and restored.max() < 1.1:
            return np.clip(restored, 0, 1)
    return (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)


def _resolve(client: "Client", name: str) -> str:
    spec = Spec.parse(name)
    return name if spec.digest is not None else client.transforms.get(spec.name).transform.uuid


def _open_picture(payload: bytes) -> Any:  # a PIL image
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'shardmill[notebook]'") from error
    picture = PIL.Image.open(io.BytesIO(payload))
    return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")


def _as_array(image: Any) -> Array:  # a torch tensor, a numpy array or a PIL image
    import numpy as np

    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    return np.asarray(image)


def _channels_last(image: Array) -> Array:
    """Shape (H, W, C) or (H, W), from either order; one channel becomes none."""
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    return image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _draw(pictures: Sequence[tuple[str, Array | None]], title: str) -> "Figure":
    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = _new_figure(columns * INCHES, rows * (INCHES + 0.3) + 0.4)
    for number, (label, picture) in enumerate(pictures, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_axis_off()
        axes.set_title(label, fontsize=9)
        if picture is not None:
            axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _new_figure(width: float, height: float) -> "Figure":
    check_drawing()
    from matplotlib.figure import Figure

    size = (width, height)
    if "ipykernel" in sys.modules:
        # Only figures that pyplot knows are shown at the end of a notebook's cell.
        from matplotlib import pyplot

        figure: Figure = pyplot.figure(figsize=size, layout="constrained")
        return figure
    return Figure(figsize=size, layout="constrained")
