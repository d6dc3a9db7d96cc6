"""Codecs inside the engines: what crosses, which codebook decodes it, and that coded runs repeat and resume."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import records, same_run, small_config
from test_resume import interrupted
from test_threads import Fault

from dgl_jax import UserError
from dgl_jax.codecs import Int8, Vq
from dgl_jax.config import ReplaySettings, options
from dgl_jax.engines import (
    EngineState,
    PipelineEngine,
    SimulatedEngine,
    SimulatedOptions,
    ThreadsEngine,
    ThreadsOptions,
)
from dgl_jax.engines.base import Publisher
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.export import export_run, load_exported
from dgl_jax.objectives import means
from dgl_jax.replay import Ring, RingSpec
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.plots import plot
from dgl_jax.train import train_and_evaluate
from dgl_jax.types import Header

VQ = options("codec", name="vq", codes=8, dims=2, codebook_every=3)
STEPS = 7
FIELDS = {"codec__name": "vq", "codec__codes": 16, "codec__dims": 2, "codec__codebook_every": 5}


@pytest.fixture
def crossed(monkeypatch):
    """Everything that the pipeline moves between devices."""
    moved = []
    put = PipelineEngine.run.__globals__["put"]

    def spy(tree, sharding):
        moved.append(tree)
        return put(tree, sharding)

    monkeypatch.setitem(PipelineEngine.run.__globals__, "put", spy)
    return moved


def pipeline(tiny, codec, **spec) -> PipelineEngine:
    """One of its own, whose meters begin at zero."""
    made = tiny.spec(codec=codec, **spec)
    return PipelineEngine(made, assign(jax.devices(), len(made.modules), (1,) * len(made.modules)))


def test_codes_cross_and_codebooks_on_their_schedule(tiny, crossed):
    made = pipeline(tiny, VQ, modules=2)  # 2x2 positions of 4 channels: two groups
    state = tiny.place(made, tiny.init(made.spec))
    crossed.clear()
    for _ in made.run(state, tiny.source, STEPS):
        pass
    books = [tree for tree in crossed if isinstance(tree, jax.Array)]
    packets = [tree for tree in crossed if isinstance(tree, tuple)]
    assert [(book.shape, book.dtype) for book in books] == [
        ((1, 2, 8, 2), jnp.float32)
    ] * 3  # one stage, at updates 0, 3 and 6
    assert len(packets) == STEPS
    for payload, context in packets:
        # eight codes: four bits each, two groups a byte
        assert (payload.shape, payload.dtype) == ((8, 2, 2, 1), jnp.uint8)
        assert (context["label"].shape, context["id"].shape) == ((8,), (8,))
    wire = sum(leaf.nbytes for tree in crossed for leaf in jax.tree.leaves(tree))
    traffic = made.traffic()
    assert traffic.measured
    np.testing.assert_allclose(traffic.wire, [wire / (8 * STEPS)])
    np.testing.assert_allclose(traffic.codebook, [3 * 2 * 8 * 2 * 4 / (8 * STEPS)])
    # Nothing crosses on one device: the encoded arrays are counted, with a codebook every third packet.
    simulated = tiny.engine("fused", modules=2, codec=VQ).traffic()
    assert not simulated.measured
    np.testing.assert_allclose(simulated.wire, [2 * 2 + 8 + 2 * 8 * 2 * 4 / 3 / 8])


def test_a_packet_is_decoded_with_the_codebook_it_was_encoded_with(tiny):
    made = pipeline(tiny, VQ, modules=2)
    program, seen = made.programs[1, "step"], []

    def look(state, inbox, context):
        seen.append(np.asarray(inbox.below.codebook))
        return program(state, inbox, context)

    made.programs[1, "step"] = look
    first, encoded = made.programs[0, "step"], []

    def send(state, inbox, context):
        state, sent, metrics = first(state, inbox, context)
        encoded.append(np.asarray(sent.above.codebook))
        return state, sent, metrics

    made.programs[0, "step"] = send
    for _ in made.run(tiny.place(made, tiny.init(made.spec)), tiny.source, STEPS):
        pass
    for a, b in zip(encoded, seen, strict=True):
        np.testing.assert_array_equal(a, b)
    changes = [n for n in range(1, STEPS) if not np.array_equal(encoded[n], encoded[n - 1])]
    assert changes == [3, 6]


def test_by_default_codebooks_take_less_than_a_tenth_of_the_codes():
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
        assert (
            codec.period(x) == 1 or share * codec.period(x) / (codec.period(x) - 1) > 0.1
        )  # and no more seldom than needed


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
    # An image's result does not depend on its neighbours.
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
        (False, [1, 2, 3], [1, 3]),  # the first one, whatever the schedule says
        (True, [1, 2, 3], [3]),
        (True, [None, 6, None, 7], [6]),  # a module that only feeds publishes nothing
        (False, [None, None], [None]),
        (True, [1, "forget", 2, 4], [2]),
    ],
)
def test_a_codebook_goes_along_where_the_reader_lacks_it(tiny, known, asked, sent):
    hop = tiny.spec(codec=VQ).hops[0]
    publisher, found = Publisher(hop, known), []
    for updates in asked:
        if updates == "forget":
            publisher.forget()
        elif publisher.fresh("codebook", updates) is not None:
            found.append(updates)
    assert found == sent
    without = Publisher(hop._replace(period=0))
    assert [without.fresh((), updates) for updates in (0, 1, None)] == [None] * 3


def entry(n):
    """Packet n."""
    return (
        np.full((2, 3), n, np.uint8),
        {"label": np.full(2, n, np.int32), "id": np.full(2, n, np.int32)},
        Header(n, n),
    )


def coded_ring(size=3) -> Ring:
    payload, context, _ = entry(0)
    return Ring((payload, context), size, codebook=np.zeros(2, np.float32))


def filled(count, every=2, size=3) -> Ring:
    """Codebook n holds the number of the packet it came with."""
    ring = coded_ring(size)
    for n in range(count):
        ring.add(*entry(n), np.full(2, n, np.float32) if n % every == 0 else None)
    return ring


def test_a_ring_keeps_a_codebook_as_long_as_a_packet_refers_to_it():
    for count, kept in [(1, {1}), (3, {1, 2}), (4, {1, 2}), (5, {2, 3}), (7, {3, 4}), (8, {3, 4})]:
        ring = filled(count)
        assert ring.versions() == kept
        assert ring.nbytes == 3 * (6 + 16) + len(kept) * 8
        for _ in range(3 if count >= 3 else count):
            found = ring.sample()
            n = found.header.sequence
            np.testing.assert_array_equal(
                found.message.codebook, n - n % 2
            )  # the one of that packet or of the one before it
    assert RingSpec(entry(0)[:2], np.zeros(2, np.float32), 2).nbytes(3) >= filled(8).nbytes


def test_codebooks_come_back_with_the_ring():
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


def run(tiny, made):
    """Metrics of each module, in order, and the state at the end."""
    state = made.resume(tiny.place(made, tiny.init(made.spec)), None)
    found = [[], [], []]
    for report in made.run(state, tiny.source, STEPS):
        for k, metrics in enumerate(report.metrics):
            if metrics:
                found[k].append({name: float(value) for name, value in means(metrics).items()})
    return found, report.snapshot()


@pytest.mark.slow
@pytest.mark.full_compile
def test_ordered_turns_and_rings_of_one_are_fused_bit_for_bit(tiny, devices, to_host):
    fused, _ = tiny.run(tiny.engine("fused", codec=VQ), STEPS)
    _, state = run(tiny, simulated(tiny, devices, VQ, ReplaySettings(1), order="ordered"))
    for a, b in zip(jax.tree.leaves(to_host(state.modules)), jax.tree.leaves(fused), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_only_the_newest_codebook_drifts(tiny, devices):
    uniform = ReplaySettings(4, "uniform")
    every = options("codec", name="vq", codes=8, dims=2, codebook_every=1)
    sent, _ = run(tiny, simulated(tiny, devices, every, uniform))
    assert not any("codec_drift" in metrics for metrics in sent[0] + sent[1] + sent[2])
    latest = options("codec", name="vq", codes=8, dims=2, codebook_every=1, decode="latest")
    newest, _ = run(tiny, simulated(tiny, devices, latest, uniform))
    drift = [metrics["codec_drift"] for metrics in newest[1] + newest[2]]
    assert max(drift) > 1e-3
    assert min(drift) == 0.0  # a packet that is the newest itself
    assert newest[1] != sent[1]


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["sent", "latest"])
def test_threads_with_codebooks_count_what_crossed(tiny, devices, decode):
    codec = options("codec", name="vq", codes=8, dims=2, codebook_every=2, decode=decode)
    made = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, (1, 1, 1)), ThreadsOptions(), ReplaySettings(4)
    )
    _, state = run(tiny, made)
    assert [int(m.updates) for m in state.modules] == [STEPS] * 3
    traffic = made.traffic()
    assert traffic.measured
    for k, meter in enumerate(made.meters):
        payload = {0: 4 * 4, 1: 2 * 2}[k] + 8  # a byte for two codes, and the context
        assert meter.messages == payload * meter.images
        assert meter.codebooks == 2 * 8 * 2 * 4 * 4  # at updates 0, 2, 4 and 6


@pytest.mark.slow
def test_a_restarted_module_sends_its_codebook_again(tiny, devices):
    codec = options("codec", name="vq", codes=8, dims=2, codebook_every=100)
    made = ThreadsEngine(
        tiny.spec(codec=codec), assign(devices, 3, (1, 1, 1)), ThreadsOptions(), ReplaySettings(4)
    )
    Fault(made, 1, call=3)
    made.recover = lambda k: tiny.place(made, tiny.init(made.spec)).modules[k]
    run(tiny, made)
    book = 2 * 8 * 2 * 4
    assert [meter.codebooks for meter in made.meters] == [book, 2 * book]


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "simulated"])
def test_resuming_repeats_every_bit(tmp_path, engine, monkeypatch):
    config = partial(small_config, engine__name=engine, replay__size=3, **FIELDS)
    train_and_evaluate(config(), tmp_path / "whole")
    interrupted(tmp_path / "parts", 7, config())
    shutil.copytree(tmp_path / "parts", tmp_path / "broken")
    train_and_evaluate(config(), tmp_path / "parts")
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    # Its twin: what has been learnt but not yet published is forgotten.
    load = Checkpoints._load

    def forgetful(self, *args):
        found = load(self, *args)
        first, *others = found.state.modules
        of_codec = first.extras["codec"]
        unlearnt = of_codec["learnt"].replace(entries=jnp.copy(of_codec["published"]))
        first = first.replace(extras={"codec": of_codec | {"learnt": unlearnt}})
        return dataclasses.replace(found, state=EngineState((first, *others)))

    monkeypatch.setattr(Checkpoints, "_load", forgetful)
    train_and_evaluate(config(), tmp_path / "broken")
    assert not same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("coded") / "run"
    return workdir, train_and_evaluate(small_config(**FIELDS), workdir)


@pytest.mark.slow
def test_what_a_run_says_of_its_codec(trained):
    workdir, summary = trained
    assert summary.wire == "simulated"
    last = next(r for r in reversed(records(workdir)) if "train/module_0/codec_error" in r)
    assert set(last) >= {
        f"train/module_0/codec_{name}" for name in ("error", "perplexity", "dead", "skipped")
    }
    assert (
        last["wire/module_0/bytes_per_image"]
        == summary.wire_bytes_per_image[0]
        < summary.raw_bytes_per_image[0] / 4
    )
    assert (
        last["wire/module_0/compression"]
        == summary.raw_bytes_per_image[0] / summary.wire_bytes_per_image[0]
    )
    assert last["wire/module_0/codebook_share"] == summary.codebook_share[0]
    assert summary.codec_error == [last["train/module_0/codec_error"]]
    assert 0 < summary.codec_error[0] < 1
    assert (
        json.loads((workdir / "summary.json").read_text())["codebook_share"]
        == summary.codebook_share
    )
    assert workdir / "plots" / "codec.png" in plot(workdir)


@pytest.mark.slow
def test_evaluation_applies_the_published_codebook(trained, tiny, to_host):
    made = tiny.engine("fused", codec=VQ)
    states, _ = tiny.run(made, STEPS)
    placed = tiny.place(made, states)
    batch = next(tiny.source.evaluation("test"))
    coded, _, _ = Evaluator(made.spec, made.placement).answers(placed.modules, batch)
    plain, _, _ = Evaluator(made.spec, made.placement, codec=False).answers(placed.modules, batch)
    np.testing.assert_array_equal(coded[0], plain[0])  # nothing has crossed yet
    assert np.abs(np.asarray(coded[1]) - np.asarray(plain[1])).max() > 1e-4
    # The published one: what has been learnt since plays no part.
    learnt = [
        s.replace(extras={"codec": s.extras["codec"] | {"learnt": None}}) if s.extras else s
        for s in placed.modules
    ]
    again, _, _ = Evaluator(made.spec, made.placement).answers(learnt, batch)
    np.testing.assert_array_equal(again[1], coded[1])


@pytest.mark.slow
def test_an_export_contains_the_codebooks(trained):
    workdir, _ = trained
    network = load_exported(export_run(workdir))
    assert network.variables[0]["codebook"].shape[2:] == (16, 2)
    assert network.variables[1]["codebook"] == ()
    images = np.random.default_rng(0).integers(
        0, 256, (5, *network.spec.task.example.shape), np.uint8
    )
    with_codec = network.logits(images)[1]
    broken = load_exported(workdir / "export")
    broken.variables[0]["codebook"] = np.zeros_like(broken.variables[0]["codebook"])
    assert not np.allclose(broken.logits(images)[1], with_codec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codec__dims": 3}, r"config\.codec\.dims=3: does not divide \d+ channels"),
        ({"codec__name": "int8", "codec__dims": 5}, r"config\.codec\.dims=5: does not divide"),
        ({"codec__codes": 0}, r"config\.codec\.codes=0: must be between 1 and 65536"),
        ({"codec__codes": 65537}, r"config\.codec\.codes=65537: must be between"),
        ({"codec__decay": 1.5}, r"config\.codec\.decay=1\.5: must be between"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(small_config(**(FIELDS | fields)), tmp_path)


@pytest.mark.slow
def test_a_checkpoint_with_a_codebook_of_another_size_is_refused(trained, tmp_path):
    workdir, _ = trained
    with pytest.raises(UserError, match=r"config\.codec\.codes \(was 16, is now 32\)"):
        train_and_evaluate(
            small_config(**(FIELDS | {"codec__codes": 32, "train__steps": 20})), workdir
        )
