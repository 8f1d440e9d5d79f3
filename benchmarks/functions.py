"""The transforms that are measured, as a user would write them: shipped to a node as a file, and run bare."""

import random

import numpy as np
import PIL.Image

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def crop(sample):  # type: ignore[no-untyped-def]  # a user's function
    """ImageNet's training transform without torch: a crop of random size and aspect, a flip, normalised float32."""
    picture = sample.pop("jpg").convert("RGB")
    width, height = picture.size
    area = width * height * random.uniform(0.08, 1.0)
    aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    wide = min(width, max(1, round((area * aspect) ** 0.5)))
    high = min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = random.randint(0, width - wide), random.randint(0, height - high)
    picture = picture.resize((224, 224), PIL.Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))
    if random.random() < 0.5:
        picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    sample["npy"] = (np.asarray(picture, np.float32) / 255 - MEAN) / DEVIATION
    return sample
