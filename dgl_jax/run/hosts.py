"""Start of a run of several processes: compares them, and gives each its part of the data."""

import hashlib
import json
import platform
from typing import Any

import jax

from dgl_jax import system
from dgl_jax.config import Settings, differences, make_settings
from dgl_jax.data import Shard, Source, make_source
from dgl_jax.data.shares import Absent, Share, facts
from dgl_jax.engines import Engine, world
from dgl_jax.errors import UserError
from dgl_jax.run.summary import versions


def check_hosts(settings: Settings) -> None:
    """Checks that all processes have the same configuration, libraries and devices.

    Every process has to call it, and each of them raises the same error.

    Raises:
      UserError: a process differs from the first one; the message names it and the differences.
    """
    if world.count() == 1:
        return
    mine = work_of(settings)
    every = world.exchange(mine)
    different = [i for i, theirs in enumerate(every) if theirs != every[0]]
    if not different:
        return
    # The configurations are long, so that they travel only if they differ.
    first = make_settings(world.from_first(settings.to_dict))
    fields = world.exchange(differences(first, settings))
    process = different[0]
    problems = fields[process] + [
        f"{name} is {value} there and {every[0].get(name)} in process 0"
        for name, value in every[process].items()
        if value != every[0].get(name) and name != "configuration"
    ]
    raise UserError(
        f"process {process} of {world.count()} differs from process 0: {'; '.join(problems)}; "
        "start the same command with the same installation on every host"
    )


def work_of(settings: Settings) -> dict[str, Any]:
    """Returns what has to be equal in all processes, as JSON values by name."""
    devices = jax.local_devices()
    text = json.dumps(settings.to_dict(), sort_keys=True)
    return {
        "configuration": hashlib.sha256(text.encode()).hexdigest()[:16],
        "python": ".".join(platform.python_version_tuple()[:2]),
        **versions(),
        "device kind": system.device_kind(devices[0]),
        "number of devices": len(devices),
    }


def open_source(settings: Settings) -> Source:
    """Returns the source of the run; in all but the first of several processes, its shapes.

    Raises:
      UserError: the data cannot be loaded.
    """
    opened: list[Source] = []

    def open_first() -> dict[str, Any]:
        opened.append(make_source(settings.data, settings.seed))
        return facts(opened[0], settings.data.batch_size) if world.count() > 1 else {}

    known = world.from_first(open_first)
    return opened[0] if opened else Absent(known)


def share_source(settings: Settings, source: Source, engine: Engine) -> Source:
    """Opens the data in the processes of the first module, each its own rows of every batch.

    Args:
      settings: configuration of the run.
      source: source that `open_source` has returned.
      engine: engine of the run.

    Raises:
      UserError: the processes do not divide the batch, or the data cannot be loaded.
    """
    if world.count() == 1 or not engine.placement.mine(0):
        return source
    processes = engine.placement.processes(0)
    shard = Shard(processes.index(world.index()), len(processes))
    shard.slice(settings.data.batch_size)
    if isinstance(source, Absent):
        source = make_source(settings.data, settings.seed)
    share: Any = Share(source, shard)
    return share  # type: ignore[no-any-return]
