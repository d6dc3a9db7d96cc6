"""Four CPU devices, a home and a compilation cache of the session's own, and small networks to train."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before anything imports JAX; pytest-xdist's workers and every subprocess of a test inherit all of it.
_OWNER = "DGL_JAX_TEST_HOME" not in os.environ
if _OWNER:
    _home = tempfile.mkdtemp(prefix="dgl_jax_tests.")
    os.environ |= {
        "DGL_JAX_TEST_HOME": _home,
        "HOME": _home,  # data sets are cached below it
        # XLA gives all CPU devices one pool, by default of as many threads as devices. On a busy machine three of four can
        # then wait in a reduction for the fourth, whose convolution waits for a free thread.
        "NPROC": "8",
        # Compiling is most of what the suite does, and many tests compile equal programs.
        "JAX_COMPILATION_CACHE_DIR": f"{_home}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

from dgl_jax import registry  # noqa: E402
from dgl_jax.codecs import make_codec  # noqa: E402
from dgl_jax.config import CodecSettings, import_plugins, options  # noqa: E402
from dgl_jax.core.kept import forget  # noqa: E402
from dgl_jax.core.module import ModuleState, make_modules  # noqa: E402
from dgl_jax.data import synthetic  # noqa: E402
from dgl_jax.data.memory import ArraySource  # noqa: E402
from dgl_jax.engines import Engine, EngineState, FusedEngine, PipelineEngine  # noqa: E402
from dgl_jax.engines.placement import assign, one_group  # noqa: E402
from dgl_jax.methods.backprop import Backprop  # noqa: E402
from dgl_jax.methods.dgl import Dgl  # noqa: E402
from dgl_jax.models.blocks import ConvBlock  # noqa: E402
from dgl_jax.models.heads import LinearHead  # noqa: E402
from dgl_jax.schedule import never  # noqa: E402
from dgl_jax.spec import TrainSpec  # noqa: E402
from dgl_jax.tasks import ImageClassification  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)

# Most tests compile with few optimizations, in child processes too, which takes a third of the time with jaxlib 0.10.
# Those marked `full_compile` compile as users do: equality of engines, rounding, memory, and runs long enough to learn.
_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,  # a program in 32 parts is compiled sooner where cores are idle, and takes more work
}
_FAST_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later ones have no choice here
    _FAST["xla_cpu_use_fusion_emitters"] = False
    _FAST_FLAGS += " --xla_cpu_use_fusion_emitters=false"
# What was imported and traced stays: looking through it again and again took a tenth of the time.
gc.set_threshold(50_000, 20, 100)
_compile_options = compiler.get_compile_options
jax.jit(lambda: 0)()  # XLA reads its environment now; what is set below is for child processes

# A file stays with one worker, which makes its shared runs once. With several workers those that take longest come first, so that
# all workers end together; else seconds first, minutes last. A file that is not named comes in between.
LONG = (
    *(
        "test_docs",
        "test_notebooks",
        "test_digits",
        "test_launch",
        "test_every_engine",
        "test_install",
        "test_threads",
        "test_threads_runs",
        "test_environments",
        "test_vq",
        "test_kmeans",
    ),
    *(
        "test_resume",
        "test_engines",
        "test_engine_reports",
        "test_coding",
        "test_codec_runs",
        "test_residual",
        "test_examples",
        "test_accelerator",
        "test_configs",
    ),
    *("test_plugin", "test_training", "test_ops", "test_testing"),
)
QUICK = (
    "test_schedule",
    "test_imports",
    "test_config",
    "test_metrics",
    "test_placement",
    "test_optimizer",
    "test_codecs",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole files, in the order of the items."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "load":
        return None  # somebody asked for another way
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the files; in each, those that compile as users do stand together, since whatever was traced is lost on the way."""
    files = list(dict.fromkeys(item.path.stem for item in items))
    ends = (LONG, QUICK) if hasattr(config, "workerinput") else (QUICK, LONG[::-1])
    place = {
        name: n
        for n, name in enumerate(
            [*ends[0], *(name for name in files if name not in LONG + QUICK), *ends[1]]
        )
    }
    items.sort(
        key=lambda item: (
            place[item.path.stem],
            item.get_closest_marker("full_compile") is not None,
        )
    )


