"""Group c: images per second, memory and waits, beside the rate of matrix products and PyTorch."""

import time
from functools import partial
from typing import Any

import jax

from benchmarks.accelerator import images, peers, starting
from benchmarks.accelerator.common import Fields, configured, fitting
from benchmarks.accelerator.measuring import ENDLESS, alone, cnn6, compare, peak
from benchmarks.accelerator.rows import Figures, Job, Row, Size
from dgl_jax.run.build import Experiment, make_experiment

_PRODUCTS = 16
_CUTS = 2  # modules of the ImageNet networks, as in the paper


def rows(size: Size) -> list[Row]:
    """Returns the rows of this group."""
    row = partial(Row, group="c")
    usual, large = size.batches
    networks = {"resnet50": size.late, "resnet152": size.late + 2}
    result = [
        row(f"matrix products, {dtype}", measure=partial(matrix_rate, dtype), cost=5, process="c")
        for dtype in ("bfloat16", "float32")
    ]
    for batch, rank in zip(size.batches, (0, size.late)):
        base = cnn6(size, batch)
        variants: dict[str, Fields] = {
            "DGL, fused": base,
            "back-propagation": cnn6(size, batch, method__name="backprop"),
            "DGL, pipeline on one device": cnn6(size, batch, engine__name="pipeline"),
        }
        if batch == usual:
            variants["DGL, fused, float32"] = cnn6(size, batch, model__dtype="float32")
            # At the full size 16 channels of bf16, which are 32 bytes, become one byte.
            variants["DGL, pipeline, vq"] = cnn6(
                size, batch, engine__name="pipeline", codec__name="vq", codec__dims=_dims(size)
            )
            variants["DGL, threads"] = cnn6(size, batch, engine__name="threads", replay__size=4)
        result += [
            row(
                f"{_name('cnn6', batch)}: {name}",
                measure=partial(_compare, fields, base),
                cost=30,
                process=f"cnn6 {batch}",
                rank=rank,
            )
            for name, fields in variants.items()
        ]
    others = peers.rows(size, networks)
    result += [other for other in others if other.name.startswith("cnn6")]
    result += starting.rows(size)
    base = cnn6(size, large)
    programs = {
        f"K = {count} programs on one card": dict(base)
        | {"engine.name": "pipeline", "model.modules": count}
        for count in sorted({1, 2, 3, size.modules})
    }
    result += [
        row(
            f"{_name('cnn6', large)}: {name}",
            measure=partial(_compare, fields, base),
            cost=30,
            process=f"cnn6 {large}",
            rank=2,
        )
        for name, fields in programs.items()
    ]
    backprop = cnn6(size, large, method__name="backprop")
    programs |= {"DGL, fused": base, "back-propagation": backprop}
    for name, fields in programs.items():
        label = f"{_name('cnn6', large)}: {name}: memory"
        result.append(row(label, measure=partial(_peak, fields), cost=15, process=label, rank=2))
    for network, rank in networks.items():
        for name, fields in _deep(size, network).items():
            label = f"{network}, {size.side} px: {name}"
            memory, measure = f"{label}: memory", partial(_deep_memory, fields, label)
            result += [
                row(label, measure=partial(_deep_speed, fields), cost=60, process=label, rank=rank),
                row(memory, measure=measure, cost=20, process=memory, rank=rank),
            ]
    return result + [other for other in others if not other.name.startswith("cnn6")]


def _name(network: str, batch: int) -> str:
    return f"{network}, batch {batch}"


def _dims(size: Size) -> int:
    return min(16, size.width)


def _compare(fields: Fields, baseline: Fields, job: Job) -> Figures:
    return compare(job, fields, baseline)


def _peak(fields: Fields, job: Job) -> Figures:
    return peak(make_experiment(configured(fields)))


def matrix_rate(dtype: str, job: Job) -> Figures:
    """Measures the rate of products of square matrices, at the default precision of their dtype."""
    side = job.size.matrix
    keys = jax.random.split(jax.random.key(0))
    # Scaled so that repeated products keep their size.
    x, y = (jax.random.normal(key, (side, side), dtype) / side**0.5 for key in keys)

    @jax.jit
    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: x @ y, x)

    seconds = []
    for _ in range(job.size.repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(products(x, y))
        seconds.append(time.perf_counter() - begin)
    flops = 2.0 * side**3 * _PRODUCTS / min(seconds[1:])
    return {"dtype": dtype, "side": side, "flops_per_second": flops}


def _deep(size: Size, network: str) -> dict[str, Fields]:
    base: dict[str, Any] = {
        "model.name": network,
        "model.width": size.deep_width,
        "model.modules": _CUTS,
        "model.dtype": "bfloat16",
        "model.remat": False,
        **ENDLESS,
    }
    return {
        "back-propagation": base | {"method.name": "backprop"},
        f"DGL, K = {_CUTS}, pipeline": base | {"engine.name": "pipeline"},
    }


def _built(fields: Fields, job: Job, batch: int) -> Experiment:
    data = images.fields(images.LARGE, job.size, batch)
    return make_experiment(configured(data | dict(fields)))


def _deep_speed(fields: Fields, job: Job) -> Figures:
    return fitting(job.size.deep_batch, lambda batch: alone(job, _built(fields, job, batch)))


def _deep_memory(fields: Fields, label: str, job: Job) -> Figures:
    batch = job.results.get(label, {}).get("batch_size", job.size.deep_batch)
    return peak(_built(fields, job, batch))
