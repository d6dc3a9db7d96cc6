"""The ring of packets at a module's entrance: host memory, taken once; and the rules that choose what is read next.

A ring holds the newest M packets its producer made (Belilovsky et al. 2020, Algorithm 2). A packet is written over the oldest one
and may be read any number of times before; labels and example ids lie in the same slot as their activations.
"""

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dgl_jax import system
from dgl_jax.errors import UserError
from dgl_jax.registry import RULES
from dgl_jax.replay.rules import ANY_NUMBER, limit_of
from dgl_jax.types import Context, Header, Message, nbytes


class Sample(NamedTuple):
    """A packet read from a ring, in arrays of its own.

    Attributes:
      message: payload, codebook and the whole context.
      header: that it came with.
      age: packets its producer has made since (0 = the newest).
      use: how often it has been read, this time included.
    """

    message: Message
    header: Header
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
      example: a packet of shapes and dtypes, as `jax.eval_shape` gives them: (payload, context).
      size: M.
      rule: a name in `RULES`.
      max_reuse: reads a packet allows; 0: any number. Under the rule `released` a packet counts as used once when it is written,
        so that k allows k - 1 reads, and a ring of one packet never counts.
      seed: of the rule `uniform`.
      codebook: shapes of what decodes the payloads, where the codec has one. A version of it is kept as long as a packet refers to
        it, and the newest one always.
    """

    def __init__(
        self,
        example: tuple[Any, Context],
        size: int,
        rule: str = "least_used_latest",
        max_reuse: int = 0,
        seed: int | tuple[int, ...] = 0,
        codebook: Any = (),
    ):
        self.size, self.rule, self.max_reuse = size, rule, max_reuse
        self._seed = (seed,) if isinstance(seed, int) else seed
        self._form: Any  # a PyTreeDef
        leaves, self._form = jax.tree.flatten(example)
        self._names = sorted(example[1])  # in the order of the leaves
        self._one_array = jax.tree_util.treedef_is_leaf(
            jax.tree.structure(example[0])
        )  # the usual payload needs no walk
        # full, not zeros: the memory is taken here and now, not at the first write.
        self._slots = [np.full((size, *leaf.shape), 0, leaf.dtype) for leaf in leaves]
        self._headers: list[Header | None] = [None] * size
        # Reads of the packet in slot s, at -s % size and again at `size` more: the packets lie in a row, newest first, wherever the
        # newest is.
        self._reads = np.zeros(2 * size, np.int64)
        self._rule, self._limit = RULES[rule].make, limit_of(rule, size, max_reuse)
        self._books: dict[int, Any] = {}  # codebooks by version, 1, 2, ...
        self._book_form: Any = jax.tree.structure(codebook)
        self.tally = Tally()
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)

    @property
    def nbytes(self) -> int:
        """Bytes the packets take, full or not, and the codebooks that are kept."""
        return sum(slots.nbytes for slots in self._slots) + nbytes(self._books)

    @property
    def newest_codebook(self) -> tuple[int, Any]:
        """Its version and the codebook; (0, ()) before the first."""
        with self._lock:
            version = max(self._books, default=0)
            return version, self._books.get(version, ())

    def versions(self) -> set[int]:
        """Of the codebooks that are kept."""
        with self._lock:
            return set(self._books)

    def add(self, payload: Any, context: Context, header: Header, codebook: Any = None) -> None:
        """Copies a packet (host arrays) over the oldest one.

        Args:
          codebook: what the payload was encoded with, where it is a new one; else it was the one before. Not copied.
        """
        leaves = (
            (payload, *(context[name] for name in self._names))
            if self._one_array
            else self._form.flatten_up_to((payload, context))
        )
        with self._lock:
            tally, size = self.tally, self.size
            slot = tally.written % size
            place = -slot % size
            if tally.written >= size and not self._reads[place]:
                tally.never_used += 1
            for slots, leaf in zip(self._slots, leaves, strict=True):
                # Cheaper than `np.copyto(..., casting="no")`, which matters for small packets.
                if getattr(leaf, "dtype", None) != slots.dtype:
                    raise TypeError(
                        f"the ring holds {slots.dtype}, the packet {getattr(leaf, 'dtype', type(leaf))}"
                    )
                slots[slot] = leaf
            if codebook is not None:
                self._books[max(self._books, default=0) + 1] = codebook
            if self._books:
                header = dataclasses.replace(header, codebook=max(self._books))
                self._headers[slot] = header
                kept = {h.codebook for h in self._headers if h is not None}
                self._books = {
                    version: book for version, book in self._books.items() if version in kept
                }
            self._headers[slot] = header
            self._reads[place] = self._reads[place + size] = 0
            tally.written += 1
            self.changed.notify_all()

    def sample(self) -> Sample | None:
        """The packet that the rule chooses, copied out; None where there is none or `max_reuse` holds all of them back."""
        with self._lock:
            slot = self._choose()
            if slot is None:
                return None
            # Private arrays: `device_put` may alias them, and the slot is written again.
            leaves = [slots[slot].copy() for slots in self._slots]
            tally, size = self.tally, self.size
            age = (tally.written - 1 - slot) % size
            place = -slot % size
            use = int(self._reads[place]) + 1
            self._reads[place] = self._reads[place + size] = use
            tally.read += 1
            tally.age += age
            if age > tally.oldest:
                tally.oldest = age
            if use > 1:
                tally.reused += 1
            header = self._headers[slot]
            assert header is not None
            codebook = self._books.get(header.codebook, ())
        if self._one_array:
            payload, context = leaves[0], dict(zip(self._names, leaves[1:]))
        else:
            payload, context = self._form.unflatten(leaves)
        return Sample(Message(payload, codebook, context=context), header, age, use)

    def ready(self) -> bool:
        """Whether `sample` would give a packet."""
        with self._lock:
            return self._uses() is not None

    def snapshot(self) -> dict[str, Any]:
        """All of it as host arrays and numbers, copied; `restore` takes it back."""
        with self._lock:
            headers = [
                [-1, -1, -1] if h is None else [h.sequence, h.updates, h.codebook]
                for h in self._headers
            ]
            slots, written = np.arange(self.size), self.tally.written
            return {
                "slots": [arrays.copy() for arrays in self._slots],
                "headers": np.array(headers, np.int64),
                "reads": self._reads[-slots % self.size],
                # The number of the write that filled the slot.
                "written": np.where(
                    slots < written, written - 1 - (written - 1 - slots) % self.size, 0
                ),
                "tally": np.array(
                    [getattr(self.tally, name) for name in Tally.__dataclass_fields__], np.int64
                ),
                "codebooks": {
                    str(version): jax.tree.leaves(book) for version, book in self._books.items()
                },
            }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from a snapshot of a ring of the same form."""
        with self._lock:
            for slots, values in zip(self._slots, saved["slots"], strict=True):
                np.copyto(slots, values)
            self._headers = [
                None if h[0] < 0 else Header(*map(int, h)) for h in np.asarray(saved["headers"])
            ]
            books = saved["codebooks"].items()
            self._books = {
                int(version): self._book_form.unflatten(map(np.asarray, leaves))
                for version, leaves in books
            }
            self._reads[:] = np.asarray(saved["reads"])[-np.arange(2 * self.size) % self.size]
            self.tally = Tally(*(int(n) for n in np.asarray(saved["tally"])))

    def _uses(self) -> np.ndarray | None:
        """Reads of the packets there are, newest first (a view); None where none may be read."""
        written, size = self.tally.written, self.size
        first = (1 - written) % size
        uses = self._reads[first : first + min(written, size)]
        if not written or (self._limit != ANY_NUMBER and uses.min() >= self._limit):
            return None
        return uses

    def _choose(self) -> int | None:
        uses = self._uses()
        if uses is None:
            return None
        newest = (self.tally.written - 1) % self.size
        # Seeded by the count of reads: a resumed ring draws what the whole one would have drawn.
        return (
            newest
            - self._rule(uses, newest, self.size, self._limit, (*self._seed, self.tally.read))
        ) % self.size


