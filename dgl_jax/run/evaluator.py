"""Metrics of every module's head, and of all heads together, on a split: every label counts once."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from dgl_jax.codecs.identity import Identity
from dgl_jax.core import ema
from dgl_jax.core.kept import kept
from dgl_jax.core.module import ModuleState
from dgl_jax.data.source import Source
from dgl_jax.engines.base import EngineState
from dgl_jax.engines.placement import Placement, put
from dgl_jax.methods.base import evaluate
from dgl_jax.run.metrics import read
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import Task
from dgl_jax.types import Batch, Context, Message


class Evaluator:
    """Runs the modules one after the other on batches of a split, each on its own devices.

    Dispatch is asynchronous and nothing is read before the end, so the modules' devices work on different batches at once.
    """

    def __init__(self, spec: TrainSpec, placement: Placement, codec: bool = True):
        """`codec`: apply it between modules as training does, with the published codebooks; else not at all."""
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
        """Returns the answer of each head (None without one), that of the ensemble, and the context beside the latter."""
        heads: list[Any] = []
        incoming: Any = self.placement.put_batch(batch, 0).inputs
        books = [self.spec.codebook(state) for state in states]
        for k, (forward, state) in enumerate(zip(self.forward, states, strict=True)):
            if k:
                payload, context = put(incoming, self.placement.split(k))
                incoming = Message(
                    payload, put(books[k - 1], self.placement.replicated(k)), context=context
                )
            incoming, answer = forward(
                *ema.evaluated(state), books[k], state.extras.get("published", {}), incoming
            )
            heads.append(answer)
        end = self.placement.split(len(heads) - 1)
        gathered = [None if h is None else put(h, end) for h in heads]
        return heads, self.ensemble(gathered), put(batch.context, end)

    def evaluate(self, state: EngineState, source: Source, split: str) -> dict[str, float]:
        """Measures what the task measures: `<split>/module_0/accuracy`, `<split>/module_0/loss`, ..., `<split>/ensemble/accuracy`.

        A module without a head has no entries. Empty where the split has no example.
        """
        counts = []
        with jax.transfer_guard("disallow"):
            for batch in source.evaluation(split):
                heads, ensemble, context = self.answers(state.modules, batch)
                end = self.placement.split(len(heads) - 1)
                named = {
                    m.name: put(h, end) for m, h in zip(self.spec.modules, heads) if h is not None
                } | {"ensemble": ensemble}
                counts.append(
                    {name: self.metrics(answer, context["label"]) for name, answer in named.items()}
                )
        return _summarise(read(counts), split)


@kept(256)
def _jitted(spec: TrainSpec, k: int) -> Any:
    return jax.jit(partial(_forward, spec, k))


@kept(32)
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
    # Without the codebook, which is here already: a result of the jit would be a copy.
    handed_on = None if message is None else (message.payload, message.context)
    return handed_on, None if logits is None else spec.task.answer(logits)


def _summarise(counts: list[dict[str, dict[str, Any]]], split: str) -> dict[str, float]:
    result = {}
    for name in counts[0] if counts else ():
        for metric in counts[0][name]:
            if (
                name != "ensemble" or metric != "loss"
            ):  # which modules minimise, and the ensemble does not
                total, number = (
                    sum(float(of_batch[name][metric][i]) for of_batch in counts) for i in range(2)
                )
                result[f"{split}/{name}/{metric}"] = total / number
    return result
