"""CIFAR images per second that the input path delivers, compared with two alternatives.

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
from dgl_jax.core.rngs import augment_key
from dgl_jax.data import synthetic
from dgl_jax.data.memory import ArraySource
from dgl_jax.data.source import DataSet
from dgl_jax.data.tfds_sets import load
from dgl_jax.engines.transfer import put
from dgl_jax.tasks import ImageClassification, Task

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "data_dir",
    "",
    "Directory in which TFDS has prepared cifar10; empty: 50,000 synthetic images.",
)
flags.DEFINE_integer("batch_size", 128, "Images per batch.")
flags.DEFINE_integer("batches", 200, "Batches per repeat.")
flags.DEFINE_integer("repeats", 15, "Repeats of each variant, interleaved.")
flags.DEFINE_string("output", str(Path(__file__).with_name("result.json")), "File for the result.")

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TARGET = 50_000  # images per second on two cores
SEED = 0
Variant = Callable[[int, int], jax.Array]  # (first batch, number of batches) -> last images


def package_variant(source: ArraySource, task: Task) -> Variant:
    """Returns the package's path: gather on the host, transfer as uint8, augment on the device."""
    train = jax.jit(lambda step, images: task.train(augment_key(SEED, step), images))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def run(start: int, count: int) -> jax.Array:
        for batch in itertools.islice(source.batches(start), count):
            batch = put(batch, device)
            images = train(batch.step, batch.inputs)
        return images

    return run


def numpy_variant(source: ArraySource) -> Variant:
    """Returns a path that augments whole batches with NumPy and transfers them as float32."""
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

    def run(start: int, count: int) -> jax.Array:
        for images in augmented(start, count):
            on_device = jax.device_put(images)
        return on_device

    return run


def resident_variant(data: DataSet, task: Task, batch_size: int) -> Variant:
    """Returns a path with all images on the device; only the ids of a batch are transferred."""
    everything = jnp.array(data.train.inputs)
    train = jax.jit(
        lambda everything, step, ids: task.train(augment_key(SEED, step), everything[ids])
    )
    order = np.random.default_rng(SEED).permutation(len(data.train.labels)).astype(np.int32)
    steps = len(order) // batch_size

    def run(start: int, count: int) -> jax.Array:
        for step in range(start, start + count):
            place = step % steps * batch_size
            images = train(everything, np.int32(step), order[place : place + batch_size])
        return images

    return run


def host_only(source: ArraySource) -> Callable[[int, int], None]:
    """Returns the host part of the package's path alone: making the batches."""

    def run(start: int, count: int) -> None:
        for _ in itertools.islice(source.batches(start), count):
            pass

    return run


def main(_: list[str]) -> None:
    if FLAGS.data_dir:
        data, data_name = (
            load(options("data", name="cifar10", dir=FLAGS.data_dir)),
            "cifar10 (as prepared in --data_dir)",
        )
    else:
        data, data_name = synthetic.make(50_000, 100, 32), "synthetic, 50,000 images of 32x32x3"
    source = ArraySource(data, batch_size=FLAGS.batch_size, seed=SEED, mean=MEAN, std=STD)
    task = ImageClassification(
        jax.ShapeDtypeStruct(source.example_shape, "uint8"), augment="crop_flip", mean=MEAN, std=STD
    )
    variants: dict[str, Callable] = {
        "dgl_jax": package_variant(source, task),
        "numpy on the host": numpy_variant(source),
        "whole set on the device": resident_variant(data, task, FLAGS.batch_size),
        "dgl_jax, host part alone": host_only(source),
    }
    for run in variants.values():
        jax.block_until_ready(run(0, 5))  # compiles
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(FLAGS.repeats):
        for name, run in variants.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(repeat * FLAGS.batches, FLAGS.batches))
            rates[name].append(FLAGS.batches * FLAGS.batch_size / (time.perf_counter() - begin))
    medians = {name: round(float(np.median(r))) for name, r in rates.items()}
    result = {
        "images_per_second": medians,
        "range": {name: [round(min(r)), round(max(r))] for name, r in rates.items()},
        "target": TARGET,
        "reached": medians["dgl_jax"] >= TARGET,
        "data": data_name,
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
    for name, rate in medians.items():
        print(f"{rate:10,d} images/s  {name}")
    print(f"target {TARGET:,d}: {'reached' if result['reached'] else 'MISSED'}")


if __name__ == "__main__":
    app.run(main)