class RingSpec(NamedTuple):
    """What a ring holds, as shapes: a packet (payload, context), a codebook, and the updates from one codebook to the next."""

    packet: tuple[Any, Context]
    codebook: Any = ()
    period: int = 0

    def nbytes(self, size: int) -> int:
        """Bytes that a ring of `size` packets will take at most."""
        books = 2 + (size - 1) // self.period if self.period else 0
        return size * nbytes(self.packet) + books * nbytes(self.codebook)


def check_memory(forms: Sequence[RingSpec], size: int, available: int | None = None) -> None:
    """Raises UserError where the rings would take more than the free memory, with the size that fits."""
    available = system.free_memory() if available is None else available
    needed = sum(form.nbytes(size) for form in forms)
    if available is not None and needed > available:
        fits, too_many = 0, size
        while too_many - fits > 1:
            half = (fits + too_many) // 2
            fits, too_many = (
                (half, too_many)
                if sum(form.nbytes(half) for form in forms) <= available
                else (fits, half)
            )
        raise UserError(
            f"config.replay.size={size}: the rings would take {needed / 2**30:.2f} GiB and {available / 2**30:.2f} GiB are free; "
            + (
                f"{fits} would fit"
                if fits
                else "not even 1 would fit; a smaller config.data.batch_size or another config.codec.name"
            )
        )
