"""In-flight state of asynchronous engines: replay rings, and a record of turns."""

from collections import deque
from typing import Any

import numpy as np

from dgl_jax.config import ReplaySettings
from dgl_jax.core import rngs
from dgl_jax.replay import Ring, RingSpec, Sample
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Header, Message

_TURNS = 64  # number of newest turns kept for the timeline


def ring_specs(spec: TrainSpec) -> list[RingSpec]:
    """Returns the shapes of the messages and codebooks that each ring holds."""
    return [
        RingSpec((hop.payload, spec.context(k)), hop.codebook, hop.period)
        for k, hop in enumerate(spec.hops, 1)
    ]


class Rings:
    """Replay rings of all modules and counters of turns and reads, as the flight of an engine.

    Attributes:
      rings: rings of modules 1, 2, ...
      batches: number of batches that the first module has read, counted when its turn is complete.
      turn: number of turns drawn so far by the engine `simulated`.
      waiting: 1 for modules that were drawn while no message was readable; they take their turn as
        soon as one is.
      skipped: number of turns that each module lost because its ring had no readable message.
      ages: [K, bins] reads of each module by the age of the message.
      turns: newest turns of all modules as (module, begin, end).
      unit: unit of begin and end: turns drawn, or seconds since the run began.
    """

    def __init__(self, spec: TrainSpec, replay: ReplaySettings, batches: int, unit: str):
        self.rings = [
            Ring(
                ring_spec.message,
                replay.size,
                replay.rule,
                replay.max_reuse,
                rngs.ring(spec.seed, k),
                ring_spec.codebook,
            )
            for k, ring_spec in enumerate(ring_specs(spec), 1)
        ]
        self.turn, self.batches, self.unit = 0, batches, unit
        modules = len(self.rings) + 1
        self.waiting, self.skipped = np.zeros(modules, np.int64), np.zeros(modules, np.int64)
        self.turns: deque[tuple[int, float, float]] = deque(maxlen=_TURNS)
        # Column i counts ages of i bits: 0, 1, 2 to 3, 4 to 7 and so on.
        self.ages = np.zeros((modules, (replay.size - 1).bit_length() + 1), np.int64)

    def ring(self, module: int) -> Ring:
        """Returns the ring that a module reads."""
        return self.rings[module - 1]

    def sample(self, module: int) -> Sample | None:
        """Returns the next message for a module, or None if its ring has no readable message."""
        sample = self.ring(module).sample()
        if sample is not None:
            self.ages[module, sample.age.bit_length()] += 1
        return sample

    def add(self, producer: int, message: Message, header: Header) -> None:
        """Copies a message to the ring of the module above its producer.

        Args:
          producer: index of the module that sends.
          message: message of host arrays; its codebook is None if the ring already has it.
          header: description of the message.
        """
        self.ring(producer + 1).add(message.payload, message.context, header, message.codebook)

    def gauges(self) -> dict[str, float]:
        """Returns statistics of each ring under `replay/module_k/`.

        These are the mean (`age`) and largest age (`oldest`) of the messages read, reads per
        message (`reuse`), messages overwritten unread (`never_used`), bytes of host memory, skipped
        turns, and reads by age (`ages_from_n`).
        """
        gauges: dict[str, float] = {}
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
            gauges |= {f"replay/module_{k}/{name}": float(value) for name, value in values.items()}
        return gauges

    def recent(self) -> list[tuple[int, float, float]]:
        """Returns the newest turns, oldest first."""
        return list(self.turns)

    def snapshot(self) -> dict[str, Any]:
        """Copies rings and counters into host arrays for a checkpoint."""
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
        """Restores rings and counters from a snapshot."""
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


class FrozenRings:
    """Copy of the rings for a checkpoint that is written while the workers keep training.

    Each ring is copied under its lock, and the rings are copied before the modules, so no message
    is newer than the saved state of its producer.
    """

    def __init__(self, rings: Rings):
        self.unit, self._turns, self._gauges, self._saved = (
            rings.unit,
            rings.recent(),
            rings.gauges(),
            rings.snapshot(),
        )

    def set_batches(self, batches: int) -> None:
        """Sets the number of batches read to the one that matches the copy of the first module."""
        self._saved["counts"][1] = batches

    def gauges(self) -> dict[str, float]:
        """Returns the ring statistics at the time of the snapshot."""
        return self._gauges

    def recent(self) -> list[tuple[int, float, float]]:
        """Returns the newest turns, oldest first."""
        return self._turns

    def snapshot(self) -> dict[str, Any]:
        """Returns the copied rings and counters."""
        return self._saved
