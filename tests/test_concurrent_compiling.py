"""Tests of concurrent compilation, and of the programs that a plan compiles and measures."""

import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from runs import small_config, spec_of
from test_dni import CDNI
from test_plan import small

from dgl_jax import system
from dgl_jax.codecs import CODECS, make_codec
from dgl_jax.config import make_settings, options
from dgl_jax.engines import PipelineEngine, pipeline
from dgl_jax.engines.advance import turn_shapes
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import LinearHead
from dgl_jax.profile import compiling, flops, memory, timing
from dgl_jax.profile.compiling import compile_all
from dgl_jax.run.parts import known_info
from dgl_jax.spec import TrainSpec
from dgl_jax.tools import plan


class Fake:
    """Program that calls a function when it is compiled."""

    def __init__(self, text, compile_=lambda: None):
        self.text, self.compile_ = text, compile_

    def as_text(self):
        return self.text

    def compile(self):
        assert threading.current_thread() is not threading.main_thread()
        self.compile_()
        return self


@pytest.fixture
def threads(monkeypatch):
    """Returns a function that sets the number of processors, 2 at first."""

    def set_count(count):
        monkeypatch.setattr(system, "cpu_count", lambda: count)

    set_count(2)
    return set_count


def test_programs_compile_at_the_same_time(threads):
    def programs():
        together = threading.Barrier(2, timeout=60)
        return [Fake("a", together.wait), Fake("b", together.wait)]

    assert [program.text for program in compile_all(programs(), "tests")] == ["a", "b"]


def test_twin_with_one_thread_fails(threads):
    threads(1)
    together = threading.Barrier(2, timeout=0.1)
    with pytest.raises(threading.BrokenBarrierError):
        compile_all([Fake("a", together.wait), Fake("b", together.wait)], "tests")


def test_later_programs_and_other_work_overlap_with_compiling(threads):
    lowered, called = threading.Event(), threading.Event()

    def programs():
        yield Fake("a", lambda: (lowered.wait(60), called.wait(60)))
        lowered.set()
        yield Fake("b")

    compile_all(programs(), "tests", called.set)
    assert lowered.is_set()
    assert called.is_set()


def test_programs_that_differ_in_names_only_compile_once(threads, caplog):
    compiled = []
    texts = [
        'module @jit_module_1 { f32 {jax.result_info = "block_1"} }',
        'module @jit_module_2 { f32 {jax.result_info = "block_2"} }',
        'module @jit_module_2 { f16 {jax.result_info = "block_2"} }',
    ]
    with caplog.at_level("INFO", logger="dgl_jax"):
        results = compile_all(
            (Fake(text, lambda text=text: compiled.append(text)) for text in texts), "3 modules"
        )
    assert sorted(compiled) == sorted([texts[0], texts[2]])
    assert [program.text for program in results] == [texts[0], texts[0], texts[2]]
    assert "compiled 2 programs of 3 modules in " in caplog.text


@pytest.mark.parametrize("error", [UserError("config.x=1: wrong"), MemoryError("none left")])
def test_errors_of_a_thread_reach_the_caller(threads, error):
    threads(1)
    started, traced = [], threading.Event()

    def failing():
        started.append("a")
        traced.wait(60)  # the program behind it is then waiting for the only thread
        raise error

    def other():
        started.append("b")

    with pytest.raises(type(error)) as caught:
        compile_all([Fake("a", failing), Fake("b", other)], "tests", traced.set)
    assert caught.value is error
    assert started[0] == "a"


@pytest.mark.parametrize("cancels", [True, False])
def test_error_of_tracing_cancels_waiting_programs(threads, monkeypatch, cancels):
    threads(1)
    busy, stop, started = threading.Event(), threading.Event(), []

    class Threads(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures and cancels)
            stop.set()
            super().shutdown(wait=wait)

    def programs():
        yield Fake("a", lambda: (busy.set(), stop.wait(60)))
        yield Fake("b", lambda: started.append("b"))
        busy.wait(60)
        raise UserError("config.model.head: does not fit")

    monkeypatch.setattr(compiling, "ThreadPoolExecutor", Threads)
    with pytest.raises(UserError, match="does not fit"):
        compile_all(programs(), "tests")
    assert started == ([] if cancels else ["b"])


