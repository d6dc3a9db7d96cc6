"""Evaluation of every head, and of the ensemble of all heads, on a split of the data set."""

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dgl_jax import waits
from dgl_jax.codecs.identity import Identity
from dgl_jax.config import Settings
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.core.program_cache import cached_program
from dgl_jax.data import Source, StoredSource
from dgl_jax.engines import world
from dgl_jax.engines.base import EngineState
from dgl_jax.engines.dispatches import chosen_steps
from dgl_jax.engines.feed import (
    Residence,
    Stored,
    chosen,
    put_selected,
    put_stacked,
    select,
    stacked_shapes,
)
from dgl_jax.engines.placement import Placement
from dgl_jax.engines.transfer import placed_shapes, put
from dgl_jax.methods.base import evaluate
from dgl_jax.run.metrics import read
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import Task
from dgl_jax.types import PADDING, Batch, Context, Message


def make_evaluator(spec: TrainSpec, placement: Placement, settings: Settings) -> "Evaluator":
    """Returns the configured evaluator of a network that is not being trained.

    Args:
      spec: description of the training run.
      placement: devices of the modules.
      settings: configuration of the evaluation and of the data.
    """
    device = placement.groups[0].devices.flat[0]
    return Evaluator(
        *(spec, placement, settings.eval.codec, Residence(settings.data.on_device)),
        getattr(settings.engine, "steps_per_dispatch", 0) or chosen_steps(spec, device),
    )


