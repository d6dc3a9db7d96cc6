"""Measurements of what turns do besides blocks and heads: codecs and augmentation."""

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from dgl_jax.codecs import Codec, encode_message
from dgl_jax.core import rngs
from dgl_jax.profile.compiling import compile_all
from dgl_jax.profile.flops import nested_jaxprs
from dgl_jax.profile.timing import Elapsed, clocked, draw
from dgl_jax.spec import TrainSpec
from dgl_jax.types import nbytes

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


@dataclass(frozen=True)
class CodecCost:
    """Cost of the codec in a turn of a module.

    Attributes:
      shared: time, on one device, of the work that the devices of a group share.
      whole: time of the work that every device of a group does in full, because all of them learn
        from the same vectors.
      gathered: bytes of each array of vectors that all devices of a group receive.
      sums: number of scalars that the devices of a group add up: two norms for the error of a
        message, and the number of vectors that a codebook leaves out.
    """

    shared: Elapsed = _NOTHING
    whole: Elapsed = _NOTHING
    gathered: tuple[int, ...] = ()
    sums: int = 0

    def on(self, devices: int) -> Elapsed:
        """Returns the wall time in a group, and the processor time of all its devices."""
        return Elapsed(
            self.shared.seconds / devices + self.whole.seconds,
            self.shared.processor + devices * self.whole.processor,
        )


def codec_costs(
    spec: TrainSpec, device: jax.Device | None, repeats: int = 7, concurrency: int = 1
) -> list[CodecCost]:
    """Measures how much longer the turn of each module takes because of the codec.

    A sender encodes a message and learns from it; a receiver decodes it. Gradients that travel down
    are included if the method encodes them. A codec that returns its inputs takes no time.

    Args:
      spec: the training run.
      device: the device to measure on; None takes all times as zero.
      repeats: see `clocked`.
      concurrency: see `clocked`.

    Returns:
      One entry per module.
    """
    builders = {"send": _sender, "learn": _learner, "receive": _receiver}
    shapes = list(dict.fromkeys(hop.activations for hop in spec.hops))
    programs = {(x, role): build(spec.codec, x) for x in shapes for role, build in builders.items()}
    measured = dict.fromkeys(programs, _NOTHING)
    if device is not None:
        description = f"the codec {type(spec.codec).__name__}"
        measured = _measured(programs, description, device, repeats, concurrency)
    gathered = {x: tuple(_gathered(*programs[x, "learn"])) for x in shapes}
    costs = []
    for k in range(len(spec.modules)):
        parts = list(_parts(spec, k))
        whole = [part for part in parts if part[1] == "learn" and gathered[part[0]]]
        sent = [x for x, role in parts if role == "send"]
        costs.append(
            CodecCost(
                shared=_added(measured[part] for part in parts if part not in whole),
                whole=_added(measured[part] for part in whole),
                gathered=tuple(itertools.chain.from_iterable(gathered[x] for x in sent)),
                sums=sum((0 if spec.codec.lossless else 2) + bool(gathered[x]) for x in sent),
            )
        )
    return costs


def _added(times: Iterable[Elapsed]) -> Elapsed:
    return Elapsed(*map(sum, zip(_NOTHING, *times)))


def _gathered(program: Callable[..., Any], inputs: tuple[Any, ...]) -> Iterator[int]:
    """Yields the bytes of each array of which every device of a group gets a whole copy."""
    # Traced as for a group of devices (`engines.program.on_group`); any number of them will do.
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("batch",), (AxisType.Auto,))):
        jaxprs = [jax.make_jaxpr(program)(*inputs).jaxpr]
    while jaxprs:
        for equation in jaxprs.pop().eqns:
            if equation.primitive.name == "sharding_constraint":
                yield nbytes(equation.outvars[0].aval)
            jaxprs += nested_jaxprs(equation.params)


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
    sender, receiver = ("send", "learn"), ("receive",)
    for number, roles, others in ((k, sender, receiver), (k - 1, receiver, sender)):
        if 0 <= number < len(spec.hops):
            for role in (*roles, *(others if both else ())):
                yield spec.hops[number].activations, role


def _sender(codec: Codec, x: jax.ShapeDtypeStruct) -> _Program:
    """Returns the program that encodes a message."""

    def send(state: Any, key: Any, values: Any, updates: Any) -> tuple[Any, ...]:
        state, _, payload, metrics = encode_message(codec, state, key, values, updates)
        return state, payload, metrics

    # Not a multiple of the period: publications are rare.
    return send, (codec.init(x), rngs.root(0), x, jnp.ones((), jnp.int32))


def _learner(codec: Codec, x: jax.ShapeDtypeStruct) -> _Program:
    """Returns the program that updates the codec with the values of a message."""
    return codec.update, (codec.init(x), rngs.root(0), x)


def _receiver(codec: Codec, x: jax.ShapeDtypeStruct) -> _Program:
    """Returns the program that decodes a message."""

    def receive(state: tuple[()], codebook: Any, payload: Any) -> tuple[Any, ...]:
        return state, codec.decode(codebook, payload)

    codebook = codec.codebook(codec.init(x))
    return receive, ((), codebook, jax.eval_shape(partial(codec.encode, codebook), x))


def _concrete(leaf: Any) -> Any:
    """Returns random values for a shape, and everything else unchanged."""
    return draw(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