# Programs of a network

BLOCKS = (
    ConvBlock(4),
    ConvBlock(4),
    ConvBlock(4),
    ConvBlock(4, pool=True),
    ConvBlock(4),
    ConvBlock(6),
    ConvBlock(4),
)
# Channels and side length of the inputs of each block, and of the head after the last one.
SHAPES = [(3, 8), (4, 8), (4, 8), (4, 8), (4, 4), (4, 4), (6, 4), (4, 4)]


def network_of(blocks):
    inputs = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
    return flops.Blocks(blocks, ((LinearHead(10),) * len(blocks),), inputs)


@pytest.fixture
def compiled(monkeypatch):
    """Counts the compiled programs, and replaces the clock by a function of a program's shapes.

    A block takes one second per value of its inputs, and 0.5 s more with the gradient of its
    inputs. A head takes 0.25 s less than that.
    """
    programs, original = [], compile_all

    def counted(lowered, *args):
        results = original(lowered, *args)
        programs.extend(results)
        return results

    def clocked(program, state, inputs, context, published, repeats, concurrency):
        arguments = (state, inputs, context, published)
        assert jax.tree.map(lambda leaf: leaf.shape, arguments) == jax.tree.map(
            lambda leaf: leaf.shape, program.args_info[0]
        )
        seconds = float(inputs.size)
        assert published == {}
        if list(context) == ["label"]:
            seconds -= 0.25
        else:
            assert list(context) == ["cotangent"]
            seconds += 0.5 * (program.out_info[2] is not None)
        return timing.Elapsed(seconds, 2 * seconds), (state,)

    monkeypatch.setattr(timing, "compile_all", counted)
    monkeypatch.setattr(timing, "clocked", clocked)
    return programs


def measure(blocks, optimizer):
    return timing.block_times(network_of(blocks), optimizer, jax.devices()[0])


@pytest.mark.medium
def test_times_of_repeated_blocks_are_in_their_rows(compiled, tiny):
    times = measure(BLOCKS, tiny.spec().optimizer)
    sizes = [2.0 * channels * side**2 for channels, side in SHAPES]
    first, after = tuple(sizes[:-1]), sizes[1:]
    inner = (sizes[0], *(size + 0.5 for size in sizes[1:-1]))
    assert times.seconds == BlockCosts(first, inner, (tuple(size - 0.25 for size in after),))
    assert times.processor.inner == tuple(2 * seconds for seconds in inner)
    # Six different blocks, all but the first one also with the gradient of their inputs; heads for
    # 4 channels at 8x8 and at 4x4, and for 6 channels.
    assert len(compiled) == len(set(map(id, compiled))) == 6 + 5 + 3


@pytest.mark.medium
def test_twin_with_unequal_blocks_traces_more_programs(compiled, tiny):
    named = (*BLOCKS[:2], ConvBlock(4, name="other"), *BLOCKS[3:])
    measure(named, tiny.spec().optimizer)
    assert len(compiled) == 6 + 5 + 3 + 2