class Evaluator:
    """Forward pass through all modules for evaluation and prediction, each on its own devices.

    Dispatch is asynchronous and results are read only at the end, so that the modules' devices work
    on different batches at the same time.
    """

    def __init__(
        self,
        spec: TrainSpec,
        placement: Placement,
        codec: bool = True,
        residence: Residence | None = None,
        steps_per_dispatch: int = 1,
    ):
        """Prepares the jitted programs.

        Args:
          spec: description of the training run.
          placement: devices of the modules.
          codec: True to encode the messages between modules as training does, with the published
            codebooks; False to pass the activations unchanged.
          residence: keeps the examples on the devices of the first module, if they fit; by default
            they come from the host.
          steps_per_dispatch: batches that one dispatch evaluates, if the examples are on the
            devices and all modules share them.
        """
        if not codec:
            spec = dataclasses.replace(
                spec,
                codec=Identity(spec.hops[0].activations.dtype.name if spec.hops else "float32"),
            )
        self.spec = spec
        self.placement = placement
        self.forward = [
            _jitted(spec, k) if placement.mine(k) else _elsewhere(spec, k, placement)
            for k in range(len(spec.modules))
        ]
        self._ends_here = placement.mine(len(spec.modules) - 1)
        self.ensemble, self.metrics = _of_task(spec.task)
        self._compiler: threading.Thread | None = None
        self._closed = False
        self._residence = residence or Residence("off")
        self._at_once = steps_per_dispatch if len(set(placement.groups)) == 1 else 1

    def answers(
        self, states: Sequence[ModuleState], batch: Batch
    ) -> tuple[list[Array | None], Array | None, Context]:
        """Returns the predictions for one batch.

        Args:
          states: state of each module, on its devices.
          batch: the batch, in host memory or on the devices of the first module.

        Returns:
          The predictions of each head (None for a module without one), the predictions of the
          ensemble, and the context of the batch on the devices of the last module, where the
          ensemble is computed. Of what other processes hold, shapes and dtypes.
        """
        heads: list[Any] = []
        incoming: Any = self.placement.put_batch(batch, 0).inputs
        books = [self.spec.codebook(state) for state in states]
        for k, (forward, state) in enumerate(zip(self.forward, states, strict=True)):
            if k:
                payload, context = put(incoming, self.placement.split(k))
                incoming = Message(
                    payload, put(books[k - 1], self.placement.replicated(k)), context=context
                )
            incoming, predictions = forward(*self._read_by_forward(state), incoming)
            heads.append(predictions)
        end = self.placement.split(len(heads) - 1)
        gathered = [None if head is None else put(head, end) for head in heads]
        ensemble = self.ensemble(gathered) if self._ends_here else None
        return heads, ensemble, put(batch.context, end)

    def compile(self, source: Source) -> None:
        """Starts to compile the programs of `evaluate` in a thread, for which `evaluate` waits.

        Args:
          source: source of the examples.
        """
        if world.count() > 1:
            return  # processes compile the programs that they share at the same time
        # A daemon thread, so that an error elsewhere does not wait for the compiler.
        self._compiler = threading.Thread(target=self._compile, args=(source,), daemon=True)
        self._compiler.start()

    def close(self) -> None:
        """Stops compiling after the program that is being compiled."""
        self._closed = True
        if self._compiler is not None:
            waits.join(self._compiler)

    def _compile(self, source: Source) -> None:
        # An error is left to `evaluate`, which compiles again and raises it.
        with suppress(Exception):
            for lowered in self._lowered(source):
                if self._closed:
                    return
                lowered.compile()

    def _lowered(self, source: Source) -> Iterator[Any]:
        """Yields the programs of `evaluate`, lowered for the arguments of the first batch."""
        parts = [
            placed_shapes(
                jax.eval_shape(self._read_by_forward, state), self.placement.replicated(k)
            )
            for k, state in enumerate(self.spec.abstract_states())
        ]
        batch = self.placement.batch_shapes(self.spec.batch())
        on_devices = [
            self._residence.stored(source, split, self.placement.replicated(0))
            for split in ("validation", "test")
        ]
        if self._at_once > 1:
            stack = stacked_shapes(batch, self._at_once, self.placement, resident=True)
            for stored in on_devices:
                if stored is not None and len(stored.inputs):
                    yield _loop(self.spec).lower(tuple(parts), stored, stack)
            if all(stored is not None for stored in on_devices):
                return
        incoming: Any = batch.inputs
        answers: list[Any] = []
        end = self.placement.split(len(parts) - 1)
        for k, part in enumerate(parts):
            split = self.placement.split(k)
            if k:
                payload, context = placed_shapes(incoming, split)
                codebook = placed_shapes(parts[k - 1][2], self.placement.replicated(k))
                incoming = Message(payload, codebook, context=context)
            lowered = self.forward[k].lower(*part, incoming)
            incoming, answer = lowered.out_info
            answers.append(None if answer is None else placed_shapes(answer, end))
            yield lowered
        ensemble = self.ensemble.lower(answers)
        yield ensemble
        label = placed_shapes(batch.context["label"], end)
        for answer in {*answers, placed_shapes(ensemble.out_info, end)} - {None}:
            yield self.metrics.lower(answer, label)

    def evaluate(self, state: EngineState, source: Source, split: str) -> dict[str, float]:
        """Returns the metrics of the task on a split; every label counts once.

        Args:
          state: state of all modules, on their devices.
          source: source of the examples.
          split: "train", "validation" or "test".

        Returns:
          `<split>/module_0/accuracy`, `<split>/module_0/loss`, ..., `<split>/ensemble/accuracy`.
          A module without a head has no entries; the dict is empty if the split has no examples.
        """
        if self._compiler is not None:
            waits.join(self._compiler)
        whole = self.placement.replicated(0)
        with jax.transfer_guard("disallow"):
            stored = self._residence.stored(source, split, whole)
            if stored is None:
                batches = source.evaluation(split)
            else:
                assert isinstance(source, StoredSource)
                ids = source.evaluation_ids(split)
                batches = (chosen(batch_ids.astype("int32"), i) for i, batch_ids in enumerate(ids))
            if stored is not None and self._at_once > 1:
                counts = self._count_in_groups(state.modules, stored, batches)
            else:
                selected = (put_selected(batch, stored, self.placement) for batch in batches)
                counts = read([self._count(state.modules, batch) for batch in selected])
        return world.merged(_summarize(counts, split))

    def _read_by_forward(self, state: ModuleState) -> tuple[Any, ...]:
        """Returns the parts of a module's state that its forward pass reads."""
        published = state.extras.get("published", {})
        return *ema.evaluated(state), self.spec.codebook(state), published

    def _count(self, states: Sequence[ModuleState], batch: Batch) -> dict[str, Any]:
        """Returns the metrics of one batch by module, as (sum, count) on the devices."""
        heads, ensemble, context = self.answers(states, batch)
        end = self.placement.split(len(heads) - 1)
        placed = [None if head is None else put(head, end) for head in heads]
        if not self._ends_here:
            return {}
        predictions = _named(self.spec, placed, ensemble)
        return {name: self.metrics(p, context["label"]) for name, p in predictions.items()}

    def _count_in_groups(
        self, states: Sequence[ModuleState], stored: Stored, batches: Iterable[Batch]
    ) -> list[dict[str, Any]]:
        """Returns the metrics of every batch as host values; a dispatch evaluates many batches."""
        parts = tuple(map(self._read_by_forward, states))
        loop, counts, every = _loop(self.spec), [], list(batches)
        number = len(every)
        # Batches of padding complete the last group, so that one program serves all; none of their
        # examples counts.
        padding = np.full(self.spec.batch_size, PADDING, np.int32)
        every += [chosen(padding, 0)] * (-number % self._at_once)
        for first in range(0, len(every), self._at_once):
            group = put_stacked(every[first : first + self._at_once], self.placement)
            counts.append(loop(parts, stored, group))
        on_host = [
            jax.tree.map(lambda x, i=i: x[i], group)
            for group in read(counts)
            for i in range(self._at_once)
        ]
        return on_host[:number]


