"""Counts the operations of modules, measures their time and reads the memory that XLA plans; and makes the table of it."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dgl_jax import flops, losses, rngs, system
from dgl_jax.engines import Recipe
from dgl_jax.engines.compose import compose
from dgl_jax.errors import UserError
from dgl_jax.models import BlockCosts
from dgl_jax.module import LocalModule, ModuleState, count_parameters, init_states
from dgl_jax.packet import Batch, Coded, nbytes
from dgl_jax.step import apply_gradient

_LOG = logging.getLogger(__name__)

# Operations


def module_flops(recipe: Recipe) -> list[tuple[float, float]]:
    """Counts the floating-point operations of each module's forward pass on a batch; see `flops.py`.

    Returns:
      Of each module: those of its body, and of its head (0 without one).
    """
    found, x = [], recipe.inputs()
    for module in recipe.modules:
        body = 0.0
        for block in module.blocks:
            operations, x = _forward(block, x.shape, x.dtype)
            body += operations
        found.append((body, 0.0 if module.head is None else _forward(module.head, x.shape, x.dtype)[0]))
    return found


def block_flops(recipe: Recipe) -> BlockCosts:
    """Counts those of a recipe with one block a module: they do not depend on where a block is."""
    body, head = zip(*module_flops(recipe))
    return BlockCosts(body, body, head)


@lru_cache(maxsize=1024)
def _forward(layer: nn.Module, shape: tuple[int, ...], dtype: Any) -> tuple[float, jax.ShapeDtypeStruct]:
    """Counts the operations of a block or head; also the shape of what it returns."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(lambda: layer.lazy_init(rngs.root(0), x, train=False))
    operations, out = flops.count(lambda v, x: layer.apply(v, x, train=False), variables, x)
    return operations, jax.ShapeDtypeStruct(out.shape, out.dtype)


# Time


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
    program: Callable[..., tuple[Any, ...]], state: Any, *inputs: Any, repeats: int, company: int = 1
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


def _crowded(program: Callable[..., tuple[Any, ...]], state: Any, inputs: Sequence[Any], calls: int, company: int) -> float:
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


def block_times(recipe: Recipe, device: jax.Device, repeats: int = 7, company: int = 1) -> BlockTimes:
    """Measures, for a recipe with one block a module, every block's part of a local step and every head's, by itself.

    A block: forward, backward and update of its parameters, with or (as the first of a module) without the gradient of its inputs.
    A head: the same, with the loss. Equal layers on equal shapes are measured once. Compiling takes most of the time.

    Args:
      company: see `clocked`.

    Raises:
      UserError: a program would take more memory than is free before the first one runs.
    """
    measured: dict[Any, Elapsed] = {}
    free = system.device_memory(device).free

    def once(layer: nn.Module | None, is_head: bool, x: jax.ShapeDtypeStruct, inner: bool = True) -> Elapsed:
        if layer is None:
            return Elapsed(0.0, 0.0)
        key = (layer, is_head, x.shape, x.dtype, inner)
        if key not in measured:
            program, shapes = _alone(layer, is_head, x, inner, recipe.optimizer)
            needed = _needed(program, company)
            if free is not None and needed is not None and needed > free:
                raise UserError(
                    f"config.data.batch_size={recipe.batch_size}: to measure a {type(layer).__name__} on inputs of "
                    f"{' x '.join(map(str, x.shape))} would take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
                    "a smaller batch may fit, and --mode=plan takes --block_times that were measured elsewhere"
                )
            # Where it is put says where it runs, in other threads too.
            measured[key], _ = clocked(program, *jax.device_put(_drawn(shapes), device), repeats=repeats, company=company)
        return measured[key]

    first, inner, head, x = [], [], [], recipe.inputs()
    for number, module in enumerate(recipe.modules):
        (block,) = module.blocks
        known = len(measured)
        first.append(once(block, False, x, inner=False))
        inner.append(once(block, False, x) if module.first else first[0])  # nothing is in front of the first block
        _, x = _forward(block, x.shape, x.dtype)
        head.append(once(module.head, True, x))
        if len(measured) > known:
            body, with_head = 1e3 * inner[-1].seconds, 1e3 * head[-1].seconds
            _LOG.info("block %d of %d: %.4g ms, its head %.4g ms", number, len(recipe.modules), body, with_head)
    rows = first, inner, head
    return BlockTimes(*(BlockCosts(*(tuple(each[field] for each in row) for row in rows)) for field in range(2)))


def _alone(
    layer: nn.Module, is_head: bool, x: jax.ShapeDtypeStruct, inner: bool, optimizer: optax.GradientTransformation
) -> tuple[Any, tuple[Any, ...]]:
    """The compiled program of a block or head by itself, and the shapes of what it takes: state, inputs, and what it is given."""
    module = LocalModule("alone", 0, () if is_head else (layer,), layer if is_head else None)
    (state,) = jax.eval_shape(lambda: init_states((module,), optimizer, rngs.root(0), x))
    given = jax.ShapeDtypeStruct(x.shape[:1], "int32") if is_head else _forward(layer, x.shape, x.dtype)[1]
    step = _head_step if is_head else _body_step

    def program(state: ModuleState, inputs: Array, given: Array) -> tuple[Any, ...]:
        state, outputs, of_inputs = step(module, optimizer, state, inputs, given)
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
    return state, draw(inputs), draw(given)


def _needed(program: Any, company: int) -> int | None:
    """Returns the bytes that copies of a compiled program need, which share its arguments; None where unknown."""
    plan = system.program_plan(program)
    return None if plan is None else plan.arguments + company * (plan.temporary + plan.outputs)


