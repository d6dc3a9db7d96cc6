"""Sources of data sets in memory: random access, epochs, shards, evaluation, held-out examples."""

from itertools import islice

import jax
import numpy as np
import pytest

from dgl_jax.config import options
from dgl_jax.data import DataSet, Shard, make_source, synthetic
from dgl_jax.data.memory import ArraySource, channel_statistics
from dgl_jax.data.order import stratified
from dgl_jax.data.source import Examples
from dgl_jax.errors import UserError
from dgl_jax.types import PADDING


def numbered(train=53, test=11, classes=3):
    """Returns a data set in which every pixel of an image equals the image's index."""

    def split(n):
        images = np.broadcast_to(
            np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 4, 4, 1)
        ).copy()
        return Examples(images, (np.arange(n) % classes).astype(np.int32))

    return DataSet("numbered", tuple(map(str, range(classes))), split(train), split(test))


def source(batch_size=8, seed=0, **kwargs):
    return ArraySource(numbered(), batch_size=batch_size, seed=seed, **kwargs)


def ids_of(batches):
    return np.concatenate([b.context["id"] for b in batches])


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def is_permutation(ids, expected):
    return sorted(ids.tolist()) == sorted(expected)


# Order


@pytest.mark.parametrize("start", [0, 5, 6, 1000])
def test_random_access_equals_iteration(start):
    fresh = source()
    for step, batch in enumerate(islice(source().batches(start), 14), start):
        assert same(batch, fresh.batch(step))
        assert batch.step == step
        assert batch.step.dtype == np.int32
    assert not same(fresh.batch(start), fresh.batch(start + 1))


def test_an_epoch_visits_every_example_at_most_once_and_drops_the_remainder():
    s = source()
    assert s.steps_per_epoch == 6
    first, second = (ids_of(islice(s.batches(6 * epoch), 6)) for epoch in range(2))
    assert len(set(first.tolist())) == len(first) == 48
    assert first.tolist() != second.tolist()
    # Batches across an epoch boundary repeat examples, so the assertion above is not trivial.
    window = ids_of(islice(s.batches(3), 6))
    assert len(set(window.tolist())) < 48


def test_an_epoch_without_remainder_visits_every_example_exactly_once():
    s = ArraySource(numbered(48), batch_size=8, seed=0)
    assert is_permutation(ids_of(islice(s.batches(6), 6)), range(48))
    assert not is_permutation(ids_of(islice(s.batches(7), 6)), range(48))


def test_images_labels_and_ids_belong_together():
    for batch in islice(source(validation_fraction=0.2).batches(0), 10):
        np.testing.assert_array_equal(batch.inputs[:, 0, 0, 0], batch.context["id"])
        np.testing.assert_array_equal(batch.context["label"], batch.context["id"] % 3)
        assert batch.context["id"].dtype == batch.context["label"].dtype == np.int32
        assert batch.inputs.dtype == np.uint8


def test_the_seed_decides_order_and_split():
    def order(seed):
        return ids_of(islice(source(seed=seed, validation_fraction=0.2).batches(0), 4)).tolist()

    assert order(1) == order(1) != order(2)


def test_overwriting_a_batch_does_not_change_later_batches():
    s = source()
    before = s.batch(0)
    changed = s.batch(0)
    changed.inputs[:] = 255
    changed.context["label"][:] = 77
    assert same(before, s.batch(0))


# Shards


def test_shards_concatenate_to_the_global_batch():
    s = source()
    whole = s.batch(9)
    parts = [s.batch(9, Shard(i, 4)) for i in range(4)]
    assert [len(p.inputs) for p in parts] == [2] * 4
    np.testing.assert_array_equal(np.concatenate([p.inputs for p in parts]), whole.inputs)
    np.testing.assert_array_equal(ids_of(parts), whole.context["id"])
    assert ids_of(parts[::-1]).tolist() != whole.context["id"].tolist()


def test_shards_of_an_evaluation_concatenate_to_the_global_batch():
    s = source()
    whole = list(s.evaluation("test"))
    parts = [list(s.evaluation("test", Shard(i, 4))) for i in range(4)]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(ids_of(p[step] for p in parts), batch.context["id"])


def test_a_batch_that_is_not_divisible_by_the_hosts_is_refused():
    message = r"batch_size=8: not divisible by the 3 hosts; 9 would work"
    with pytest.raises(UserError, match=message):
        source().batch(0, Shard(0, 3))
    with pytest.raises(ValueError, match="no such shard"):
        source().batch(0, Shard(4, 4))


# Evaluation and held-out images


