"""Who works when: pure data, in plain Python.

`fused` gives every module the same batch in one tick. `pipelined` gives module k at tick t batch t - k, here for three modules
and four batches; rows are ticks, read from left to right in the order of dispatch (the deepest module first, since all it
needs was made a tick ago):

    tick 0                          m0:b0
    tick 1              m1:b0       m0:b1
    tick 2   m2:b0      m1:b1       m0:b2
    tick 3   m2:b1      m1:b2       m0:b3
    tick 4   m2:b2      m1:b3
    tick 5   m2:b3

Filling and draining change no number: each module sees the same batches in the same order.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple


class Turn(NamedTuple):
    """Module `module` works on batch `batch`.

    Attributes:
      kind: `step` (forward pass and update), `forward`, or `backward` (an update by a gradient from above).
    """

    module: int
    batch: int
    kind: str = "step"

    def updates(self) -> bool:
        """Returns whether the module makes an update of it."""
        return self.kind != "forward"


Tick = tuple[Turn, ...]


def never() -> bool:
    """The stop of a run that nobody interrupts."""
    return False


def fused(modules: int, start: int, until: int, stop: Callable[[], bool] = never) -> Iterator[Tick]:
    """Every module on batch t at tick t, the first module first; ends early once `stop()`."""
    for batch in range(start, until):
        if stop():
            return
        yield tuple(Turn(k, batch) for k in range(modules))


def pipelined(
    modules: int, start: int, until: int, stop: Callable[[], bool] = never
) -> Iterator[Tick]:
    """Module k on batch t - k at tick t, the deepest first; once `stop()`, no new batch enters and the pipe drains."""
    tick = start
    while tick < until + modules - 1:
        if tick < until and stop():
            until = tick
        turns = tuple(
            Turn(k, tick - k) for k in reversed(range(modules)) if start <= tick - k < until
        )
        if not turns:
            return
        yield turns
        tick += 1


def aligned(
    counts: Sequence[int], until: int, stop: Callable[[], bool] = never, overlap: bool = False
) -> Iterator[Tick]:
    """Goes on with modules that have made equally many updates: `pipelined` if they work at once (`overlap`), else `fused`.

    Raises:
      ValueError: they have not.
    """
    if len(set(counts)) != 1:
        raise ValueError(
            f"modules of a synchronous run have unequal update counts: {sorted(set(counts))}"
        )
    return (pipelined if overlap else fused)(len(counts), counts[0], until, stop)


def in_order(modules: int) -> Callable[[int], int]:
    """Which module has turn n when they work one after the other: with rings of one packet this is `fused`."""
    return lambda turn: turn % modules


def drawn(modules: int, slowdown: Sequence[float], seed: int) -> Callable[[int], int]:
    """Which module has turn n when it is drawn, module k with a probability in proportion to 1 / slowdown[k].

    The first turns are 0, 0, 1, 1, 2, 2 and so on, so that every ring has something to read. A function of seed and turn alone.
    """
    shares = list(accumulate(1 / s for s in slowdown or [1.0] * modules))

    def module(turn: int) -> int:
        if turn < 2 * modules:
            return turn // 2
        point = random.Random(f"{seed}/{turn}").random() * shares[-1]
        return next(k for k, share in enumerate(shares) if point < share or k == modules - 1)

    return module
