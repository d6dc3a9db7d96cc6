"""Probes of a run: measures its convergence on a fixed probe set, and keeps the results in files.

Each probe writes `diagnostics/STEP.npz` into the workdir, before a checkpoint of the same step. The
checkpoint stores its checksum, so that a resumed run compares with the same numbers.
"""

import io
import logging
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dgl_jax.config.registry import METHODS
from dgl_jax.core.program_cache import cached_program
from dgl_jax.data import Source
from dgl_jax.diagnostics import Parts, drift, probe, weighted_drift
from dgl_jax.engines import EngineState, counts, world
from dgl_jax.engines.base import held
from dgl_jax.engines.program import on_group
from dgl_jax.engines.transfer import put
from dgl_jax.errors import UserError
from dgl_jax.run.begin import RunStart
from dgl_jax.run.build import Experiment
from dgl_jax.run.checkpoint import Checkpoints
from dgl_jax.run.record import Record
from dgl_jax.run.writers import write_atomically, writing
from dgl_jax.spec import TrainSpec
from dgl_jax.types import Batch, Message

_LOG = logging.getLogger(__name__)
FOLDER = "diagnostics"


class Stored(NamedTuple):
    """Results of a probe that later probes are compared with.

    Attributes:
      inputs: projected inputs of each module but the first, float32 [K - 1, n, p].
      updates: updates that each module has made, int64 [K].
      rates: sum of the learning rates of these updates, float64 [K]; stored because the schedule of
        a longer run gives other rates for the same updates.
      reads: messages that each module has read, and the sum of their ages, float64 [K, 2].
    """

    inputs: np.ndarray
    updates: np.ndarray
    rates: np.ndarray
    reads: np.ndarray


class Walk(NamedTuple):
    """Results of passing the probe set through all modules.

    Attributes:
      inputs: see `Stored`.
      gradients: per module, the squared norm of the gradient on the probe set and the mean of the
        squared norms on its batches; None without an objective.
      codec_errors: mean relative error of what each module sends; None if it sends no codes.
      incoming: per batch and module, what the module read: (message or inputs, context).
    """

    inputs: np.ndarray
    gradients: list[tuple[float, float] | None]
    codec_errors: list[float | None]
    incoming: list[list[tuple[Any, Any]]]


