"""Keeps what was made for equal arguments, such as jitted functions: a second run in a process traces and compiles nothing anew."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CACHES: list[Any] = []


def kept(size: int) -> Callable[[_Function], _Function]:
    """Decorates a function so that its newest `size` results are kept; arguments that are not hashable are worked on each time."""

    def decorate(function: _Function) -> _Function:
        cached = functools.lru_cache(size)(function)
        _CACHES.append(cached)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                hash((args, tuple(kwargs.items())))
            except TypeError:  # a network of somebody's own
                return function(*args, **kwargs)
            return cached(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def forget() -> None:
    """Forgets all of it: for whoever replaces a function that may have been traced."""
    for cached in _CACHES:
        cached.cache_clear()
