"""Linear modules with quadratic losses on Gaussian inputs, with closed forms for all quantities.

An input x has d independent normal values with mean `MEAN` and variance 1. Module 0 maps it to a
number z_0 = a x, and module k maps z_{k-1} to z_k = theta_k z_{k-1}. The loss of each module is
(z_k - target)^2 / 2 on average over the batch. Closed forms are in float64 and use NumPy alone.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgl_jax.codecs import Identity, Stateless
from dgl_jax.config import ReplaySettings
from dgl_jax.core.module import make_modules
from dgl_jax.engines import EngineState, FusedEngine, SimulatedEngine, SimulatedOptions
from dgl_jax.engines.placement import one_group
from dgl_jax.methods.dgl import Dgl
from dgl_jax.objectives import LocalLoss, Objective
from dgl_jax.spec import TrainSpec
from dgl_jax.tasks import Task
from dgl_jax.types import Batch

MEAN = np.array([1.0, 0.5, -0.5])
TARGET, BATCH = 1.0, 32


class Linear(nn.Module):
    """Linear map to one number, without bias."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1],))
        return jnp.sum(x * kernel, axis=-1, keepdims=True)


class Quadratic(Objective):
    """Loss (z - target)^2 / 2; its metric `number` tells which batch an update has read."""

    needs: ClassVar[tuple[str, ...]] = ("id",)

    def __call__(self, features: Any, context: Any, published: Any, train: bool) -> LocalLoss:
        loss = jnp.mean((features - TARGET) ** 2) / 2
        number = context["id"][0].astype(jnp.float32) / BATCH
        return LocalLoss(loss, {"loss": (loss, 1.0), "number": (number, 1.0)}, None)


@dataclass(frozen=True)
class Grid(Stateless):
    """Codec that rounds each value to the nearest multiple of `step`."""

    step: float
    lossless: ClassVar[bool] = False

    def encode(self, codebook: Any, activations: Any) -> Any:
        return jnp.round(activations / self.step)

    def decode(self, codebook: Any, payload: Any) -> Any:
        return payload * self.step


class Gaussian:
    """Source of batches; batch number n is a function of the seed and n."""

    steps_per_epoch = 10**6

    def __init__(self, seed: int):
        self.seed = seed

    def batch(self, step: int) -> Batch:
        random = np.random.default_rng([self.seed, step])
        x = (MEAN + random.normal(size=(BATCH, MEAN.size))).astype(np.float32)
        ids = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int32)
        return Batch(x, {"label": ids * 0, "id": ids}, np.asarray(step, np.int32))

    def batches(self, start: int) -> Iterator[Batch]:
        while True:
            yield self.batch(start)
            start += 1


def robbins_monro(first: float) -> Callable[[Any], Any]:
    """Returns step sizes with an infinite sum and a finite sum of squares."""
    return lambda count: first * (1 + count / 10) ** -0.75


def make_spec(modules: int, optimizer: Any, codec: Any = None) -> TrainSpec:
    """Returns the problem with this number of modules."""
    example: Any = jax.ShapeDtypeStruct((MEAN.size,), "float32")
    return TrainSpec(
        modules=make_modules([Linear()] * modules, range(modules), [Quadratic()] * modules),
        method=Dgl(),
        optimizer=optimizer,
        task=Task(example),
        codec=codec or Identity("float32"),
        seed=0,
        batch_size=BATCH,
    )


class Trajectory(NamedTuple):
    """Parameters and inputs of one training run.

    Attributes:
      params: per module, its kernel before each update and at the end, [T + 1, d or 1].
      numbers: per module, the number of the batch that each update has read, [T].
      metrics: per module, the metrics of each update.
    """

    params: list[np.ndarray]
    numbers: list[np.ndarray]
    metrics: list[list[dict[str, float]]]


def begin(spec: TrainSpec, start: Sequence[Any]) -> EngineState:
    """Returns fresh states with the given kernels."""
    states = [
        dataclasses.replace(
            state,
            params=jax.tree.map(lambda x, v=v: jnp.broadcast_to(jnp.float32(v), x.shape), s),
        )
        for state, v in zip(spec.init(), map(np.asarray, start))
        for s in [state.params]
    ]
    return EngineState(tuple(states))


