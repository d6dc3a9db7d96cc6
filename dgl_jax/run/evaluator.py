"""Evaluation of every head, and of the ensemble of all heads, on a split of the data set."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from dgl_jax.codecs.identity import Identity
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.core.program_cache import cached_program
from dgl_jax.data.source import Source
from dgl_jax.engines.base import EngineState
from dgl_jax.engines.placement import Placement, put
from dgl_jax.methods.base import evaluate
from dgl_jax.run.metrics import read
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import Task
from dgl_jax.types import Batch, Context, Message


class Evaluator:
    """Forward pass through all modules for evaluation and prediction, each on its own devices.

    Dispatch is asynchronous and results are read only at the end, so that the modules' devices work
    on different batches at the same time.
    """

    def __init__(self, spec: TrainSpec, placement: Placement, codec: bool = True):
        """Prepares the jitted programs.

        Args:
          spec: description of the training run.
          placement: devices of the modules.
          codec: True to encode the messages between modules as training does, with the published
            codebooks; False to pass the activations unchanged.
        """
        if not codec:
            spec = dataclasses.replace(
                spec,
                codec=Identity(spec.hops[0].activations.dtype.name if spec.hops else "float32"),
            )
        self.spec = spec
        self.placement = placement
        self.forward = [_jitted(spec, k) for k in range(len(spec.modules))]
        self.ensemble, self.metrics = _of_task(spec.task)

    def answers(
        self, states: Sequence[ModuleState], batch: Batch
    ) -> tuple[list[Array | None], Array, Context]:
        """Returns the predictions for one batch.

        Args:
          states: state of each module, on its devices.
          batch: the batch, in host memory.

        Returns:
          The predictions of each head (None for a module without one), the predictions of the
          ensemble, and the context of the batch on the devices of the last module, where the
          ensemble is computed.
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
            incoming, predictions = forward(
                *ema.evaluated(state), books[k], state.extras.get("published", {}), incoming
            )
            heads.append(predictions)
        end = self.placement.split(len(heads) - 1)
        gathered = [None if head is None else put(head, end) for head in heads]
        return heads, self.ensemble(gathered), put(batch.context, end)

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
        counts = []
        with jax.transfer_guard("disallow"):
            for batch in source.evaluation(split):
                heads, ensemble, context = self.answers(state.modules, batch)
                end = self.placement.split(len(heads) - 1)
                predictions = {
                    module.name: put(head, end)
                    for module, head in zip(self.spec.modules, heads)
                    if head is not None
                } | {"ensemble": ensemble}
                counts.append(
                    {name: self.metrics(p, context["label"]) for name, p in predictions.items()}
                )
        return _summarize(read(counts), split)


@cached_program(256)
def _jitted(spec: TrainSpec, k: int) -> Any:
    return jax.jit(partial(_forward, spec, k))


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
