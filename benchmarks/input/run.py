"""How many CIFAR images a second the input path delivers, beside two other ways to do the same.

    python benchmarks/input/run.py --data_dir=DIR

See README.md in this directory.
"""

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dgl_jax import system
from dgl_jax.config import options
from dgl_jax.data import synthetic
from dgl_jax.data.memory import ArraySource
from dgl_jax.data.source import DataSet
from dgl_jax.data.tfds_sets import load
from dgl_jax.engines.placement import put
from dgl_jax.tasks import ImageClassification, Task, augment_key

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "data_dir",
    "",
    "A directory in which TFDS has prepared cifar10; empty: 50,000 synthetic images.",
)
flags.DEFINE_integer("batch_size", 128, "Images a batch.")
flags.DEFINE_integer("batches", 200, "Batches a repeat.")
flags.DEFINE_integer("repeats", 15, "Repeats of each way, interleaved.")
flags.DEFINE_string(
    "output", str(Path(__file__).with_name("result.json")), "Where the result goes."
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TARGET = 50_000  # images a second on two cores
SEED = 0
Way = Callable[[int, int], jax.Array]


def ours(source: ArraySource, task: Task) -> Way:
    """The package's own: batches gathered on the host, put on the device as uint8, augmented there."""
    train = jax.jit(lambda step, images: task.train(augment_key(SEED, step), images))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def go(start: int, count: int) -> jax.Array:
        for batch in itertools.islice(source.batches(start), count):
            batch = put(batch, device)
            images = train(batch.step, batch.inputs)
        return images

    return go


def numpy_way(source: ArraySource) -> Way:
    """Augmentation and normalisation in NumPy on the host, a whole batch at a time, then float32 to the device."""
    scale, shift = (
        np.float32(1 / (255 * np.array(STD))),
        np.float32(-np.array(MEAN) / np.array(STD)),
    )

    def augmented(start: int, count: int) -> Iterator[np.ndarray]:
        for step, batch in enumerate(itertools.islice(source.batches(start), count), start):
            random = np.random.default_rng([SEED, step])
            size, height, width, _ = batch.inputs.shape
            padded = np.pad(batch.inputs, ((0, 0), (4, 4), (4, 4), (0, 0)))
            rows = random.integers(0, 9, (size, 1)) + np.arange(height)
            columns = random.integers(0, 9, (size, 1)) + np.arange(width)
            columns = np.where(random.random((size, 1)) < 0.5, columns[:, ::-1], columns)
            cut = padded[np.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield cut.astype(np.float32) * scale + shift

    def go(start: int, count: int) -> jax.Array:
        for images in augmented(start, count):
            on_device = jax.device_put(images)
        return on_device

    return go


def resident_way(data: DataSet, task: Task, batch_size: int) -> Way:
    """All training images on the device as uint8; a batch is gathered and augmented inside one jit, ids come from the host."""
    everything = jnp.array(data.train.inputs)
    train = jax.jit(
        lambda everything, step, ids: task.train(augment_key(SEED, step), everything[ids])
    )
    order = np.random.default_rng(SEED).permutation(len(data.train.labels)).astype(np.int32)
    steps = len(order) // batch_size

    def go(start: int, count: int) -> jax.Array:
        for step in range(start, start + count):
            place = step % steps * batch_size
            images = train(everything, np.int32(step), order[place : place + batch_size])
        return images

    return go


def host_only(source: ArraySource) -> Callable[[int, int], None]:
    """Making the batches, nothing else: what the host's share of the first way costs."""

    def go(start: int, count: int) -> None:
        for _ in itertools.islice(source.batches(start), count):
            pass

    return go


def main(_: list[str]) -> None:
    if FLAGS.data_dir:
        data, name = (
            load(options("data", name="cifar10", dir=FLAGS.data_dir)),
            "cifar10 (as prepared in --data_dir)",
        )
    else:
        data, name = synthetic.make(50_000, 100, 32), "synthetic, 50,000 images of 32x32x3"
    source = ArraySource(data, batch_size=FLAGS.batch_size, seed=SEED, mean=MEAN, std=STD)
    task = ImageClassification(
        jax.ShapeDtypeStruct(source.example_shape, "uint8"), augment="crop_flip", mean=MEAN, std=STD
    )
    ways: dict[str, Callable] = {
        "dgl_jax": ours(source, task),
        "numpy on the host": numpy_way(source),
        "whole set on the device": resident_way(data, task, FLAGS.batch_size),
        "dgl_jax, host part alone": host_only(source),
    }
    for go in ways.values():
        jax.block_until_ready(go(0, 5))  # compiles
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(FLAGS.repeats):
        for way, go in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(go(repeat * FLAGS.batches, FLAGS.batches))
            rates[way].append(FLAGS.batches * FLAGS.batch_size / (time.perf_counter() - begin))
    medians = {way: round(float(np.median(r))) for way, r in rates.items()}
    result = {
        "images_per_second": medians,
        "range": {way: [round(min(r)), round(max(r))] for way, r in rates.items()},
        "target": TARGET,
        "reached": medians["dgl_jax"] >= TARGET,
        "data": name,
        "batch_size": FLAGS.batch_size,
        "batches": FLAGS.batches,
        "repeats": FLAGS.repeats,
        "device": system.device_kind(jax.devices()[0]),
        "cpus": system.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {
            package: version(package)
            for package in ("jax", "jaxlib", "numpy", "pillow", "tensorflow-datasets")
        },
    }
    Path(FLAGS.output).write_text(json.dumps(result, indent=2) + "\n")
    for way, rate in medians.items():
        print(f"{rate:10,d} images/s  {way}")
    print(f"target {TARGET:,d}: {'reached' if result['reached'] else 'MISSED'}")


if __name__ == "__main__":
    app.run(main)