def kernels(state: EngineState) -> list[np.ndarray]:
    return [np.asarray(jax.tree.leaves(module.params)[0], np.float64) for module in state.modules]


def train(engine: Any, start: Sequence[Any], steps: int, seed: int) -> Trajectory:
    """Trains and records every update; the engine is `fused` or `simulated`."""
    source, state = Gaussian(seed), engine.place(begin(engine.spec, start))
    modules = range(len(engine.spec.modules))
    params = [[kernel] for kernel in kernels(state)]
    metrics: list[list[dict[str, float]]] = [[] for _ in modules]
    if isinstance(engine, SimulatedEngine):
        state = engine.resume(state, None)

    def reports() -> Iterator[Any]:
        if isinstance(engine, SimulatedEngine):
            yield from engine.run(state, source, steps)
            return
        now = state
        for step in range(steps):
            for report in engine.run(now, source, step + 1):
                yield report
            now = report.snapshot()

    for report in reports():
        new = kernels(report.snapshot())
        for k, values in enumerate(report.metrics):
            if values:
                pairs = {n: v if isinstance(v, tuple) else (v, 1) for n, v in values.items()}
                metrics[k].append({n: float(s) / float(c) for n, (s, c) in pairs.items()})
                params[k].append(new[k])
    numbers = [np.array([round(m["number"]) for m in each]) for each in metrics]
    return Trajectory([np.array(p) for p in params], numbers, metrics)


def fused(spec: TrainSpec) -> FusedEngine:
    return FusedEngine(spec, one_group(jax.devices()[:1], len(spec.modules)))


def simulated(spec: TrainSpec, steps: int, slowdown: float, size: int) -> SimulatedEngine:
    """Returns the engine with its last module slowed down, and rings of `size` messages."""
    factors = (1.0,) * (len(spec.modules) - 1) + (slowdown,)
    place = one_group(jax.devices()[:1], len(spec.modules))
    options = SimulatedOptions("simulated", slowdown=factors)
    return SimulatedEngine(spec, place, steps, options, ReplaySettings(size=size))


def replayed(
    trajectory: Trajectory, rates: np.ndarray, seed: int, quantum: float = 0.0
) -> list[np.ndarray]:
    """Computes the parameters of modules 0 and 1 again, from the batches that they have read."""
    a, theta = ([trajectory.params[k][0]] for k in (0, 1))
    for t, number in enumerate(trajectory.numbers[0]):
        x = Gaussian(seed).batch(number).inputs.astype(np.float64)
        a.append(a[-1] - rates[t] * np.mean((x @ a[-1] - TARGET)[:, None] * x, axis=0))
    for t, number in enumerate(trajectory.numbers[1]):
        x = Gaussian(seed).batch(number).inputs.astype(np.float64)
        z = x @ a[min(number, len(rates))]
        z = np.round(z / quantum) * quantum if quantum else z
        theta.append(theta[-1] - rates[t] * np.mean((theta[-1] * z - TARGET) * z))
    return [np.array(a), np.array(theta).reshape(-1, 1)]


