"""Number of steps that one dispatch runs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from dgl_jax.engines.base import Engine, EngineInputs
from dgl_jax.profile.flops import module_flops
from dgl_jax.spec import TrainSpec

_LOG = logging.getLogger(__name__)
# Operations of a dispatch with a chosen number of steps: half a second at 12 TFLOP/s. The number
# follows from counts and not from measured times, so that two runs group their steps equally.
_OPERATIONS = 6e12
_MOST = 64  # steps of a dispatch, however small they are: they take a few milliseconds each
_UPDATE = 3  # operations of an update in multiples of its forward pass


@dataclass(frozen=True)
class Dispatches:
    """Division of the steps of a run into dispatches, as a function of the step alone.

    Attributes:
      steps: steps per dispatch.
      every: intervals in steps, of evaluations for example; a dispatch ends at every multiple of
        each. Steps that are left before it are dispatched one by one.
    """

    steps: int = 1
    every: tuple[int, ...] = ()

    @classmethod
    def of(cls, run: EngineInputs, steps: int = 0) -> "Dispatches":
        """Returns the dispatches of a run; 0 steps choose their number.

        A dispatch is not longer than the time between two evaluations or checkpoints.
        """
        chosen = steps or chosen_steps(run.spec, run.devices[0], run.log_every, run.every)
        most = min(run.every, default=chosen)
        if chosen > most:
            _LOG.warning(
                "config.engine.steps_per_dispatch=%d: uses %d, the steps between two evaluations "
                "or checkpoints",
                chosen,
                most,
            )
        return cls(min(chosen, most), run.every)

    def size(self, tick: int, until: int, per_step: int = 1) -> int:
        """Returns the number of ticks of the dispatch that starts at a tick of the run.

        Args:
          tick: number of the tick; the step itself if a step has one tick.
          until: step by which the dispatch ends.
          per_step: number of ticks per step, see `schedule.Progress`.
        """
        every = [n * per_step for n in self.every]
        begin = max((tick // n * n for n in every), default=0)
        end = min([until * per_step, *((tick // n + 1) * n for n in every)])
        fits = (tick - begin) % self.steps == 0 and tick + self.steps <= end
        return self.steps if fits else 1


def steps_per_dispatch(engine: Engine) -> int:
    """Returns the number of steps that the dispatches of an engine run; 1 unless it is `fused`."""
    dispatches: Dispatches = getattr(engine, "dispatches", Dispatches())
    return dispatches.steps


def chosen_steps(
    spec: TrainSpec, device: jax.Device, log_every: int = 0, every: Sequence[int] = ()
) -> int:
    """Returns the number of steps per dispatch that suits a device.

    On the CPU, where loops of convolutions are slow, it is 1. On accelerators it is the number
    between the largest one that `_OPERATIONS` and the log allow and its half that leaves the fewest
    single steps between two evaluations or checkpoints.

    Args:
      spec: description of the training run.
      device: device that runs the steps.
      log_every: steps between two log lines; 0 if there are none.
      every: steps between two evaluations, and between two checkpoints.
    """
    if device.platform == "cpu":
        return 1
    operations = _UPDATE * sum(body + objective for body, objective in module_flops(spec))
    fitting = max(1, int(_OPERATIONS / max(operations, 1.0)))
    most = min(_MOST, log_every or _MOST, fitting, *every)
    return min(range(most, most // 2, -1), key=lambda n: min(every, default=0) % n)
