"""Dense networks for tests of methods with delayed gradients, and their updates by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dgl_jax.codecs import make_codec
from dgl_jax.config import options
from dgl_jax.core.module import make_modules
from dgl_jax.data import synthetic
from dgl_jax.data.memory import ArraySource
from dgl_jax.engines import EngineState, FusedEngine, PipelineEngine
from dgl_jax.engines.placement import assign, one_group
from dgl_jax.models.heads import LinearHead
from dgl_jax.objectives import cross_entropy
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import ImageClassification

BATCH, STEPS = 8, 7
SOURCE = ArraySource(synthetic.make(64, 20, 4), batch_size=BATCH, seed=0, validation_fraction=0.2)


class Layer(nn.Module):
    """Dense layer with batch norm or dropout, which compiles in a moment."""

    norm: bool = False
    drop: float = 0.0
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, dtype=self.dtype)(x.reshape(x.shape[0], 1, -1))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        x = nn.tanh(x)
        return nn.Dropout(self.drop, deterministic=not train)(x) if self.drop else x


def make_spec(method: Any, modules: int = 3, codec: Any = "identity", **fields: Any) -> TrainSpec:
    """Returns the spec of a run with one layer per module and one objective at the end.

    Args:
      method: the training method.
      modules: number of modules.
      codec: name of a codec, or its settings.
      **fields: fields of `TrainSpec`, or of `Layer`, or `remat`.
    """
    named = {f.name for f in dataclasses.fields(Layer)} - {"parent", "name"}
    layer = {name: fields.pop(name) for name in named & set(fields)}
    dtype = layer.get("dtype", "float32")
    heads = [None] * (modules - 1) + [LinearHead(10, dtype)]
    codec = options("codec", name=codec) if isinstance(codec, str) else codec
    example = jax.ShapeDtypeStruct(SOURCE.example_shape, "uint8")
    remat, adapters = fields.pop("remat", False), fields.pop("adapters", ())
    base: dict[str, Any] = {
        "optimizer": optax.sgd(0.2, momentum=0.5),
        "task": ImageClassification(example, augment="none", mean=(0.5,) * 3, std=(0.25,) * 3),
        "seed": 0,
        "batch_size": BATCH,
    }
    return TrainSpec(
        modules=make_modules(
            [Layer(**layer) for _ in range(modules)],
            tuple(range(modules)),
            heads,
            remat,
            adapters=adapters,
        ),
        method=method,
        codec=make_codec(codec, dtype),
        **base | fields,
    )


def make_engine(spec: TrainSpec, devices: int | tuple[int, ...] = 1, total: int = STEPS) -> Any:
    """Returns `fused` on one device, or `pipeline` on more of them.

    Args:
      spec: the spec of the run.
      devices: number of devices, or the sizes of the groups of `pipeline`.
      total: updates per module at the end of the run.
    """
    count = len(spec.modules)
    if devices == 1:
        return FusedEngine(spec, one_group(jax.devices()[:1], count), total_steps=total)
    sizes = devices if isinstance(devices, tuple) else ()
    groups = assign(jax.devices()[: devices if not sizes else None], count, sizes)
    return PipelineEngine(spec, groups, total_steps=total)


def train(engine: Any, until: int = STEPS, state: EngineState | None = None) -> EngineState:
    """Trains to a step and returns the state there."""
    *_, last = engine.run(engine.init() if state is None else state, SOURCE, until)
    return last.snapshot()


def params_of(state: EngineState) -> list[Any]:
    return [jax.device_get(module.params) for module in state.modules]


class Hand:
    """Training loop in plain JAX: parameters, gradients and updates per module."""

    def __init__(self, spec: TrainSpec):
        self.spec, states = spec, spec.init()
        self.count, self.last = len(states), len(states) - 1
        self.params = [state.params for state in states]
        self.stats = [state.batch_stats for state in states]
        self.opt_states = [spec.optimizer.init(p) for p in self.params]
        self.top = jax.jit(jax.value_and_grad(self._loss, argnums=(0, 1)))
        self.whole = jax.jit(jax.grad(self._whole_loss))
        self.pull = jax.jit(self._pull, static_argnums=0)
        self.forward = jax.jit(self._forward, static_argnums=0)

    def _forward(self, k: int, params: Any, x: Any) -> Any:
        return self.spec.modules[k].apply_body(params, self.stats[k], x, train=True)[0]

    def _loss(self, params: Any, x: Any, label: Any) -> Any:
        features = self._forward(self.last, params, x)
        head = self.spec.modules[self.last].objective.head
        return cross_entropy(head.apply({"params": params["objective"]}, features, True), label)

    def _whole_loss(self, params: Any, x: Any, label: Any) -> Any:
        for k in range(self.last):
            x = self._forward(k, params[k], x)
        return self._loss(params[self.last], x, label)

    def _pull(self, k: int, params: Any, x: Any, cotangent: Any) -> Any:
        return jax.vjp(lambda p, x: self._forward(k, p, x), params, x)[1](cotangent)

    def batch(self, number: int) -> tuple[Any, Any]:
        batch = SOURCE.batch(number)
        return self.spec.task.evaluate(batch.inputs), jnp.asarray(batch.context["label"])

    def update(self, k: int, gradient: Any) -> None:
        updates, self.opt_states[k] = self.spec.optimizer.update(
            gradient, self.opt_states[k], self.params[k]
        )
        self.params[k] = optax.apply_updates(self.params[k], updates)


def ddg_by_hand(spec: TrainSpec, steps: int, late: int = 0, current: bool = False) -> list[Any]:
    """Trains with the gradients of the whole network at the parameters of K - 1 - k ticks before.

    Args:
      spec: the spec of the run.
      steps: updates per module.
      late: further ticks of delay, for a twin.
      current: takes the current parameters instead of the stored ones, for a twin.
    """
    hand = Hand(spec)
    before: list[list[Any]] = []
    for tick in range(steps + hand.last + late):
        before.append(list(hand.params))
        for k in range(hand.count):
            number = tick - (hand.last - k) - late * (k < hand.last)
            if 0 <= number < steps:
                params = before[tick if current else number]
                hand.update(k, hand.whole(params, *hand.batch(number))[k])
    return hand.params


def replay_by_hand(
    spec: TrainSpec, steps: int, first_rate: float = 1.0, then: bool = False
) -> list[Any]:
    """Trains with gradients of stored inputs at the current parameters.

    Args:
      spec: the spec of the run.
      steps: updates per module.
      first_rate: factor of the updates of module 0.
      then: takes the parameters of the forward pass, for a twin.
    """
    hand = Hand(spec)
    inputs: dict[tuple[int, int], Any] = {}
    gradients: dict[tuple[int, int], Any] = {}
    old: dict[int, list[Any]] = {}
    for tick in range(steps + hand.last):
        if tick < steps:
            x, label = hand.batch(tick)
            old[tick] = list(hand.params)
            for k in range(hand.count):
                inputs[k, tick] = x
                x = hand.forward(k, hand.params[k], x)
        for k in range(hand.last):
            number = tick - (hand.last - k)
            if 0 <= number < steps:
                params = old[number][k] if then else hand.params[k]
                gradient, gradients[k, number] = hand.pull(
                    k, params, inputs[k, number], gradients[k + 1, number]
                )
                before = hand.params[k]
                hand.update(k, gradient)
                if k == 0:
                    hand.params[0] = jax.tree.map(
                        lambda a, b: a + first_rate * (b - a), before, hand.params[0]
                    )
        if tick < steps:
            _, (gradient, gradients[hand.last, tick]) = hand.top(
                hand.params[hand.last], inputs[hand.last, tick], label
            )
            hand.update(hand.last, gradient)
    return hand.params


def fdg_by_hand(
    spec: TrainSpec, steps: int, shrink: Callable[[int], float] = lambda hops: 1.0, late: int = 0
) -> list[Any]:
    """Trains with activations and gradients that cross one hop per tick.

    Module k learns from batch t - 2 (K - 1) + k at tick t and then runs batch t - k forward.

    Args:
      spec: the spec of the run.
      steps: updates per module.
      shrink: factor of the true gradient of a module that is this number of hops below the last.
      late: further ticks of delay, for a twin.
    """
    hand = Hand(spec)
    last = hand.last
    arrived = {(0, n): hand.batch(n)[0] for n in range(steps)}
    gradients: dict[tuple[int, int], Any] = {}
    for tick in range(steps + 2 * last + late):
        for k in range(last):
            number = tick - 2 * last + k - late
            if 0 <= number < steps:
                gradient, gradients[k, number] = hand.pull(
                    k, hand.params[k], arrived[k, number], gradients[k + 1, number]
                )
                hand.update(k, jax.tree.map(lambda g, k=k: shrink(last - k) * g, gradient))
        number = tick - last
        if 0 <= number < steps:
            _, (gradient, gradients[last, number]) = hand.top(
                hand.params[last], arrived[last, number], hand.batch(number)[1]
            )
            hand.update(last, gradient)
        for k in reversed(range(last)):
            if 0 <= tick - k < steps:
                arrived[k + 1, tick - k] = hand.forward(k, hand.params[k], arrived[k, tick - k])
    return hand.params
