"""Looking into a traced program."""

from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr and of the functions that it calls (jit, custom gradients)."""
    for equation in jaxpr.eqns:
        yield equation
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            yield from equations(getattr(inner, "jaxpr", inner))
