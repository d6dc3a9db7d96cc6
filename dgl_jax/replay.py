"""The ring of packets at a module's entrance: host memory, taken once; and the rules that choose what is read next.

A ring holds the newest M packets its producer made (Belilovsky et al. 2020, Algorithm 2). A packet is written over the oldest one
and may be read any number of times before; labels and example ids lie in the same slot as their activations.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from dgl_jax.errors import UserError
from dgl_jax.packet import Header, Packet, Targets, nbytes

# (slots that may be read, their uses, slot that is written next, slots of the ring, random) -> the slot to read
Rule = Callable[[Int[np.ndarray, "n"], Int[np.ndarray, "n"], int, int, np.random.Generator], int]


def least_used_latest(slots: np.ndarray, uses: np.ndarray, following: int, size: int, random: np.random.Generator) -> int:
    """The paper's rule: of the packets used least often the newest."""
    return max(slots[uses == uses.min()], key=lambda slot: _recency(slot, following, size))


def fifo(slots: np.ndarray, uses: np.ndarray, following: int, size: int, random: np.random.Generator) -> int:
    """Of the packets used least often the oldest."""
    return min(slots[uses == uses.min()], key=lambda slot: _recency(slot, following, size))


def uniform(slots: np.ndarray, uses: np.ndarray, following: int, size: int, random: np.random.Generator) -> int:
    """Any packet, all equally likely."""
    return int(random.choice(slots))


def released(slots: np.ndarray, uses: np.ndarray, following: int, size: int, random: np.random.Generator) -> int:
    """What the authors' published code does: `least_used_latest`, but the oldest packet of a full ring passes for the newest.

    There `>` stands where `>=` was meant. Its count of uses also begins at 1 (see `Ring`), which matters for `max_reuse` alone.
    """
    return max(slots[uses == uses.min()], key=lambda slot: slot - size if slot > following else slot)


def _recency(slot: int, following: int, size: int) -> int:
    """Grows with the time a slot was written: the next one to be written is the oldest of a full ring."""
    return slot - size if slot >= following else slot


RULES: dict[str, Rule] = {"least_used_latest": least_used_latest, "fifo": fifo, "uniform": uniform, "released": released}


class Sample(NamedTuple):
    """A packet read from a ring, in arrays of its own.

    Attributes:
      age: packets its producer has made since (0 = the newest).
      use: how often it has been read, this time included.
    """

    packet: Packet
    age: int
    use: int


@dataclass
class Tally:
    """What became of a ring's packets, summed since the start."""

    written: int = 0
    read: int = 0
    age: int = 0  # sum over reads
    oldest: int = 0  # largest age of a read
    reused: int = 0  # reads of a packet that had been read before
    never_used: int = 0  # packets written over unread

    def mean_age(self) -> float:
        """Of the packets read, in packets of the producer; 0 before the first read."""
        return self.age / self.read if self.read else 0.0

    def reuse(self) -> float:
        """Reads a packet that was read at all; 0 before the first read."""
        return self.read / (self.read - self.reused) if self.read else 0.0


