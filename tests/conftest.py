"""Settings of the test session, the order of its tests, and shared fixtures.

Every session has four CPU devices and a temporary home directory. Compiled programs are kept in
`.cache/tests`, so that later sessions take less time than the first.
"""

import gc
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Set before JAX is imported. The workers of pytest-xdist and all subprocesses of tests inherit it.
_OWNER = "DGL_JAX_TEST_HOME" not in os.environ
if _OWNER:
    _home = tempfile.mkdtemp(prefix="dgl_jax_tests.")
    os.environ |= {
        "DGL_JAX_TEST_HOME": _home,
        "HOME": _home,  # data sets are cached below it
        # By default XLA's thread pool has one thread per CPU device, shared by all of them. On a
        # busy machine, three of four devices can then block all threads while they wait in a
        # reduction for the fourth, whose convolution needs a free thread.
        "NPROC": "8",
        # The suite spends most of its time compiling, and many tests compile equal programs.
        "JAX_COMPILATION_CACHE_DIR": f"{_home}/jax",  # used if `.cache` cannot be written
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402
from tiny import Tiny, host  # noqa: E402

from dgl_jax.config import import_plugins, registry  # noqa: E402
from dgl_jax.core.program_cache import clear_programs  # noqa: E402
from dgl_jax.run.compiling import store_programs  # noqa: E402

if _OWNER:
    _programs = Path(__file__).parents[1] / ".cache" / "tests"
    store_programs(str(_programs), os.environ["NPROC"])
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
jax.config.update("jax_num_cpu_devices", 4)
# No test asserts a time, not even of one example.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

# Most tests, and their child processes, compile with few optimizations, which takes a third of the
# time with jaxlib 0.10. Tests marked `full_compile` compile as users do: they compare engines,
# check rounding or memory, or train until something is learned.
_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # Compiling one program in 32 parallel parts costs more work and only helps if cores are idle.
    "xla_cpu_parallel_codegen_split_count": 1,
}
_FAST_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # later versions have no such option
    _FAST["xla_cpu_use_fusion_emitters"] = False
    _FAST_FLAGS += " --xla_cpu_use_fusion_emitters=false"
# Imported modules and traced programs live as long as the session, and repeated passes of the
# garbage collector over them took a tenth of the time.
gc.set_threshold(50_000, 20, 100)
# A damaged checkpoint leaves failed reads behind, which asyncio logs in whichever test the garbage
# collector meets them. `test_a_damaged_checkpoint_prints_one_line` sees what a user sees.
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
_compile_options = compiler.get_compile_options
jax.jit(lambda: 0)()  # XLA reads its environment here; later changes affect child processes only

