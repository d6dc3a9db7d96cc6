"""Layer-wise training, the sequential greedy solver: one module after the other.

While a module trains, the modules below it are frozen: they forward batches with the running
averages of batch norm, as in evaluation.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from dgl_jax import schedule
from dgl_jax.config import MethodSettings
from dgl_jax.config.fields import number
from dgl_jax.config.registry import METHODS
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.core.step import Metrics, forward_step, local_step
from dgl_jax.errors import UserError
from dgl_jax.methods.base import MethodKind, Ports, Program
from dgl_jax.methods.post import Composed
from dgl_jax.schedule import Progress, Tick, never
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Context, Inbox, Outbox


@dataclass(frozen=True)
class LayerwiseOptions(MethodSettings):
    """Options of layer-wise training.

    Attributes:
      laps: passes over the modules; each module makes an equal part of its updates in each pass.
    """

    laps: int = number(1, 1, 10_000)

    def check(self, settings: Any) -> None:
        """Raises UserError if a lap would have less than one step."""
        if 0 < settings.train.steps < self.laps:
            raise UserError(
                f"config.method.laps={self.laps}: {settings.train.steps} steps give less than one "
                "step per lap; use fewer laps"
            )


@dataclass(frozen=True)
class Layerwise(Composed):
    """Training of one module after the other, each on the outputs of the frozen ones below it.

    The step of a run is the average number of updates per module, rounded down.

    Attributes:
      laps: see `LayerwiseOptions`.
    """

    laps: int = 1

    def progress(self, counts: Sequence[int]) -> Progress:
        """Returns the updates of all modules together, of which K make one step."""
        return Progress(sum(counts), len(counts))

    def check(self, spec: TrainSpec) -> None:
        """Raises UserError if an objective reads from the module above, which is untrained."""
        for k, module in enumerate(spec.modules):
            if "next_block" in spec.reads(k):
                raise UserError(
                    f"config.method.name=layerwise: the objective of {module.name} reads "
                    "next_block, of the module above, which trains only later; use another "
                    "objective (auglocal without momentum_block), or config.method.name=dgl"
                )

    def schedule(
        self,
        counts: Sequence[int],
        until: int,
        total: int,
        stop: Callable[[], bool] = never,
        overlap: bool = False,
    ) -> Iterator[Tick]:
        """Yields the turns of one module after the other; see `schedule.layerwise`."""
        return schedule.layerwise(counts, until, total, self.laps, stop, overlap)

    def ports(self, spec: TrainSpec, k: int, kind: str) -> tuple[Inbox, Outbox]:
        """Returns the ports of a turn: frozen modules send, the module that trains does not."""
        return Inbox(below=True), Outbox(above=True if kind == "forward" else None)  # type: ignore[arg-type]

    def program(self, spec: TrainSpec, k: int, kind: str = "step") -> Program:
        """Returns the program of a turn: update module k, or forward a batch while it is frozen."""
        module, ports = spec.modules[k], Ports(spec, k)

        def step(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            inputs, input_metrics = ports.receive(inbox.below)
            state, _, metrics = local_step(
                module,
                spec.optimizer,
                state,
                inputs,
                ports.full_context(inputs, context),
                accumulate=spec.accumulate,
            )
            if spec.ema:
                state = ema.advance(state, spec.ema)
            return state, Outbox(), metrics | input_metrics

        def forward(
            state: ModuleState, inbox: Inbox, context: Context
        ) -> tuple[ModuleState, Outbox, Metrics]:
            inputs, input_metrics = ports.receive(inbox.below)
            outputs, _ = forward_step(
                module,
                state,
                inputs,
                ports.full_context(inputs, context),
                train=False,
                accumulate=spec.accumulate,
            )
            # The module's update count does not rise here, so the codec counts its messages.
            sent = state.extras.get("sent", state.updates)
            state, message, metrics = ports.send(state, sent, outputs, inputs)
            if "sent" in state.extras:
                extras = state.extras | {"sent": sent + 1}
                state = dataclasses.replace(state, extras=extras)
            return state, Outbox(above=message), metrics | input_metrics

        program = forward if kind == "forward" else step
        program.__name__ = f"{module.name}_{kind}"
        return program

    def extras(self, spec: TrainSpec, k: int, states: Sequence[ModuleState]) -> dict[str, Any]:
        """Returns the number of messages that the module has sent, if its codec learns."""
        return {"sent": jnp.zeros((), jnp.int32)} if "codec" in states[k].extras else {}


METHODS.ship(
    layerwise=MethodKind(
        lambda options: Layerwise(options.laps),
        LayerwiseOptions,
        engines=("fused", "pipeline"),
        in_turn=True,
    )
)