def _body_step(
    module: LocalModule, optimizer: Any, state: ModuleState, inputs: Float[Array, "B ..."], cotangent: Float[Array, "B ..."]
) -> tuple[ModuleState, Array, Array]:
    def forward(params, x):
        rng = rngs.micro_batch(rngs.update(state.rng, state.updates), 0)
        return module.apply_body(params, state.batch_stats, x, train=True, rng=rng)

    outputs, pull, stats = jax.vjp(forward, state.params, inputs, has_aux=True)
    gradient, of_inputs = pull(cotangent)
    return apply_gradient(optimizer, state, gradient, {"body": stats}), outputs, of_inputs


def _head_step(
    module: LocalModule, optimizer: Any, state: ModuleState, inputs: Float[Array, "B ..."], label: Array
) -> tuple[ModuleState, Array, Array]:
    def objective(params, x):
        rng = rngs.micro_batch(rngs.update(state.rng, state.updates), 0)
        logits, stats = module.apply_head(params, state.batch_stats, x, train=True, rng=rng)
        return losses.cross_entropy(logits, label), stats

    (loss, stats), (gradient, of_inputs) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(state.params, inputs)
    return apply_gradient(optimizer, state, gradient, {"body": {}, "head": stats}), loss, of_inputs


# Memory


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes that the compiled program of a module needs, as XLA plans it.

    Attributes:
      arguments: the module's state, and the packet (or batch) it works on.
      temporary: scratch.
      added: outputs that do not lie in the donated state: the packet for the next module, the metrics.
      packet: of one packet (or batch) at the entrance; one is among the arguments.
    """

    arguments: int
    temporary: int
    added: int
    packet: int


def module_memory(recipe: Recipe) -> list[ProgramMemory] | None:
    """Compiles the program of each module for the default device; runs nothing. None where XLA does not tell its plans."""
    images: Any = jax.ShapeDtypeStruct((recipe.batch_size, *recipe.image_shape), "uint8")
    step: Any = jax.ShapeDtypeStruct((), "int32")
    incoming: Any = Batch(images, recipe.targets(), step)
    found = []
    for k, state in enumerate(recipe.abstract_states()):
        if k:
            incoming = Coded(recipe.hops[k - 1].payload, recipe.hops[k - 1].codebook)
        lowered = jax.jit(compose(recipe, k), donate_argnums=0).lower(state, incoming, recipe.targets())
        plan = system.program_plan(lowered.compile())
        if plan is None:
            return None
        packet = nbytes((incoming.payload if k else incoming.images, recipe.targets()))
        found.append(ProgramMemory(plan.arguments, plan.temporary, plan.outputs - plan.donated, packet))
    return found


# The table


@dataclass(frozen=True)
class ModuleCost:
    """A row of the table.

    Attributes:
      first_block, blocks: where the module begins in the network, and how many blocks it has.
      parameters, body_parameters: with and without the head.
      body_gflops, head_gflops: of the forward pass, an image; two operations a multiply-add of convolutions and dot products.
      activation_bytes: handed on, an image; None where nothing is.
      wire_bytes: the same as it is sent: encoded, with label, id and a share of the codebooks.
      share: of the tick, which lasts as long as the slowest module's turn.
    """

    name: str
    first_block: int
    blocks: int
    parameters: int
    body_parameters: int
    body_gflops: float
    head_gflops: float
    activation_bytes: float | None
    wire_bytes: float | None
    share: float


def module_costs(recipe: Recipe, seconds: Sequence[float] = ()) -> list[ModuleCost]:
    """Makes the rows of the table; `seconds` of each module's turn give its share of the tick, without them the operations do."""
    operations = module_flops(recipe)
    turns = seconds or [body + head for body, head in operations]
    if not any(turns):
        turns = [1.0] * len(turns)  # a network without convolutions and products
    traffic = recipe.traffic() if recipe.modules[0].head else None  # with one loss for all nothing is sent
    rows = []
    for k, (module, state, (body, head)) in enumerate(zip(recipe.modules, recipe.abstract_states(), operations)):
        sends = traffic is not None and k + 1 < len(recipe.modules)
        own = dataclasses.replace(state, params=state.params["body"])
        rows.append(
            ModuleCost(
                module.name,
                module.first,
                len(module.blocks),
                count_parameters(state),
                count_parameters(own),
                body / recipe.batch_size / 1e9,
                head / recipe.batch_size / 1e9,
                nbytes(recipe.hops[k].activations) / recipe.batch_size if sends else None,
                traffic.wire[k] if traffic and sends else None,
                turns[k] / max(turns),
            )
        )
    return rows


def table(rows: Sequence[ModuleCost]) -> list[str]:
    """The rows as aligned lines of text, under a heading."""
    small = max(row.body_gflops for row in rows) < 0.01
    unit, scale = ("MFLOP", 1e3) if small else ("GFLOP", 1.0)
    cells = [["module", "blocks", "parameters", f"{unit} body", f"{unit} head", "bytes out", "on the wire", "share of tick"]]
    for row in rows:
        last = row.first_block + row.blocks - 1
        sent = [f"{bytes_:,.0f}" if bytes_ is not None else "-" for bytes_ in (row.activation_bytes, row.wire_bytes)]
        blocks = f"{row.first_block}-{last}" if row.blocks > 1 else f"{last}"
        operations = [f"{scale * gflops:.4g}" for gflops in (row.body_gflops, row.head_gflops)]
        cells.append([row.name, blocks, f"{row.parameters:,}", *operations, *sent, f"{100 * row.share:.0f} %"])
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in cells]
