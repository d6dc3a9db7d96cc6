"""Counts of floating-point operations in traced programs.

Nothing is lowered or compiled, so the counts are the same on every backend. They include
convolutions and dot products, with two operations per multiply-add at every position of the output:
as in published numbers, multiplications with the zeros of a padded edge count too. Elementwise
operations, sums, pooling and custom calls count as zero. Of a choice by platform, the `default`
branch counts, which every accelerator uses.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from dgl_jax.core import rngs
from dgl_jax.core.module import LocalModule, ModuleState, published_block
from dgl_jax.models.partition import BlockCosts
from dgl_jax.objectives import Objective
from dgl_jax.spec import TrainSpec


def count(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Counts the floating-point operations of a function call.

    Args:
      function: a function that JAX can trace.
      *arguments: pytrees of arrays, or of their shapes and dtypes.

    Returns:
      The number of operations, and the shapes and dtypes of the results.
    """
    traced, returned = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return 2.0 * _multiply_adds(traced.jaxpr), returned


def _multiply_adds(jaxpr: Any) -> int:
    return sum(_equation_multiply_adds(equation) for equation in jaxpr.eqns)


def _equation_multiply_adds(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # Axes of the kernel: output features, input features of one group, spatial axes.
        _, *taps = params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval.shape
        # A transposed convolution inserts zeros between its inputs (lhs_dilation); taps that meet
        # these zeros do not count.
        return (
            _size(equation.outvars[0])
            * math.prod(kernel[axis] for axis in taps)
            // math.prod(params["lhs_dilation"])
        )
    if name == "scan":
        return params["length"] * _multiply_adds(_without_constants(params["jaxpr"]))
    if name == "cond":
        branches = [_multiply_adds(_without_constants(branch)) for branch in params["branches"]]
        platforms = params.get("branches_platforms")
        return (
            branches[list(platforms).index(None)]
            if platforms and None in platforms
            else max(branches)
        )
    # Calls: jit, remat and custom gradients (which contain the function, not the gradient). The
    # iterations of a `while` depend on its data, so condition and body count once; a loop whose
    # number of iterations is known while tracing is a scan.
    return sum(map(_multiply_adds, nested_jaxprs(params)))


def nested_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_without_constants(entry), "eqns"):
                yield _without_constants(entry)


def _without_constants(jaxpr: Any) -> Any:
    """Returns the jaxpr of a closed jaxpr; which of the two JAX stores depends on its version."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def module_flops(spec: TrainSpec) -> list[tuple[float, float]]:
    """Counts the floating-point operations of each module's forward pass on one batch.

    Returns:
      For each module, the operations of its body (with the adapter) and of its loss (0 without an
      objective).
    """
    operations_by_module, x = [], spec.inputs()
    for k, (module, state) in enumerate(zip(spec.modules, spec.abstract_states())):
        body, inputs = 0.0, x
        context: dict[str, Any] = {"image": spec.inputs(), **spec.context(k)}
        if module.adapter is not None:
            body, _ = call_flops(module.adapter, x, _named(module.adapter.needs, context))
        for block in module.blocks:
            operations, x = forward_flops(block, x.shape, x.dtype)
            body += operations
        objective, published = 0.0, state.extras.get("published", {})
        if module.collects or published:
            objective = _loss_with_publications(module, state, inputs, context, published)
        elif module.objective is not None:
            objective, _ = call_flops(module.objective, x, _named(module.objective.needs, context))
        operations_by_module.append((body, objective))
    return operations_by_module


def _loss_with_publications(
    module: LocalModule, state: ModuleState, inputs: Any, context: Any, published: Any
) -> float:
    """Counts the loss of an objective that reads publications or values sown in the blocks."""
    features, _, collected = jax.eval_shape(
        lambda *args: module.apply_body_and_collect(*args, train=False),
        *(state.params, state.batch_stats, inputs, context),
    )
    operations, _ = count(
        lambda *args: module.apply_objective(*args, train=False)[0].loss,
        *(state.params, state.batch_stats, features, context, published | collected),
    )
    return operations


def _named(names: Sequence[str], context: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, context[name]) for name in names)


class Blocks(NamedTuple):
    """Network before it is cut into modules.

    Attributes:
      blocks: all blocks, in order.
      heads: for each module, the head (or objective) that it would have if it ended with each
        block, or None without one; a single row if all modules have equal heads. The last entry of
        a row is the classifier.
      inputs: shape and dtype of a batch of network inputs.
      label: shape of the label of one example.
      adapters: for each block, the input adapter of a module that began with it, or None; empty if
        there are none.
    """

    blocks: tuple[nn.Module, ...]
    heads: tuple[tuple[nn.Module | None, ...], ...]
    inputs: jax.ShapeDtypeStruct
    label: tuple[int, ...] = ()
    adapters: tuple[nn.Module | None, ...] = ()

    def ending(self, modules: Iterable[LocalModule]) -> "Blocks":
        """Returns the network with a single row of heads, of the modules that end there."""
        known = {m.first + len(m.blocks) - 1: m.objective for m in modules}
        row = tuple(known.get(i, head) for i, head in enumerate(self.heads[0]))
        return self._replace(heads=(row,))

    def adapter(self, number: int, x: jax.ShapeDtypeStruct) -> tuple[nn.Module | None, float]:
        """Returns the adapter of a module that begins with a block, and its operations.

        Returns None and 0 if there is none, or if it does not fit the inputs, so that no module can
        begin there.

        Args:
          number: index of the block.
          x: shape and dtype of the block's inputs.
        """
        made = self.adapters[number] if self.adapters else None
        if made is not None:
            with suppress(Exception):  # a user may have written the adapter
                needed = _named(made.needs, self.context(x.shape[0]))
                operations, adapted = call_flops(made, x, needed)
                if (adapted.shape, adapted.dtype) == (x.shape, x.dtype):
                    return made, operations
        return None, 0.0

    def next_block(self, number: int, head: nn.Module | None) -> nn.Module | None:
        """Returns the block after a block if `head`, of a module that ends there, reads it."""
        reads = isinstance(head, Objective) and "next_block" in head.reads
        return self.blocks[number + 1] if reads and number + 1 < len(self.blocks) else None

    def context(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of all context arrays that an objective may read."""
        ids, label = (jax.ShapeDtypeStruct((batch, *shape), "int32") for shape in ((), self.label))
        return {"id": ids, "label": label, "image": self.inputs}


