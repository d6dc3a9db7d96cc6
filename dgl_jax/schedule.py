"""Schedules: which module works on which batch at which tick, in plain Python.

`fused` gives all modules the same batch in one tick. `pipelined` gives module k batch t - k at tick
t, shown here for three modules and four batches. Each row is a tick, in dispatch order from left to
right: the deepest module is first, since its input was computed one tick earlier.

    tick 0                          m0:b0
    tick 1              m1:b0       m0:b1
    tick 2   m2:b0      m1:b1       m0:b2
    tick 3   m2:b1      m1:b2       m0:b3
    tick 4   m2:b2      m1:b3
    tick 5   m2:b3

Filling and draining do not change the results: each module sees the same batches in the same order.

`staggered` leaves one tick between two batches of a module: module k works on batch b at tick
2b + k. A message that module k sends down in one tick is then read in the next tick, before the
module below works on another batch. Neighbors take turns, and every other module works at the same
time:

    tick 0                          m0:b0
    tick 1              m1:b0
    tick 2   m2:b0                  m0:b1
    tick 3              m1:b1
    tick 4   m2:b1                  m0:b2
    tick 5              m1:b2
    tick 6   m2:b2

`layerwise` trains one module after the other, shown here for three modules and two batches, without
and with overlap; f marks the forward turns of modules that do not train:

    phase 0    m0:b0                     m0:b0
               m0:b1                     m0:b1
    phase 1    m0:f0   m1:b0                      m0:f0
               m0:f1   m1:b1             m1:b0    m0:f1
                                         m1:b1
    phase 2    m0:f0   m1:f0   m2:b0                      m0:f0
               m0:f1   m1:f1   m2:b1             m1:f0    m0:f1
                                         m2:b0   m1:f1
                                         m2:b1
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple


class Turn(NamedTuple):
    """Unit of work: one module processes one batch.

    Attributes:
      module: index k of the module.
      batch: index of the batch in the run.
      kind: `step` (forward pass and update), `forward`, or `backward` (update with a gradient from
        the module above).
    """

    module: int
    batch: int
    kind: str = "step"

    def updates(self) -> bool:
        """Returns True if the turn updates the module."""
        return self.kind != "forward"


Tick = tuple[Turn, ...]

# Consecutive ticks with equal turns, which a single dispatch may run.
Group = tuple[Tick, ...]


class Progress(NamedTuple):
    """Progress of a run, computed from the update counts of its modules.

    Attributes:
      made: count that rises with every tick once the first batches have passed.
      per_step: amount by which it rises per step of the run.
    """

    made: int
    per_step: int = 1

    @property
    def step(self) -> int:
        """Returns the step that the run has reached."""
        return self.made // self.per_step


def never() -> bool:
    """Returns False: the default `stop` callback, which never ends a run early."""
    return False


def fused(modules: int, start: int, until: int, stop: Callable[[], bool] = never) -> Iterator[Tick]:
    """Yields one tick per batch, in which all modules work on that batch, module 0 first.

    Args:
      modules: number of modules.
      start: index of the first batch.
      until: index after the last batch.
      stop: called before each tick; the schedule ends when it returns True.
    """
    for batch in range(start, until):
        if stop():
            return
        yield tuple(Turn(k, batch) for k in range(modules))


def pipelined(
    modules: int, start: int, until: int, stop: Callable[[], bool] = never
) -> Iterator[Tick]:
    """Yields ticks in which module k works on batch t - k, the deepest module first.

    Args:
      modules: number of modules.
      start: index of the first batch.
      until: index after the last batch.
      stop: called before a batch enters; when it returns True, no further batch enters and the
        batches in flight are finished.
    """
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


def staggered(
    modules: int, start: int, until: int, stop: Callable[[], bool] = never
) -> Iterator[Tick]:
    """Yields ticks in which module k works on batch b at tick 2b + k, the deepest module first.

    Takes the same arguments as `pipelined`.
    """
    tick = 2 * start
    while tick < 2 * until + modules - 2:
        if tick % 2 == 0 and tick < 2 * until and stop():
            until = tick // 2
        turns = tuple(
            Turn(k, (tick - k) // 2)
            for k in reversed(range(modules))
            if (tick - k) % 2 == 0 and start <= (tick - k) // 2 < until
        )
        if turns:
            yield turns
        tick += 1


def aligned(
    counts: Sequence[int],
    until: int,
    stop: Callable[[], bool] = never,
    overlap: bool = False,
    overlapping: Callable[..., Iterator[Tick]] = pipelined,
) -> Iterator[Tick]:
    """Returns the schedule that continues from equal update counts, `overlapping` or `fused`.

    Args:
      counts: updates made so far, per module.
      until: updates per module at the end.
      stop: see `pipelined` and `fused`.
      overlap: modules work at the same time, so that `overlapping` is used.
      overlapping: `pipelined` or `staggered`.

    Raises:
      ValueError: the update counts differ.
    """
    if len(set(counts)) != 1:
        raise ValueError(
            f"modules of a synchronous run have unequal update counts: {sorted(set(counts))}"
        )
    return (overlapping if overlap else fused)(len(counts), counts[0], until, stop)


def layerwise(
    counts: Sequence[int],
    until: int,
    total: int,
    laps: int = 1,
    stop: Callable[[], bool] = never,
    overlap: bool = False,
) -> Iterator[Tick]:
    """Yields ticks that train one module after the other, on equal batches.

    Update n of every module uses batch n. In lap i of R every module makes its updates from
    i * total // R to (i + 1) * total // R, while the modules below it forward the same batches and
    the modules above it rest. The next phase follows from the counts alone: it is the first one
    whose module has updates left.

    Args:
      counts: updates made so far, per module.
      until: average number of updates per module at which the schedule ends.
      total: updates per module at the end of training.
      laps: number of passes over the modules, R.
      stop: see `pipelined` and `fused`.
      overlap: modules forward and train at the same time, so that each phase is `pipelined`.
    """
    made, left, stopped = list(counts), until * len(counts) - sum(counts), False

    def polled() -> bool:
        nonlocal stopped
        stopped = stop()
        return stopped

    for lap in range(laps):
        for k, begin in enumerate(made):
            end = min((lap + 1) * total // laps, begin + left)
            for tick in (pipelined if overlap else fused)(k + 1, begin, end, polled):
                yield tuple(t if t.module == k else t._replace(kind="forward") for t in tick)
            if stopped:
                return
            made[k] = max(begin, end)
            left -= made[k] - begin


def grouped(
    schedule: Callable[[Callable[[], bool]], Iterator[Tick]],
    size_at: Callable[[int], int],
    stop: Callable[[], bool] = never,
) -> Iterator[Group]:
    """Yields the ticks of a schedule in groups.

    The groups depend only on the ticks and on `size_at`, so that a run which was stopped and
    resumed forms the same ones as an uninterrupted run: a group that has begun is completed before
    the schedule can stop.

    Args:
      schedule: `schedule(stop)` returns the ticks.
      size_at: `size_at(batch)` returns the number of ticks that a group may have whose first tick
        enters the batch. A group with fewer ticks is not formed: its ticks are yielded one by one.
      stop: polled between groups; no new batch enters after it returns true.
    """
    collected: list[Tick] = []

    def turns(tick: Tick) -> list[tuple[int, str]]:
        return [(turn.module, turn.kind) for turn in tick]

    size = 1
    for tick in schedule(lambda: not collected and stop()):
        if collected and turns(tick) != turns(collected[0]):
            yield from ((single,) for single in collected)
            collected.clear()
        if not collected:
            first = entering(tick)
            size = 1 if first is None else size_at(first.batch)
        collected.append(tick)
        if len(collected) == size:
            group = tuple(collected)
            collected.clear()
            yield group
    yield from ((single,) for single in collected)


def entering(tick: Tick) -> Turn | None:
    """Returns the turn of a tick that takes a batch from the source; None if there is none."""
    return next((turn for turn in tick if turn.module == 0 and turn.kind != "backward"), None)


def in_order(modules: int) -> Callable[[int], int]:
    """Returns a function from a turn's number to its module: all modules in order, repeatedly.

    With rings of size 1 this is equivalent to `fused`.
    """
    return lambda turn: turn % modules


def drawn(modules: int, slowdown: Sequence[float], seed: int) -> Callable[[int], int]:
    """Returns a function from a turn's number to its module, drawn at random.

    The first turns belong to modules 0, 0, 1, 1, 2, 2 and so on, so that every ring holds a message
    when it is first read. The module of a turn depends only on the seed and the turn's number.

    Args:
      modules: number of modules.
      slowdown: module k is drawn with a probability proportional to 1 / slowdown[k]; empty for
        equal probabilities.
      seed: seed of the run.
    """
    shares = list(accumulate(1 / s for s in slowdown or [1.0] * modules))

    def module(turn: int) -> int:
        if turn < 2 * modules:
            return turn // 2
        point = random.Random(f"{seed}/{turn}").random() * shares[-1]
        return next(k for k, share in enumerate(shares) if point < share or k == modules - 1)

    return module
