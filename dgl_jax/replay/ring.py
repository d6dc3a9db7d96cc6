"""Replay ring in host memory at a module's entrance.

A ring holds the newest M messages of its producer (Belilovsky et al. 2020, Algorithm 2). A new
message overwrites the oldest one; until then a message may be read any number of times. Labels and
example ids are stored in the same slot as their activations. A ring of five messages after the
producer has sent eight, of batches 0 to 7:

    slot         0      1      2      3      4
    message     b5     b6     b7     b3     b4
    age          2      1      0      4      3
                             newest oldest
                                    (b8 goes here)
"""

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from dgl_jax import system
from dgl_jax.config.registry import RULES
from dgl_jax.errors import UserError
from dgl_jax.replay.rules import ANY_NUMBER, limit_of
from dgl_jax.types import Context, Header, Message, nbytes


class Sample(NamedTuple):
    """Message read from a ring, copied into separate arrays.

    Attributes:
      message: payload, codebook and the full context.
      header: header that was added with the message.
      age: number of messages that the producer has sent since (0: it is the newest).
      use: number of times the message has been read, including this one.
    """

    message: Message
    header: Header
    age: int
    use: int


@dataclass
class Tally:
    """Cumulative usage statistics of a ring."""

    written: int = 0
    read: int = 0
    age: int = 0  # sum over reads
    oldest: int = 0  # largest age of a read
    reused: int = 0  # reads of a message that had been read before
    never_used: int = 0  # messages overwritten before any read

    def mean_age(self) -> float:
        """Returns the mean age of the reads, in messages; 0 before the first read."""
        return self.age / self.read if self.read else 0.0

    def reuse(self) -> float:
        """Returns the mean number of reads per message read at least once; 0 before any read."""
        return self.read / (self.read - self.reused) if self.read else 0.0


class Ring:
    """Ring of M messages in preallocated arrays, with one copy per write and one per read.

    One thread may write while another one reads.

    Args:
      example: shapes and dtypes of a message, (payload, context), as `jax.eval_shape` returns them.
      size: number of slots, M.
      rule: name of the rule that chooses the message to read, from `RULES`.
      max_reuse: number of times a message may be read; 0 for no limit. Under the rule `released` a
        message counts as used once when it is written, so that a limit of k allows k - 1 reads; in
        a ring of one slot that rule counts no further use.
      seed: seed of the rule `uniform`.
      codebook: shapes of the codebook that decodes the payloads, if the codec has one. The ring
        keeps the newest version, and older ones as long as a stored message refers to them.
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
        # The usual payload is a single array and needs no tree traversal.
        self._one_array = jax.tree_util.treedef_is_leaf(jax.tree.structure(example[0]))
        # np.full, not np.zeros: it commits the memory now instead of at the first write.
        self._slots = [np.full((size, *leaf.shape), 0, leaf.dtype) for leaf in leaves]
        self._headers: list[Header | None] = [None] * size
        # Read counts in reverse slot order, stored twice, so that newest-to-oldest is always one
        # contiguous view. With three slots and the newest message in slot 1:
        #
        #     index  0  1  2  3  4  5
        #     slot   0  2  1  0  2  1
        #                  '-----'      newest to oldest
        self._reads = np.zeros(2 * size, np.int64)
        self._rule, self._limit = RULES[rule].make, limit_of(rule, size, max_reuse)
        self._books: dict[int, Any] = {}  # codebooks by version, 1, 2, ...
        self._book_form: Any = jax.tree.structure(codebook)
        self.tally = Tally()
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all slots, filled or not, and of the stored codebooks."""
        return sum(slots.nbytes for slots in self._slots) + nbytes(self._books)

    @property
    def newest_codebook(self) -> tuple[int, Any]:
        """Returns the version of the newest codebook and the codebook; (0, ()) before the first."""
        with self._lock:
            version = max(self._books, default=0)
            return version, self._books.get(version, ())

    def versions(self) -> set[int]:
        """Returns the versions of the stored codebooks."""
        with self._lock:
            return set(self._books)

    def add(self, payload: Any, context: Context, header: Header, codebook: Any = None) -> None:
        """Copies a message (host arrays) into the slot of the oldest one.

        Args:
          payload: encoded activations, of the same structure as the example.
          context: arrays with one row per example; must have all names of the example's context.
          header: header of the message; the ring fills in the codebook version.
          codebook: new codebook that encoded the payload; None if it is the same as for the
            previous message. It is stored without a copy.

        Raises:
          TypeError: an array has another dtype than the ring.
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
                # Cheaper than `np.copyto(..., casting="no")`, which matters for small messages.
                if getattr(leaf, "dtype", None) != slots.dtype:
                    raise TypeError(
                        f"the ring stores {slots.dtype}, but the message has "
                        f"{getattr(leaf, 'dtype', type(leaf))}"
                    )
                slots[slot] = leaf
            if codebook is not None:
                self._books[max(self._books, default=0) + 1] = codebook
            if self._books:
                header = dataclasses.replace(header, codebook=max(self._books))
                self._headers[slot] = header
                used = {h.codebook for h in self._headers if h is not None}
                self._books = {
                    version: book for version, book in self._books.items() if version in used
                }
            self._headers[slot] = header
            self._reads[place] = self._reads[place + size] = 0
            tally.written += 1
            self.changed.notify_all()

    def sample(self) -> Sample | None:
        """Reads the message that the rule chooses, as a copy; None if no message may be read.

        That is the case if the ring is empty, or if all messages have reached `max_reuse`.
        """
        with self._lock:
            slot = self._choose()
            if slot is None:
                return None
            # Copy: `device_put` may alias a host array, and the slot will be overwritten.
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
        """Returns True if `sample` would return a message."""
        with self._lock:
            return self._uses() is not None

    def snapshot(self) -> dict[str, Any]:
        """Returns a copy of the ring as a pytree of host arrays, for `restore`."""
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
                # Index of the write that filled each slot.
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
        """Restores a snapshot of a ring with the same shapes and size."""
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
        """Returns a view of the read counts, newest first; None if no message may be read."""
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
        # The seed includes the number of reads, so a resumed ring repeats the same draws.
        return (
            newest
            - self._rule(uses, newest, self.size, self._limit, (*self._seed, self.tally.read))
        ) % self.size


class RingSpec(NamedTuple):
    """Shapes and dtypes of a ring's contents."""

    message: tuple[Any, Context]  # (payload, context)
    codebook: Any = ()  # () if the codec has none
    period: int = 0  # updates from one codebook to the next; 0 if the codec has none

    def nbytes(self, size: int) -> int:
        """Returns the maximum number of bytes in a ring of `size` messages."""
        books = 2 + (size - 1) // self.period if self.period else 0
        return size * nbytes(self.message) + books * nbytes(self.codebook)


def check_memory(forms: Sequence[RingSpec], size: int, available: int | None = None) -> None:
    """Raises UserError, with a size that would fit, if the rings need more than the free memory.

    Args:
      forms: one entry per ring.
      size: number of messages per ring.
      available: free memory in bytes; by default what the operating system reports. If that is
        unknown, nothing is checked.
    """
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
            f"config.replay.size={size}: the rings need {needed / 2**30:.2f} GiB of memory, but "
            f"only {available / 2**30:.2f} GiB are free; "
            + (
                f"{fits} would fit"
                if fits
                else "not even 1 would fit: reduce config.data.batch_size or choose another "
                "config.codec.name"
            )
        )