def pytest_report_header() -> str:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return "under test: " + ", ".join(f"{name} {version(name)}" for name in names)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWNER:
        shutil.rmtree(os.environ["DGL_JAX_TEST_HOME"], ignore_errors=True)


def compile_fast(fast: bool) -> None:
    """Compiles with few optimizations from now on, here and in child processes, or as users do."""

    def options(
        *args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        return _compile_options(
            *args, env_options_overrides=(env_options_overrides or {}) | _FAST, **kwargs
        )

    if fast != (compiler.get_compile_options is not _compile_options):
        jax.clear_caches()
        compiler.get_compile_options = options if fast else _compile_options
        os.environ |= {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(fast)),
            "XLA_FLAGS": _FAST_FLAGS if fast else "",
        }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    compile_fast(item.get_closest_marker("full_compile") is None)


_TRACED = (
    *("jax", "flax", "optax", "examples"),
    *(
        f"dgl_jax.{room}"
        for room in (
            "codecs",
            "core",
            "engines",
            "methods",
            "models",
            "objectives",
            "ops",
            "run.evaluator",
            "tasks",
        )
    ),
)


class _MonkeyPatch(pytest.MonkeyPatch):
    """Forgets the programs that are kept for equal specs, so that a replaced function is in those that follow, and only there."""

    replaced = False

    def setattr(self, target: Any, *args: Any, **kwargs: Any) -> None:
        name = (
            target
            if isinstance(target, str)
            else getattr(target, "__module__", None) or target.__name__
        )
        if name.startswith(_TRACED):
            self.replaced = True
            forget()
        super().setattr(target, *args, **kwargs)

    def undo(self) -> None:
        super().undo()
        if self.replaced:
            forget()


@pytest.fixture
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    patch = _MonkeyPatch()
    yield patch
    patch.undo()


