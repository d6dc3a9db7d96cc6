"""Small runs with the parts of `examples/plugin`, and a training loop in plain JAX."""

from typing import Any

import jax
import numpy as np
import optax
from runs import small_config

from dgl_jax.config import default_config, make_settings
from dgl_jax.core.module import LocalModule
from dgl_jax.objectives import cross_entropy
from dgl_jax.run.build import make_experiment

PLUGIN = {
    "plugins": ("examples.plugin",),
    "data__name": "stripes",
    "data__train_examples": 48,
    "data__augment": "none",
}
ECHO: dict[str, Any] = {"model__adapter": "echo"}
MIRROR: dict[str, Any] = {"objective__name": "mirror"}


def config(**fields: Any) -> Any:
    """Returns the configuration of the small run with the plugin imported and `fields` set."""
    # Stripes have many equal pixels. In shallow maps a difference of rounding then decides which of
    # them is the largest.
    fields = {"model__name": "cnn4"} | fields
    plugin_config = default_config(PLUGIN["plugins"])
    plugin_config.update(
        small_config(
            **{name: value for name, value in PLUGIN.items() if name != "plugins"}
        ).to_dict()
        | {"plugins": plugin_config.plugins}
    )
    for name, value in fields.items():
        group, _, leaf = name.partition("__")
        setattr(plugin_config[group], leaf, value)
    return plugin_config


def trained(steps: int, devices: int = 2, **fields):
    """Trains the small run and returns the parameters of each module on the host."""
    experiment = make_experiment(make_settings(config(**fields)), jax.devices()[:devices])
    *_, last = experiment.engine.run(experiment.engine.init(), experiment.source, steps)
    return [jax.device_get(module.params) for module in last.snapshot().modules]


def equal(one, other):
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


def furthest(one, other):
    """Returns the largest absolute difference between two pytrees."""
    return max(
        float(np.max(np.abs(a - b)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


class ByHand:
    """Parameters, batch statistics and optimizer states of a small run, for a loop in plain JAX."""

    def __init__(self, **fields: Any):
        self.experiment = make_experiment(make_settings(config(**fields)), jax.devices()[:1])
        self.spec, states = self.experiment.spec, self.experiment.spec.init()
        self.modules = self.spec.modules
        self.params = [state.params for state in states]
        self.stats = [state.batch_stats for state in states]
        self.optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9))
        self.opt_states = [self.optimizer.init(p) for p in self.params]

    def batch(self, number: int) -> tuple[Any, Any]:
        batch = self.experiment.source.batch(number)
        return self.spec.task.evaluate(batch.inputs), batch.context["label"]

    def update(self, k: int, gradient: Any) -> None:
        updates, self.opt_states[k] = self.optimizer.update(
            gradient, self.opt_states[k], self.params[k]
        )
        self.params[k] = optax.apply_updates(self.params[k], updates)


def head_loss(
    module: LocalModule, params: Any, stats: Any, features: Any, label: Any
) -> tuple[Any, Any]:
    """Returns the cross entropy of the module's head, and the head's new batch statistics."""
    variables = {"params": params, "batch_stats": stats}
    logits, updated = module.objective.head.apply(
        variables, features, train=True, mutable=["batch_stats"]
    )
    return cross_entropy(logits, label), updated.get("batch_stats", {})
