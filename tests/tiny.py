"""Small networks for tests, and engines that are compiled once per session."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax.codecs import make_codec
from dgl_jax.config import CodecSettings, options
from dgl_jax.core.module import ModuleState, make_modules
from dgl_jax.data import synthetic
from dgl_jax.data.memory import ArraySource
from dgl_jax.engines import Engine, EngineState, FusedEngine, PipelineEngine
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.methods.backprop import Backprop
from dgl_jax.methods.dgl import Dgl
from dgl_jax.models.blocks import ConvBlock
from dgl_jax.models.heads import LinearHead
from dgl_jax.schedule import never
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import ImageClassification


def host(tree: Any) -> Any:
    """Copies a pytree to NumPy arrays; a random key becomes its data."""

    def to_numpy(x: Any) -> Any:
        return np.array(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    return jax.tree.map(to_numpy, tree)


class Tiny:
    """Convolution blocks on 4x4 images, as specs and engines that are cached by arguments.

    There are three blocks, or four if there are four modules.
    """

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
        """Returns a spec, the same object for the same arguments.

        Args:
          modules: number of modules, 1 to 4.
          dtype: dtype of the activations.
          codec: name of a codec with its default options, or its settings.
          heads: if False, only the last module has a head and the method is back-propagation.
          augment: augmentation of the training images.
        """
        return self._spec(modules, dtype, codec, heads, augment)

    def engine(self, name: str, groups: tuple[int, ...] = (), **spec: Any) -> Engine:
        """Returns an engine, the same object for the same arguments.

        Args:
          name: "pipeline", "fused", or "backprop" for back-propagation under `fused`.
          groups: number of devices per module; empty to put all modules on the first device.
          **spec: arguments of `spec`.
        """
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
        if modules == 4:
            blocks.append(ConvBlock(6, dtype=dtype))
        last, example = modules - 1, jax.ShapeDtypeStruct(self.source.example_shape, "uint8")
        return TrainSpec(
            modules=make_modules(
                blocks,
                {1: (0,), 2: (0, 2), 3: (0, 1, 2), 4: (0, 1, 2, 3)}[modules],
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
        """Returns an uncached engine, for tests that replace functions inside its programs."""
        count = len(spec.modules)
        placement = (
            assign(jax.devices(), count, groups) if groups else one_group(jax.devices()[:1], count)
        )
        if name == "pipeline":
            return PipelineEngine(spec, placement)
        return FusedEngine(spec, placement)

    def init(self, spec: TrainSpec) -> tuple[ModuleState, ...]:
        """Returns states on the host, drawn with NumPy so that nothing is compiled.

        The values of a block do not depend on where the network is cut.
        """

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            name = jax.tree_util.keystr(path)
            if "opt_state" in name or "updates" in name:
                return np.zeros(leaf.shape, leaf.dtype)
            # The seed is the path without the module's index, and the values that tests assert were
            # drawn when the objective was called head.
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
        """Moves host states, as returned by `init` and `run`, to the devices of an engine."""
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
        """Trains until every module has made `until` updates, or until `stop` returns True.

        Args:
          engine: an engine of this class or with a spec of it.
          until: updates per module at the end.
          states: host states to start from; by default those that `init` returns.
          source: training data; by default `self.source`.
          stop: passed to `engine.run`.

        Returns:
          The states after training, and the metrics of each report, all on the host.
        """
        state = self.place(engine, self.init(engine.spec) if states is None else states)
        metrics, report = [], None
        for report in engine.run(state, source or self.source, until, stop):
            metrics.append(host(report.metrics))
        return host((report.snapshot() if report else state).modules), metrics
