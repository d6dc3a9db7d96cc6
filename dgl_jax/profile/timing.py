"""Measurements of the time that blocks and heads take in training."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dgl_jax import system
from dgl_jax.core import rngs
from dgl_jax.core.module import ModuleState, init_states, make_modules, published_block
from dgl_jax.core.step import local_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.objectives import Context, LocalLoss, Objective, Transport
from dgl_jax.profile.compiling import compile_all
from dgl_jax.profile.flops import Blocks, forward_flops

_LOG = logging.getLogger(__name__)


class Elapsed(NamedTuple):
    """Time of one program call.

    Attributes:
      seconds: wall time in seconds, when the program runs alone.
      processor: CPU time of the host in seconds, with `concurrency` copies at once; see `clocked`.
    """

    seconds: float
    processor: float


class BlockTimes(NamedTuple):
    """Times of all blocks and heads in training.

    Attributes:
      seconds: wall times in seconds.
      processor: CPU times of the host in seconds.
    """

    seconds: BlockCosts
    processor: BlockCosts


_CALLS_IN_FLIGHT = 2
_LEAST_PAIRS = 2
_ENOUGH_SECONDS = 10.0  # for which the pairs of one program are measured


def clocked(
    program: Callable[..., tuple[Any, ...]],
    state: Any,
    *inputs: Any,
    repeats: int,
    concurrency: int = 1,
) -> tuple[Elapsed, tuple[Any, ...]]:
    """Measures the time of a program call as the median over pairs of calls.

    The second call of a pair is dispatched while the first is in flight, as the engines do. A first
    pair, which may compile, is not measured.

    Args:
      program: returns a tuple that starts with the next `state`; may donate its `state` argument.
      state: the first state.
      *inputs: further arguments of every call.
      repeats: number of measured pairs; of a slow program fewer, but at least two.
      concurrency: number of programs that share the host's CPU cores in the run to be predicted. A
        CPU program spreads over idle cores and then takes more CPU time than on a busy host, so CPU
        time is measured with this many copies of the program running at once.

    Returns:
      The time of one call, and the results of the last call.
    """
    walls, processors = [], []
    results: tuple[Any, ...] = (state,)
    jax.block_until_ready((state, inputs))
    for _ in range(repeats + 1):
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(_CALLS_IN_FLIGHT):
            results = program(results[0], *inputs)
        jax.block_until_ready(results)
        processors.append((time.process_time() - processor) / _CALLS_IN_FLIGHT)
        walls.append((time.perf_counter() - wall) / _CALLS_IN_FLIGHT)
        if len(walls) > _LEAST_PAIRS and _CALLS_IN_FLIGHT * sum(walls[1:]) > _ENOUGH_SECONDS:
            break
    alone = statistics.median(processors[1:])
    busy = (
        _busy_cpu_time(program, results[0], inputs, len(walls) - 1, concurrency)
        if concurrency > 1
        else alone
    )
    return Elapsed(statistics.median(walls[1:]), busy), results


def _busy_cpu_time(
    program: Callable[..., tuple[Any, ...]],
    state: Any,
    inputs: Sequence[Any],
    calls: int,
    concurrency: int,
) -> float:
    """Measures the CPU seconds per call while `concurrency` threads call the program at once."""
    states = [jax.tree.map(jnp.copy, state) for _ in range(concurrency)]

    def chain(number: int) -> None:
        for _ in range(calls):
            states[number] = program(states[number], *inputs)[0]
        jax.block_until_ready(states[number])

    jax.block_until_ready(states)
    with ThreadPoolExecutor(concurrency) as threads:
        before = time.process_time()
        list(threads.map(chain, range(concurrency)))  # the list raises the errors of the threads
        return (time.process_time() - before) / (calls * concurrency)


class _Part(NamedTuple):
    """Block or head to measure alone; equal parts have the same program.

    Attributes:
      layer: the block or head.
      inputs: shape and dtype of its inputs.
      role: "first" or "inner" for a block, as in `BlockCosts`, or "head".
      beside: adapter in front of a first block, or the next block if a head reads its variables.
      transport: weight of the transport cost of a block.
    """

    layer: nn.Module
    inputs: jax.ShapeDtypeStruct
    role: str
    beside: nn.Module | None = None
    transport: float = 0.0

    def __str__(self) -> str:
        return f"{type(self.layer).__name__} on inputs of {' x '.join(map(str, self.inputs.shape))}"


class _Given(Objective):
    """Loss whose gradient with respect to the features is given; a metric holds the features."""

    needs = ("cotangent",)

    def __call__(
        self, features: Array, context: Context, published: Mapping[str, Any], train: bool
    ) -> LocalLoss:
        loss = jnp.sum(features * context["cotangent"])
        return LocalLoss(loss, {"features": (features, jnp.float32(1))}, None)


def block_times(
    network: Blocks,
    optimizer: optax.GradientTransformation,
    device: jax.Device,
    repeats: int = 7,
    concurrency: int = 1,
    meanwhile: Callable[[], object] = lambda: None,
) -> BlockTimes:
    """Measures each block and head alone, as a part of a local step.

    The program of a block is forward pass, backward pass and parameter update, with or (for the
    first block of a module) without the gradient with respect to the inputs, and with the adapter
    and the transport cost. The program of a head also computes the loss. Equal layers with equal
    input shapes are measured once. Most of the time is spent compiling.

    Args:
      network: the network before it is cut.
      optimizer: the optimizer of all modules.
      device: the device to measure on.
      repeats: see `clocked`.
      concurrency: see `clocked`.
      meanwhile: called while the programs compile, before anything is measured.

    Raises:
      UserError: a program needs more memory than was free at the start.
    """
    free = system.device_memory(device).free
    rows, x = [], network.inputs
    all_heads = [head for row in network.heads for head in row]
    weight = max((head.weight for head in all_heads if isinstance(head, Transport)), default=0.0)
    for number, (block, *heads) in enumerate(zip(network.blocks, *network.heads, strict=True)):
        first = _Part(block, x, "first", network.adapter(number, x)[0], weight)
        # The first block of the network is the first one of its module, however it is cut.
        inner = _Part(block, x, "inner", transport=weight) if number else first
        _, x = forward_flops(block, x.shape, x.dtype)
        ends = [
            None if head is None else _Part(head, x, "head", network.next_block(number, head))
            for head in heads
        ]
        rows.append((first, inner, *ends))
    parts = [*dict.fromkeys(part for row in rows for part in row if part)]
    number_of_heads = sum(len({*ends} - {None}) for _, _, *ends in rows)
    # Nothing is measured until all programs are compiled: compiling takes the cores of a CPU, and
    # on a GPU it runs convolutions to select their algorithms.
    programs = compile_all(
        (_lower_alone(part, optimizer, network) for part in parts),
        f"{len(rows)} blocks and {number_of_heads} heads",
        meanwhile,
    )
    for part, program in zip(parts, programs):
        needed = _needed(program, concurrency)
        if free is not None and needed is not None and needed > free:
            raise UserError(
                f"config.data.batch_size={network.inputs.shape[0]}: measuring a {part} would take "
                f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; a smaller batch "
                "may fit, and --mode=plan accepts --block_times measured elsewhere"
            )
    measured: dict[_Part | None, Elapsed] = {None: Elapsed(0.0, 0.0)}
    arrays: dict[Any, Array] = {}
    for part, program in zip(parts, programs):
        state, *inputs = program.args_info[0]
        leaves, tree = jax.tree.flatten(inputs)
        # Activations are large and not donated, so successive programs share them.
        arrays = {
            key: arrays[key] if key in arrays else jax.device_put(draw(leaf), device)
            for number, leaf in enumerate(leaves)
            for key in [(number, leaf.shape, leaf.dtype)]
        }
        # Committed arrays select the device of the program, in other threads too.
        measured[part], _ = clocked(
            program,
            jax.device_put(_random_state(state), device),
            *jax.tree.unflatten(tree, arrays.values()),
            repeats=repeats,
            concurrency=concurrency,
        )
        milliseconds = 1e3 * measured[part].seconds
        count = len(measured) - 1, len(parts)
        _LOG.info("%d of %d: %s %s: %.4g ms", *count, part.role, part, milliseconds)

    def costs(field: int) -> BlockCosts:
        first_, inner_, *heads_ = zip(*([measured[part][field] for part in row] for row in rows))
        return BlockCosts(first_, inner_, tuple(heads_))

    return BlockTimes(costs(0), costs(1))


def _lower_alone(
    part: _Part, optimizer: optax.GradientTransformation, network: Blocks
) -> jax.stages.Lowered:
    """Lowers the program of a single block or objective.

    Its arguments are the state, the inputs, the context, and publications. The context of a block
    has the gradient with respect to its outputs, `cotangent`.

    Args:
      part: the block or objective.
      optimizer: see `block_times`.
      network: the whole network; an objective may read its inputs and labels.
    """
    layer, x, beside, is_head = part.layer, part.inputs, part.beside, part.role == "head"
    if is_head and beside is not None:
        modules = make_modules((beside,), (0, 0), (layer, None))
    elif is_head:
        modules = make_modules((), (0,), (layer,))
    else:
        given_loss = Transport(_Given(), part.transport) if part.transport else _Given()
        modules = make_modules((layer,), (0,), (given_loss,), adapters=(beside,))
    module, context = modules[0], network.context(x.shape[0])
    needs = [*module.objective.needs, *(module.adapter.needs if module.adapter else ())]  # type: ignore[union-attr]
    if not is_head:
        _, context["cotangent"] = forward_flops(layer, x.shape, x.dtype)
    state, *_ = jax.eval_shape(lambda: init_states(modules, optimizer, rngs.root(0), x, context))
    read = {}
    if is_head and beside is not None:
        read["next_block"] = published_block(beside, rngs.root(0), x)

    def program(
        state: ModuleState, inputs: Array, given: Context, published: Any
    ) -> tuple[Any, ...]:
        if part.role == "first":  # no gradient with respect to the inputs, which may be integers
            state, outputs, _ = local_step(module, optimizer, state, inputs, given)
            return state, outputs, None
        state, gradient, metrics = loss_step(
            module, optimizer, state, inputs, given, published=published
        )
        return state, metrics if is_head else metrics["features"][0], gradient

    given = {name: context[name] for name in needs}
    return jax.jit(program, donate_argnums=0).lower(state, x, given, read)


def _random_state(state: ModuleState) -> ModuleState:
    """Returns a state with random parameters and zeros elsewhere, given its shapes.

    The values do not matter for the time, and compiling the real initializers would take longer
    than compiling the step.
    """
    without_key: Any = dataclasses.replace(state, rng=None)  # type: ignore[arg-type]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), without_key)
    return dataclasses.replace(zeros, params=jax.tree.map(draw, state.params), rng=rngs.root(0))


def draw(leaf: Any) -> np.ndarray:
    """Returns a random array of the shape and dtype of `leaf`; zeros unless floating-point."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    # Repeated, because activations can have 1e8 values, which would take seconds to draw.
    values = 0.1 * np.random.default_rng(0).standard_normal(2**16, np.float32)
    return np.resize(values.astype(leaf.dtype), leaf.shape)


def _needed(program: Any, concurrency: int) -> int | None:
    """Returns the bytes that `concurrency` copies of a program need if they share its arguments.

    Returns None if the plan of the program is unknown.
    """
    plan = system.program_plan(program)
    return None if plan is None else plan.arguments + concurrency * (plan.temporary + plan.outputs)
