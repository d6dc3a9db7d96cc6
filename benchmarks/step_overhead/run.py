"""Processor time of the controlling thread per tick, inside and outside the compiled programs.

python benchmarks/step_overhead/run.py [--write]
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.engines import PipelineEngine
from dgl_jax.run.build import Experiment, make_experiment
from dgl_jax.types import Inbox

LIMIT = 1.0  # ms per module
WARM_UP = 10
PARTS = ("source", "batch to device", "programs", "messages between devices")


def build(engine: str, modules: int, devices: int, args: Any) -> Experiment:
    """Builds an experiment with state trees of normal size but tiny arrays."""
    settings = harness.settings(
        data__name="synthetic",
        data__batch_size=args.batch_size,
        data__image_size=args.image_size,
        model__name="cnn6",
        model__width=args.width,
        model__modules=modules,
        engine__name=engine,
        train__steps=1,
    )
    return make_experiment(settings, jax.devices()[:devices])


class Case:
    """Engine that can be measured repeatedly, with its training state."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.engine = experiment, experiment.engine
        self.state, self.step = experiment.engine.init(), 0
        self.leaves = len(jax.tree.leaves(self.state))
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.run(WARM_UP)

    def run(self, steps: int) -> float:
        """Measures the processor milliseconds of the controlling thread per tick."""
        self.step += steps
        begin = time.thread_time()
        for report in self.engine.run(self.state, self.experiment.source, self.step):
            last = report
        spent = time.thread_time() - begin
        self.state = last.snapshot()
        jax.block_until_ready(self.state)
        return 1e3 * spent / steps

    def bare(self, steps: int) -> float:
        """Measures a bare loop that calls the same programs on fixed inputs.

        This is the cost of dispatch in jit, and of the work that it runs inline.

        Returns:
          Processor milliseconds per tick.
        """
        engine: Any = self.engine
        batch = engine.placement.put_batch(self.experiment.source.batch(0), 0)
        states = list(self.state.modules)
        if not isinstance(engine, PipelineEngine):
            all_states = tuple(states)
            step = harness.step(engine)
            begin = time.thread_time()
            for _ in range(steps):
                all_states, _ = jax.block_until_ready(step(all_states, batch))
            states = list(all_states)
        else:
            inputs, incoming = [], (Inbox(batch), batch.context)
            programs = harness.programs(engine)
            for k, program in enumerate(programs):
                inputs.append(incoming)
                states[k], (message, _), _ = program(states[k], *incoming)
                if message is not None:
                    incoming = jax.device_put(
                        (Inbox(message), batch.context), engine.placement.split(k + 1)
                    )
            jax.block_until_ready(states)
            begin = time.thread_time()
            for _ in range(steps):
                for k, program in enumerate(programs):
                    states[k], _, _ = program(states[k], *inputs[k])
                jax.block_until_ready(states)
        spent = time.thread_time() - begin
        self.step = int(jax.device_get(states[0].updates))
        self.state = type(self.state)(tuple(self.with_equal_updates(states)))
        return 1e3 * spent / steps

    def with_equal_updates(self, states: list[Any]) -> Iterator[Any]:
        """Yields the states with the same update count in all modules."""
        for state in states:
            yield state.replace(
                updates=jax.device_put(
                    jax.numpy.asarray(self.step, "int32"), state.updates.sharding
                )
            )

    def parts(self, steps: int) -> dict[str, float]:
        """Measures the milliseconds per tick of each part by timing the calls of a run.

        The last part is the remaining time: the loop, the reports and the waiting.
        """
        engine: Any = self.engine
        source, placement, originals = self.experiment.source, engine.placement, {}
        self.spent = dict.fromkeys(PARTS, 0.0)
        if isinstance(engine, PipelineEngine):
            originals["programs"] = engine.programs
            engine.programs = {
                turn: self.watch("programs", program) for turn, program in engine.programs.items()
            }
            engine._move = self.watch("messages between devices", engine._move)
        else:
            originals["steps"] = engine.steps
            engine.steps = {
                turns: self.watch("programs", step) for turns, step in engine.steps.items()
            }
        object.__setattr__(
            placement, "put_batch", self.watch("batch to device", placement.put_batch)
        )
        source.batch = self.watch("source", source.batch)
        try:
            total = self.run(steps)
        finally:
            del source.batch
            object.__delattr__(placement, "put_batch")
            vars(engine).pop("_move", None)
            for name, value in originals.items():
                setattr(engine, name, value)
        milliseconds = {name: 1e3 * seconds / steps for name, seconds in self.spent.items()}
        return milliseconds | {"loop, reports, waiting": total - sum(milliseconds.values())}

    def watch(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its processor time is added to a part."""

        def watched(*args: Any) -> Any:
            begin = time.thread_time()
            result = function(*args)
            self.spent[part] += time.thread_time() - begin
            return result

        return watched


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--width", type=int, default=4)
    flags.add_argument("--batch_size", type=int, default=2)
    flags.add_argument("--image_size", type=int, default=4)
    flags.add_argument("--modules", type=int, nargs="+", default=[1, 2, 3, 6])
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--repeats", type=int, default=15)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", max(args.modules))
    layouts = {
        "fused": ("fused", lambda k: 1),
        "one device": ("pipeline", lambda k: 1),
        "K devices": ("pipeline", lambda k: k),
    }
    cases = {
        (name, modules): Case(build(engine, modules, devices(modules), args))
        for modules in args.modules
        for name, (engine, devices) in layouts.items()
        if not (name == "K devices" and modules == 1)
    }
    print(f"{len(cases)} cases compiled", flush=True)
    measured: dict[Any, dict[str, list[Any]]] = {
        key: {"total": [], "bare": [], "parts": []} for key in cases
    }
    for _ in range(args.repeats):
        for key, case in cases.items():
            measured[key]["total"].append(case.run(args.steps))
            measured[key]["bare"].append(case.bare(args.steps))
            measured[key]["parts"].append(case.parts(args.steps))
    rows, results = [], []
    for (name, modules), times in measured.items():
        per_module = harness.quartiles([t / modules for t in times["total"]])
        outside = harness.quartiles(
            [(sum(p.values()) - p["programs"]) / modules for p in times["parts"]]
        )
        parts = {
            part: harness.quartiles([p[part] for p in times["parts"]]) for part in times["parts"][0]
        }
        results.append(
            {
                "engine": name,
                "modules": modules,
                "leaves": cases[name, modules].leaves,
                "milliseconds_per_tick": harness.quartiles(times["total"]),
                "milliseconds_per_tick_and_module": per_module,
                "bare_calls_milliseconds_per_tick": harness.quartiles(times["bare"]),
                "outside_programs_milliseconds_per_tick_and_module": outside,
                "parts_milliseconds_per_tick": parts,
            }
        )
        cells = [f"{q['median']:.3f}" for q in parts.values()]
        verdict = "yes" if outside["median"] < LIMIT else "NO"
        bare = f"{statistics.median(times['bare']):.3f}"
        rows.append(
            [
                name,
                modules,
                harness.shown(outside),
                verdict,
                harness.shown(per_module),
                *cells,
                bare,
            ]
        )
    parts_names = results[0]["parts_milliseconds_per_tick"]
    header = [
        "engine",
        "K",
        "outside programs, per module",
        "below 1",
        "total, per module",
        *parts_names,
        "bare calls",
    ]
    harness.table(header, rows)
    harness.finish(
        __file__,
        {"settings": {k: v for k, v in vars(args).items() if k != "write"}, "rows": results},
        args.write,
    )


if __name__ == "__main__":
    main()
