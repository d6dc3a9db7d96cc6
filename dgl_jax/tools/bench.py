"""Measures how fast the configured engine runs on this machine."""

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
    """Measures `steps` training steps of the configured engine; writes no files.

    Args:
      config: checked settings, or a configuration to make them from.
      steps: number of timed steps; a few more run first as a warm-up.

    Returns:
      A dictionary that can be written as JSON, with the configuration's names and
        images_per_second: training throughput.
        tick_milliseconds: time from one batch entering the network to the next.
        module_milliseconds: time of each module's program when it runs alone on its devices.
        python_milliseconds_per_tick: processor time of the controlling thread, without waiting.
        peak_memory_bytes: peak of the fullest device, on the CPU of the process; None if unknown.
        cpu_threads: threads of XLA's CPU pool; None on an accelerator or if unknown.
    """
    settings = config if isinstance(config, Settings) else make_settings(config)
    # The training must be as long as the measurement: an asynchronous engine waits forever if asked
    # for updates beyond the end of its training.
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, steps=_WARM_UP + steps)
    )
    experiment = make_experiment(settings)
    engine = experiment.engine
    state = engine.init()
    for report in engine.run(state, experiment.source, _WARM_UP):
        take_snapshot = report.snapshot
    state = take_snapshot()
    wall, processor = time.perf_counter(), time.thread_time()
    for report in engine.run(state, experiment.source, _WARM_UP + steps):
        take_snapshot = report.snapshot
    wall, processor = time.perf_counter() - wall, time.thread_time() - processor
    state = take_snapshot()
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
    experiment: Experiment, state: EngineState, repeats: int = 10, concurrency: int = 1
) -> list[Elapsed]:
    """Measures the time of each module's program when it runs alone on its devices.

    Args:
      experiment: the run whose programs are measured.
      state: engine state to start from; its arrays are donated and cannot be used afterwards.
      repeats: number of measured pairs of calls per module.
      concurrency: number of programs that work at the same time, see `clocked`; only meaningful if
        each module has one device.

    Returns:
      Seconds and processor seconds per call, one entry per module; empty if the method's modules
      cannot run alone.
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
            program, module, inbox, context, repeats=repeats, concurrency=concurrency
        )
        times.append(elapsed)
    return times


def _peak_memory() -> int | None:
    peaks = [system.device_memory(device).peak for device in jax.devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