@dataclass(frozen=True)
class Law:
    """Distribution of a module's inputs: normal, or normal and rounded to a grid.

    Attributes:
      mean: mean before rounding.
      deviation: standard deviation before rounding.
      quantum: distance of the grid's points; 0 for no rounding.
    """

    mean: float
    deviation: float
    quantum: float = 0.0

    @classmethod
    def behind(cls, a: np.ndarray, scale: float = 1.0, quantum: float = 0.0) -> "Law":
        """Returns the law of scale * (a x)."""
        return cls(scale * float(a @ MEAN), abs(scale) * float(np.linalg.norm(a)), quantum)

    def below(self, x: Any) -> np.ndarray:
        """Returns the probability of values below x before rounding."""
        z = (np.asarray(x, np.float64) - self.mean) / self.deviation / math.sqrt(2)
        return 0.5 * (1 + np.vectorize(math.erf)(z))

    def cells(self, points: np.ndarray) -> np.ndarray:
        """Returns the probabilities of the grid's points with these numbers."""
        edges = (np.append(points, points[-1] + 1) - 0.5) * self.quantum
        return np.diff(self.below(edges))

    def moment(self, order: int) -> float:
        """Returns the mean of z^order, for orders 1 to 4."""
        m, v = self.mean, self.deviation**2
        if self.quantum:
            return float(np.sum(self.cells(POINTS) * (POINTS * self.quantum) ** order))
        return (m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2)[order - 1]

    def loss(self, theta: float) -> float:
        """Returns the expected loss of a module."""
        return 0.5 * (theta**2 * self.moment(2) - 2 * theta * TARGET * self.moment(1) + TARGET**2)

    def gradient(self, theta: float) -> float:
        """Returns the derivative of `loss`; its Lipschitz constant is `moment(2)`."""
        return theta * self.moment(2) - TARGET * self.moment(1)

    def second_moment(self, theta: float) -> float:
        """Returns the mean squared gradient of the loss of a single example."""
        parts = theta**2 * self.moment(4), 2 * theta * TARGET * self.moment(3)
        return parts[0] - parts[1] + TARGET**2 * self.moment(2)

    def optimum(self) -> float:
        """Returns the parameter with the smallest expected loss."""
        return TARGET * self.moment(1) / self.moment(2)

    def distance(self, other: "Law") -> float:
        """Returns the integral of |p - q|, or the sum over the points of a grid; from 0 to 2."""
        if self.quantum:
            return float(np.abs(self.cells(POINTS) - other.cells(POINTS)).sum())
        # p and q are equal where this polynomial is 0.
        u, v = self.deviation**2, other.deviation**2
        polynomial = [
            1 / v - 1 / u,
            2 * (self.mean / u - other.mean / v),
            other.mean**2 / v - self.mean**2 / u + math.log(v / u),
        ]
        roots = np.roots(np.trim_zeros(polynomial, "f"))
        edges = [-math.inf, *sorted(r.real for r in roots if abs(r.imag) < 1e-9), math.inf]
        gap = self.below(edges) - other.below(edges)
        return float(np.abs(np.diff(gap)).sum())


POINTS = np.arange(-60, 61)


def settled() -> np.ndarray:
    """Returns the parameters of module 0 with the smallest expected loss."""
    return np.linalg.solve(np.eye(MEAN.size) + np.outer(MEAN, MEAN), MEAN * TARGET)


class Bound(NamedTuple):
    """Two sides of the bound after 1, 2, ..., T updates of a module.

    Attributes:
      left: sum of eta |grad L|^2, for the loss under the final distribution of the inputs.
      right: decrease of the loss + G * (sum of eta sqrt(2 c) + sum of Lambda eta^2 / 2).
      without_drift: `right` without the drift.
      rates: sum of eta.
      drift: sum of eta sqrt(c).
      most: G, the largest second moment of the gradient that has occurred.
      smallest: running minimum of |grad L|^2.
    """

    left: np.ndarray
    right: np.ndarray
    without_drift: np.ndarray
    rates: np.ndarray
    drift: np.ndarray
    most: float
    smallest: np.ndarray


def bound(theta: np.ndarray, laws: Sequence[Law], final: Law, rates: np.ndarray) -> Bound:
    """Computes both sides of the bound for one module of one run.

    Args:
      theta: parameter before each update and at the end, [T + 1].
      laws: distribution of what each update has read.
      final: distribution that the module below settles at.
      rates: step sizes.
    """
    count = len(laws)
    theta, rates = theta.ravel()[: count + 1], rates[:count]
    squares = np.array([final.gradient(x) ** 2 for x in theta[:-1]])
    most = max(law.second_moment(x) for x, each in zip(theta, laws) for law in (each, final))
    decrease = final.loss(theta[0]) - np.array([final.loss(x) for x in theta[1:]])
    drift = np.cumsum(rates * np.sqrt([law.distance(final) for law in laws]))
    noise = most * final.moment(2) / 2 * np.cumsum(rates**2)
    return Bound(
        np.cumsum(rates * squares),
        decrease + most * math.sqrt(2) * drift + noise,
        decrease + noise,
        np.cumsum(rates),
        drift,
        most,
        np.minimum.accumulate(squares),
    )


def constant_producer(rates: Any, constant: float) -> optax.GradientTransformation:
    """Returns an optimizer that updates module 0 with a constant step size, so it never settles."""

    def label(params: Any) -> Any:
        name = "moving" if "block_0" in params["body"] else "settling"
        return jax.tree.map(lambda _: name, params)

    return optax.multi_transform(
        {"moving": optax.sgd(constant), "settling": optax.sgd(rates)}, label
    )