# All tests of a file run in the same worker, so that the runs they share are trained once. With
# several workers the longest files come first, so that all workers end at about the same time. In a
# single process the quickest files come first. Files that are not listed come in between.
LONG = (
    "test_docs",
    "test_delayed_runs",
    "test_objective_runs",
    "test_world",
    "test_diagnostics_engines",
    "test_diagnostics",
    "test_diagnostics_methods",
    "test_every_engine",
    "test_accelerator",
    "test_digits",
    "test_dni",
    "test_dni_runs",
    "test_engines",
    "test_install",
    "test_notebooks",
    "test_launch",
    "test_layerwise",
    "test_accelerator_benchmark",
    "test_residual",
    "test_plugin_methods",
    "test_token_runs",
    "test_configs",
    "test_layerwise_runs",
    "test_resume",
    "test_vq",
    "test_delayed",
    "test_threads_runs",
    "test_sweep_processes",
    "test_examples",
    "test_kmeans",
    "test_eight_devices",
    "test_switches",
    "test_deep_models",
    "test_coding",
    "test_plugin",
    "test_ops",
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
    """Returns a scheduler that sends whole files to the workers, in the order of the items."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "load":
        return None  # the command line chose another scheduler
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the test files, and puts the `full_compile` tests of each file at its end.

    Switching between the two ways of compiling clears JAX's caches, so it should happen rarely.
    """
    files = list(dict.fromkeys(item.path.stem for item in items))
    first, last = (LONG, QUICK) if hasattr(config, "workerinput") else (QUICK, LONG[::-1])
    middle = [name for name in files if name not in LONG + QUICK]
    position = {name: index for index, name in enumerate([*first, *middle, *last])}
    items.sort(
        key=lambda item: (
            position[item.path.stem],
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
    """Selects how later programs are compiled, in this process and in its children.

    Args:
      fast: compile with few optimizations; if False, as users do.
    """

    def fast_options(
        *args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        return _compile_options(
            *args, env_options_overrides=(env_options_overrides or {}) | _FAST, **kwargs
        )

    if fast != (compiler.get_compile_options is not _compile_options):
        jax.clear_caches()
        compiler.get_compile_options = fast_options if fast else _compile_options
        os.environ |= {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(fast)),
            "XLA_FLAGS": _FAST_FLAGS if fast else "",
        }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    compile_fast(item.get_closest_marker("full_compile") is None)


# Packages with functions that may be part of a traced program.
_TRACED = (
    "jax",
    "flax",
    "optax",
    "examples",
    "dgl_jax.codecs",
    "dgl_jax.core",
    "dgl_jax.engines",
    "dgl_jax.methods",
    "dgl_jax.models",
    "dgl_jax.objectives",
    "dgl_jax.ops",
    "dgl_jax.run.evaluator",
    "dgl_jax.tasks",
)


class _MonkeyPatch(pytest.MonkeyPatch):
    """MonkeyPatch that clears the caches of jitted functions when it replaces a traced function.

    Programs that are built while the patch is active contain the replacement, and no others do.
    """

    replaced = False

    def setattr(self, target: Any, *args: Any, **kwargs: Any) -> None:
        name = (
            target
            if isinstance(target, str)
            else getattr(target, "__module__", None) or target.__name__
        )
        if name.startswith(_TRACED):
            self.replaced = True
            clear_programs()
        super().setattr(target, *args, **kwargs)

    def undo(self) -> None:
        super().undo()
        if self.replaced:
            clear_programs()


@pytest.fixture
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    patch = _MonkeyPatch()
    yield patch
    patch.undo()


@pytest.fixture(autouse=True)
def _skip_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skips the plots at the end of runs, which take half a second, unless marked `pictures`."""
    if request.node.get_closest_marker("pictures"):
        yield
        return
    from dgl_jax.run import plots

    original, plots.plot = plots.plot, lambda workdir: []
    yield
    plots.plot = original


@pytest.fixture(scope="session", autouse=True)
def _home_is_temporary() -> None:
    assert Path("~").expanduser() == Path(os.environ["DGL_JAX_TEST_HOME"])


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    """Clears JAX's caches before and after a test that replaces a branch of `platform_dependent`.

    JAX caches the traced branches, so later programs of the process would contain the replacement.
    """
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    cpu_devices = jax.devices("cpu")
    assert len(cpu_devices) == 4
    return cpu_devices


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="session")
def to_host() -> Callable[[Any], Any]:
    return host


@pytest.fixture(scope="module")
def plugin_kinds():
    """Registers the kinds of `examples/plugin` for the tests of one file and removes them after."""
    registries = [
        value for value in vars(registry).values() if isinstance(value, registry.Registry)
    ]
    before = [dict(kinds.items()) for kinds in registries]
    for name in [name for name in sys.modules if name.startswith("examples.plugin")]:
        del sys.modules[name]  # an earlier file may have imported it; importing registers the kinds
    import_plugins(["examples.plugin"])
    yield
    for kinds, known in zip(registries, before):
        kinds._kinds.clear()
        kinds._kinds.update(known)


@pytest.fixture
def stated(tmp_path: Path) -> str:
    """Returns a file of block times: the modules of `plans.small` take 2, 3 and 1 ms per turn."""
    # The third module consists of the last two blocks; times of 9 ms must not be used.
    times = {
        "first": [1.5, 2.0, 0.25, 9.0],
        "inner": [9.0, 9.0, 9.0, 0.5],
        "heads": [[0.5, 1.0, 9.0, 0.25]],
    }
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times))
    return str(path)


@pytest.fixture
def stated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces compilation: the n-th program needs 100 n scratch, 10 n outputs, n per message."""
    from dgl_jax.profile.memory import ProgramMemory
    from dgl_jax.tools import plan as planning  # here: most tests need no plan

    def module_memory(spec):
        return [ProgramMemory(1000 * n, 100 * n, 10 * n, n) for n, _ in enumerate(spec.modules, 1)]

    monkeypatch.setattr(planning, "module_memory", module_memory)
