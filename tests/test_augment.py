"""Augmentation against a NumPy loop over images, and normalization against known values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dgl_jax.core.rngs import augment_key
from dgl_jax.tasks import ImageClassification
from dgl_jax.tasks.image_classification import draw_crop_flip

MEAN, STD = (0.5, 0.25, 0.1), (0.2, 0.5, 1.0)
CROP_FLIP = ImageClassification(
    jax.ShapeDtypeStruct((12, 9, 3), "uint8"), augment="crop_flip", mean=MEAN, std=STD
)


def images(batch=16, height=12, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def oracle(key, x, padding=4, *, flip=True, fill=0):
    """Augments image by image as torchvision does: pad with black, crop, mirror, normalize."""
    offsets, flips = (np.asarray(a) for a in draw_crop_flip(key, len(x), padding))
    augmented = []
    for image, (row, column), mirrored in zip(x, offsets, flips, strict=True):
        padded = np.pad(
            image, ((padding, padding), (padding, padding), (0, 0)), constant_values=fill
        )
        crop = padded[row : row + image.shape[0], column : column + image.shape[1]]
        augmented.append(crop[:, ::-1] if flip and mirrored else crop)
    return (np.stack(augmented) / 255 - MEAN) / STD


@pytest.mark.parametrize("seed", range(3))
def test_crop_flip_equals_a_loop_over_images(seed):
    key, x = augment_key(seed, 7), images(seed=seed)
    np.testing.assert_allclose(jax.jit(CROP_FLIP.train)(key, x), oracle(key, x), atol=2e-6)


@pytest.mark.parametrize("broken", [{"flip": False}, {"fill": 1}, {"padding": 3}])
def test_twin_broken_crop_flip_differs_from_the_loop(broken):
    key, x = augment_key(0, 7), images()
    assert np.abs(np.asarray(CROP_FLIP.train(key, x)) - oracle(key, x, **broken)).max() > 1e-3


def test_inception_crop_only_mirrors_half_of_the_images():
    key, x = augment_key(0, 7), images()
    mirrored = np.asarray(replace(CROP_FLIP, augment="inception_crop").train(key, x))
    np.testing.assert_allclose(mirrored, oracle(key, x, padding=0), atol=2e-6)
    assert np.abs(mirrored - oracle(key, x, padding=0, flip=False)).max() > 1e-3


def test_offsets_and_flips_take_every_value():
    offsets, flips = draw_crop_flip(augment_key(0, 0), 4096, 4)
    counts = np.stack([np.bincount(offsets[:, axis], minlength=9) for axis in range(2)])
    assert counts.shape == (2, 9)
    assert counts.min() > 4096 / 9 * 0.8
    assert abs(flips.mean() - 0.5) < 0.03


def test_normalization_against_known_values():
    x = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    # (0/255 - .5)/.2, (51/255 - .25)/.5, (255/255 - .1)/1
    y = CROP_FLIP.evaluate(x)
    np.testing.assert_allclose(y.ravel(), [-2.5, -0.1, 0.9], rtol=1e-6)
    assert y.dtype == jnp.float32


def test_training_without_augmentation_equals_evaluation():
    plain = replace(CROP_FLIP, augment="none")
    np.testing.assert_array_equal(
        plain.train(augment_key(0, 0), images()), plain.evaluate(images())
    )
    assert np.abs(CROP_FLIP.train(augment_key(0, 0), images()) - plain.evaluate(images())).max() > 1


def test_augmentation_key_depends_on_seed_and_step_traced_or_not():
    def data(key):
        return jax.random.key_data(key).tolist()

    traced = jax.jit(augment_key, static_argnums=0)
    assert (
        data(traced(3, jnp.int32(5)))
        == data(augment_key(3, 5))
        == data(augment_key(3, np.asarray(5, np.int32)))
    )
    assert (
        len({tuple(data(augment_key(seed, step))) for seed in range(3) for step in range(3)}) == 9
    )


def test_grayscale_images_with_the_task_as_static_argument():
    grayscale = replace(CROP_FLIP, mean=(0.0,), std=(1.0,))
    x = images()[..., :1]
    train = jax.jit(ImageClassification.train, static_argnums=0)
    offsets, flips = (np.asarray(a) for a in draw_crop_flip(augment_key(1, 1), len(x), 4))
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))[
        0, offsets[0, 0] : offsets[0, 0] + 12, offsets[0, 1] :
    ][:, :9]
    first = padded[:, ::-1] if flips[0] else padded
    np.testing.assert_allclose(train(grayscale, augment_key(1, 1), x)[0], first / 255, atol=1e-6)


def test_batch_sharded_over_devices_needs_no_communication():
    mesh = jax.make_mesh((len(jax.devices()),), ("batch",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("batch"))
    replicated = NamedSharding(mesh, PartitionSpec())
    key, x = augment_key(0, 0), images(4 * len(jax.devices()))

    def communicates(function):
        text = (
            jax.jit(function, in_shardings=(replicated, sharded), out_shardings=sharded)
            .lower(key, x)
            .compile()
            .as_text()
        )
        return "all-gather" in text or "all-reduce" in text

    def indexed(key, x):
        rows = draw_crop_flip(key, len(x), 4)[0][:, :1] % 3 + jnp.arange(9)
        return x[jnp.arange(len(x))[:, None, None], rows[:, :, None], rows[:, None, :]]

    assert not communicates(CROP_FLIP.train)
    assert communicates(indexed)  # the obvious implementation
    train = jax.jit(CROP_FLIP.train, in_shardings=(replicated, sharded), out_shardings=sharded)
    np.testing.assert_allclose(train(key, x), oracle(key, x), atol=2e-6)