@pytest.mark.parametrize(("split", "count"), [("train", 45), ("validation", 8), ("test", 11)])
def test_evaluation_counts_every_example_once(split, count):
    s = source(validation_fraction=0.15)
    assert s.examples(split) == count
    batches = list(s.evaluation(split))
    assert all(b.inputs.shape == (8, 4, 4, 1) for b in batches)
    ids = ids_of(batches)
    real = ids[ids != PADDING]
    assert len(real) == count
    assert real.tolist() == sorted(set(real.tolist()))
    assert len(ids) == -(-count // 8) * 8
    padding = -count % 8
    last = batches[-1]
    assert (last.context["label"][8 - padding :] == PADDING).all()
    assert (last.inputs[8 - padding :] == 0).all()
    assert (last.context["label"][: 8 - padding] != PADDING).all()


def test_training_and_validation_share_no_image_and_leave_none_out():
    s = source(validation_fraction=0.25)
    ids = {
        split: {i for i in ids_of(s.evaluation(split)).tolist() if i != PADDING}
        for split in ("train", "validation")
    }
    assert not ids["train"] & ids["validation"]
    assert ids["train"] | ids["validation"] == set(range(53))
    assert set(ids_of(islice(s.batches(0), 30)).tolist()) <= ids["train"]
    with pytest.raises(ValueError, match="there are train, validation, test"):
        s.examples("dev")


@pytest.mark.parametrize("seed", range(3))
def test_stratification_is_exact(seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    random = np.random.Philox(seed)
    assert np.bincount(labels[stratified(labels, 10, random)]).tolist() == [5, 3, 2]
    # 7 % of 50, 30, 20 is 3.5, 2.1, 1.4: the missing one goes to the class that lost most.
    chosen = stratified(labels, 7, random)
    assert np.bincount(labels[chosen]).tolist() == [4, 2, 1]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    # Plain draws do not keep the shares, so the assertions above are not trivial.
    plain = [
        np.bincount(labels[np.random.default_rng(k).permutation(100)[:10]]).tolist()
        for k in range(5)
    ]
    assert plain != [[5, 3, 2]] * 5


def test_a_training_subset_does_not_change_the_validation_split():
    whole, part = (
        source(validation_fraction=0.15),
        source(validation_fraction=0.15, train_examples=15),
    )
    held_out = [
        [i for i in ids_of(s.evaluation("validation")).tolist() if i >= 0] for s in (whole, part)
    ]
    assert held_out[0] == held_out[1]
    contexts = [b.context for b in part.evaluation("train")]
    labels = np.concatenate([c["label"] for c in contexts])
    assert np.bincount(labels[labels >= 0]).tolist() == [5, 5, 5]
    assert part.examples("train") == 15
    assert part.steps_per_epoch == 1


def test_sizes_that_do_not_fit_the_data_are_refused():
    with pytest.raises(
        UserError, match=r"config.data.batch_size=54: there are only 53 training examples"
    ):
        source(batch_size=54)
    assert source(batch_size=53).steps_per_epoch == 1
    with pytest.raises(UserError, match=r"config.data.train_examples=54: numbered has only 53"):
        source(train_examples=54)
    with pytest.raises(
        UserError, match=r"config.data.mean=\(0.1, 0.2\): needs one value per channel.* has 1 "
    ):
        source(mean=(0.1, 0.2), std=(1.0, 1.0))


def test_channel_statistics_equal_hand_computed_values():
    images = np.zeros((3, 1, 2, 2), np.uint8)
    images[0, 0, :, 0], images[1, 0, :, 0] = 255, 255
    images[2] = 255  # not among the ids of the first call
    mean, std = channel_statistics(images, np.array([0, 1]), at_once=1)
    assert mean == (1.0, 0.0)
    assert std == (1 / 255, 1 / 255)  # constant channels
    mean, std = channel_statistics(images, np.array([0, 2]))
    assert mean == (1.0, 0.5)
    assert std == (1 / 255, 0.5)


# Data sets by name


def test_synthetic_images_are_separable_and_have_the_configured_size():
    s = make_source(options("data", name="synthetic", image_size=8), seed=0)
    assert s.example_shape == (8, 8, 3)
    assert [s.examples(split) for split in ("train", "validation", "test")] == [1843, 205, 128]
    data = synthetic.make(500, 200, 8)
    means = np.stack([data.train.inputs[data.train.labels == k].mean(axis=0) for k in range(10)])
    distances = ((data.test.inputs[:, None].astype(float) - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == data.test.labels).mean() > 0.9
    assert (distances.argmin(axis=1) == np.roll(data.test.labels, 1)).mean() < 0.3


def test_settings_override_mean_and_std():
    settings = options(
        "data",
        name="synthetic",
        image_size=8,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2.0, 3.0),
        augment="crop_flip",
    )
    source = make_source(settings, 0)
    assert (source.mean, source.std) == (settings.mean, settings.std)


def test_an_unknown_name_lists_similar_ones():
    with pytest.raises(
        UserError, match=r"config.data.name='cifar': no such name; did you mean cifar10"
    ):
        make_source(options("data", name="cifar"), 0)
