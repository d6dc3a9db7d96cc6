"""Time of vq to encode, decode and update, compared with two libraries, and its share of a tick.

python benchmarks/vq_speed/run.py [--cores=1] [--write]

Encoding is also compared with the bare matrix product of the distances. The column of
vector-quantize-pytorch needs `pip install torch vector-quantize-pytorch`.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
CORES = next((int(a.partition("=")[2]) for a in sys.argv if a.startswith("--cores=")), 1)
# Must come before any library counts the cores to size its thread pool.
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))

import harness  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.cluster import MiniBatchKMeans  # noqa: E402

from dgl_jax import vq  # noqa: E402
from dgl_jax.engines.transfer import put  # noqa: E402
from dgl_jax.run.build import make_experiment  # noqa: E402
from dgl_jax.types import Inbox  # noqa: E402

LIMIT = 2.0  # largest ratio of encode to the bare matrix product
# (height and width, channels) of the hops of the 6-layer CNN at widths 32 and 128.
HOPS = [
    (32, 32),
    (16, 64),
    (8, 128),
    (32, 128),
    (16, 256),
    (8, 512),
]
SIZES = [(256, 4), (256, 8), (256, 16), (16, 4), (16, 8), (16, 16)]  # (codes, dims)
TICKS = {
    "identity": {},
    "N 256, D 8": {"codec__name": "vq"},
    "N 16, D 4": {"codec__name": "vq", "codec__codes": 16, "codec__dims": 4},
}
BATCH = 128
# Bytes of all distances; above it, variants that hold several copies of them are not run.
MOST = 3e9


def distances(entries: jax.Array, x: jax.Array) -> jax.Array:
    """Computes only the matrix product that the distances need."""
    vectors = x.reshape(-1, entries.shape[0], entries.shape[2])
    return jnp.einsum("gnd,bgd->gnb", entries, vectors, precision=jax.lax.Precision.HIGHEST)


def argmin(entries: jax.Array, x: jax.Array) -> jax.Array:
    """Encodes naively: takes the minimum over a tensor of all distances."""
    return jnp.argmin(jnp.square(entries).sum(-1)[..., None] - 2 * distances(entries, x), axis=1)


def torch_variant(entries: np.ndarray, x: np.ndarray) -> Callable[[], Any] | None:
    """Returns vector-quantize-pytorch in evaluation mode, with one head per group."""
    if not importlib.util.find_spec("vector_quantize_pytorch"):
        return None
    import torch
    from vector_quantize_pytorch import VectorQuantize

    torch.set_num_threads(CORES)
    groups, codes, dims = entries.shape
    # Its inputs are [batch, positions, channels], with the channels split into heads.
    model = VectorQuantize(
        dim=groups * dims,
        codebook_size=codes,
        codebook_dim=dims,
        heads=groups,
        separate_codebook_per_head=True,
    )
    model.eval()
    with torch.no_grad():
        model._codebook.embed.copy_(torch.from_numpy(entries.copy()))
        if hasattr(model._codebook, "initted"):
            model._codebook.initted.fill_(True)
    data = torch.from_numpy(x.reshape(x.shape[0], -1, x.shape[-1]).copy())

    def run() -> Any:
        with torch.no_grad():
            return model(data)[1]

    return run


def sklearn_variant(entries: np.ndarray, x: np.ndarray) -> Callable[[], Any]:
    """Returns scikit-learn's MiniBatchKMeans, with one model per group."""
    groups, codes, dims = entries.shape
    vectors = x.reshape(-1, groups, dims)
    parts, models = [], []
    for group in range(groups):
        parts.append(np.ascontiguousarray(vectors[:, group]))
        start = np.ascontiguousarray(entries[group])
        model = MiniBatchKMeans(
            codes, init=start, n_init=1, max_iter=1, batch_size=codes, random_state=0
        ).fit(parts[group][:codes])
        model.cluster_centers_ = start
        models.append(model)
    return lambda: [model.predict(part) for model, part in zip(models, parts)]


