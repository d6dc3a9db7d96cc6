"""Trains tiny networks on groups of eight CPU devices and prints what the tests check as JSON.

    python tests/eight_devices.py DIRECTORY

Each layout is also run with one mechanism broken, for the twins. DIRECTORY receives checkpoints.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from runs import small_config, watch_labels  # noqa: E402
from test_engines import furthest, reference_steps, single_steps, unequal  # noqa: E402
from tiny import Tiny, host  # noqa: E402

from dgl_jax.config import ReplaySettings, options  # noqa: E402
from dgl_jax.engines import (  # noqa: E402
    Engine,
    EngineState,
    FusedEngine,
    ThreadsEngine,
    ThreadsOptions,
    counts,
    pipeline,
)
from dgl_jax.engines.placement import assign, one_group  # noqa: E402
from dgl_jax.engines.program import jitted  # noqa: E402
from dgl_jax.engines.transfer import put  # noqa: E402
from dgl_jax.replay import Ring  # noqa: E402
from dgl_jax.run.checkpoint import Checkpoints  # noqa: E402
from dgl_jax.train import train_and_evaluate  # noqa: E402
from dgl_jax.types import Batch, Inbox, Message  # noqa: E402

VQ = options("codec", name="vq", codes=8, dims=2, codebook_every=2)
FOUR = {"modules": 4}
THREE = {"augment": "crop_flip"}
# Layouts of `pipeline`: devices of each module, and the arguments of the spec.
PIPELINES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "equal": ((2, 2, 2, 2), FOUR),
    "unequal": ((4, 2, 1, 1), FOUR),
    "growing": ((1, 3, 4), THREE),
    "vq": ((4, 3), {"modules": 2, "codec": VQ}),
}
UPDATES = 4  # of each module under `threads`


class Divisible(Tiny):
    """Tiny networks with batches that one to four and eight devices divide."""

    batch_size = 24


class Recorder:
    """Copies the inputs and outputs of the programs of an engine while it is entered.

    Attributes:
      rows: per module, the rows that each device of its group received in the first step.
      received: per module, the ids and the payloads of the messages that it received.
      sent: per module, the ids and the payloads of the messages that it sent.
      steps: (module, arguments, results) of every update.
    """

    def __init__(self, engine: Engine):
        self.modules = range(len(engine.spec.modules))
        self.rows: dict[int, list[int]] = {}
        self.received: list[list[Any]] = [[] for _ in self.modules]
        self.sent: list[list[Any]] = [[] for _ in self.modules]
        self.steps: list[tuple[int, Any, Any]] = []
        self._programs: Any = engine.programs  # a list, or a dict by module and kind of turn
        self._feeds: Any = getattr(engine, "feeds", [])
        self._replaced: list[tuple[Any, Any, Any]] = []

    def __enter__(self) -> "Recorder":
        asynchronous = isinstance(self._programs, list)
        for k in self.modules:
            self._replace(self._programs, k if asynchronous else (k, "step"), self._watched(k))
        for k in range(len(self._feeds)):
            self._replace(self._feeds, k, self._watched_feed(k))
        return self

    def __exit__(self, *_: object) -> None:
        for programs, key, program in self._replaced:
            programs[key] = program

    def _replace(self, programs: Any, key: Any, watched: Callable[..., Any]) -> None:
        self._replaced.append((programs, key, programs[key]))
        programs[key] = partial(watched, programs[key])

    def _watched(self, k: int) -> Callable[..., Any]:
        def call(program: Callable[..., Any], state: Any, inbox: Inbox, context: Any) -> Any:
            arguments = on_host((state, inbox, context))
            self.rows.setdefault(k, rows(inbox.below, context))
            if k:
                self.received[k].append((arguments[2]["id"], arguments[1].below.payload))
            results = program(state, inbox, context)
            copied = on_host(results)
            self.steps.append((k, arguments, copied))
            if copied[1].above is not None:
                self.sent[k].append((arguments[2]["id"], copied[1].above.payload))
            return results

        return call

    def _watched_feed(self, k: int) -> Callable[..., Any]:
        def call(feed: Callable[..., Any], state: Any, incoming: Any, context: Any) -> Any:
            message = feed(state, incoming, context)
            self.sent[k].append(on_host((context["id"], message.payload)))
            return message

        return call

    def ids(self) -> list[list[list[int]]]:
        """Returns the ids of the examples of each step, by module."""
        return [[a[2]["id"].tolist() for n, a, _ in self.steps if n == k] for k in self.modules]

    def belong(self) -> bool:
        """Returns True if every module received, row for row, what was sent for these ids."""
        pairs = list(zip(self.sent, self.received[1:]))
        assert all(received for _, received in pairs)
        return all(
            any(not unequal(message, other) for other in sent)
            for sent, received in pairs
            for message in received
        )


def on_host(tree: Any) -> Any:
    """Copies a pytree to the host, also where implicit transfers are disallowed."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.device_get(jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree))


