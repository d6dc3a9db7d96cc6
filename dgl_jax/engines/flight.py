"""What is under way in an asynchronous state: the rings of packets between modules, and who had which turn."""

from collections import deque
from typing import Any

import numpy as np

from dgl_jax.config import ReplaySettings
from dgl_jax.core import rngs
from dgl_jax.replay import Ring, RingSpec, Sample
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Header, Message

_TURNS = 64  # the newest, kept for the timeline


def ring_specs(spec: TrainSpec) -> list[RingSpec]:
    """What each ring holds."""
    return [
        RingSpec((hop.payload, spec.context(k)), hop.codebook, hop.period)
        for k, hop in enumerate(spec.hops, 1)
    ]


class Rings:
    """The flight of an asynchronous state.

    Attributes:
      rings: those of modules 1, 2, ...
      batches: batches that the first module has read, up to its last whole turn.
      turn: turns drawn so far, where they are drawn.
      waiting: modules that had a turn but no packet to read, and take it as soon as there is one.
      skipped: of each module, turns lost for want of a packet.
      turns: the newest of all modules as (module, begin, end).
      unit: of begin and end: turns drawn, or seconds since the run began.
    """

    def __init__(self, spec: TrainSpec, replay: ReplaySettings, batches: int, unit: str):
        self.rings = [
            Ring(
                form.packet,
                replay.size,
                replay.rule,
                replay.max_reuse,
                rngs.ring(spec.seed, k),
                form.codebook,
            )
            for k, form in enumerate(ring_specs(spec), 1)
        ]
        self.turn, self.batches, self.unit = 0, batches, unit
        modules = len(self.rings) + 1
        self.waiting, self.skipped = np.zeros(modules, np.int64), np.zeros(modules, np.int64)
        self.turns: deque[tuple[int, float, float]] = deque(maxlen=_TURNS)
        # How often module k read a packet of age 0, 1, 2 or 3, 4 to 7 and so on.
        self.ages = np.zeros((modules, (replay.size - 1).bit_length() + 1), np.int64)

    def ring(self, module: int) -> Ring:
        """The one that module reads."""
        return self.rings[module - 1]

    def sample(self, module: int) -> Sample | None:
        """What the module reads next; None where no packet may be read."""
        sample = self.ring(module).sample()
        if sample is not None:
            self.ages[module, sample.age.bit_length()] += 1
        return sample

    def add(self, producer: int, message: Message, header: Header) -> None:
        """Copies a message (host arrays; codebook None: the same as before) from one module to the ring of the next."""
        self.ring(producer + 1).add(message.payload, message.context, header, message.codebook)

    def gauges(self) -> dict[str, float]:
        """Of each ring: mean and largest age of the packets read, reads a packet, packets never read, bytes held, ages."""
        found: dict[str, float] = {}
        for k, ring in enumerate(self.rings, 1):
            tally = ring.tally
            values = {
                "age": tally.mean_age(),
                "oldest": tally.oldest,
                "reuse": tally.reuse(),
                "never_used": tally.never_used,
                "bytes": ring.nbytes,
                "skipped": self.skipped[k],
            }
            values |= {f"ages_from_{2**i // 2}": n for i, n in enumerate(self.ages[k])}
            found |= {f"replay/module_{k}/{name}": float(value) for name, value in values.items()}
        return found

    def recent(self) -> list[tuple[int, float, float]]:
        """The newest turns, oldest first."""
        return list(self.turns)

    def snapshot(self) -> dict[str, Any]:
        """Host arrays, copied."""
        rings = {f"ring_{k}": ring.snapshot() for k, ring in enumerate(self.rings, 1)}
        turns = np.array(self.recent(), np.float64).reshape(-1, 3)
        return rings | {
            "counts": np.array([self.turn, self.batches], np.int64),
            "waiting": self.waiting.copy(),
            "skipped": self.skipped.copy(),
            "ages": self.ages.copy(),
            "turns": np.concatenate([turns, np.full((_TURNS - len(turns), 3), -1.0)]),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Goes on from a snapshot."""
        self.turn, self.batches = (int(n) for n in np.asarray(saved["counts"]))
        self.waiting[:], self.skipped[:], self.ages[:] = (
            saved["waiting"],
            saved["skipped"],
            saved["ages"],
        )
        self.turns.extend(
            (int(k), float(a), float(b)) for k, a, b in np.asarray(saved["turns"]) if k >= 0
        )
        for k, ring in enumerate(self.rings, 1):
            ring.restore(saved[f"ring_{k}"])


class Still:
    """The rings as they were when a snapshot was taken, for a checkpoint that is written while the workers go on.

    Each ring is copied under its lock. The rings are copied before the modules: no packet is newer than its producer.
    """

    def __init__(self, rings: Rings):
        self.unit, self._turns, self._gauges, self._saved = (
            rings.unit,
            rings.recent(),
            rings.gauges(),
            rings.snapshot(),
        )

    def begin_at(self, batches: int) -> None:
        """Takes the count of batches that goes with the copy of the first module."""
        self._saved["counts"][1] = batches

    def gauges(self) -> dict[str, float]:
        """Returns those of the rings."""
        return self._gauges

    def recent(self) -> list[tuple[int, float, float]]:
        """Returns the newest turns, oldest first."""
        return self._turns

    def snapshot(self) -> dict[str, Any]:
        """Returns the copy itself."""
        return self._saved