def test_error_while_compiling_a_block_reaches_the_caller(compiled, tiny, monkeypatch):
    def compile_(self, *args, **options):
        assert threading.current_thread() is not threading.main_thread()
        raise UserError("config.model.name: cannot be compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    with pytest.raises(UserError, match="cannot be compiled"):
        measure(BLOCKS[:1], tiny.spec().optimizer)


def repeated_modules():
    """Returns a spec of four modules, of which the second and the third have equal programs."""
    settings = make_settings(
        small_config(model__name="resnet20", model__modules=4, model__split="0,1,2,3")
    )
    return spec_of(settings, known_info(settings.data))


@pytest.mark.medium
@pytest.mark.parametrize(("names", "count"), [(compiling._NAMES, 3), (re.compile("(?!)"), 4)])
def test_equal_modules_compile_once(monkeypatch, names, count):
    compiled, original = [], jax.stages.Lowered.compile

    def compile_(self, *args, **options):
        compiled.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    monkeypatch.setattr(compiling, "_NAMES", names)
    programs = memory.module_memory(repeated_modules())
    assert len(compiled) == count
    assert programs[1] == programs[2] != programs[3]


# Order of the work of a plan


@pytest.fixture
def order(monkeypatch):
    """Replaces the measurement; returns a list of the calls that compile modules or measure."""
    calls = []

    def block_times(network, optimizer, device, concurrency, meanwhile):
        meanwhile()
        calls.append("blocks")
        return plan.stated_times("1,2,3,4", network, 2)

    def module_memory(spec):
        calls.append(f"modules for {spec.batch_size} images")

    monkeypatch.setattr(plan, "block_times", block_times)
    monkeypatch.setattr(plan, "module_memory", module_memory)
    return calls


@pytest.mark.medium
def test_modules_compile_before_blocks_are_measured(order):
    plan.plan(small())
    assert order == ["modules for 8 images", "blocks"]
    order.clear()
    plan.plan(small(), devices=4)
    assert order == ["modules for 8 images", "blocks"]
    order.clear()
    plan.plan(small(), devices=6)
    assert order == ["modules for 4 images", "blocks"]


@pytest.mark.medium
def test_modules_that_depend_on_the_times_compile_after_them(order):
    plan.plan(small(model__split="time"))
    assert order == ["blocks", "modules for 8 images"]


def test_codecs_are_compared_without_tracing_the_network_again(monkeypatch):
    settings = small(codec__dims=4, codec__codes=16)
    spec = spec_of(settings, known_info(settings.data))
    fresh = {
        name: dataclasses.replace(spec, codec=make_codec(options, "float32"))
        for name in CODECS
        for options in [plan._codec_options(settings, name)]
    }
    expected = {name: other.traffic() for name, other in fresh.items()}
    assert len({traffic.wire for traffic in expected.values()}) == len(expected) > 3
    assert spec.hops
    monkeypatch.setattr(TrainSpec, "abstract_states", lambda spec: pytest.fail("traced again"))
    for name, other in fresh.items():
        assert plan._with_codec(spec, other.codec).traffic() == expected[name]
    with pytest.raises(pytest.fail.Exception, match="traced again"):
        dataclasses.replace(spec, codec=fresh["bf16"].codec).traffic()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("codec", "groups"),
    [
        ("identity", (2, 1, 1)),
        ("identity", (1,)),
        pytest.param("vq", (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("cdni", (2, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_programs_of_a_pipeline_compile_once_and_before_the_first_turn(
    tiny, codec, groups, monkeypatch
):
    codecs = {"vq": options("codec", name="vq", codes=8, dims=2)}
    made, seeds = tiny.spec(codec=codecs.get(codec, "identity")), iter(range(9, 99))
    if codec == "cdni":  # a method that sends messages down
        made = dataclasses.replace(tiny.spec(heads=False), method=CDNI)
    compiled: list[str] = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def programs(prepared: bool) -> int:
        """Returns the number of programs compiled by two steps with programs of their own."""
        spec = dataclasses.replace(made, seed=next(seeds))
        placement = (
            assign(jax.devices(), 3, groups)
            if len(groups) == 3
            else one_group(jax.devices()[:1], 3)
        )
        engine = PipelineEngine(spec, placement)
        engine._prepared = prepared
        state = tiny.place(engine, tiny.init(spec))
        compiled.clear()
        list(engine.run(state, tiny.source, 2))
        return len(compiled)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        programs(True)  # compiles what all specs share
        assert programs(False) == programs(True) >= 3
        # Twin: compiled for other arguments.
        monkeypatch.setattr(
            pipeline,
            "turn_shapes",
            lambda spec, placement, k: turn_shapes(
                dataclasses.replace(spec, batch_size=16), placement, k
            ),
        )
        assert programs(False) == programs(True) + 3
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