class Ring:
    """M packets in arrays taken once: one copy in, one copy out. Safe to write and read from two threads.

    Args:
      example: a packet of shapes and dtypes, as `jax.eval_shape` gives them: (payload, targets).
      size: M.
      rule: a name in `RULES`.
      max_reuse: reads a packet allows; 0: any number. Under the rule `released` a packet counts as used once when it is written,
        so that k allows k - 1 reads, and a ring of one packet never counts.
      seed: of the rule `uniform`.
    """

    def __init__(self, example: tuple[Any, Targets], size: int, rule: str = "least_used_latest", max_reuse: int = 0, seed: int = 0):
        self.size, self.rule, self.max_reuse, self.seed = size, rule, max_reuse, seed
        leaves, self._form = jax.tree.flatten(example)
        # zeros, not empty: the memory is taken here and now, not at the first write.
        self._slots = [np.zeros((size, *leaf.shape), leaf.dtype) for leaf in leaves]
        self._headers: list[Header | None] = [None] * size
        self._reads = np.zeros(size, np.int64)  # of the packet in the slot
        self._written = np.zeros(size, np.int64)  # number of the write that filled the slot
        self.tally = Tally()
        self.changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes the packets take, full or not."""
        return sum(slots.nbytes for slots in self._slots)

    def add(self, payload: Any, targets: Targets, header: Header) -> None:
        """Copies a packet (host arrays) over the oldest one."""
        leaves = jax.tree.leaves((payload, targets))
        with self.changed:
            slot = self.tally.written % self.size
            if self.tally.written >= self.size and not self._reads[slot]:
                self.tally.never_used += 1
            for slots, leaf in zip(self._slots, leaves, strict=True):
                np.copyto(slots[slot], leaf, casting="no")
            self._headers[slot] = header
            self._reads[slot] = 0
            self._written[slot] = self.tally.written
            self.tally.written += 1
            self.changed.notify_all()

    def sample(self) -> Sample | None:
        """The packet that the rule chooses, copied out; None where there is none or `max_reuse` holds all of them back."""
        with self.changed:
            slot = self._choose()
            if slot is None:
                return None
            # Private arrays: `device_put` may alias them, and the slot is written again.
            leaves = [slots[slot].copy() for slots in self._slots]
            age = self.tally.written - 1 - int(self._written[slot])
            self._reads[slot] += 1
            use = int(self._reads[slot])
            self.tally.read += 1
            self.tally.age += age
            self.tally.oldest = max(self.tally.oldest, age)
            self.tally.reused += use > 1
            header = self._headers[slot]
        assert header is not None
        payload, targets = jax.tree.unflatten(self._form, leaves)
        return Sample(Packet(payload, targets, header), age, use)

    def ready(self) -> bool:
        """Whether `sample` would give a packet."""
        with self.changed:
            return len(self._candidates()[0]) > 0

    def snapshot(self) -> dict[str, Any]:
        """All of it as host arrays and numbers, copied; `restore` takes it back."""
        with self.changed:
            headers = [[-1, -1] if h is None else [h.sequence, h.updates] for h in self._headers]
            return {
                "slots": [slots.copy() for slots in self._slots],
                "headers": np.array(headers, np.int64),
                "reads": self._reads.copy(),
                "written": self._written.copy(),
                "tally": np.array([getattr(self.tally, name) for name in Tally.__dataclass_fields__], np.int64),
            }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from a snapshot of a ring of the same form."""
        with self.changed:
            for slots, values in zip(self._slots, saved["slots"], strict=True):
                np.copyto(slots, values)
            self._headers = [None if h[0] < 0 else Header(int(h[0]), int(h[1])) for h in np.asarray(saved["headers"])]
            self._reads[:], self._written[:] = saved["reads"], saved["written"]
            self.tally = Tally(*(int(n) for n in np.asarray(saved["tally"])))

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots that may be read, and their uses as the rule counts them."""
        filled = min(self.tally.written, self.size)
        uses = self._reads[:filled]
        if self.rule == "released":
            uses = np.ones_like(uses) if self.size == 1 else uses + 1
        slots = np.arange(filled)
        if self.max_reuse:
            slots = slots[uses < self.max_reuse]
        return slots, uses[slots]

    def _choose(self) -> int | None:
        slots, uses = self._candidates()
        if len(slots) < 2:
            return int(slots[0]) if len(slots) else None
        # A fresh generator from the count of reads: a resumed ring draws what the whole one would have drawn.
        random = np.random.default_rng([self.seed, self.tally.read]) if self.rule == "uniform" else _NO_RANDOM
        return int(RULES[self.rule](slots, uses, self.tally.written % self.size, self.size, random))


_NO_RANDOM = np.random.default_rng(0)  # for rules that draw nothing


def ring_bytes(examples: Sequence[tuple[Any, Targets]], size: int) -> list[int]:
    """Bytes that rings of `size` such packets will take, one entry a ring."""
    return [size * nbytes(example) for example in examples]


def check_memory(examples: Sequence[tuple[Any, Targets]], size: int, available: int | None = None) -> None:
    """Raises UserError where the rings would take more than the free memory, with the size that fits."""
    available = free_memory() if available is None else available
    needed = sum(ring_bytes(examples, size))
    if available is not None and needed > available:
        fits = available // max(1, sum(ring_bytes(examples, 1)))
        raise UserError(
            f"config.replay.size={size}: the rings would take {needed / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are free; "
            + (
                f"{fits} would fit"
                if fits
                else "not even 1 would fit; a smaller config.data.batch_size or another config.codec.name"
            )
        )


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
