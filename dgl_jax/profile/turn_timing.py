"""Measurements of what turns do besides blocks and heads: codecs and augmentation."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dgl_jax.codecs import Codec, encode_and_learn
from dgl_jax.core import rngs
from dgl_jax.profile.compiling import compile_all
from dgl_jax.profile.timing import Elapsed, clocked, draw
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)
_NOTHING = Elapsed(0.0, 0.0)
_Program = tuple[Callable[..., Any], tuple[Any, ...]]  # with its arguments: arrays or their shapes
_Key = TypeVar("_Key", bound=Hashable)


def augmentation_time(
    spec: TrainSpec, device: jax.Device, repeats: int = 7, concurrency: int = 1
) -> Elapsed:
    """Measures how long the first module takes to convert and augment a batch of stored inputs.

    Args:
      spec: the training run.
      device: the device to measure on.
      repeats: see `clocked`.
      concurrency: see `clocked`.
    """

    def program(state: tuple[()], key: Any, inputs: Any) -> tuple[Any, ...]:
        return state, spec.task.train(key, inputs)

    programs = {"a batch": (program, ((), rngs.root(0), spec.batch().inputs))}
    return _measured(programs, "the augmentation", device, repeats, concurrency)["a batch"]


def codec_times(
    spec: TrainSpec, device: jax.Device, repeats: int = 7, concurrency: int = 1
) -> list[Elapsed]:
    """Measures how much longer the turn of each module takes because of the codec.

    The program of a sender encodes a message and learns from it; the program of a receiver decodes
    it. Gradients that travel down are included if the method encodes them. A codec that returns its
    inputs takes no time.

    Args:
      spec: the training run.
      device: the device to measure on.
      repeats: see `clocked`.
      concurrency: see `clocked`.

    Returns:
      One entry per module.
    """
    programs = {
        (hop.activations, role): build(spec.codec, hop.activations)
        for hop in spec.hops
        for role, build in (("send", _sender), ("receive", _receiver))
    }
    description = f"the codec {type(spec.codec).__name__}"
    measured = _measured(programs, description, device, repeats, concurrency)
    return [
        Elapsed(*map(sum, zip(_NOTHING, *(measured[part] for part in _parts(spec, k)))))
        for k in range(len(spec.modules))
    ]


def _measured(
    programs: Mapping[_Key, _Program],
    description: str,
    device: jax.Device,
    repeats: int,
    concurrency: int,
) -> dict[_Key, Elapsed]:
    """Compiles programs concurrently and measures each; those without operations take no time."""
    real = {
        key: (program, inputs)
        for key, (program, inputs) in programs.items()
        if jax.make_jaxpr(program)(*inputs).eqns
    }
    compiled = compile_all(
        (jax.jit(program).lower(*inputs) for program, inputs in real.values()), description
    )
    measured = dict.fromkeys(programs, _NOTHING)
    for (key, (_, inputs)), program in zip(real.items(), compiled):
        arrays = jax.device_put(jax.tree.map(_concrete, inputs), device)
        measured[key], _ = clocked(program, *arrays, repeats=repeats, concurrency=concurrency)
        milliseconds = 1e3 * measured[key].seconds
        _LOG.info("%s, %s: %.4g ms", description, _shown(key), milliseconds)
    return measured


def _shown(key: Any) -> str:
    """Returns the description of a program for the log."""
    if isinstance(key, str):
        return key
    x, role = key
    return f"{role} {' x '.join(map(str, x.shape))}"


def _parts(spec: TrainSpec, k: int) -> Iterator[tuple[jax.ShapeDtypeStruct, str]]:
    """Yields the activations that module k sends and receives in a turn, and gradients likewise."""
    both = getattr(spec.method, "encode_gradients", False)
    for number, role, other in ((k, "send", "receive"), (k - 1, "receive", "send")):
        if 0 <= number < len(spec.hops):
            yield spec.hops[number].activations, role
            if both:
                yield spec.hops[number].activations, other


def _sender(codec: Codec, x: jax.ShapeDtypeStruct) -> _Program:
    """Returns the program that encodes a message and learns from it."""

    def send(state: Any, key: Any, values: Any, updates: Any) -> tuple[Any, ...]:
        state, _, payload, metrics = encode_and_learn(codec, state, key, values, updates)
        return state, payload, metrics

    # Not a multiple of the period: publications are rare.
    return send, (codec.init(x), rngs.root(0), x, jnp.ones((), jnp.int32))


def _receiver(codec: Codec, x: jax.ShapeDtypeStruct) -> _Program:
    """Returns the program that decodes a message."""

    def receive(state: tuple[()], codebook: Any, payload: Any) -> tuple[Any, ...]:
        return state, codec.decode(codebook, payload)

    codebook = codec.codebook(codec.init(x))
    return receive, ((), codebook, jax.eval_shape(partial(codec.encode, codebook), x))


def _concrete(leaf: Any) -> Any:
    """Returns random values for a shape, and everything else unchanged."""
    return draw(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