def block_flops(network: Blocks) -> BlockCosts:
    """Counts the floating-point operations of each block and head on one batch.

    The first block of a module counts with the module's adapter.
    """
    first, inner, columns, x = [], [], [], network.inputs
    context = network.context(x.shape[0])
    for number, (block, *heads) in enumerate(zip(network.blocks, *network.heads, strict=True)):
        _, adapting = network.adapter(number, x)
        operations, x = forward_flops(block, x.shape, x.dtype)
        first.append(adapting + operations)
        inner.append(operations)
        operations_of: dict[nn.Module | None, float] = {None: 0.0}
        for head in heads:
            if isinstance(head, Objective):
                named, beside = _named(head.needs, context), network.next_block(number, head)
                operations_of[head] = call_flops(head, x, named, beside)[0]
            elif head is not None:
                operations_of[head] = forward_flops(head, x.shape, x.dtype)[0]
        columns.append([operations_of[head] for head in heads])
    return BlockCosts(tuple(first), tuple(inner), tuple(zip(*columns)))


@lru_cache(maxsize=1024)
def forward_flops(
    layer: nn.Module, shape: tuple[int, ...], dtype: Any
) -> tuple[float, jax.ShapeDtypeStruct]:
    """Counts the operations of the forward pass of a block or head.

    Args:
      layer: a Flax module called as `layer(x, train)`.
      shape: shape of the inputs, [B, ...].
      dtype: dtype of the inputs.

    Returns:
      The number of operations, and shape and dtype of the result.
    """
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(lambda: layer.lazy_init(rngs.root(0), x, train=False))
    operations, out = count(lambda v, x: layer.apply(v, x, train=False), variables, x)
    return operations, jax.ShapeDtypeStruct(out.shape, out.dtype)


@lru_cache(maxsize=1024)
def call_flops(
    layer: nn.Module,
    x: jax.ShapeDtypeStruct,
    context: tuple[tuple[str, Any], ...],
    next_block: nn.Module | None = None,
) -> tuple[float, Any]:
    """Counts the operations of a layer that reads the context: an objective or an adapter.

    Args:
      layer: an objective, whose loss is counted, or an adapter.
      x: shape and dtype of its inputs, [B, ...].
      context: (name, shape and dtype) of each context array that it reads.
      next_block: block whose variables an objective reads, see `Objective.reads`.

    Returns:
      The number of operations, and shapes and dtypes of the result.
    """
    arguments: tuple[Any, ...] = (x, dict(context))
    if isinstance(layer, Objective):
        arguments += (
            {"next_block": published_block(next_block, rngs.root(0), x)} if next_block else {},
        )
    variables = jax.eval_shape(lambda: layer.lazy_init(rngs.root(0), *arguments, train=False))
    return count(lambda v, *args: layer.apply(v, *args, train=False), variables, *arguments)
