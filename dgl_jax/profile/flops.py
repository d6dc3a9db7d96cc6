"""Counts floating-point operations in traced programs: the same on every backend, as nothing is lowered or compiled.

Counted are convolutions and dot products, two operations a multiply-add, at every place of the
output: as in published numbers, the zeros beyond the edge of a padded map are multiplied as well.
Elementwise operations, sums and pooling by windows count as nothing, and so do custom calls. Of a
choice by platform the `default` counts, which every accelerator takes.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from dgl_jax.core import rngs
from dgl_jax.models.partition import BlockCosts
from dgl_jax.objectives import Objective
from dgl_jax.spec import TrainSpec


def count(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Counts the operations of a call.

    Args:
      arguments: pytrees of arrays, or of their shapes and dtypes.

    Returns:
      Floating-point operations, and shapes and dtypes of what the function returns.
    """
    traced, returned = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return 2.0 * _multiply_adds(traced.jaxpr), returned


def _multiply_adds(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # Axes of the kernel: output features, then input features of one group, and space.
        _, *taps = params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval.shape
        # A transposed convolution writes zeros between its inputs: only each n-th tap meets a number.
        return (
            _size(equation.outvars[0])
            * math.prod(kernel[axis] for axis in taps)
            // math.prod(params["lhs_dilation"])
        )
    if name == "scan":
        return params["length"] * _multiply_adds(_open(params["jaxpr"]))
    if name == "cond":
        branches = [_multiply_adds(_open(branch)) for branch in params["branches"]]
        platforms = params.get("branches_platforms")
        return (
            branches[list(platforms).index(None)]
            if platforms and None in platforms
            else max(branches)
        )
    # Calls: jit, remat, custom gradients (the function, not the gradient). How often a `while` turns only its data know: its
    # condition and its body count once. A loop with a number of turns known while tracing is a scan.
    return sum(map(_multiply_adds, _inner(params)))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(one), "eqns"):
                yield _open(one)


def _open(jaxpr: Any) -> Any:
    """Returns a jaxpr without its constants; JAX has it with and without, by version."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def module_flops(spec: TrainSpec) -> list[tuple[float, float]]:
    """Counts the floating-point operations of each module's forward pass on a batch; see `flops.py`.

    Returns:
      Of each module: those of its body, and of its objective (0 without one).
    """
    found, x = [], spec.inputs()
    for module in spec.modules:
        body = 0.0
        for block in module.blocks:
            operations, x = forward_flops(block, x.shape, x.dtype)
            body += operations
        found.append(
            (
                body,
                0.0
                if module.objective is None
                else forward_flops(module.objective, x.shape, x.dtype)[0],
            )
        )
    return found


class Blocks(NamedTuple):
    """A network before it is cut.

    Attributes:
      blocks: in their order.
      heads: of each block the head that a module ending there would have, None if it would have none; the last is the classifier.
      inputs: shape and dtype of a batch of network inputs.
      label: shape of the label of an example.
    """

    blocks: tuple[nn.Module, ...]
    heads: tuple[nn.Module | None, ...]
    inputs: jax.ShapeDtypeStruct
    label: tuple[int, ...] = ()


def block_flops(network: Blocks) -> BlockCosts:
    """Counts the floating-point operations of each block and head: they do not depend on where a network is cut."""
    body, head, x = [], [], network.inputs
    for block, end in zip(network.blocks, network.heads, strict=True):
        operations, x = forward_flops(block, x.shape, x.dtype)
        body.append(operations)
        head.append(0.0 if end is None else forward_flops(end, x.shape, x.dtype)[0])
    return BlockCosts(tuple(body), tuple(body), tuple(head))


@lru_cache(maxsize=1024)
def forward_flops(
    layer: nn.Module, shape: tuple[int, ...], dtype: Any
) -> tuple[float, jax.ShapeDtypeStruct]:
    """Counts the operations of a block, or of what an objective answers; also the shape of what it returns."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    answers = isinstance(layer, Objective)
    arguments: tuple[Any, ...] = (x, {}) if answers else (x,)
    how: dict[str, Any] = {"method": "predict"} if answers else {}
    variables = jax.eval_shape(
        lambda: layer.lazy_init(rngs.root(0), *arguments, train=False, **how)
    )
    operations, out = count(
        lambda v, *given: layer.apply(v, *given, train=False, **how), variables, *arguments
    )
    return operations, jax.ShapeDtypeStruct(out.shape, out.dtype)
