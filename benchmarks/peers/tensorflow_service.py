"""tf.data service: `tensorflow_service.py serve` is a dispatcher with a worker, `… read ADDRESS DIRECTORY` a client.

`serve` prints `ready PORT`. `read` speaks as loaders.py does; the pictures are decoded, cropped, resized, flipped and
normalised by TensorFlow's own operations on the worker, since a graph cannot call Python.
"""

import sys
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

BATCH = 64
SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(path: Any) -> Any:
    """ImageNet's training transform: channels first, float32."""
    data = tf.io.read_file(path)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data),
        tf.zeros([0, 0, 4]),
        area_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        min_object_covered=0.0,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    picture = tf.io.decode_and_crop_jpeg(data, window, channels=3)
    picture = tf.image.resize(picture, (SIDE, SIDE), antialias=True) / 255
    picture = tf.image.random_flip_left_right(picture)
    return tf.transpose((picture - MEAN) / DEVIATION, (2, 0, 1))


def serve() -> None:
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.partition("://")[2]
    worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))
    print("ready", address.rpartition(":")[2], flush=True)
    sys.stdin.read()
    del worker


def read(address: str, directory: str) -> None:
    paths = sorted(map(str, Path(directory).glob("*.jpg")))
    # Autotuning is what its guide recommends; files are shared out as they are asked for, since there is one worker.
    dataset = tf.data.Dataset.from_tensor_slices(paths).map(make, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH)
    service = tf.data.experimental.service
    dataset = dataset.apply(service.distribute(service.ShardingPolicy.OFF, f"grpc://{address}"))
    print("ready", flush=True)
    for _ in sys.stdin:
        start, samples, first = time.perf_counter(), 0, 0.0
        for pictures in dataset:
            assert pictures.shape[1:] == (3, SIDE, SIDE)
            samples += len(pictures)
            first = first or time.perf_counter() - start
        print(samples, time.perf_counter() - start, first, flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else read(*sys.argv[2:])
