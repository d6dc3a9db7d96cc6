"""Measures how fast the configured engine runs on this machine."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from dgl_jax import system
from dgl_jax.config import Settings, make_settings
from dgl_jax.config.registry import METHODS
from dgl_jax.engines import EngineState
from dgl_jax.engines.dispatches import steps_per_dispatch
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.program import jitted
from dgl_jax.engines.transfer import put
from dgl_jax.methods.base import steps_alone
from dgl_jax.methods.post import oldest, opened
from dgl_jax.profile.timing import Elapsed, clocked
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.types import Inbox

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_WARM_UP = 5
_NEVER = 2**30  # interval in steps


def bench(
    config: "Mapping[str, Any] | ConfigDict | Settings", steps: int = 200, modules: bool = True
) -> dict[str, Any]:
    """Measures `steps` training steps of the configured engine; writes no files.

    Args:
      config: checked settings, or a configuration to make them from.
      steps: number of timed steps; a few more run first as a warm-up.
      modules: if True, each module's program is compiled and timed alone as well.

    Returns:
      A dictionary that can be written as JSON, with the configuration's names and
        images_per_second: training throughput.
        tick_milliseconds: time from one batch entering the network to the next.
        module_milliseconds: time of each module's program when it runs alone on its devices;
          empty without `modules`.
        python_milliseconds_per_tick: time that the host spends starting work on the devices, of all
          threads together; None if the engine does not measure it.
        steps_per_dispatch: training steps that one dispatch runs.
        peak_memory_bytes: peak memory by device, "unknown" if JAX does not tell; of the whole
          process on the CPU, where devices have no memory of their own.
        cpu_threads: threads of XLA's CPU pool; None on an accelerator or if unknown.
        steps_per_epoch: updates per module in one epoch of the data set.
        checkpoint_bytes: size of a checkpoint without compression: all arrays of the modules and,
          in asynchronous engines, the rings filled so far, if checkpoints hold them.
    """
    settings = config if isinstance(config, Settings) else make_settings(config)
    settings = dataclasses.replace(
        settings,
        # The training must be as long as the measurement: an asynchronous engine waits forever if
        # asked for updates beyond the end of its training.
        train=dataclasses.replace(settings.train, steps=_WARM_UP + steps),
        # Dispatches of many steps would end at an evaluation or a checkpoint.
        eval=dataclasses.replace(settings.eval, every=_NEVER),
        checkpoint=dataclasses.replace(settings.checkpoint, every=_NEVER),
    )
    experiment = make_experiment(settings)
    engine = experiment.engine
    if not steps_alone(experiment.spec) and hasattr(engine, "total_steps"):
        # The last batches of a run have other turns, whose compilation would be timed.
        engine.total_steps += 2 * len(experiment.spec.modules)
    at_once = steps_per_dispatch(engine)
    if METHODS[settings.method.name].in_turn:
        # The warm-up then trains every module, and compiles all programs, instead of the first one.
        engine.total_steps = 0  # type: ignore[attr-defined]
    warm_up, steps = (-(-n // at_once) * at_once for n in (_WARM_UP, steps))  # whole dispatches
    state = _trained(experiment, engine.init(), warm_up)
    begin, host = time.perf_counter(), getattr(engine, "host_seconds", None)
    state = _trained(experiment, state, warm_up + steps)
    jax.block_until_ready(state.modules)
    wall = time.perf_counter() - begin
    host = None if host is None else engine.host_seconds - host  # type: ignore[attr-defined]
    rings = settings.checkpoint.replay_every > 0
    checkpoint = _bytes(state, rings)  # before the measurements below, which donate its arrays
    return {
        "method": settings.method.name,
        "engine": settings.engine.name,
        "images_per_second": round(steps * settings.data.batch_size / wall, 1),
        "tick_milliseconds": round(1e3 * wall / steps, 3),
        "module_milliseconds": [
            round(1e3 * elapsed.seconds, 3)
            for elapsed in (module_times(experiment, state) if modules else ())
        ],
        "python_milliseconds_per_tick": None if host is None else round(1e3 * host / steps, 3),
        "steps_per_dispatch": at_once,
        "peak_memory_bytes": _peak_memory(engine.placement),
        "steps": steps,
        "batch_size": settings.data.batch_size,
        "devices": engine.placement.describe(),
        "cpu_threads": system.cpu_threads() if jax.default_backend() == "cpu" else None,
        "steps_per_epoch": experiment.source.steps_per_epoch,
        "checkpoint_bytes": checkpoint,
    }


def _bytes(state: EngineState, rings: bool) -> int:
    """Returns the bytes of a state's arrays, with `rings` including the messages in flight."""
    flight = {} if state.flight is None or not rings else state.flight.snapshot()
    return sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves((state.modules, flight)))


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


def _trained(experiment: Experiment, state: EngineState, until: int) -> EngineState:
    """Returns the state after training until every module has `until` updates."""
    *_, report = experiment.engine.run(state, experiment.source, until)
    return report.snapshot()


def _peak_memory(placement: Placement) -> dict[str, int | str]:
    """Returns the peak memory in bytes by device."""
    devices = {device for group in placement.groups for device in group.devices.flat}
    peaks = system.peak_memory(devices)
    if peaks is None:
        peaks = {"process": system.process_peak()}
    return {name: peak or "unknown" for name, peak in peaks.items()}
