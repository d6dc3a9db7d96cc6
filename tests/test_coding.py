"""Tests of codecs inside engines: what crosses a hop, and which codebook decodes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_threads import Fault

from dgl_jax.codecs import Int8, Vq
from dgl_jax.config import ReplaySettings, options
from dgl_jax.core.program_cache import clear_programs
from dgl_jax.engines import (
    FusedEngine,
    PipelineEngine,
    SimulatedEngine,
    SimulatedOptions,
    ThreadsEngine,
    ThreadsOptions,
    fused,
    program,
)
from dgl_jax.engines.base import Publisher
from dgl_jax.engines.dispatches import Dispatches
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.objectives import means
from dgl_jax.replay import Ring, RingSpec
from dgl_jax.types import Header

VQ = options("codec", name="vq", codes=8, dims=2, codebook_every=3)
STEPS = 7


@pytest.fixture
def crossed(monkeypatch):
    """Records everything that the pipeline moves between devices."""
    moved = []
    put = PipelineEngine.run.__globals__["put"]

    def spy(tree, sharding):
        moved.append(tree)
        return put(tree, sharding)

    monkeypatch.setitem(PipelineEngine.run.__globals__, "put", spy)
    return moved


def pipeline(tiny, codec, **spec) -> PipelineEngine:
    """Creates a new pipeline, whose meters start at zero."""
    train_spec = tiny.spec(codec=codec, **spec)
    return PipelineEngine(
        train_spec, assign(jax.devices(), len(train_spec.modules), (1,) * len(train_spec.modules))
    )


@pytest.mark.medium
def test_pipeline_sends_codes_and_scheduled_codebooks(tiny, crossed):
    engine = pipeline(tiny, VQ, modules=2)  # 2x2 positions of 4 channels: two groups
    state = tiny.place(engine, tiny.init(engine.spec))
    crossed.clear()
    for _ in engine.run(state, tiny.source, STEPS):
        pass
    books = [tree for tree in crossed if isinstance(tree, jax.Array)]
    messages = [tree for tree in crossed if isinstance(tree, tuple)]
    assert [(book.shape, book.dtype) for book in books] == [
        ((1, 2, 8, 2), jnp.float32)
    ] * 3  # published at updates 0, 3 and 6
    assert len(messages) == STEPS
    for payload, context in messages:
        # With eight codes, two groups of four bits share a byte.
        assert (payload.shape, payload.dtype) == ((8, 2, 2, 1), jnp.uint8)
        assert (context["label"].shape, context["id"].shape) == ((8,), (8,))
    wire = sum(leaf.nbytes for tree in crossed for leaf in jax.tree.leaves(tree))
    traffic = engine.traffic()
    assert traffic.measured
    np.testing.assert_allclose(traffic.wire, [wire / (8 * STEPS)])
    np.testing.assert_allclose(traffic.codebook, [3 * 2 * 8 * 2 * 4 / (8 * STEPS)])
    # Nothing crosses devices in `fused`, so the encoded arrays count, with a codebook for every
    # third message.
    simulated = tiny.engine("fused", modules=2, codec=VQ).traffic()
    assert not simulated.measured
    np.testing.assert_allclose(simulated.wire, [2 * 2 + 8 + 2 * 8 * 2 * 4 / 3 / 8])


@pytest.mark.medium
def test_messages_are_decoded_with_the_codebook_that_encoded_them(tiny):
    engine = pipeline(tiny, VQ, modules=2)
    program, seen = engine.programs[1, "step"], []

    def look(state, inbox, context):
        seen.append(np.asarray(inbox.below.codebook))
        return program(state, inbox, context)

    engine.programs[1, "step"] = look
    first, encoded = engine.programs[0, "step"], []

    def send(state, inbox, context):
        state, sent, metrics = first(state, inbox, context)
        encoded.append(np.asarray(sent.above.codebook))
        return state, sent, metrics

    engine.programs[0, "step"] = send
    for _ in engine.run(tiny.place(engine, tiny.init(engine.spec)), tiny.source, STEPS):
        pass
    for a, b in zip(encoded, seen, strict=True):
        np.testing.assert_array_equal(a, b)
    changes = [n for n in range(1, STEPS) if not np.array_equal(encoded[n], encoded[n - 1])]
    assert changes == [3, 6]


def test_default_period_keeps_codebooks_under_a_tenth_of_the_codes():
    for shape, codes, dims in [
        ((128, 8, 8, 512), 256, 8),
        ((128, 32, 32, 32), 256, 16),
        ((4, 4, 4, 8), 16, 2),
    ]:
        codec = Vq(codes, dims)
        x = jax.ShapeDtypeStruct(shape, "float32")
        book = jax.eval_shape(codec.codebook, codec.init(x))
        payload = jax.eval_shape(codec.encode, book, x)
        share = 4 * book.size / (codec.period(x) * payload.size * payload.dtype.itemsize)
        assert share <= 0.1
        # The period is the smallest possible.
        assert codec.period(x) == 1 or share * codec.period(x) / (codec.period(x) - 1) > 0.1


def test_int8_is_affine_for_each_example_and_group():
    codec = Int8(2)
    random = np.random.default_rng(0)
    x = (random.normal(size=(3, 5, 4)) * [1, 2, 50, 80] + 7).astype(np.float32)
    sent = codec.encode((), jnp.asarray(x))
    assert (sent.number.dtype, sent.number.shape, sent.low.shape) == (jnp.uint8, x.shape, (3, 2))
    decoded = np.asarray(codec.decode((), sent))
    for example in range(3):
        for group in (slice(0, 2), slice(2, 4)):
            part = x[example, :, group]
            step = (part.max() - part.min()) / 255
            assert np.abs(decoded[example, :, group] - part).max() <= step * 0.501
    # The result of an example does not depend on the others.
    other = x.copy()
    other[1:] *= 1000
    np.testing.assert_array_equal(
        codec.decode((), codec.encode((), jnp.asarray(other)))[0], decoded[0]
    )
    flat = jnp.full((2, 3, 4), -3.25)
    np.testing.assert_array_equal(codec.decode((), codec.encode((), flat)), flat)


# Rings


@pytest.mark.parametrize(
    ("known", "asked", "sent"),
    [
        (False, [0, 1, 2, 3, 4, 6], [0, 3, 6]),
        (False, [1, 2, 3], [1, 3]),  # the first message always carries its codebook
        (True, [1, 2, 3], [3]),
        (True, [None, 6, None, 7], [6]),  # None: a finished module, which publishes nothing
        (False, [None, None], [None]),
        (True, [1, "forget", 2, 4], [2]),
    ],
)
def test_publisher_sends_codebooks_that_the_reader_lacks(tiny, known, asked, sent):
    publisher, carriers = Publisher(tiny.spec(codec=VQ).hops[0].period, known), []
    for updates in asked:
        if updates == "forget":
            publisher.forget()
        elif publisher.fresh("codebook", updates) is not None:
            carriers.append(updates)
    assert carriers == sent
    without = Publisher(0)
    assert [without.fresh((), updates) for updates in (0, 1, None)] == [None] * 3


def entry(n):
    """Returns payload, context and header of message n."""
    return (
        np.full((2, 3), n, np.uint8),
        {"label": np.full(2, n, np.int32), "id": np.full(2, n, np.int32)},
        Header(n, n),
    )


def coded_ring(size=3) -> Ring:
    payload, context, _ = entry(0)
    return Ring((payload, context), size, codebook=np.zeros(2, np.float32))


def filled(count, every=2, size=3) -> Ring:
    """Fills a ring; each codebook holds the number of the message it came with."""
    ring = coded_ring(size)
    for n in range(count):
        ring.add(*entry(n), np.full(2, n, np.float32) if n % every == 0 else None)
    return ring


def test_ring_keeps_a_codebook_while_a_message_refers_to_it():
    for count, kept in [(1, {1}), (3, {1, 2}), (4, {1, 2}), (5, {2, 3}), (7, {3, 4}), (8, {3, 4})]:
        ring = filled(count)
        assert ring.versions() == kept
        assert ring.nbytes == 3 * (6 + 16) + len(kept) * 8
        for _ in range(3 if count >= 3 else count):
            sample = ring.sample()
            n = sample.header.sequence
            # Every second message brings a codebook.
            np.testing.assert_array_equal(sample.message.codebook, n - n % 2)
    assert RingSpec(entry(0)[:2], np.zeros(2, np.float32), 2).nbytes(3) >= filled(8).nbytes


def test_restored_ring_has_its_codebooks():
    ring, other = filled(7), coded_ring()
    other.restore(jax.tree.map(np.asarray, ring.snapshot()))
    assert other.versions() == ring.versions()
    for n in range(7, 12):
        for one in (ring, other):
            one.add(*entry(n), np.full(2, n, np.float32) if n % 2 == 0 else None)
        a, b = ring.sample(), other.sample()
        assert a.header == b.header
        np.testing.assert_array_equal(a.message.codebook, b.message.codebook)


def simulated(tiny, devices, codec, replay=None, **settings) -> SimulatedEngine:
    spec = tiny.spec(codec=codec)
    return SimulatedEngine(
        spec,
        one_group(devices[:1], 3),
        STEPS,
        SimulatedOptions(**settings),
        replay or ReplaySettings(4),
    )


def run(tiny, engine):
    """Returns the metrics of each module in order, and the final state."""
    state = engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)
    by_module = [[], [], []]
    for report in engine.run(state, tiny.source, STEPS):
        for k, metrics in enumerate(report.metrics):
            if metrics:
                by_module[k].append({name: float(value) for name, value in means(metrics).items()})
    return by_module, report.snapshot()


@pytest.mark.slow
@pytest.mark.full_compile
def test_ordered_turns_with_rings_of_one_equal_fused(tiny, devices, to_host):
    fused, _ = tiny.run(tiny.engine("fused", codec=VQ), STEPS)
    _, state = run(tiny, simulated(tiny, devices, VQ, ReplaySettings(1), order="ordered"))
    for a, b in zip(jax.tree.leaves(to_host(state.modules)), jax.tree.leaves(fused), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_only_decoding_with_the_newest_codebook_drifts(tiny, devices):
    uniform = ReplaySettings(4, "uniform")
    every = options("codec", name="vq", codes=8, dims=2, codebook_every=1)
    sent, _ = run(tiny, simulated(tiny, devices, every, uniform))
    assert not any("codec_drift" in metrics for metrics in sent[0] + sent[1] + sent[2])
    latest = options("codec", name="vq", codes=8, dims=2, codebook_every=1, decode="latest")
    newest, _ = run(tiny, simulated(tiny, devices, latest, uniform))
    drift = [metrics["codec_drift"] for metrics in newest[1] + newest[2]]
    assert max(drift) > 1e-3
    assert min(drift) == 0.0  # a message encoded with the newest codebook
    assert newest[1] != sent[1]


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["sent", "latest"])
def test_threads_measure_traffic_of_codebooks(tiny, devices, decode):
    codec = options("codec", name="vq", codes=8, dims=2, codebook_every=2, decode=decode)
    engine = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, (1, 1, 1)), ThreadsOptions(), ReplaySettings(4)
    )
    _, state = run(tiny, engine)
    assert [int(m.updates) for m in state.modules] == [STEPS] * 3
    traffic = engine.traffic()
    assert traffic.measured
    for k, meter in enumerate(engine.meters):
        payload = {0: 4 * 4, 1: 2 * 2}[k] + 8  # one byte per two codes, plus the context
        assert meter.messages == payload * meter.images
        assert meter.codebooks == 2 * 8 * 2 * 4 * 4  # at updates 0, 2, 4 and 6


@pytest.mark.slow
def test_restarted_module_sends_its_codebook_again(tiny, devices):
    codec = options("codec", name="vq", codes=8, dims=2, codebook_every=100)
    engine = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, (1, 1, 1)), ThreadsOptions(), ReplaySettings(4)
    )
    Fault(engine, 1, call=3)
    engine.recover = lambda k: tiny.place(engine, tiny.init(engine.spec)).modules[k]
    run(tiny, engine)
    book = 2 * 8 * 2 * 4
    assert [meter.codebooks for meter in engine.meters] == [book, 2 * book]


# Groups of devices


@pytest.fixture
def gathered(monkeypatch):
    """Records the shapes of what programs copy to all devices of a group, while JAX traces them."""
    shapes, constrain = [], jax.lax.with_sharding_constraint

    def spy(x, sharding):
        shapes.append(x.shape)
        return constrain(x, sharding)

    monkeypatch.setattr(jax.lax, "with_sharding_constraint", spy)
    clear_programs()
    yield shapes
    clear_programs()


def grouped_engine(tiny, devices, name, codec):
    spec = tiny.spec(modules=2, codec=codec)
    if name == "pipeline":
        return tiny.new_engine("pipeline", (2, 1), spec)
    dispatches = Dispatches(2) if name == "loop" else None
    return FusedEngine(spec, one_group(devices[:2], 2), dispatches=dispatches)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["pipeline", "fused", "loop"])
def test_every_device_of_a_group_gets_the_drawn_vectors(tiny, devices, gathered, name):
    # 8 examples with 2 x 2 positions: 8 vectors of 4 channels are drawn to learn from, and 32, all
    # there are, for restarts and for the start.
    codec = options("codec", name="vq", codes=8, dims=2, samples=1)
    tiny.run(grouped_engine(tiny, devices, name, codec), 3)
    assert set(gathered) == {(8, 1, 4), (8, 4, 4)}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["pipeline", "fused", "loop"])
def test_twin_without_the_group_nothing_is_gathered(tiny, devices, gathered, monkeypatch, name):
    for module in (fused, program):
        monkeypatch.setattr(module, "on_group", lambda function, group: function)
    codec = options("codec", name="vq", codes=8, dims=2, samples=1)
    tiny.run(grouped_engine(tiny, devices, name, codec), 3)
    assert gathered == []
