"""Methods with delayed gradients: their updates, delays and factors against definitions by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from delayed import (
    STEPS,
    ddg_by_hand,
    fdg_by_hand,
    make_engine,
    make_spec,
    params_of,
    replay_by_hand,
    train,
)
from plugin_runs import furthest

from dgl_jax import testing
from dgl_jax.config import make_settings, registry
from dgl_jax.errors import UserError
from dgl_jax.methods.backprop import Backprop
from dgl_jax.methods.ddg import Ddg
from dgl_jax.methods.delayed import locked_ticks, staggered, unlocked_ticks
from dgl_jax.methods.fdg import Fdg
from dgl_jax.methods.features_replay import FeaturesReplay
from dgl_jax.schedule import Turn

METHODS = {"ddg": Ddg(), "features_replay": FeaturesReplay(), "fdg": Fdg()}


def trained(method: Any, **fields: Any) -> list[Any]:
    return params_of(train(make_engine(make_spec(method, **fields))))


# Definitions


@pytest.mark.medium
def test_ddg_applies_the_gradient_at_the_parameters_of_the_forward_pass():
    params, spec = trained(Ddg()), make_spec(Ddg())
    assert furthest(params, ddg_by_hand(spec, STEPS)) < 1e-5
    # Twins: the parameters of another time, and one more tick of delay.
    assert furthest(params, ddg_by_hand(spec, STEPS, current=True)) > 1e-3
    assert furthest(params, ddg_by_hand(spec, STEPS, late=1)) > 1e-3


@pytest.mark.medium
def test_features_replay_applies_the_gradient_of_stored_inputs_at_current_parameters():
    params, spec = trained(FeaturesReplay()), make_spec(FeaturesReplay())
    assert furthest(params, replay_by_hand(spec, STEPS)) < 1e-5
    # Twin: the parameters of the forward pass, as in `ddg`.
    assert furthest(params, replay_by_hand(spec, STEPS, then=True)) > 1e-3
    assert furthest(trained(Ddg()), replay_by_hand(spec, STEPS, then=True)) < 1e-5


@pytest.mark.medium
def test_first_rate_scales_the_updates_of_the_first_module():
    params, spec = trained(FeaturesReplay(first_rate=2.0)), make_spec(FeaturesReplay())
    assert furthest(params, replay_by_hand(spec, STEPS, first_rate=2.0)) < 1e-5
    alone = [trained(FeaturesReplay(first_rate=rate), modules=1)[0] for rate in (1.0, 2.0)]
    assert furthest(*alone) == 0.0  # a single module trains as under back-propagation
    assert furthest(params, replay_by_hand(spec, STEPS)) > 1e-3


@pytest.mark.medium
def test_fdg_delays_by_two_ticks_per_hop():
    params, spec = trained(Fdg()), make_spec(Fdg())
    assert furthest(params, fdg_by_hand(spec, STEPS)) < 1e-5
    # Twin: one more tick of delay.
    assert furthest(params, fdg_by_hand(spec, STEPS, late=1)) > 1e-3


@pytest.mark.medium
def test_fdg_shrinks_gradients_once_per_hop():
    params, spec = trained(Fdg(shrink=0.5)), make_spec(Fdg())
    assert furthest(params, fdg_by_hand(spec, STEPS, shrink=lambda hops: 0.5**hops)) < 1e-5
    # Twins: no factor, and the same factor for all modules below the last.
    assert furthest(params, fdg_by_hand(spec, STEPS)) > 1e-3
    assert furthest(params, fdg_by_hand(spec, STEPS, shrink=lambda hops: 0.5 if hops else 1)) > 1e-3


# The gradients with parameters that never change

RECORDER = optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p),
    lambda g, _, p: (jax.tree.map(jnp.zeros_like, p), g),
)


def recorded(method: Any, **fields: Any) -> Any:
    """Returns the state after a run whose optimizer stores the gradient and updates nothing."""
    return train(make_engine(make_spec(method, optimizer=RECORDER, **fields)))


def gradients(state: Any) -> list[Any]:
    return [jax.device_get(module.opt_state) for module in state.modules]


@pytest.mark.medium
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fields", [{"accumulate": 2}, {"norm": True}, {"dtype": "bfloat16"}])
def test_gradients_equal_backprop_on_their_batch(name, fields):
    delayed, expected = (recorded(m, **fields) for m in (METHODS[name], Backprop()))
    tolerance = 1e-3 if "dtype" in fields else 1e-5
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients(expected))) > 1e-2
    assert furthest(gradients(delayed), gradients(expected)) < tolerance
    # Running averages see each batch once, in the first of the two forward passes.
    stats = [
        [jax.device_get(module.batch_stats["body"]) for module in state.modules]
        for state in (delayed, expected)
    ]
    if jax.tree.leaves(stats):
        assert furthest(*stats) < 1e-5
    # Twin: the gradient of the batch before.
    engine = make_engine(make_spec(Backprop(), optimizer=RECORDER, **fields))
    assert furthest(gradients(delayed), gradients(train(engine, STEPS - 1))) > 1e-2


@pytest.mark.medium
@pytest.mark.parametrize("name", METHODS)
def test_second_forward_pass_repeats_dropout(name):
    """Compares with a run that uses no codec, remat or EMA: none of them changes an update."""
    plain = trained(METHODS[name], drop=0.5)
    assert furthest(plain, trained(METHODS[name], drop=0.5, remat=True, ema=0.5)) < 1e-6
    frozen = recorded(METHODS[name], drop=0.5), recorded(Backprop(), drop=0.5)
    assert furthest(*map(gradients, frozen)) < 1e-5
    assert furthest(gradients(frozen[0]), gradients(recorded(METHODS[name]))) > 1e-3


@pytest.mark.medium
@pytest.mark.full_compile
@pytest.mark.parametrize("name", METHODS)
def test_a_single_module_equals_backprop_bit_for_bit(name):
    one, other = (trained(m, modules=1) for m in (METHODS[name], Backprop()))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.medium
@pytest.mark.parametrize("modules", [2, 3])
def test_fdg_equals_features_replay_with_two_modules_only(modules):
    one, other = (
        jax.tree.leaves(trained(METHODS[name], modules=modules))
        for name in ("fdg", "features_replay")
    )
    differences = [float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)]
    if modules == 2:
        assert max(differences) == pytest.approx(0, abs=1e-6)
    else:
        assert max(differences) > 1e-3


# Schedules


def steady(ticks: Any) -> dict[tuple[int, str], int]:
    """Returns the batch of each (module, kind) in a tick in the middle of a run."""
    *_, tick = (tick for tick, _ in zip(ticks, range(20), strict=False))
    return {(turn.module, turn.kind): turn.batch for turn in tick}


def test_ticks_have_the_delays_of_the_papers():
    modules, last = 4, 3
    locked = steady(locked_ticks([0] * modules, 99, 99))
    unlocked = steady(unlocked_ticks([0] * modules, 99, 99))
    for k in range(last):
        assert locked[k, "forward"] == locked[last, "step"]
        assert locked[k, "forward"] - locked[k, "backward"] == last - k
        assert unlocked[k, "forward"] == unlocked[last, "step"] + last - k
        assert unlocked[k, "forward"] - unlocked[k, "backward"] == 2 * (last - k)


def test_staggered_ticks_keep_the_order_of_each_module_and_overlap_all_of_them():
    locked = list(locked_ticks([0] * 4, 30, 30))
    overlapping = list(staggered(iter(locked)))

    def turns_of(ticks: Any, k: int) -> list[Turn]:
        return [turn for tick in ticks for turn in tick if turn.module == k]

    for k in range(4):
        assert turns_of(overlapping, k) == turns_of(locked, k)
    # All modules work side by side, except that the last one has one turn in two ticks.
    assert {len({turn.module for turn in tick}) for tick in overlapping[20:-20]} == {3, 4}
    sent: set[tuple[int, int, str]] = set()
    for tick in overlapping:
        for k, batch, kind in tick:  # all that a turn reads was sent in an earlier tick
            if kind == "backward":
                assert (k + 1, batch, "down") in sent
            elif k:
                assert (k - 1, batch, "up") in sent
        for k, batch, kind in tick:
            sent.add((k, batch, "up" if kind == "forward" else "down"))


@pytest.mark.parametrize("schedule", [locked_ticks, unlocked_ticks])
def test_a_stopped_schedule_continues_with_the_same_ticks(schedule):
    total, modules = 12, 3
    whole = list(schedule([0] * modules, total, total))
    for until in range(1, total):
        made, ticks = [0] * modules, []
        for end in (until, total):
            for tick in schedule(list(made), end, total):
                ticks.append(tick)
                for turn in tick:
                    made[turn.module] += turn.updates()
        assert made == [total] * modules
        assert ticks == whole
    # A signal ends the schedule only once every module has made an update.
    stopped = list(schedule([0] * modules, total, total, lambda: True))
    assert any(turn == Turn(0, 0, "backward") for turn in stopped[-1])
    assert stopped == whole[: len(stopped)]


# Options


def test_options_of_the_methods():
    def method(name: str, **fields: Any) -> Any:
        settings = make_settings({"method": {"name": name} | fields})
        return registry.METHODS[name].make(settings.method)

    assert method("ddg", encode_gradients=False) == Ddg(False)
    assert method("features_replay", first_rate=2.0) == FeaturesReplay(first_rate=2.0)
    assert method("fdg", shrink=0.5) == Fdg(shrink=0.5)
    with pytest.raises(UserError, match=r"config\.method\.shrink=0\.0: no gradient would reach"):
        method("fdg", shrink=0.0)
    refused = testing.small_settings(method={"name": "ddg"}, engine={"name": "threads"})
    with pytest.raises(UserError, match=r"threads: config\.method\.name=ddg runs under fused or"):
        testing.make_experiment(refused, jax.devices()[:1])


def test_memory_of_the_histories():
    """Counts the bytes of the stored arrays: 48 inputs or 8 activations per image, float32."""
    sizes = {"image": 8 * 48 * 4, "features": 8 * 8 * 4}
    params = [4 * (48 * 8 + 8), 4 * (8 * 8 + 8)]
    for name, entries, weights in (("ddg", (3, 2), 1), ("features_replay", (3, 2), 0)):
        histories = history_bytes(METHODS[name])
        assert histories == [
            entries[0] * (sizes["image"] + weights * params[0]),
            entries[1] * (sizes["features"] + weights * params[1]),
        ]
    assert history_bytes(Fdg()) == [4 * sizes["image"], 2 * sizes["features"]]


def history_bytes(method: Any) -> list[int]:
    states = dataclasses.replace(make_spec(method)).abstract_states()
    return [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(s.extras["history"]))
        for s in states[:-1]
    ]