def case(side: int, channels: int, codes: int, dims: int) -> dict[str, Any]:
    """Measures all variants on the activations of one hop, interleaved."""
    random = np.random.default_rng(0)
    # Values as after a ReLU.
    x = np.maximum(random.normal(size=(BATCH, side, side, channels)), 0).astype(np.float32)
    key, activations = jax.random.key(0), jnp.asarray(x)
    book = jax.jit(partial(vq.init, codes=codes, dims=dims))(key, activations)
    for _ in range(3):
        book, _ = vq.update(book, key, activations)
    encode, decode, update, product, naive = map(
        jax.jit, (vq.encode, vq.decode, vq.update, distances, argmin)
    )
    sent, entries = encode(book.entries, activations), np.asarray(book.entries)
    all_distances = 4 * codes * x.size // dims
    variants: dict[str, Callable[[], Any] | None] = {
        "encode": lambda: encode(book.entries, activations),
        "decode": lambda: decode(book.entries, sent),
        "update": lambda: update(book, key, activations),
        "product": lambda: product(book.entries, activations),
        "naive": None if all_distances > MOST else lambda: naive(book.entries, activations),
        "torch": None if all_distances > MOST else torch_variant(entries, x),
        "sklearn": sklearn_variant(entries, x),
    }
    expected = np.asarray(vq._unpack(sent, codes, channels // dims)).reshape(-1, channels // dims)
    by_sklearn = np.stack(variants["sklearn"](), -1)  # type: ignore[misc]
    agree = {"sklearn": float((by_sklearn == expected).mean())}
    if variants["torch"]:
        by_torch = variants["torch"]().numpy().reshape(expected.shape)
        agree["torch"] = float((by_torch == expected).mean())
    repeats = 2 if x.nbytes > 2**25 else 5
    spent: dict[str, list[float]] = {name: [] for name, run in variants.items() if run}
    for repeat in range(repeats + 1):
        for name in spent:
            # Slow variants are called once; a warm-up would not matter for them.
            if name in ("naive", "torch", "sklearn") and x.nbytes >= 2**22 and repeat != 1:
                continue
            begin = time.perf_counter()
            jax.block_until_ready(variants[name]())  # type: ignore[misc]
            if repeat:
                spent[name].append(1e3 * (time.perf_counter() - begin))
    encoding = statistics.median(spent["encode"])
    over = {name: round(encoding / statistics.median(times), 4) for name, times in spent.items()}
    return {
        "side": side,
        "channels": channels,
        "codes": codes,
        "dims": dims,
        "milliseconds": {name: harness.quartiles(times) for name, times in spent.items()},
        "encode_over": {
            name: over[name] for name in over if name not in ("encode", "decode", "update")
        },
        "same_codes": agree,
    }


def shares(modules: int, repeats: int = 7) -> dict[str, Any]:
    """Measures the share of coding in the programs of the 6-layer CNN at width 32.

    The slowest program is the tick of a pipeline.
    """
    programs: dict[str, list[list[float]]] = {}
    ready = {}
    for name, codec in TICKS.items():
        settings = harness.settings(
            data__name="synthetic",
            data__image_size=32,
            data__augment="crop_flip",
            model__name="cnn6",
            model__width=32,
            model__modules=modules,
            **codec,
        )
        experiment = make_experiment(settings)
        states, placement = experiment.spec.init(), experiment.engine.placement
        batch = placement.put_batch(experiment.source.batch(0), 0)
        incoming, steps = batch, []
        for k, state in enumerate(states):
            step = jax.jit(experiment.spec.method.program(experiment.spec, k))
            arguments = (
                put(state, placement.replicated(0)),
                Inbox(incoming),
                batch.context,
            )
            steps.append((step, arguments))
            incoming = jax.block_until_ready(step(*arguments))[1].above
        ready[name] = steps
        programs[name] = [[] for _ in steps]
    for repeat in range(repeats + 1):
        for name, steps in ready.items():
            for k, (step, arguments) in enumerate(steps):
                begin = time.perf_counter()
                jax.block_until_ready(step(*arguments))
                if repeat:
                    programs[name][k].append(1e3 * (time.perf_counter() - begin))
    medians = {
        name: [statistics.median(times) for times in module_times]
        for name, module_times in programs.items()
    }
    ticks, work = (
        {name: combine(times) for name, times in medians.items()} for combine in (max, sum)
    )
    coded = [name for name in TICKS if name != "identity"]
    return {
        "modules": modules,
        "module_milliseconds": {
            name: [round(t, 2) for t in times] for name, times in medians.items()
        },
        "tick_milliseconds": {name: round(t, 2) for name, t in ticks.items()},
        "share_of_tick": {name: round(1 - ticks["identity"] / ticks[name], 4) for name in coded},
        "share_of_all_work": {name: round(1 - work["identity"] / work[name], 4) for name in coded},
    }


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--cores", type=int, default=1)
    flags.add_argument(
        "--only",
        default="",
        help="side,channels of one hop, or tick; --write then replaces only that part",
    )
    args: argparse.Namespace = flags.parse_args()
    hops = (
        HOPS
        if not args.only
        else []
        if args.only == "tick"
        else [tuple(map(int, args.only.split(",")))]
    )
    rows = []
    for side, channels in hops:
        for size in SIZES:
            rows.append(case(side, channels, *size))
            print(
                rows[-1]["side"], rows[-1]["channels"], *size, rows[-1]["encode_over"], flush=True
            )
    columns = ("encode", "decode", "update", "product", "naive", "torch", "sklearn")
    harness.table(
        ["hop", "N", "D", *columns, "encode over product", "over torch", "over sklearn"],
        [
            [f"{r['channels']} at {r['side']}x{r['side']}", r["codes"], r["dims"]]
            + [
                f"{r['milliseconds'][c]['median']:.3g}" if c in r["milliseconds"] else "not run"
                for c in columns
            ]
            + [
                f"{r['encode_over'].get(c, float('nan')):.3g}"
                for c in ("product", "torch", "sklearn")
            ]
            for r in rows
        ],
    )
    if args.only:
        before = json.loads(Path(__file__).with_name("result.json").read_text())
        others = [r for r in before["cases"] if (r["side"], r["channels"]) not in hops]
        rows, ticks = others + rows, before["ticks"]
    if args.only in ("", "tick"):
        ticks = [shares(k) for k in (2, 3, 6)]
        print(*ticks, sep="\n")
    harness.finish(
        __file__, {"cores": CORES, "limit": LIMIT, "cases": rows, "ticks": ticks}, args.write
    )


if __name__ == "__main__":
    main()
