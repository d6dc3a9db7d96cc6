"""How fast the configured engine runs here: what a user asks before choosing one."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from dgl_jax import system
from dgl_jax.config import Settings, make_settings
from dgl_jax.engines import EngineState
from dgl_jax.engines.placement import put
from dgl_jax.engines.program import jitted
from dgl_jax.methods.base import oldest, opened, steps_alone
from dgl_jax.profile.timing import Elapsed, clocked
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.types import Inbox

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_WARM_UP = 5


def bench(config: "Mapping[str, Any] | ConfigDict | Settings", steps: int = 200) -> dict[str, Any]:
    """Trains `steps` steps of the configured engine and measures; writes nothing.

    Returns:
      `images_per_second`, `tick_milliseconds` (a new batch enters), `module_milliseconds` (each module's program alone, on
      its devices), `python_milliseconds_per_tick` (processor time of the controlling thread, waiting excluded),
      `peak_memory_bytes` (of the fullest device; on the CPU of the whole process; None where unknown), `cpu_threads` (of XLA's
      pool; None: of an accelerator, or unknown).
    """
    settings = config if isinstance(config, Settings) else make_settings(config)
    # As long a training as is measured: an asynchronous engine makes no update beyond its end.
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, steps=_WARM_UP + steps)
    )
    experiment = make_experiment(settings)
    engine = experiment.engine
    state = engine.init()
    for report in engine.run(state, experiment.source, _WARM_UP):
        state_of = report.snapshot
    state = state_of()
    wall, processor = time.perf_counter(), time.thread_time()
    for report in engine.run(state, experiment.source, _WARM_UP + steps):
        state_of = report.snapshot
    wall, processor = time.perf_counter() - wall, time.thread_time() - processor
    state = state_of()
    jax.block_until_ready(state.modules)
    return {
        "method": settings.method.name,
        "engine": settings.engine.name,
        "images_per_second": round(steps * settings.data.batch_size / wall, 1),
        "tick_milliseconds": round(1e3 * wall / steps, 3),
        "module_milliseconds": [
            round(1e3 * elapsed.seconds, 3) for elapsed in module_times(experiment, state)
        ],
        "python_milliseconds_per_tick": round(1e3 * processor / steps, 3),
        "peak_memory_bytes": _peak_memory(),
        "steps": steps,
        "batch_size": settings.data.batch_size,
        "devices": engine.placement.describe(),
        "cpu_threads": system.cpu_threads() if jax.default_backend() == "cpu" else None,
    }


def module_times(
    experiment: Experiment, state: EngineState, repeats: int = 10, company: int = 1
) -> list[Elapsed]:
    """What each module's program takes by itself, on its devices; `state` is used up. Empty where modules cannot be taken apart.

    `company`: see `clocked`; of modules on a device each.
    """
    spec, placement = experiment.spec, experiment.engine.placement
    if not steps_alone(spec):
        return []
    batch = placement.put_batch(experiment.source.batch(0), 0)
    incoming: Any = batch
    context, times = batch.context, []
    for k, (module, mail) in enumerate(map(opened, state.modules)):
        program = jitted(spec, k, placement)
        if k:
            context = put(spec.carried(k, context, incoming.context), placement.split(k))
            incoming = put(incoming._replace(context=()), placement.message(k))
        inbox = Inbox(incoming, oldest(mail))
        elapsed, (_, (incoming, _), _) = clocked(
            program, module, inbox, context, repeats=repeats, company=company
        )
        times.append(elapsed)
    return times


def _peak_memory() -> int | None:
    peaks = [system.device_memory(device).peak for device in jax.devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
