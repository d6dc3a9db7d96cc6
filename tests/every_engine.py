"""Runs every engine and codec, checkpoints and the functions of vq on tiny networks; prints what came out, as JSON.

    python tests/every_engine.py DIRECTORY

saves a checkpoint of step 2 there, or goes on from the one that it finds.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import Tiny, host

from dgl_jax import vq
from dgl_jax.config import ReplaySettings, options
from dgl_jax.engines import (
    EngineState,
    SimulatedEngine,
    SimulatedOptions,
    ThreadsEngine,
    ThreadsOptions,
)
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.run.checkpoint import Checkpoints

STEPS = 3
VQ = options("codec", name="vq", codes=8, dims=2, stages=2, codebook_every=2)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(host(tree))
    }


def digest(tree: Any) -> int:
    value = 0
    for leaf in leaves(tree).values():
        value = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), value)
    return value


def told(before: dict[str, np.ndarray], after: Any, metrics: Any = ()) -> dict[str, Any]:
    """What a test asks of a run: its bits, types that changed or are wide, and whether all is finite."""
    found = leaves(after)
    everything = found | {f"metrics{name}": leaf for name, leaf in leaves(metrics).items()}
    numbers = [x for x in everything.values() if np.issubdtype(x.dtype, np.floating)]
    return {
        "digest": digest(after),
        "changed": [name for name in before if before[name].dtype != found[name].dtype],
        "wide": [name for name, leaf in everything.items() if leaf.dtype.itemsize > 4],
        "finite": bool(all(np.isfinite(x).all() for x in numbers)),
    }


def engines(tiny: Tiny) -> dict[str, Any]:
    """One of each, each with another codec, on device groups of unequal sizes where it has several."""
    replay, devices = ReplaySettings(size=2), jax.devices()

    def spec(codec: Any, **how: Any) -> Any:
        return tiny.spec(modules=2, codec=codec, augment="crop_flip", **how)

    return {
        "fused": tiny.new_engine("fused", (), spec(VQ)),
        "pipeline": tiny.new_engine("pipeline", (1, 2), spec(VQ)),
        "simulated": SimulatedEngine(
            spec(options("codec", name="int8", dims=2)),
            one_group(devices[:1], 2),
            STEPS,
            SimulatedOptions("simulated"),
            replay,
        ),
        "threads": ThreadsEngine(
            spec("bf16"), assign(devices, 2, (2, 1)), ThreadsOptions("threads"), replay
        ),
        "backprop": tiny.new_engine("backprop", (), spec("identity", heads=False)),
    }


def ran(tiny: Tiny, engine: Any, state: EngineState, until: int) -> tuple[EngineState, Any]:
    report = None
    for report in engine.run(state, tiny.source, until):
        metrics = host(report.metrics)
    assert report is not None
    return report.snapshot(), metrics


def resumed(tiny: Tiny, engine: Any, directory: Path) -> EngineState:
    """Three steps of which the first two lie in a checkpoint, perhaps one that another process wrote."""
    checkpoints = Checkpoints(directory)
    if not checkpoints.steps():
        state, _ = ran(tiny, engine, engine.init(), 2)
        checkpoints.save(2, state, {})
    found = checkpoints.restore(lambda meta: (engine.spec.abstract_states(), engine.placement))
    checkpoints.close()
    return ran(tiny, engine, engine.place(found.state), STEPS)[0]


def quantised() -> dict[str, Any]:
    """vq on its own, as a library user calls it, with keys of the environment's kind."""
    init, update = (
        jax.jit(vq.init, static_argnames=("codes", "dims", "start")),
        jax.jit(vq.update, static_argnames="rule"),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
    told_of = {}
    for start, rule in (("kmeans++", "ema"), ("sample", "minibatch")):
        book = init(jax.random.key(0), x, codes=4, dims=4, start=start)
        new, health = update(book, jax.random.key(1), x, rule=rule)
        codes = vq.encode(new.entries, x)
        assert codes.dtype == jnp.uint8
        told_of[rule] = told(leaves(book), new, (health, vq.decode(new.entries, codes)))
    return told_of


def main(directory: Path) -> None:
    tiny, found = Tiny(), {}
    made = engines(tiny)
    for name, engine in made.items():
        state = engine.init()
        before = leaves(state.modules)
        state, metrics = ran(tiny, engine, state, STEPS)
        found[name] = told(before, state.modules, metrics)
    found["resumed"] = {"digest": digest(resumed(tiny, made["fused"], directory).modules)}
    found |= quantised()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
