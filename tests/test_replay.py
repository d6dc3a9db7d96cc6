"""Replay ring and rules against a plain Python oracle (invariant 7), and safety of the ring."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runs import small_config

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.replay import Ring, RingSpec, check_memory
from dgl_jax.replay.rules import RULES
from dgl_jax.testing import make_experiment
from dgl_jax.types import Header

EXAMPLE = (
    jax.ShapeDtypeStruct((2, 3), np.float32),
    {name: jax.ShapeDtypeStruct((2,), np.int32) for name in ("label", "id")},
)


def make_message(n: int):
    """Returns payload, context and header of message n, filled with values derived from n."""
    return (
        np.full((2, 3), n, np.float32),
        {"label": np.full(2, n, np.int32), "id": np.full(2, 100 + n, np.int32)},
        Header(n, n + 1),
    )


def read(ring: Ring):
    """Samples a ring, checks the message and returns (number, age, use); None if it has none."""
    sample = ring.sample()
    if sample is None:
        return None
    n = sample.header.sequence
    np.testing.assert_array_equal(sample.message.payload, np.full((2, 3), n))
    np.testing.assert_array_equal(sample.message.context["label"], [n, n])
    np.testing.assert_array_equal(sample.message.context["id"], [100 + n, 100 + n])
    return n, sample.age, sample.use


class Oracle:
    """Reference implementation: a list of [number, uses], oldest first.

    The rule `released` works on slots, as in the published code.
    """

    def __init__(self, size: int, rule: str, max_reuse: int):
        self.size, self.rule, self.max_reuse = size, rule, max_reuse
        self.messages, self.written = [], 0

    def add(self):
        self.messages = [*self.messages, [self.written, 0]][-self.size :]
        self.written += 1

    def sample(self):
        released_uses = (
            [1 if self.size == 1 else uses + 1 for _, uses in self.messages]
            if self.rule == "released"
            else None
        )
        uses = released_uses or [uses for _, uses in self.messages]
        if not uses or (self.max_reuse and min(uses) >= self.max_reuse):
            return None
        least = [m for m, u in zip(self.messages, uses) if u == min(uses)]
        if self.rule == "released":
            pointer = self.written % self.size
            rank = {
                n % self.size: (n % self.size) - (self.size if n % self.size > pointer else 0)
                for n, _ in least
            }
            chosen = max(least, key=lambda m: rank[m[0] % self.size])
        else:
            chosen = least[-1] if self.rule == "least_used_latest" else least[0]
        chosen[1] += 1
        return chosen[0], self.written - 1 - chosen[0], chosen[1]


@settings(max_examples=150)
@given(
    st.sampled_from(["least_used_latest", "fifo", "released"]),
    st.integers(1, 5),
    st.integers(0, 3),
    st.lists(st.booleans(), max_size=60),
)
def test_rules_equal_the_oracle_on_any_history(rule, size, max_reuse, history):
    assume((rule, max_reuse) != ("released", 1))  # refused, see below
    ring, oracle = Ring(EXAMPLE, size, rule, max_reuse), Oracle(size, rule, max_reuse)
    for writes in history:
        if writes:
            ring.add(*make_message(oracle.written))
            oracle.add()
        else:
            ready = ring.ready()
            result = read(ring)
            assert result == oracle.sample()
            assert ready == (result is not None)


def test_full_ring_against_known_reads_and_statistics():
    ring = Ring(EXAMPLE, 3)
    assert read(ring) is None
    for n in range(4):  # overwrites message 0
        ring.add(*make_message(n))
    assert [read(ring) for _ in range(4)] == [(3, 0, 1), (2, 1, 1), (1, 2, 1), (3, 0, 2)]
    ring.add(*make_message(4))  # overwrites message 1
    assert read(ring) == (4, 0, 1)
    tally = ring.tally
    assert (tally.written, tally.read, tally.age, tally.oldest, tally.reused, tally.never_used) == (
        5,
        5,
        3,
        2,
        1,
        1,
    )
    assert (tally.mean_age(), tally.reuse()) == (3 / 5, 5 / 4)


def test_released_rule_takes_the_oldest_message_for_the_newest():
    rings = {rule: Ring(EXAMPLE, 3, rule) for rule in ("least_used_latest", "released")}
    for ring in rings.values():
        for n in range(3):
            ring.add(*make_message(n))
    assert [read(rings["least_used_latest"])[0] for _ in range(3)] == [2, 1, 0]
    assert [read(rings["released"])[0] for _ in range(3)] == [0, 2, 1]


def test_max_reuse_and_the_count_of_the_released_rule():
    ring = Ring(EXAMPLE, 2, max_reuse=2)
    ring.add(*make_message(0))
    assert [read(ring) for _ in range(3)] == [(0, 0, 1), (0, 0, 2), None]
    assert not ring.ready()
    ring.add(*make_message(1))
    assert read(ring) == (1, 0, 1)

    counted_from_one = Ring(EXAMPLE, 2, "released", max_reuse=2)
    counted_from_one.add(*make_message(0))
    assert [read(counted_from_one) for _ in range(2)] == [(0, 0, 1), None]
    never_counts = Ring(EXAMPLE, 1, "released", max_reuse=2)
    never_counts.add(*make_message(0))
    assert [read(never_counts)[2] for _ in range(4)] == [1, 2, 3, 4]


def test_a_limit_that_allows_no_read_is_refused():
    with pytest.raises(
        UserError, match=r"^config\.replay\.max_reuse=1: .*released.* use 2 or more"
    ):
        Ring(EXAMPLE, 2, "released", max_reuse=1)
    fields = {"engine__name": "simulated", "replay__max_reuse": 1}
    make_experiment(make_settings(small_config(**fields)))
    with pytest.raises(UserError, match=r"^config\.replay\.max_reuse=1"):
        make_experiment(make_settings(small_config(**fields, replay__rule="released")))


def test_uniform_rule_is_uniform_and_repeats_with_the_same_seed():
    def draws(ring):
        for n in range(4):
            ring.add(*make_message(n))
        return [read(ring)[0] for _ in range(2000)]

    numbers = draws(Ring(EXAMPLE, 4, "uniform", seed=3))
    assert numbers == draws(Ring(EXAMPLE, 4, "uniform", seed=3))
    assert numbers != draws(Ring(EXAMPLE, 4, "uniform", seed=4))
    np.testing.assert_allclose(np.bincount(numbers) / 2000, 0.25, atol=0.04)


def test_uniform_rule_respects_max_reuse():
    ring = Ring(EXAMPLE, 4, "uniform", max_reuse=2)
    for n in range(4):
        ring.add(*make_message(n))
    assert sorted(read(ring)[0] for _ in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert read(ring) is None


@pytest.mark.parametrize("rule", RULES)
def test_restored_snapshot_continues_identically(rule):
    ring, other = Ring(EXAMPLE, 3, rule, seed=1), Ring(EXAMPLE, 3, rule, seed=1)
    for n in range(5):
        ring.add(*make_message(n))
        read(ring)
    saved = ring.snapshot()
    ring.add(*make_message(5))  # must not change the snapshot
    other.restore(saved)
    other.add(*make_message(5))
    for n in range(6, 12):
        assert read(ring) == read(other)
        ring.add(*make_message(n))
        other.add(*make_message(n))
    assert ring.tally == other.tally
    fresh = Ring(EXAMPLE, 3, rule, seed=1)
    fresh.add(*make_message(5))
    assert ring.tally != fresh.tally


def aligned(shape):
    """Returns float32 zeros aligned to 64 bytes, which the CPU backend aliases."""
    raw = np.zeros(int(np.prod(shape)) * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + int(np.prod(shape)) * 4].view(np.float32).reshape(shape)


def test_later_writes_do_not_change_a_message_that_was_read():
    example = (jax.ShapeDtypeStruct((16, 16), np.float32), EXAMPLE[1])

    def corrupted(copied: bool) -> int:
        ring, wrong = Ring(example, 1), 0
        ring._slots[0] = aligned((1, 16, 16))
        for n in range(20):
            ring.add(np.full((16, 16), n, np.float32), *make_message(n)[1:])
            payload = ring.sample().message.payload if copied else ring._slots[0][0]
            array = jax.device_put(payload, jax.devices()[0])
            ring.add(np.full((16, 16), -1, np.float32), *make_message(n)[1:])
            wrong += bool((np.asarray(array) != n).any())
        return wrong

    assert corrupted(copied=True) == 0
    # Twin: without the copy the device reads the later message.
    assert corrupted(copied=False) > 0


def test_message_of_another_dtype_or_structure_is_refused():
    ring = Ring(EXAMPLE, 2)
    with pytest.raises((TypeError, ValueError)):
        ring.add(np.zeros((2, 3), np.float64), *make_message(0)[1:])
    with pytest.raises((TypeError, ValueError)):
        ring.add((np.zeros((2, 3), np.float32),) * 2, *make_message(0)[1:])


def test_payload_of_several_arrays_is_stored_and_read():
    example = (
        {
            "codes": jax.ShapeDtypeStruct((2, 4), np.uint8),
            "scale": jax.ShapeDtypeStruct((2,), np.float32),
        },
        EXAMPLE[1],
    )
    ring = Ring(example, 2)
    for n in range(3):
        ring.add(
            {"codes": np.full((2, 4), n, np.uint8), "scale": np.full(2, n / 2, np.float32)},
            *make_message(n)[1:],
        )
    for n in (2, 1):
        message = ring.sample().message
        assert message.payload.keys() == {"codes", "scale"}
        np.testing.assert_array_equal(message.payload["codes"], np.full((2, 4), n))
        np.testing.assert_array_equal(message.payload["scale"], [n / 2, n / 2])
        np.testing.assert_array_equal(message.context["id"], [100 + n, 100 + n])
    with pytest.raises((TypeError, ValueError)):
        ring.add(make_message(3)[0], *make_message(3)[1:])
    with pytest.raises((TypeError, ValueError)):
        ring.add({"codes": np.zeros((2, 4), np.uint8)}, *make_message(3)[1:])


def test_snapshot_against_known_values():
    ring = Ring(EXAMPLE, 3)
    for n in range(2):
        ring.add(*make_message(n))
    assert ring.snapshot()["written"].tolist() == [0, 1, 0]
    for n in range(2, 5):  # slots hold messages 3, 4, 2
        ring.add(*make_message(n))
    assert [read(ring)[0] for _ in range(4)] == [4, 3, 2, 4]
    saved = ring.snapshot()
    assert {name: saved[name].tolist() for name in ("headers", "reads", "written", "tally")} == {
        "headers": [[3, 4, 0], [4, 5, 0], [2, 3, 0]],
        "reads": [1, 2, 1],
        "written": [3, 4, 2],
        "tally": [5, 4, 3, 2, 1, 2],
    }
    np.testing.assert_array_equal(saved["slots"][0][:, 0, 0], [3, 4, 2])


def test_concurrent_reads_never_see_a_half_written_message():
    example = (jax.ShapeDtypeStruct((2, 20_000), np.float32), EXAMPLE[1])
    ring, count = Ring(example, 2), 300

    def write():
        for n in range(count):
            ring.add(np.full((2, 20_000), n, np.float32), *make_message(n)[1:])

    writer = threading.Thread(target=write)
    with ring.changed:
        writer.start()
        assert ring.changed.wait_for(ring.ready, timeout=30)
    last = -1
    while last < count - 1:
        sample = ring.sample()
        n = sample.header.sequence
        assert (sample.message.payload == n).all()
        assert (sample.message.context["id"] == 100 + n).all()
        last = max(last, n)
    writer.join()


def test_rings_larger_than_memory_are_refused_with_a_size_that_fits():
    message_bytes = 2 * 3 * 4 + 2 * 2 * 4
    spec = RingSpec(EXAMPLE)
    assert spec.nbytes(5) == 5 * message_bytes
    assert Ring(EXAMPLE, 5).nbytes == 5 * message_bytes
    check_memory([spec, spec], 5, available=10 * message_bytes)
    with pytest.raises(UserError, match=r"config\.replay\.size=6: the rings need .* 5 would fit"):
        check_memory([spec, spec], 6, available=10 * message_bytes + 3)
    with pytest.raises(UserError, match="not even 1 would fit"):
        check_memory([spec], 1, available=3)
