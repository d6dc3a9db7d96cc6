"""Runs the command line in one of several processes and writes what this process did.

    python world_run.py FOLDER FLAGS...

Writes FOLDER/process_<i>.json when the training has ended.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import dgl_jax.cli as cli
import dgl_jax.train as train
from dgl_jax.engines import pipeline, transfer, world
from dgl_jax.engines.placement import Placement
from dgl_jax.run import hosts

done: dict[str, Any] = {"compiled": [], "opened": 0, "moves": 0, "ids": [], "bytes": []}


def recorded(module: Any, name: str, note: Any) -> None:
    """Calls `note` with the arguments of every call of a function."""
    original = getattr(module, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(*args)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def note_ids(placement: Any, batch: Any, module: int) -> None:
    """Records the ids of the examples that this process holds in host memory."""
    ids = batch.context["id"]
    if isinstance(ids, np.ndarray):
        done["ids"].append(ids.tolist())


def add(name: str) -> Any:
    """Returns a function that counts its calls."""

    def count(*args: Any) -> None:
        done[name] += 1

    return count


def family() -> list[int]:
    """Returns the numbers of this process and of all processes below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
    processes = [os.getpid()]
    for process in processes:  # grows meanwhile
        processes += [child for child, parent in parents.items() if parent == process]
    return processes


def listening() -> list[str]:
    """Returns the addresses at which this process tree listens, as in /proc/net/tcp."""
    sockets = set()
    for process in family():
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):  # the descriptor of this listing
                sockets.add(str(link.readlink()))
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.append(fields[1].partition(":")[0])
    return sorted(addresses)


recorded(pipeline, "jitted", lambda spec, k, *_: done["compiled"].append(k))
recorded(hosts, "make_source", add("opened"))
recorded(transfer, "_handle", add("moves"))  # arrays that move between processes
recorded(Placement, "put_batch", note_ids)
trained = train.train_loop


def train_loop(experiment: Any, *args: Any) -> Any:
    """Trains, and writes what was recorded."""
    summary = trained(experiment, *args)
    meters = getattr(experiment.engine, "meters", [])
    done["bytes"] = [[m.messages, m.codebooks, m.images] for m in meters]
    done["listening"] = listening()
    Path(sys.argv[0], f"process_{world.index()}.json").write_text(json.dumps(done))
    return summary


train.train_loop = train_loop  # type: ignore[assignment]

if __name__ == "__main__":
    del sys.argv[0]
    cli.main()
