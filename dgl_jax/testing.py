"""Checks of user-defined parts against the invariants of the package, for use in your tests.

    from dgl_jax import testing

    testing.check_codec("mine", options("codec", name="mine"))

Each check takes seconds, at most a few training steps of a small network on synthetic images. It
raises AssertionError with the invariant that is violated.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgl_jax.codecs import relative_error
from dgl_jax.config import CodecSettings, Settings, make_settings
from dgl_jax.config.registry import CODECS, ENGINES, METHODS
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import local_step
from dgl_jax.engines import EngineState
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.spec import TrainSpec

_STEPS = 4
_SMALL: dict[str, Any] = {
    "data": {"name": "synthetic", "image_size": 8, "batch_size": 8, "train_examples": 48},
    "model": {"name": "cnn4", "width": 8, "modules": 2, "head": "linear"},
    "optimizer": {"learning_rate": 0.05},
    "train": {"steps": _STEPS},
}


def small_settings(**groups: Any) -> Settings:
    """Returns the settings of a small run, with some of the groups changed.

    Example: `small_settings(codec={"name": "mine"})`.

    Args:
      groups: fields that differ, as a dict per configuration group.
    """
    return make_settings(
        {name: _SMALL.get(name, {}) | dict(groups.get(name, {})) for name in {**_SMALL, **groups}}
    )


def check_objective(**groups: Any) -> None:
    """Checks the objective of a configuration, as in `check_objective(objective={"name": "mine"})`.

    The invariants, of every module but the last one, are:

    - Equal settings create equal, hashable objectives, so that compiled programs are reused.
    - The loss is a finite scalar, and every metric is a (sum, count) pair.
    - The gradient of the loss reaches the body of the module, but not the module below.
    - The objective reads no context except `id` and what it declares in `needs`.

    Args:
      groups: changes to the small run, see `small_settings`.

    Raises:
      AssertionError: an invariant is violated.
    """
    settings = small_settings(**groups)
    spec, again = (make_experiment(settings, jax.devices()[:1]).spec for _ in range(2))
    assert hash(spec.modules) == hash(again.modules), (
        "equal settings create objectives of unequal hash"
    )
    assert spec.modules == again.modules, "equal settings create unequal objectives"
    states = spec.init()
    assert spec.modules[0].objective is not None, (
        "the first module has no objective under this method"
    )
    for k in range(max(1, len(states) - 1)):
        _check_loss(spec, k, states)


def _check_loss(spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> None:
    """Checks loss, metrics and gradients of module k."""
    module, state = spec.modules[k], states[k]
    inputs, shapes = (
        jnp.ones(spec.shapes(states)[k].shape) * 0.5,
        {"image": spec.inputs(), **spec.context(k)},
    )
    assert module.objective is not None
    needed = (*module.objective.needs, *(module.adapter.needs if module.adapter else ()))
    context: Any = {
        name: jnp.ones(shapes[name].shape, shapes[name].dtype) for name in ("id", *needed)
    }
    published = state.extras.get("published", {})

    def loss_of(params: Any, inputs: jax.Array) -> Any:
        features, _, collected = module.apply_body_and_collect(
            params, state.batch_stats, inputs, context, train=True
        )
        return module.apply_objective(
            params, state.batch_stats, features, context, {**published, **collected}, train=True
        )[0]

    local = jax.jit(loss_of)(state.params, inputs)
    assert local.loss.shape == (), f"the loss has shape {local.loss.shape}, but must be a scalar"
    assert bool(jnp.isfinite(local.loss)), f"the loss is {local.loss}"
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in local.metrics.values()), (
        "a metric is not a (sum, count) pair"
    )
    gradient = jax.jit(jax.grad(lambda params: loss_of(params, inputs).loss))(state.params)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["body"])), (
        "no gradient reaches the body"
    )

    # Everything that a step returns must be detached from its inputs, so that no module trains
    # another one.
    def total(inputs: jax.Array) -> jax.Array:
        new, outputs, metrics = local_step(
            module, spec.optimizer, state, inputs, context, published=published
        )
        return sum(
            (
                jnp.sum(leaf.astype(jnp.float32))
                for leaf in jax.tree.leaves((new.params, outputs, metrics))
            ),
            jnp.zeros(()),
        )

    input_gradient = jax.jit(jax.grad(total))(inputs)
    assert float(jnp.abs(input_gradient).max()) == 0, "a gradient reaches the module below"


def check_codec(
    name: str, options: CodecSettings, shape: Sequence[int] = (8, 4, 4, 16), dtype: str = "float32"
) -> None:
    """Checks a registered codec on random activations.

    The invariants are:

    - Equal options create equal, hashable codecs.
    - Decoding returns the shape and dtype of the activations, and finite values.
    - A codec that declares itself lossless changes no bit.
    - Encoding depends on codebook and activations alone, jitted or not.

    Args:
      name: registered name of the codec.
      options: options of the codec.
      shape: shape of the activations.
      dtype: dtype of the activations.

    Raises:
      AssertionError: an invariant is violated.
    """
    codec, again = (CODECS[name].make(options, dtype) for _ in range(2))
    assert codec == again, "equal options create unequal codecs"
    assert hash(codec) == hash(again), "equal options create codecs of unequal hash"
    assert codec.lossless == CODECS[name].lossless, "the codec and its kind disagree on `lossless`"
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
    assert bool(jnp.isfinite(decoded).all()), "decodes to values that are not finite"
    assert not codec.lossless or float(relative_error(x, decoded)) == 0, (
        "the codec declares itself lossless, but changes activations"
    )


def check_engine(name: str, devices: int = 1, **groups: Any) -> None:
    """Checks a registered engine on the first devices.

    The invariants are:

    - Every module makes the requested number of updates.
    - A run that stops halfway and resumes from the state in a checkpoint equals an uninterrupted
      run bit for bit (not checked for continuous engines).
    - An engine of the family of `fused` equals `fused` bit for bit.

    Args:
      name: registered name of the engine.
      devices: number of devices to use.
      groups: changes to the small run, see `small_settings`.

    Raises:
      AssertionError: an invariant is violated.
    """
    kind = ENGINES[name]
    groups = {"engine": {"name": name}} | groups
    whole, _ = _trained(make_experiment(small_settings(**groups), jax.devices()[:devices]), _STEPS)
    assert [int(module.updates) for module in whole] == [_STEPS] * len(whole), (
        "not every module made the requested number of updates"
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
        assert _same(whole, resumed), "a resumed run differs from an uninterrupted one"
    if kind.family == ENGINES["fused"].family:
        fused, _ = _trained(
            make_experiment(
                small_settings(**groups | {"engine": {"name": "fused"}}), jax.devices()[:1]
            ),
            _STEPS,
        )
        assert _same(whole, fused), "the engine is of the family of `fused`, but results differ"


def check_method(name: str, **groups: Any) -> None:
    """Checks a registered training method.

    The invariants are:

    - `check_engine` passes with every engine that the method names, or with `fused` and `pipeline`
      if it names none.
    - With a single module the method equals `backprop` bit for bit.

    Args:
      name: registered name of the method.
      groups: changes to the small run, see `small_settings`.

    Raises:
      AssertionError: an invariant is violated.
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
    # The single module uses the network's classifier, so `model.head` has no effect.
    one, other = (
        small_settings(**groups | model | {"method": {"name": method}})
        for method in (name, "backprop")
    )
    results = [
        _trained(make_experiment(settings, jax.devices()[:1]), _STEPS)[0]
        for settings in (one, other)
    ]
    assert _same(*results), "with a single module the results differ from `backprop`"


def _trained(
    made: Experiment, until: int, state: EngineState | None = None
) -> tuple[tuple[ModuleState, ...], EngineState]:
    *_, last = made.engine.run(made.engine.init() if state is None else state, made.source, until)
    end = last.snapshot()
    return end.modules, end


def _copied(leaf: jax.Array) -> Any:
    """Copies an array to the host; returns random keys unchanged."""
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