def rows(below: Batch | Message, context: Any) -> list[int]:
    """Returns the number of rows that each device holds of the inputs and of the ids."""
    inputs = below.inputs if isinstance(below, Batch) else jax.tree.leaves(below.payload)[0]
    held = [[s.data.shape[0] for s in x.addressable_shards] for x in (inputs, context["id"])]
    assert held[0] == held[1]
    return held[0]


@cache
def rolling(sharding: Any) -> Callable[[Any], Any]:
    """Returns a function that moves the rows of arrays with this sharding by one."""
    return jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tree), out_shardings=sharding
    )


@contextlib.contextmanager
def rolled_payloads() -> Iterator[None]:
    """Moves the activations that `pipeline` sends by one row, but not their ids and labels."""

    def moved(tree: Any, sharding: Any) -> Any:
        tree = put(tree, sharding)
        if isinstance(tree, tuple) and "id" in tree[-1]:  # no codebook
            return rolling(sharding)(tree[0]), tree[1]
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "put", moved)
        yield


@contextlib.contextmanager
def rolled_contexts() -> Iterator[None]:
    """Stores messages in the rings with ids and labels moved by one row."""
    add = Ring.add

    def added(self: Ring, payload: Any, context: Any, *rest: Any) -> None:
        add(self, payload, {name: np.roll(x, 1, axis=0) for name, x in context.items()}, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ring, "add", added)
        yield


def replayed(engine: Engine, steps: list[tuple[int, Any, Any]], shift: int = 0) -> float:
    """Repeats recorded steps on one device; returns the largest deviation of their results.

    Args:
      engine: engine whose steps were recorded.
      steps: as in `Recorder`.
      shift: rows by which the labels are moved, for the twin.
    """
    spec, worst = engine.spec, 0.0
    one = one_group(jax.devices()[:1], len(spec.modules))
    for k, (state, inbox, context), results in steps:
        key = jax.random.wrap_key_data(jnp.array(state.rng), impl="threefry2x32")
        context = context | {"label": np.roll(context["label"], shift)}
        arguments = put((state.replace(rng=key), inbox, context), one.replicated(k))
        pairs = list(zip(results, on_host(jitted(spec, k, one)(*arguments)), strict=True))
        (state, repeated), (sent, sent_again), metrics = pairs
        worst = max(
            worst,
            furthest(state.params, repeated.params),
            furthest(*metrics),
            # Batch norm scales activations to 1: those near 0 are differences of larger numbers.
            furthest(sent, sent_again, floor=1.0) if sent.above else 0.0,
        )
    return worst


def against_one_device(tiny: Tiny, run: Engine, spec: dict[str, Any]) -> dict[str, Any]:
    """Compares single steps with steps on one device, also with a step on another batch."""
    steps = reference_steps(tiny, **spec)
    before, after, reports = steps[1]
    first_again = tuple(state.replace(updates=np.int32(0)) for state in before)
    return {
        "worst": single_steps(tiny, run, steps),
        "other batch": single_steps(tiny, run, [(first_again, after, reports)]),
    }