class Probes:
    """Measurements of a run on a fixed probe set; they change no number of the run.

    Args:
      experiment: the run.
      workdir: folder of the run.
      record: receives the metrics; its `extra` becomes part of every checkpoint.
      start: state from which this process starts the run.
      saved: the part of the checkpoint's metadata that `Record.extra` was; {} for a new run.

    Raises:
      UserError: the probe set is larger than the training data.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        record: Record,
        start: RunStart,
        saved: dict[str, Any],
    ):
        self._experiment, self._record, self._folder = experiment, record, workdir / FOLDER
        self._batches = probe_set(experiment.source, experiment.settings.diagnostics.batches)
        self._last: Stored | None = None
        self._first = "probe" not in saved  # no probe of this run has been made
        self._in_turn = METHODS[experiment.settings.method.name].in_turn
        for path in self._folder.glob("*.npz"):
            if path.stem.isdecimal() and (int(path.stem) > start.step or not start.step):
                path.unlink()  # the resumed run measures it again
        if "probe" in saved:
            self._last = self._restored(**saved["probe"])
            if self._last and not start.flight:  # the messages read are counted from 0 again
                self._last = self._last._replace(reads=np.zeros_like(self._last.reads))
            record.extra["probe"] = saved["probe"]

    def measure(self, step: int, state: EngineState, live: EngineState) -> None:
        """Probes all modules, writes the metrics, and stores what the next probe needs.

        Args:
          step: current step of the run.
          state: the modules.
          live: current state of the engine, whose `flight` counts the messages read.

        Raises:
          UserError: an objective has no gradient, or the disk is full.
        """
        walk = self._walk(state)
        new = self._stored(walk, state, live)
        self._record.write(step, self._metrics(step, walk, new))
        self._store(step, new)

    def _stored(self, walk: Walk, state: EngineState, live: EngineState) -> Stored:
        spec, gauges = self._experiment.spec, self._experiment.engine.gauges(live)
        reads = np.array([_reads(gauges, module.name) for module in spec.modules])
        updates = np.array(counts(state), np.int64)
        before = self._last
        begin, rates = (before.updates, before.rates) if before else (0 * updates, 0.0)
        rates = rates + np.array([*map(self._rates, begin, updates)])
        return Stored(walk.inputs, updates, rates, reads)

    def _store(self, step: int, new: Stored) -> None:
        self._last, self._first = new, False
        content = _packed(new)
        with writing(str(self._folder)):
            write_atomically({self._folder / f"{step}.npz": content})
        self._record.extra["probe"] = {"step": step, "checksum": zlib.crc32(content)}

    def _metrics(self, step: int, walk: Walk, new: Stored) -> dict[str, float]:
        values: dict[str, float] = {}
        spec = self._experiment.spec
        for k, module in enumerate(spec.modules):
            metrics: dict[str, float] = {}
            if (gradient := walk.gradients[k]) is not None:
                if self._first and not gradient[1]:
                    raise UserError(
                        f"config.diagnostics.enabled=True: the objective of {module.name} has no "
                        "gradient on the probe set, it is 0 for every parameter; use more "
                        "config.diagnostics.batches, another config.objective.name, or no "
                        "diagnostics"
                    )
                metrics["gradient_squared"], metrics["gradient_second_moment"] = gradient
                if (n := len(self._batches)) > 1:
                    metrics["gradient_unbiased"] = (n * gradient[0] - gradient[1]) / (n - 1)
            if k and (error := walk.codec_errors[k - 1]) is not None:
                metrics["codec_error"] = error
            if self._last is not None:
                if k:
                    metrics |= _numbers(drift(self._last.inputs[k - 1], new.inputs[k - 1]))
                count, total = new.reads[k] - self._last.reads[k]
                if count > 0:
                    metrics["staleness"] = total / count
            values |= {f"diagnostics/{module.name}/{name}": v for name, v in metrics.items()}
        return values

    def finish(self, step: int, state: EngineState, checkpoints: Checkpoints) -> None:
        """Compares every probe with the last one, and writes the metrics `final/...`.

        Where a checkpoint of a probe's step is left, the gradients of its parameters are computed
        on the inputs that the final modules provide.

        Args:
          step: last step of the run.
          state: the modules at the end.
          checkpoints: checkpoints of the run.
        """
        spec, placement = self._experiment.spec, self._experiment.engine.placement
        walk = self._walk(state)
        if self._first:  # the run had ended without diagnostics
            self.measure(step, state, state)
        elif self._last is None:  # the last probe is lost, not its metrics
            self._store(step, self._stored(walk, state, state))
        assert self._last is not None
        probes = {
            int(path.stem): stored
            for path in self._folder.glob("*.npz")
            if path.stem.isdecimal() and (stored := self._read(path)) is not None
        } | {step: self._last}
        steps = sorted(s for s in probes if probes[s].inputs.shape == self._last.inputs.shape)
        values: dict[int, dict[str, float]] = {s: {} for s in steps}
        for k, module in enumerate(spec.modules[1:], 1):
            final = [drift(probes[s].inputs[k - 1], self._last.inputs[k - 1]) for s in steps]
            rates = np.diff([probes[s].rates[k] for s in steps]).tolist()
            distances = [float(distance["mmd"].value) for distance in final]
            sums = weighted_drift(distances, rates, self._in_turn)
            for s, distance in zip(steps, final):
                numbers = _numbers(distance)
                values[s] |= {f"final/{module.name}/{name}": v for name, v in numbers.items()}
            for s, weighted in zip(steps[1:], sums):
                values[s][f"final/{module.name}/weighted_drift"] = weighted
        checkpoints.finish()
        for s in sorted({*steps} & {*checkpoints.steps()}):
            older = state
            if s != step:
                try:
                    older = checkpoints.restore(
                        lambda _: (spec.abstract_states(), placement), str(s)
                    ).state
                except UserError as error:  # the run has ended well
                    _LOG.warning("the gradients of step %d are left out: %s", s, error)
                    continue
            for k, module in enumerate(spec.modules):
                gradient = self._gradient(k, older, [batch[k] for batch in walk.incoming])
                if gradient is not None:
                    values[s][f"final/{module.name}/gradient_squared"] = gradient[0]
        epoch = self._experiment.source.steps_per_epoch
        for s in steps:
            if values[s]:
                self._record.writer.write_scalars(s, {"epoch": s / epoch} | values[s])

    def _walk(self, state: EngineState) -> Walk:
        """Passes the probe set through all modules, each on its own devices."""
        spec, placement = self._experiment.spec, self._experiment.engine.placement
        modules = range(len(spec.modules))
        parts = [Parts.of(module) for module in state.modules]
        # A module that has sent no message has no codebook yet.
        sent = held(state, lambda module: module.extras.get("sent", module.updates))
        untrained = [not n and bool(jax.tree.leaves(p.codec)) for n, p in zip(sent, parts)]
        programs = self._programs(spec)
        starts = self._programs(spec, start=True) if any(untrained) else []
        sums: list[Any] = [None for _ in modules]
        inputs: list[list[Any]] = [[] for _ in modules]
        errors: list[list[Any]] = [[] for _ in modules]
        incoming: list[list[tuple[Any, Any]]] = []
        for host_batch in self._batches:
            batch = placement.put_batch(host_batch, 0)
            read: Any = (batch.inputs, batch.context)
            incoming.append([])
            for k in modules:
                if k:
                    payload, context = put(read, placement.split(k))
                    codebook = parts[k - 1].codebook(spec)
                    read = Message(payload, put(codebook, placement.replicated(k))), context
                incoming[-1].append(read)
                result = (starts if untrained[k] else programs)[k](parts[k], *read)
                if untrained[k]:
                    parts[k], untrained[k] = parts[k]._replace(codec=result.codec), False
                read = result.payload, result.context
                if result.gradient is not None:
                    sums[k] = _added(sums[k], result.gradient)
                inputs[k].append(result.inputs)
                errors[k].append(result.codec_error)
        projected = [np.concatenate(jax.device_get(batches)) for batches in inputs[1:]]
        size = len(self._batches) * spec.batch_size
        none = np.zeros((0, size, self._experiment.settings.diagnostics.projections), np.float32)
        return Walk(
            np.stack(projected) if projected else none,
            [_moments(total, len(self._batches)) for total in sums],
            [None if e[0] is None else float(np.mean(jax.device_get(e))) for e in errors],
            incoming,
        )

    def _gradient(
        self, k: int, state: EngineState, incoming: Sequence[tuple[Any, Any]]
    ) -> tuple[float, float] | None:
        """Returns the entry of `Walk.gradients` for given inputs of module k."""
        spec = self._experiment.spec
        if spec.modules[k].objective is None:
            return None
        total = None
        for read in incoming:
            result = self._programs(spec)[k](Parts.of(state.modules[k]), *read)
            total = _added(total, result.gradient)
        return _moments(total, len(incoming))

    def _programs(self, spec: TrainSpec, start: bool = False) -> list[Any]:
        chosen = self._experiment.settings.diagnostics.projections, self._in_turn, start
        groups = self._experiment.engine.placement.groups
        return [_jitted(spec, k, group, *chosen) for k, group in enumerate(groups)]

    def _rates(self, begin: int, end: int) -> float:
        """Returns the sum of the learning rates of a module's updates `begin` to `end`."""
        numbers = jnp.arange(begin, end)
        rates = np.asarray(jax.vmap(self._experiment.schedule)(numbers), np.float64)
        return float(np.sum(rates)) if end > begin else 0.0

    def _restored(self, step: int, checksum: int) -> Stored | None:
        path = self._folder / f"{step}.npz"
        intact = path.exists() and zlib.crc32(path.read_bytes()) == checksum
        stored = self._read(path) if intact else None
        if stored is None:
            _LOG.warning(
                "%s: missing or damaged; the drift of the next probe is left out, training "
                "continues",
                path,
            )
        return stored

    def _read(self, path: Path) -> Stored | None:
        try:
            with np.load(path) as arrays:
                return Stored(*(arrays[name] for name in Stored._fields))
        except Exception as error:  # a damaged archive raises many kinds
            _LOG.warning("%s: cannot be read (%s); this probe is left out", path, error)
            return None


