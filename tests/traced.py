"""Iteration over the equations of a traced program."""

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of the functions it calls (jit, custom gradients)."""
    for equation in jaxpr.eqns:
        yield equation
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            yield from equations(getattr(inner, "jaxpr", inner))
