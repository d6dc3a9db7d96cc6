"""Images per second from 500x375 JPEGs to random crops of 224 pixels, compared with tf.data.

tf.data uses its fused decode-and-crop operation on the same cores.

    python benchmarks/input_imagenet/run.py --write

See README.md in this directory.
"""

import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness

from dgl_jax import system
from dgl_jax.data import crops, streaming, tfds_sets

Open = Callable[[], Iterator[Any]]
CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")


def photo(random: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """Generates a JPEG with structure at all scales and noise, about as large as ImageNet's."""
    pixels = np.full((height, width, 3), 127.0)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = random.normal(size=(3, cells, cells)).astype(np.float32)
        planes = [
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
            for c in coarse
        ]
        pixels += np.stack(planes, axis=-1) * 60 / cells**0.5
    pixels += random.normal(size=pixels.shape) * 16
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(root: Path, photos: list[bytes], count: int) -> tfds_sets.Records:
    """Writes `count` training images, cycling through `photos`, with the package's builder."""

    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as train:
        for label, name in enumerate(CLASSES):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as class_archive:
                for number in range(label, count, len(CLASSES)):
                    add(class_archive, f"{name}_{number}.JPEG", photos[number % len(photos)])
            add(train, f"{name}.tar", file.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as validation:
        add(validation, "ILSVRC2012_val_00000001.JPEG", photos[0])
    tfds_sets._prepare(root, root, "imagenet2012")
    return tfds_sets.Records(root / "imagenet2012" / "5.1.0", "train")


def package_source(stored: tfds_sets.Records, workers: int, batch_size: int, size: int) -> Open:
    """Returns the package's source, which makes batches of uint8 from record files."""
    data = streaming.RecordSet("imagenet", CLASSES, stored, stored, size, workers, random_crop=True)
    source = streaming.RecordSource(
        data, batch_size=batch_size, seed=0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    return lambda: source.batches(0)


def tf_data(root: Path, stored: tfds_sets.Records, batch_size: int, size: int) -> Open:
    """Returns a tf.data pipeline on the same images, cropped as in TensorFlow's ImageNet specs."""
    import tensorflow as tf

    path = str(root / "train.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for record in stored.read(range(len(stored))):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[record.image]))
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[record.label]))
            writer.write(
                tf.train.Example(
                    features=tf.train.Features(feature={"image": image, "label": label})
                ).SerializeToString()
            )

    def cut(serialized: Any) -> Any:
        features = {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
        example = tf.io.parse_single_example(serialized, features)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(example["image"]),
            tf.zeros([1, 0, 4]),
            area_range=crops.AREA,
            aspect_ratio_range=crops.ASPECT,
            max_attempts=crops.ATTEMPTS,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        pixels = tf.image.decode_and_crop_jpeg(example["image"], window, channels=3)
        return tf.cast(tf.image.resize(pixels, [size, size]), tf.uint8), example["label"]

    def open_dataset() -> Iterator[Any]:
        dataset = (
            tf.data.TFRecordDataset(path)
            .shuffle(512)
            .repeat()
            .map(cut, num_parallel_calls=tf.data.AUTOTUNE)
        )
        return (
            dataset.batch(batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
            .as_numpy_iterator()
        )

    return open_dataset


def rate(open_batches: Open, batch_size: int, warm_up: int, batches: int) -> tuple[float, float]:
    """Measures a source after some warm-up batches.

    Returns:
      Images per second, and milliseconds of processor time of this process per image.
    """
    iterator = open_batches()
    for _ in itertools.islice(iterator, warm_up):
        pass
    begin, processor = time.perf_counter(), time.process_time()
    for _ in itertools.islice(iterator, batches):
        pass
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    if close := getattr(iterator, "close", None):
        close()
    return batches * batch_size / seconds, 1e3 * processor / (batches * batch_size)


def decoders(photos: list[bytes], size: int, repeats: int) -> dict[str, list[float]]:
    """Measures decoding, random cropping and resizing on one thread, libraries interleaved.

    Returns:
      Milliseconds per image of each repeat, by library.
    """
    draws = np.random.default_rng(0).random((len(photos), *crops.DRAWS))

    def pillow(data: bytes, draw: np.ndarray) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            left, top, width, height = crops.random_box(*image.size, draw)
            box = (left, top, left + width, top + height)
            return np.asarray(
                image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box)
            )

    def opencv(data: bytes, draw: np.ndarray) -> np.ndarray:
        pixels = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        left, top, width, height = crops.random_box(pixels.shape[1], pixels.shape[0], draw)
        return cv2.resize(pixels[top : top + height, left : left + width], (size, size))

    def package(data: bytes, draw: np.ndarray) -> np.ndarray:
        return crops.random_crop(data, draw, size)

    libraries = {"simplejpeg, OpenCV to resize (the package)": package}
    libraries |= {"OpenCV": opencv, "Pillow": pillow}
    times: dict[str, list[float]] = {name: [] for name in libraries}
    for _, (name, cut) in itertools.product(range(repeats), libraries.items()):
        begin = time.perf_counter()
        for data, draw in zip(photos, draws, strict=True):
            cut(data, draw)
        times[name].append(1e3 * (time.perf_counter() - begin) / len(photos))
    return times


def installed(package: str) -> str:
    """Returns the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--images", type=int, default=1024, help="images in the data set")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=40, help="timed batches per repeat")
    parser.add_argument("--warm_up", type=int, default=8, help="batches before the timed ones")
    parser.add_argument("--repeats", type=int, default=9, help="repeats of each source")
    parser.add_argument(
        "--size", type=int, default=224, help="height and width of a crop in pixels"
    )
    parser.add_argument("--note", default="", help="note stored with the result")
    args = parser.parse_args()
    cores = system.cpu_count() or 1
    random = np.random.default_rng(0)
    photos = [photo(random) for _ in range(min(args.images, 64))]
    kilobytes = statistics.mean(map(len, photos)) / 1e3
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        stored = prepare(root, photos, args.images)
        sources = {
            f"dgl_jax, {cores} threads": package_source(stored, 0, args.batch_size, args.size),
            f"dgl_jax, {cores} processes": package_source(
                stored, cores, args.batch_size, args.size
            ),
        }
        if find_spec("tensorflow"):
            sources["tf.data"] = tf_data(root, stored, args.batch_size, args.size)
        rates: dict[str, list[float]] = {name: [] for name in sources}
        # The processor time of other processes is not measured.
        spent: dict[str, list[float]] = {name: [] for name in sources if "processes" not in name}
        for _, (name, open_batches) in itertools.product(range(args.repeats), sources.items()):
            per_second, processor = rate(open_batches, args.batch_size, args.warm_up, args.batches)
            rates[name].append(per_second)
            if name in spent:
                spent[name].append(processor)
    times = decoders(photos, args.size, args.repeats)
    rows = [
        (
            name,
            harness.shown(harness.quartiles(values, 1)),
            harness.shown(harness.quartiles(spent[name])) if name in spent else "",
        )
        for name, values in rates.items()
    ]
    result: dict[str, Any] = {
        "photographs": f"500x375, {kilobytes:.0f} kB",
        "arguments": vars(args),
        "versions": {
            p: installed(p)
            for p in ("grain", "opencv-python-headless", "pillow", "simplejpeg", "tensorflow-cpu")
        },
        "images_per_second": {name: harness.quartiles(values, 1) for name, values in rates.items()},
        "processor_milliseconds": {
            name: harness.quartiles(values) for name, values in spent.items()
        },
        "milliseconds_one_thread": {
            name: harness.quartiles(values) for name, values in times.items()
        },
    }
    if "tf.data" in rates:
        over = {
            name: harness.quartiles(harness.ratios(values, rates["tf.data"]))
            for name, values in rates.items()
            if name != "tf.data"
        }
        result |= {"over_tf_data": over, "reached": max(q["median"] for q in over.values()) >= 1}
    else:
        rows.append(("tf.data", "TensorFlow is not installed", ""))
    harness.table(("source", "images/s", "processor ms per image"), rows)
    print()
    harness.table(
        ("library", "ms per image, one thread"),
        [(name, harness.shown(harness.quartiles(values))) for name, values in times.items()],
    )
    if "over_tf_data" in result:
        over = ", ".join(f"{name} {harness.shown(q)}" for name, q in result["over_tf_data"].items())
        print(f"\nover tf.data: {over}; target 1: {'reached' if result['reached'] else 'MISSED'}")
    harness.finish(__file__, result, args.write)


if __name__ == "__main__":
    main()