def run_pipeline(tiny: Tiny, groups: tuple[int, ...], spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `pipeline` on groups of these sizes."""
    run = tiny.engine("pipeline", groups, **spec)
    result = against_one_device(tiny, run, spec)
    with Recorder(run) as seen:
        tiny.run(run, UPDATES)
    with rolled_payloads():
        with Recorder(run) as rolled:
            tiny.run(run, UPDATES)
        result["other rows"] = single_steps(tiny, run, reference_steps(tiny, **spec)[:1])
    expected = [tiny.source.batch(t).context["id"].tolist() for t in range(UPDATES)]
    return result | {
        "rows": [seen.rows[k] for k in seen.modules],
        "ids": seen.ids() == [expected] * len(groups),
        "belong": seen.belong(),
        "belong, other rows": rolled.belong(),
    }


def run_threads(tiny: Tiny, groups: tuple[int, ...], spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `threads` on groups of these sizes, and repeats its steps on one device."""
    placement = assign(jax.devices(), len(groups), groups)

    def train() -> tuple[ThreadsEngine, Recorder, list[bool], EngineState]:
        engine = ThreadsEngine(
            tiny.spec(**spec), placement, ThreadsOptions("threads"), ReplaySettings(size=3)
        )
        state = engine.resume(tiny.place(engine, tiny.init(engine.spec)), None)
        with pytest.MonkeyPatch.context() as patch, Recorder(engine) as seen:
            right = watch_labels(patch, tiny.source)
            *_, last = engine.run(state, tiny.source, UPDATES)
        return engine, seen, right, last.snapshot()

    engine, seen, right, state = train()
    with rolled_contexts():
        _, rolled, wrong, _ = train()
    return {
        "worst": replayed(engine, seen.steps),
        "other labels": replayed(engine, seen.steps[:2], shift=1),
        "updates": counts(state),
        "rows": [seen.rows[k] for k in seen.modules],
        "ids": all(right),
        "belong": seen.belong(),
        "ids, other rows": all(wrong),
        "belong, other rows": rolled.belong(),
    }


def resume(tiny: Tiny, directory: Path) -> dict[str, Any]:
    """Saves a checkpoint on one layout, and makes the next step from it on others."""
    saved = tiny.engine("pipeline", (4, 2, 1, 1), **FOUR)
    *_, last = saved.run(tiny.place(saved, tiny.init(saved.spec)), tiny.source, 2)
    state = last.snapshot()
    checkpoints = Checkpoints(directory)
    checkpoints.save(2, state, {})
    before = host(state.modules)
    one = tiny.engine("fused", **FOUR)
    expected = [state.params for state in tiny.run(one, 3, before)[0]]
    result: dict[str, Any] = {}
    layouts = {
        "equal": tiny.engine("pipeline", (2, 2, 2, 2), **FOUR),
        "fused": FusedEngine(saved.spec, one_group(jax.devices(), 4)),
        "one device": one,
    }
    for name, engine in layouts.items():
        restored = checkpoints.restore(
            lambda _, engine=engine: (engine.spec.abstract_states(), engine.placement)
        )
        states = host(restored.state.modules)
        forgotten = [
            state.replace(opt_state=jax.tree.map(np.zeros_like, state.opt_state))
            for state in before
        ]
        *_, last = engine.run(engine.place(restored.state), tiny.source, 3)
        after = host(last.snapshot().modules)
        result[name] = {
            "same": not unequal(states, before),
            "updates": [int(state.updates) for state in after],
            "worst": furthest([s.params for s in after], expected),
            "no momentum": furthest(
                [s.params for s in tiny.run(engine, 3, forgotten)[0]], expected
            ),
        }
    checkpoints.close()
    return result


def run_of_threads(directory: Path) -> dict[int, dict[str, Any]]:
    """Trains with `threads`, and resumes on other groups; returns a summary of both parts."""
    summaries = {}
    for steps, groups in ((4, (4, 2)), (8, (2, 4))):
        fields = {"engine__group_sizes": groups, "train__steps": steps, "replay__size": 3}
        summary = train_and_evaluate(small_config(engine__name="threads", **fields), directory)
        lists = {name: [m[name] for m in summary.modules] for name in ("updates", "devices")}
        summaries[steps] = {**lists, "wire": summary.wire}
    return summaries


def main(directory: Path) -> None:
    tiny = Divisible()
    results: dict[str, Any] = {
        name: run_pipeline(tiny, *layout) for name, layout in PIPELINES.items()
    }
    everywhere = FusedEngine(tiny.spec(**FOUR), one_group(jax.devices(), 4))
    results["fused"] = against_one_device(tiny, everywhere, FOUR)
    results["threads"] = run_threads(tiny, *PIPELINES["growing"])
    results["threads run"] = run_of_threads(directory / "threads")
    results["resume"] = resume(tiny, directory / "checkpoints")
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
