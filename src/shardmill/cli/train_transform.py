"""The demo's transform: ImageNet's training augmentation with Pillow and numpy alone.

It is shipped as text and run in a worker of the node, so it imports nothing of shardmill. Copy it as a start for one
of your own: `shardmill transform try train_transform.py:train_transform SHARD` shows what it does to a shard.
"""

import math
import random
from typing import Any

import numpy as np
from PIL import Image

SIDE = 224  # pixels, of what comes out
AREA = (0.08, 1.0)  # of the picture, that a crop takes
RATIO = (3 / 4, 4 / 3)  # its width / height
ATTEMPTS = 10  # at a crop that lies inside
MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # of ImageNet's red, green and blue
DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)
FIELDS = ("jpg", "jpeg", "png", "webp")  # that may hold the picture


def train_transform(sample: dict[str, Any]) -> dict[str, Any]:
    """Replace the picture by a random crop, mirrored half of the time, resized and normalised.

    Returns:
        The sample with `npy`: float32, shape (224, 224, 3), RGB; and with `crop.json`: where the crop lies in the
        picture (left, top, right, bottom; pixels) and whether it is mirrored.
    """
    picture = sample.pop(next(name for name in FIELDS if name in sample))
    box = random_crop(*picture.size)
    crop = picture.crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    is_mirrored = random.random() < 0.5
    if is_mirrored:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(crop, np.float32) / 255
    sample["npy"] = (pixels - MEAN) / DEVIATION
    sample["crop.json"] = {"box": box, "mirrored": is_mirrored}
    return sample


def random_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """A box of random area and shape; the largest one in the middle where ten attempts do not fit."""
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = random.randint(0, width - across), random.randint(0, height - down)
            return left, top, left + across, top + down
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    across, down = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