def _named(spec: TrainSpec, answers: Sequence[Any], ensemble: Any) -> dict[str, Any]:
    """Returns the predictions of the modules that make any, and of the ensemble, by name."""
    names = [module.name for module in spec.modules]
    known = {name: answer for name, answer in zip(names, answers) if answer is not None}
    return known | {"ensemble": ensemble}


@cached_program(32)
def _loop(spec: TrainSpec) -> Any:
    """Returns the jitted function that evaluates a stack of batches with all modules."""

    def count(parts: list[Any], stored: Stored, batch: Batch) -> dict[str, Any]:
        batch = select(stored, batch)
        answers: list[Any] = []
        incoming: Any = batch.inputs
        for k, part in enumerate(parts):
            if k:
                payload, context = incoming
                incoming = Message(payload, parts[k - 1][2], context=context)
            params, batch_stats, codebook, published = part
            incoming, answer = _forward(spec, k, params, batch_stats, codebook, published, incoming)
            answers.append(answer)
        predictions = _named(spec, answers, spec.task.ensemble(answers))
        label: Any = batch.context["label"]
        return {name: spec.task.metrics(p, label) for name, p in predictions.items()}

    def loop(parts: Any, stored: Stored, batches: Batch) -> dict[str, Any]:
        return jax.lax.scan(lambda _, batch: (None, count(parts, stored, batch)), None, batches)[1]

    return jax.jit(loop)


@cached_program(256)
def _jitted(spec: TrainSpec, k: int) -> Any:
    return jax.jit(partial(_forward, spec, k))


@cached_program(256)
def _elsewhere(spec: TrainSpec, k: int, placement: Placement) -> Any:
    """Returns a stand-in for `_jitted` of a module whose devices belong to other processes."""
    split = placement.split(k)
    answers: list[Any] = []

    def stand_in(*arguments: Any) -> Any:
        if not answers:
            with jax.transfer_guard("allow"):
                answers.append(
                    placed_shapes(jax.eval_shape(partial(_forward, spec, k), *arguments), split)
                )
        return answers[0]

    return stand_in


@cached_program(32)
def _of_task(task: Task) -> tuple[Any, Any]:
    return jax.jit(task.ensemble), jax.jit(task.metrics)


def _forward(
    spec: TrainSpec,
    k: int,
    params: Any,
    batch_stats: Any,
    codebook: Any,
    published: Any,
    incoming: Any,
) -> tuple[Any, Any]:
    message, logits = evaluate(spec, k, params, batch_stats, codebook, published, incoming)
    # Leave the codebook out: the caller has it already, and a jit output would be a copy.
    sent = None if message is None else (message.payload, message.context)
    return sent, None if logits is None else spec.task.answer(logits)


def _summarize(counts: list[dict[str, dict[str, Any]]], split: str) -> dict[str, float]:
    """Averages the (sum, count) pairs of all batches."""
    result = {}
    for name in counts[0] if counts else ():
        for metric in counts[0][name]:
            # The ensemble has no loss of its own: nothing minimizes it.
            if name != "ensemble" or metric != "loss":
                total, number = (
                    sum(float(batch[name][metric][i]) for batch in counts) for i in range(2)
                )
                result[f"{split}/{name}/{metric}"] = total / number
    return result