@pytest.fixture(autouse=True)
def _pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draws none at the end of runs in this process: half a second each. Tests marked `pictures` look at them."""
    if request.node.get_closest_marker("pictures"):
        yield
        return
    from dgl_jax.run import plots

    drawn, plots.plot = plots.plot, lambda workdir: []
    yield
    plots.plot = drawn


@pytest.fixture(scope="session", autouse=True)
def _home_is_not_touched() -> None:
    assert Path("~").expanduser() == Path(os.environ["DGL_JAX_TEST_HOME"])


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """Forgets what was traced, before and after: JAX keeps the branch of a choice by platform that a test has replaced, and later
    programs of the process would be made of it.
    """
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    found = jax.devices("cpu")
    assert len(found) == 4
    return found


def host(tree: Any) -> Any:
    """A pytree of NumPy arrays: keys as their data."""

    def one(x: Any) -> Any:
        return np.array(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    return jax.tree.map(one, tree)


class Tiny:
    """Three convolution blocks on 4x4 images; every spec, and every engine with its compiled programs, is made once."""

    batch_size = 8

    def __init__(self) -> None:
        self.source = ArraySource(
            synthetic.make(64, 20, 4), batch_size=self.batch_size, seed=0, validation_fraction=0.2
        )
        self._spec = cache(self._make_spec)
        self._engine = cache(self.new_engine)

    def spec(
        self,
        modules: int = 3,
        dtype: str = "float32",
        codec: str | CodecSettings = "identity",
        heads: bool = True,
        augment: str = "none",
    ) -> TrainSpec:
        """`heads` false: of the last module only. The same object for the same arguments."""
        return self._spec(modules, dtype, codec, heads, augment)

    def engine(self, name: str, groups: tuple[int, ...] = (), **spec: Any) -> Engine:
        """`groups`: devices of each module; empty: all modules on the first device. The same object for the same arguments."""
        return self._engine(
            name, groups, self.spec(**({"heads": False} if name == "backprop" else {}), **spec)
        )

    def _make_spec(
        self, modules: int, dtype: str, codec: str | CodecSettings, heads: bool, augment: str
    ) -> TrainSpec:
        blocks = [
            ConvBlock(4, dtype=dtype),
            ConvBlock(4, pool=True, dtype=dtype),
            ConvBlock(6, dtype=dtype),
        ]
        last, example = modules - 1, jax.ShapeDtypeStruct(self.source.example_shape, "uint8")
        return TrainSpec(
            modules=make_modules(
                blocks,
                {1: (0,), 2: (0, 2), 3: (0, 1, 2)}[modules],
                [LinearHead(10, dtype) if heads or k == last else None for k in range(modules)],
            ),
            method=Dgl() if heads else Backprop(),
            optimizer=optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
            task=ImageClassification(example, augment=augment, mean=(0.5,) * 3, std=(0.25,) * 3),
            codec=make_codec(
                options("codec", name=codec) if isinstance(codec, str) else codec, dtype
            ),
            decode=getattr(codec, "decode", "sent"),
            seed=0,
            batch_size=self.batch_size,
        )

    def new_engine(self, name: str, groups: tuple[int, ...], spec: TrainSpec) -> Engine:
        """With programs of its own."""
        count = len(spec.modules)
        placement = (
            assign(jax.devices(), count, groups) if groups else one_group(jax.devices()[:1], count)
        )
        if name == "pipeline":
            return PipelineEngine(spec, placement)
        return FusedEngine(spec, placement)

    def init(self, spec: TrainSpec) -> tuple[ModuleState, ...]:
        """States on the host, drawn by NumPy: nothing to compile. A block's values do not depend on where the network is cut."""

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            name = jax.tree_util.keystr(path)
            if "opt_state" in name or "updates" in name:
                return np.zeros(leaf.shape, leaf.dtype)
            random = np.random.default_rng(
                list(name.split(".", 1)[1].replace("objective", "head").encode())
            )
            if name.endswith(("['scale']", "['var']")):
                return np.ones(leaf.shape, leaf.dtype)
            return random.normal(0, 0.3, leaf.shape).astype(leaf.dtype)

        shapes = spec.abstract_states()
        states = jax.tree_util.tree_map_with_path(
            draw, tuple(state.replace(rng=None) for state in shapes)
        )
        return tuple(
            state.replace(rng=np.array([0, k], np.uint32)) for k, state in enumerate(states)
        )

    def place(self, engine: Engine, states: Sequence[ModuleState]) -> EngineState:
        """Host states (as `init` and `run` give them) on the engine's devices."""
        return engine.place(
            EngineState(
                tuple(
                    s.replace(rng=jax.random.wrap_key_data(jnp.array(s.rng), impl="threefry2x32"))
                    for s in states
                )
            )
        )

    def run(
        self,
        engine: Engine,
        until: int,
        states: Sequence[ModuleState] | None = None,
        *,
        source: Any = None,
        stop: Callable[[], bool] = never,
    ) -> tuple[tuple[ModuleState, ...], list[Any]]:
        """Trains from `states` (fresh ones by default): the states afterwards and the metrics of each report, on the host."""
        state = self.place(engine, self.init(engine.spec) if states is None else states)
        metrics, report = [], None
        for report in engine.run(state, source or self.source, until, stop):
            metrics.append(host(report.metrics))
        return host((report.snapshot() if report else state).modules), metrics


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def to_host() -> Callable[[Any], Any]:
    return host


@pytest.fixture(scope="module")
def plugin_kinds():
    """The kinds of `examples/plugin` are registered in the tests of this file alone."""
    registries = [
        value for value in vars(registry).values() if isinstance(value, registry.Registry)
    ]
    before = [dict(kinds.items()) for kinds in registries]
    for name in [name for name in sys.modules if name.startswith("examples.plugin")]:
        del sys.modules[name]  # other tests may have been here before
    import_plugins(["examples.plugin"])
    yield
    for kinds, known in zip(registries, before):
        kinds._kinds.clear()
        kinds._kinds.update(known)
