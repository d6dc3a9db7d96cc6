"""Random functions whose bits are drawn before the function is compiled.

XLA compiles a generator of its own for every random array and every derived key of a program. For
the initial values of a small network this takes most of the time until training begins. Here, keys
are derived one by one, one small program draws all bits, and the compiled function only turns bits
into values. The results equal the original ones bit for bit.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.extend.random import threefry_2x32

# (equation, values of its inputs) -> values of its outputs
Action = Callable[[Any, list[Any]], Sequence[Any]]
_CHUNK = 2**16


class DrawnFirst:
    """Function of a random key with the results of `function`, which compiles faster.

    Args:
      function: a function of one key that JAX can trace; its arrays have fixed shapes.
      compiler_options: options of XLA for the part that turns bits into values.
    """

    def __init__(
        self, function: Callable[..., Any], compiler_options: dict[str, Any] | None = None
    ):
        self._function = jax.jit(function)
        self._evaluate = jax.jit(self._with_known, compiler_options=compiler_options)

    def __call__(self, key: jax.Array) -> Any:
        """Returns the result of the function for this key."""
        return self._evaluate(key, self._known(key))

    def shapes(self, key: jax.Array) -> Any:
        """Returns shapes and dtypes of the results."""
        return jax.eval_shape(self._function, key)

    @cached_property
    def _traced(self) -> Any:
        return self._function.trace(jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")))

    def _known(self, key: jax.Array) -> list[Sequence[Any] | None]:
        """Returns the keys and bits that follow from `key`, one entry per equation.

        The entry of an equation that computes anything else, or from anything else, is None.
        """
        entries: list[Sequence[Any] | None] = []

        def derive(equation: Any, inputs: list[Any]) -> Sequence[Any]:
            entry: Sequence[Any] | None = None
            if not any(value is None for value in inputs):
                if equation.primitive.name == "random_bits":
                    entry = _draw(*inputs, **equation.params)
                elif all(_is_key(output.aval) for output in equation.outvars):
                    entry = _bind(equation, inputs)
            entries.append(entry)
            return [None] * len(equation.outvars) if entry is None else entry

        if jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            _run(self._traced.jaxpr, [key], derive)
        return entries

    def _with_known(self, key: jax.Array, entries: list[Sequence[Any] | None]) -> Any:
        """Returns `function(key)`, given the result of `_known`."""
        known = iter(entries)

        def replace(equation: Any, inputs: list[Any]) -> Sequence[Any]:
            entry = next(known, None)
            return _bind(equation, inputs) if entry is None else entry

        results = _run(self._traced.jaxpr, [key], replace)
        return jax.tree.unflatten(jax.tree.structure(self._traced.out_info), results)


def _run(program: Any, arguments: Sequence[Any], act: Action) -> list[Any]:
    """Evaluates the needed equations of a jaxpr and of the jitted functions that it calls."""
    jaxpr = program.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments]))

    def read(variables: Sequence[Any]) -> list[Any]:
        return [v.val if isinstance(v, Literal) else values[v] for v in variables]

    for equation in _needed(jaxpr):
        inputs = read(equation.invars)
        if equation.primitive.name == "jit":
            outputs: Sequence[Any] = _run(equation.params["jaxpr"], inputs, act)
        else:
            outputs = act(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return read(jaxpr.outvars)


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the equations that the results depend on: Flax also traces a layer's outputs."""
    needed: set[Any] = set()
    equations, wanted = [], jaxpr.outvars
    for equation in reversed(jaxpr.eqns):
        needed.update(v for v in wanted if not isinstance(v, Literal))
        wanted = []
        if equation.effects or not needed.isdisjoint(equation.outvars):
            wanted = equation.invars
            equations.append(equation)
    return equations[::-1]


def _bind(equation: Any, values: list[Any]) -> Sequence[Any]:
    primitive = equation.primitive
    results = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return results if primitive.multiple_results else [results]


def _is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _draw(keys: jax.Array, shape: tuple[int, ...], bit_width: int) -> list[np.ndarray] | None:
    """Returns `jax.random.bits` of each key; None unless these are the bits of `_chunk`."""
    size = int(np.prod(shape))
    if bit_width != 32 or size >= 2**32 or jax.random.key_impl(keys) != "threefry2x32":
        return None
    arrays = [
        np.concatenate(
            [np.asarray(_chunk(key, np.uint32(n))) for n in range(0, size, _CHUNK) or [0]]
        )[:size]
        for key in np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
    ]
    return [np.array(arrays, np.uint32).reshape((*keys.shape, *shape))]


@jax.jit
def _chunk(key: jax.Array, begin: jax.Array) -> jax.Array:
    """Returns the bits of `_CHUNK` consecutive elements; bits depend on key and index alone."""
    index = begin + jnp.arange(_CHUNK, dtype=jnp.uint32)
    high, low = jnp.split(threefry_2x32(key, jnp.concatenate([jnp.zeros_like(index), index])), 2)
    return high ^ low
