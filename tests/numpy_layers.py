"""NumPy reference of the layers in float64, for the tests of models and heads."""

import jax
import numpy as np


def random_variables(module, shape, seed=0):
    """Returns variables of a module with random values, so that each one affects the output."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key, x: module.init(key, x, False), jax.random.key(0), np.zeros(shape, np.float32)
    )
    # Vectors are positive, as variances must be; kernels have both signs.
    return jax.tree.map(
        lambda a: rng.uniform(0.1, 1.0, a.shape).astype(a.dtype) - 0.4 * (a.ndim > 1), shapes
    )


def max_pool(x):
    return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)


def max_pool_3x3(x):
    """Computes the maximum of 3x3 windows with stride 2 and a padding of 1."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    return np.max(
        [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)],
        axis=0,
    )


def adaptive_avg_pool(x, out):
    def windows(size, n):
        return [
            slice(int(np.floor(i * size / n)), int(np.ceil((i + 1) * size / n))) for i in range(n)
        ]

    rows, columns = windows(x.shape[1], out[0]), windows(x.shape[2], out[1])
    return np.stack([np.stack([x[:, r, c].mean((1, 2)) for c in columns], 1) for r in rows], 1)


class Layers:
    """Layers of a linen module, to be called in the same order, and their new running averages."""

    def __init__(self, variables, train):
        self.params, self.old = variables["params"], variables.get("batch_stats", {})
        self.train, self.stats, self.calls = train, {}, {}

    def _next(self, kind):
        self.calls[kind] = self.calls.get(kind, -1) + 1
        name = f"{kind}_{self.calls[kind]}"
        return name, {k: np.asarray(v, np.float64) for k, v in self.params[name].items()}

    def all_used(self):
        return sum(n + 1 for n in self.calls.values()) == len(self.params)

    def conv(self, x, stride=1):
        _, p = self._next("Conv")
        size = len(p["kernel"])
        padded = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        (_, height, width, _) = x.shape
        terms = [
            padded[:, i : i + height, j : j + width] @ p["kernel"][i, j]
            for i in range(size)
            for j in range(size)
        ]
        return np.sum(terms, axis=0)[:, ::stride, ::stride] + p.get("bias", 0)

    def linear(self, x):
        _, p = self._next("Dense")
        return x @ p["kernel"] + p["bias"]

    def batch_norm(self, x):
        name, p = self._next("BatchNorm")
        mean, var = (np.asarray(self.old[name][k], np.float64) for k in ("mean", "var"))
        if self.train:
            axes = tuple(range(x.ndim - 1))
            old_mean, old_var, mean, var = mean, var, x.mean(axes), x.var(axes)
            self.stats[name] = {
                "mean": 0.9 * old_mean + 0.1 * mean,
                "var": 0.9 * old_var + 0.1 * var,
            }
        else:
            self.stats[name] = {"mean": mean, "var": var}
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def check_forward(module, oracle, x, train, seed=0):
    """Compares output and running averages of a jitted flax module with `oracle(layers, x)`."""
    variables = random_variables(module, x.shape, seed)
    apply = jax.jit(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))
    y, updated = apply(variables, np.asarray(x, np.float32))
    layers = Layers(variables, train)
    expected = oracle(layers, np.asarray(x, np.float32).astype(np.float64))
    assert layers.all_used()
    close(y, expected)
    jax.tree.map(close, updated.get("batch_stats", {}), layers.stats)


def close(actual, expected):
    # The absolute tolerance is relative to the largest value: sums that nearly cancel leave no
    # relative precision in single values.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
