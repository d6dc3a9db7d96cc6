"""Checks that a part of a user's own keeps what the package relies on: call them from your tests.

    from dgl_jax import testing

    testing.check_codec("mine", options("codec", name="mine"))

Each raises AssertionError with what does not hold, and takes seconds: a few steps of a small network on made-up images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.codecs import relative_error
from dgl_jax.config import CodecSettings, Settings, make_settings
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import local_step
from dgl_jax.engines import EngineState
from dgl_jax.registry import CODECS, ENGINES, METHODS
from dgl_jax.run.build import Experiment, make_experiment

_STEPS = 4
_SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "image_size": 8, "batch_size": 8, "train_examples": 48},
    "model": {"name": "cnn4", "width": 8, "modules": 2, "head": "linear"},
    "optimizer": {"learning_rate": 0.05},
    "train": {"steps": _STEPS},
}


def small_settings(**groups: Any) -> Settings:
    """Returns the settings of the small run with some groups changed: `small_settings(codec={"name": "mine"})`."""
    return make_settings(
        {name: _SMALL.get(name, {}) | dict(groups.get(name, {})) for name in {**_SMALL, **groups}}
    )


def check_objective(**groups: Any) -> None:
    """Checks the objective of a configuration: `check_objective(objective={"name": "mine"})`.

    Checked are: equal inputs make equal, hashable objectives, so that programs are found again; the loss is a finite scalar and
    every metric a (sum, count); its gradient reaches the module's body; nothing flows to the module below; the context it reads is
    all that it asks for.

    Raises:
      AssertionError: one of them does not hold.
    """
    settings = small_settings(**groups)
    spec, again = (make_experiment(settings, jax.devices()[:1]).spec for _ in range(2))
    assert hash(spec.modules) == hash(again.modules) and spec.modules == again.modules, (
        "equal settings make unequal objectives"
    )
    (state, *_), (module, *_) = spec.init(), spec.modules
    inputs, shapes = (
        jnp.ones(spec.inputs().shape) * 0.5,
        {"image": spec.inputs(), **spec.context(0)},
    )
    assert module.objective is not None, "the method gives modules no objective"
    context: Any = {
        name: jnp.ones(shapes[name].shape, shapes[name].dtype)
        for name in ("id", *module.objective.needs)
    }

    def loss_of(params: Any, inputs: jax.Array) -> Any:
        features, _ = module.apply_body(params, state.batch_stats, inputs, train=True)
        return module.apply_objective(params, state.batch_stats, features, context, train=True)[0]

    local = jax.jit(loss_of)(state.params, inputs)
    assert local.loss.shape == () and bool(jnp.isfinite(local.loss)), f"the loss is {local.loss}"  # noqa: PT018
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in local.metrics.values()), (
        "a metric is no (sum, count)"
    )
    gradient = jax.jit(jax.grad(lambda params: loss_of(params, inputs).loss))(state.params)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["body"])), (
        "no gradient reaches the body"
    )
    # What a step hands on and what it reads are detached: no module trains another one.
    step = lambda x: local_step(module, spec.optimizer, state, x, context)[1].sum()  # noqa: E731
    assert float(jnp.abs(jax.grad(step)(inputs)).max()) == 0, "a gradient reaches the module below"


def check_codec(
    name: str, options: CodecSettings, shape: Sequence[int] = (8, 4, 4, 16), dtype: str = "float32"
) -> None:
    """Checks a registered codec on activations of a shape.

    Checked are: codecs made of equal options are equal and hashable; decoding gives back shape and type, without NaN; a codec that
    calls itself lossless changes no bit; encoding is a function of codebook and activations alone, jitted or not.

    Raises:
      AssertionError: one of them does not hold.
    """
    codec, again = (CODECS[name].make(options, dtype) for _ in range(2))
    assert codec == again and hash(codec) == hash(again), "equal options make unequal codecs"  # noqa: PT018
    assert codec.lossless == CODECS[name].lossless, (
        "the codec and its kind do not agree on `lossless`"
    )
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), shape).astype(dtype)
    state = codec.init(jax.ShapeDtypeStruct(x.shape, x.dtype))
    for updates in range(2):
        state = codec.publish(state, key, x, jnp.int32(updates))
        state, _ = codec.update(state, key, x)
    book = codec.codebook(state)
    payload = jax.jit(codec.encode)(book, x)
    decoded = jax.jit(codec.decode)(book, payload)
    eager = codec.decode(book, codec.encode(book, x))
    assert float(relative_error(decoded, eager)) < 1e-3, "encoding depends on whether it is jitted"
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype), (
        f"decodes to {decoded.shape} {decoded.dtype}"
    )
    assert bool(jnp.isfinite(decoded).all()), "decodes to numbers that are not finite"
    assert not codec.lossless or float(relative_error(x, decoded)) == 0, (
        "calls itself lossless, and changes activations"
    )


def check_engine(name: str, devices: int = 1, **groups: Any) -> None:
    """Checks a registered engine on the first devices.

    Checked are: every module makes as many updates as it is asked for, whole or in two parts; the second part, on the state of the
    first as a checkpoint holds it, ends with the bits of an undisturbed run, if the engine is not continuous; and so does `fused`,
    if the engine is of its family.

    Raises:
      AssertionError: one of them does not hold.
    """
    kind = ENGINES[name]
    groups = {"engine": {"name": name}} | groups
    whole, _ = _trained(make_experiment(small_settings(**groups), jax.devices()[:devices]), _STEPS)
    assert [int(module.updates) for module in whole] == [_STEPS] * len(whole), (
        "not every module has all its updates"
    )
    if not kind.continuous:
        made = make_experiment(small_settings(**groups), jax.devices()[:devices])
        _, half = _trained(made, _STEPS // 2)
        flight = None if half.flight is None else half.flight.snapshot()
        again = make_experiment(small_settings(**groups), jax.devices()[:devices]).engine
        placed = again.place(EngineState(jax.tree.map(_copied, half.modules)))
        resumed, _ = _trained(
            dataclasses.replace(made, engine=again), _STEPS, again.resume(placed, flight)
        )
        assert _same(whole, resumed), "a resumed run differs from a whole one"
    if kind.family == ENGINES["fused"].family:
        fused, _ = _trained(
            make_experiment(
                small_settings(**groups | {"engine": {"name": "fused"}}), jax.devices()[:1]
            ),
            _STEPS,
        )
        assert _same(whole, fused), "is of the family of `fused`, and gives other numbers"


def check_method(name: str, **groups: Any) -> None:
    """Checks a registered method.

    Checked are: under each synchronous engine that runs it, every module makes its updates, a run resumes exactly, and the bits are
    those of `fused`; with a single module it is back-propagation, bit for bit.

    Raises:
      AssertionError: one of them does not hold.
    """
    engines = METHODS[name].engines or ("fused", "pipeline")
    for engine in engines:
        check_engine(
            engine,
            min(2, len(jax.devices())) if engine == "pipeline" else 1,
            method={"name": name},
            **groups,
        )
    model = {"model": _SMALL["model"] | {"modules": 1}, "engine": {"name": engines[0]}}
    # Heads do not apply where there is but the network's classifier.
    one, other = (
        small_settings(**groups | model | {"method": {"name": method}})
        for method in (name, "backprop")
    )
    found = [
        _trained(make_experiment(settings, jax.devices()[:1]), _STEPS)[0]
        for settings in (one, other)
    ]
    assert _same(*found), "a single module gives other numbers than back-propagation"


def _trained(
    made: Experiment, until: int, state: EngineState | None = None
) -> tuple[tuple[ModuleState, ...], EngineState]:
    *_, last = made.engine.run(made.engine.init() if state is None else state, made.source, until)
    end = last.snapshot()
    return end.modules, end


def _copied(leaf: jax.Array) -> Any:
    """Returns an array on the host, and keys as they are."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf)


def _same(one: Any, other: Any) -> bool:
    leaves = [
        [
            np.asarray(
                jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            )
            for x in jax.tree.leaves(tree)
        ]
        for tree in (one, other)
    ]
    return len(leaves[0]) == len(leaves[1]) and all(np.array_equal(a, b) for a, b in zip(*leaves))