def probe_set(source: Source, batches: int) -> list[Batch]:
    """Returns the first batches of the run's first epoch, in which no example occurs twice.

    Raises:
      UserError: the epoch has fewer batches.
    """
    if world.count() > 1:
        raise UserError(
            "config.diagnostics.enabled=True: diagnostics run in one process; start a single one"
        )
    if batches > source.steps_per_epoch:
        size = len(source.batch(0).context["id"])
        raise UserError(
            f"config.diagnostics.batches={batches}: {batches * size} examples, but the training "
            f"data have {source.steps_per_epoch} batches of {size}; use at most "
            f"{source.steps_per_epoch}"
        )
    return [source.batch(number) for number in range(batches)]


@cached_program(256)
def _jitted(
    spec: TrainSpec, k: int, group: Mesh, directions: int, in_turn: bool, start: bool
) -> Any:
    return jax.jit(on_group(partial(probe, spec, k, directions, in_turn, start), group))


@jax.jit
def _added(total: Any, gradient: Any) -> Any:
    """Adds a gradient, and its squared norm, to a sum that None begins."""
    norm = _squared(gradient)
    if total is None:
        return gradient, norm
    return jax.tree.map(jnp.add, total[0], gradient), total[1] + norm


@jax.jit
def _squared(tree: Any) -> jax.Array:
    return sum((jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.zeros(()))


def _moments(total: Any, batches: int) -> tuple[float, float] | None:
    if total is None:
        return None
    gradient, norms = total
    return float(_squared(gradient)) / batches**2, float(norms) / batches


def _numbers(distances: dict[str, Any]) -> dict[str, float]:
    """Returns distances and their errors as metrics."""
    values = {name: float(d.value) for name, d in distances.items()}
    return values | {f"{name}_error": float(d.error) for name, d in distances.items()}


def _reads(gauges: dict[str, float], name: str) -> tuple[float, float]:
    """Returns the number of messages that a module has read, and the sum of their ages."""
    prefix = f"replay/{name}/"
    count = sum(v for key, v in gauges.items() if key.startswith(f"{prefix}ages_from_"))
    return count, count * gauges.get(f"{prefix}age", 0.0)


def _packed(stored: Stored) -> bytes:
    file = io.BytesIO()
    np.savez(file, **stored._asdict())
    return file.getvalue()
