"""Caches for functions that build jitted functions, shared by all runs of a process.

A second run with equal settings finds its programs here, and neither traces nor compiles again.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CACHES: list[Any] = []


def cached_program(size: int) -> Callable[[_Function], _Function]:
    """Decorates a function with a cache of its `size` most recent results.

    Calls with unhashable arguments are not cached.
    """

    def decorate(function: _Function) -> _Function:
        cached = functools.lru_cache(size)(function)
        _CACHES.append(cached)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                hash((args, tuple(kwargs.items())))
            except TypeError:  # for example a user's network with an unhashable field
                return function(*args, **kwargs)
            return cached(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def clear_programs() -> None:
    """Clears all caches, after a function that may have been traced was replaced."""
    for cached in _CACHES:
        cached.cache_clear()
