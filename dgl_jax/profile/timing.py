"""Counts the operations of modules, measures their time and reads the memory that XLA plans; and makes the table of it."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
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
from dgl_jax.core.module import ModuleState, init_states, make_modules
from dgl_jax.core.step import backward_step, loss_step
from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.profile.flops import Blocks, forward_flops

_LOG = logging.getLogger(__name__)


class Elapsed(NamedTuple):
    """Of one call of a program: seconds, alone; and processor seconds of the host, beside as many others as was asked for."""

    seconds: float
    processor: float


class BlockTimes(NamedTuple):
    """What blocks and heads take in training: seconds, and processor seconds of the host."""

    seconds: BlockCosts
    processor: BlockCosts


_IN_A_ROW = 2


def clocked(
    program: Callable[..., tuple[Any, ...]],
    state: Any,
    *inputs: Any,
    repeats: int,
    company: int = 1,
) -> tuple[Elapsed, tuple[Any, ...]]:
    """What a call takes, the median over pairs of calls after a pair that may compile; and what the last call gave.

    The second of a pair is dispatched while the first is under way, as the engines do.

    Args:
      program: gives a tuple that begins with the next `state`; may take over (donate) the one it is given.
      company: programs that will work at once on the processors of a host. A CPU program that finds idle processors spreads over
        them and takes more of their time than where all are busy, so that is measured with so many copies of the program at work.
    """
    walls, processors = [], []
    results: tuple[Any, ...] = (state,)
    jax.block_until_ready((state, inputs))
    for _ in range(repeats + 1):
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(_IN_A_ROW):
            results = program(results[0], *inputs)
        jax.block_until_ready(results)
        processors.append((time.process_time() - processor) / _IN_A_ROW)
        walls.append((time.perf_counter() - wall) / _IN_A_ROW)
    alone = statistics.median(processors[1:])
    busy = _crowded(program, results[0], inputs, repeats, company) if company > 1 else alone
    return Elapsed(statistics.median(walls[1:]), busy), results


def _crowded(
    program: Callable[..., tuple[Any, ...]],
    state: Any,
    inputs: Sequence[Any],
    calls: int,
    company: int,
) -> float:
    """Processor seconds a call while `company` of them are under way at once, each chain of calls from a thread of its own."""
    states = [jax.tree.map(jnp.copy, state) for _ in range(company)]

    def chain(number: int) -> None:
        for _ in range(calls):
            states[number] = program(states[number], *inputs)[0]
        jax.block_until_ready(states[number])

    jax.block_until_ready(states)
    with ThreadPoolExecutor(company) as threads:
        before = time.process_time()
        list(threads.map(chain, range(company)))  # so that an error in a thread is one here
        return (time.process_time() - before) / (calls * company)


def block_times(
    network: Blocks,
    optimizer: optax.GradientTransformation,
    device: jax.Device,
    repeats: int = 7,
    company: int = 1,
) -> BlockTimes:
    """Measures every block's part of a local step and every head's, by itself.

    A block: forward, backward and update of its parameters, with or (as the first of a module) without the gradient of its inputs.
    A head: the same, with the loss. Equal layers on equal shapes are measured once. Compiling takes most of the time.

    Args:
      company: see `clocked`.

    Raises:
      UserError: a program would take more memory than is free before the first one runs.
    """
    measured: dict[Any, Elapsed] = {}
    free = system.device_memory(device).free

    def once(
        layer: nn.Module | None, is_head: bool, x: jax.ShapeDtypeStruct, inner: bool = True
    ) -> Elapsed:
        if layer is None:
            return Elapsed(0.0, 0.0)
        key = (layer, is_head, x.shape, x.dtype, inner)
        if key not in measured:
            program, shapes = _alone(layer, is_head, x, inner, optimizer, network)
            needed = _needed(program, company)
            if free is not None and needed is not None and needed > free:
                raise UserError(
                    f"config.data.batch_size={network.inputs.shape[0]}: to measure a {type(layer).__name__} on inputs of "
                    f"{' x '.join(map(str, x.shape))} would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
                    "a smaller batch may fit, and --mode=plan takes --block_times that were measured elsewhere"
                )
            # Where it is put says where it runs, in other threads too.
            measured[key], _ = clocked(
                program, *jax.device_put(_drawn(shapes), device), repeats=repeats, company=company
            )
        return measured[key]

    first, inner, head, x = [], [], [], network.inputs
    for number, (block, end) in enumerate(zip(network.blocks, network.heads, strict=True)):
        known = len(measured)
        first.append(once(block, False, x, inner=False))
        inner.append(
            once(block, False, x) if number else first[0]
        )  # nothing is in front of the first block
        _, x = forward_flops(block, x.shape, x.dtype)
        head.append(once(end, True, x))
        if len(measured) > known:
            body, with_head = 1e3 * inner[-1].seconds, 1e3 * head[-1].seconds
            _LOG.info(
                "block %d of %d: %.4g ms, its head %.4g ms",
                number,
                len(network.blocks),
                body,
                with_head,
            )
    rows = first, inner, head
    return BlockTimes(
        *(BlockCosts(*(tuple(each[field] for each in row) for row in rows)) for field in range(2))
    )


def _alone(
    layer: nn.Module,
    is_head: bool,
    x: jax.ShapeDtypeStruct,
    inner: bool,
    optimizer: optax.GradientTransformation,
    network: Blocks,
) -> tuple[Any, tuple[Any, ...]]:
    """Compiles the program of a block or objective by itself.

    Args:
      network: its inputs and labels an objective may read.

    Returns:
      The program, and the shapes of what it takes: state, inputs, and a cotangent or the context.
    """
    (module,) = make_modules(() if is_head else (layer,), (0,), (layer if is_head else None,))
    ids, label = (
        jax.ShapeDtypeStruct((*x.shape[:1], *shape), "int32") for shape in ((), network.label)
    )
    context = {"id": ids, "label": label, "image": network.inputs}
    (state,) = jax.eval_shape(lambda: init_states((module,), optimizer, rngs.root(0), x, context))
    given: Any = forward_flops(layer, x.shape, x.dtype)[1]
    if module.objective is not None:
        given = {name: context[name] for name in module.objective.needs}

    def program(state: ModuleState, inputs: Array, given: Any) -> tuple[Any, ...]:
        if is_head:
            state, of_inputs, metrics = loss_step(module, optimizer, state, inputs, given)
            return state, metrics, of_inputs
        state, outputs, of_inputs = backward_step(module, optimizer, state, inputs, given)
        return state, outputs, of_inputs if inner else None

    shapes = state, x, given
    return jax.jit(program, donate_argnums=0).lower(*shapes).compile(), shapes


def _drawn(shapes: tuple[ModuleState, Any, Any]) -> tuple[Any, ...]:
    """Generic numbers of these shapes.

    Drawn by NumPy, as what the arrays hold matters to no clock: a proper start would take longer to compile than the step.
    """

    def draw(leaf: jax.ShapeDtypeStruct) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
        values *= 0.1
        return jnp.asarray(values, leaf.dtype)

    state, inputs, given = shapes
    without_key: Any = dataclasses.replace(state, rng=None)  # type: ignore[arg-type]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), without_key)
    state = dataclasses.replace(zeros, params=jax.tree.map(draw, state.params), rng=rngs.root(0))
    return state, draw(inputs), jax.tree.map(draw, given)


def _needed(program: Any, company: int) -> int | None:
    """Returns the bytes that copies of a compiled program need, which share its arguments; None where unknown."""
    plan = system.program_plan(program)
    return None if plan is None else plan.arguments + company * (plan.temporary + plan.outputs)
