"""Accuracy of every module's head, and of all heads together, on a split: every example counts once."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

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
from dgl_jax.types import PADDING, Batch, Context, Message


class Evaluator:
    """Runs the modules one after the other on batches of a split, each on its own devices.

    Dispatch is asynchronous and nothing is read before the end, so the modules' devices work on different batches at once.
    """

    def __init__(self, spec: TrainSpec, placement: Placement, codec: bool = True):
        """`codec`: apply it between modules as training does, with the published codebooks; else not at all."""
        if not codec:
            spec = dataclasses.replace(spec, codec=Identity(spec.hops[0].activations.dtype.name if spec.hops else "float32"))
        self.spec = spec
        self.placement = placement
        self.forward = [_jitted(spec, k) for k in range(len(spec.modules))]

    def probabilities(
        self, states: Sequence[ModuleState], batch: Batch
    ) -> tuple[list[Float[Array, "B C"] | None], Float[Array, "B C"], Context]:
        """Class probabilities of each head (None without one), of the ensemble, and the context beside the latter."""
        heads: list[Any] = []
        incoming: Any = self.placement.put_batch(batch, 0).inputs
        books = [self.spec.codebook(state) for state in states]
        for k, (forward, state) in enumerate(zip(self.forward, states, strict=True)):
            if k:
                payload, context = put(incoming, self.placement.split(k))
                incoming = Message(payload, put(books[k - 1], self.placement.replicated(k)), context=context)
            incoming, probabilities = forward(*ema.evaluated(state), books[k], state.extras.get("published", {}), incoming)
            heads.append(probabilities)
        end = self.placement.split(len(heads) - 1)
        gathered = [None if h is None else put(h, end) for h in heads]
        return heads, _ensemble(gathered), put(batch.context, end)

    def evaluate(self, state: EngineState, source: Source, split: str) -> dict[str, float]:
        """`<split>/module_0/accuracy` (fraction), `<split>/module_0/loss` (nats), ..., `<split>/ensemble/accuracy`.

        A module without a head has no entries. Empty where the split has no example.
        """
        counts = []
        with jax.transfer_guard("disallow"):
            for batch in source.evaluation(split):
                heads, ensemble, context = self.probabilities(state.modules, batch)
                end = self.placement.split(len(heads) - 1)
                named = {m.name: put(h, end) for m, h in zip(self.spec.modules, heads) if h is not None}
                counts.append({name: _count(p, context["label"]) for name, p in (named | {"ensemble": ensemble}).items()})
        return _summarise(read(counts), split)


@kept(256)
def _jitted(spec: TrainSpec, k: int) -> Any:
    return jax.jit(partial(_forward, spec, k))


def _forward(
    spec: TrainSpec, k: int, params: Any, batch_stats: Any, codebook: Any, published: Any, incoming: Any
) -> tuple[Any, Any]:
    coded, logits = evaluate(spec, k, params, batch_stats, codebook, published, incoming)
    # Without the codebook, which is here already: a result of the jit would be a copy.
    handed_on = None if coded is None else (coded.payload, coded.context)
    return handed_on, None if logits is None else jax.nn.softmax(logits.astype(jnp.float32))


@jax.jit
def _ensemble(heads: list[Float[Array, "B C"] | None]) -> Float[Array, "B C"]:
    """Mean of the heads' probabilities, module k with a weight proportional to 2^k."""
    weights = [0.0 if h is None else 2.0**k for k, h in enumerate(heads)]
    return sum(w * h for w, h in zip(weights, heads) if h is not None) / sum(weights)  # type: ignore[return-value]


@jax.jit
def _count(probabilities: Float[Array, "B C"], label: Any) -> dict[str, Array]:
    real = label != PADDING
    correct = (jnp.argmax(probabilities, axis=-1) == label) & real
    nats = optax.softmax_cross_entropy_with_integer_labels(jnp.log(jnp.maximum(probabilities, 1e-30)), jnp.maximum(label, 0))
    return {"examples": real.sum(), "correct": correct.sum(), "loss": jnp.where(real, nats, 0.0).sum()}


def _summarise(counts: list[dict[str, dict[str, Any]]], split: str) -> dict[str, float]:
    result = {}
    for name in counts[0] if counts else ():
        total = {key: sum(float(c[name][key]) for c in counts) for key in counts[0][name]}
        result[f"{split}/{name}/accuracy"] = total["correct"] / total["examples"]
        if name != "ensemble":
            result[f"{split}/{name}/loss"] = total["loss"] / total["examples"]
    return result
