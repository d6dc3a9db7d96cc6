"""Trains tiny networks with every engine and codec and prints a summary of the results as JSON.

    python tests/every_engine.py DIRECTORY

Also calls the functions of `dgl_jax.vq`, and resumes a run from a checkpoint of step 2 in
DIRECTORY, which it saves first if there is none.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (sets up four CPU devices)
import jax
import jax.numpy as jnp
import numpy as np
from tiny import Tiny, host

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


def summarize(before: dict[str, np.ndarray], after: Any, metrics: Any = ()) -> dict[str, Any]:
    """Returns what the tests check about the arrays of a run.

    Args:
      before: arrays by path before the run.
      after: the same pytree after the run.
      metrics: further results of the run.

    Returns:
      digest: checksum of the bits of `after`.
      changed: paths of arrays whose dtype changed.
      wide: paths of arrays and metrics with elements of more than 4 bytes.
      finite: True if all floating-point values are finite.
    """
    arrays = leaves(after)
    everything = arrays | {f"metrics{name}": leaf for name, leaf in leaves(metrics).items()}
    floating = [x for x in everything.values() if np.issubdtype(x.dtype, np.floating)]
    return {
        "digest": digest(after),
        "changed": [name for name in before if before[name].dtype != arrays[name].dtype],
        "wide": [name for name, leaf in everything.items() if leaf.dtype.itemsize > 4],
        "finite": bool(all(np.isfinite(x).all() for x in floating)),
    }


def engines(tiny: Tiny) -> dict[str, Any]:
    """Returns an engine of each kind, by name; together they use every codec.

    Engines with several device groups get groups of unequal sizes.
    """
    replay, devices = ReplaySettings(size=2), jax.devices()

    def spec(codec: Any, **arguments: Any) -> Any:
        return tiny.spec(modules=2, codec=codec, augment="crop_flip", **arguments)

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


def train(tiny: Tiny, engine: Any, state: EngineState, until: int) -> tuple[EngineState, Any]:
    report = None
    for report in engine.run(state, tiny.source, until):
        metrics = host(report.metrics)
    assert report is not None
    return report.snapshot(), metrics


def resumed(tiny: Tiny, engine: Any, directory: Path) -> EngineState:
    """Returns the state at step 3 of a run that resumes from the checkpoint of step 2.

    The checkpoint may come from a process with another environment; it is saved if missing.
    """
    checkpoints = Checkpoints(directory)
    if not checkpoints.steps():
        state, _ = train(tiny, engine, engine.init(), 2)
        checkpoints.save(2, state, {})
    restored = checkpoints.restore(lambda meta: (engine.spec.abstract_states(), engine.placement))
    checkpoints.close()
    return train(tiny, engine, engine.place(restored.state), STEPS)[0]


def quantize() -> dict[str, Any]:
    """Calls `dgl_jax.vq` as a library user does, with random keys of JAX's default kind."""
    init, update = (
        jax.jit(vq.init, static_argnames=("codes", "dims", "start")),
        jax.jit(vq.update, static_argnames="rule"),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
    summaries = {}
    for start, rule in (("kmeans++", "ema"), ("sample", "minibatch")):
        book = init(jax.random.key(0), x, codes=4, dims=4, start=start)
        new, health = update(book, jax.random.key(1), x, rule=rule)
        codes = vq.encode(new.entries, x)
        assert codes.dtype == jnp.uint8
        summaries[rule] = summarize(leaves(book), new, (health, vq.decode(new.entries, codes)))
    return summaries


def main(directory: Path) -> None:
    tiny, summaries = Tiny(), {}
    by_name = engines(tiny)
    for name, engine in by_name.items():
        state = engine.init()
        before = leaves(state.modules)
        state, metrics = train(tiny, engine, state, STEPS)
        summaries[name] = summarize(before, state.modules, metrics)
    summaries["resumed"] = {"digest": digest(resumed(tiny, by_name["fused"], directory).modules)}
    summaries |= quantize()
    print(json.dumps(summaries))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
