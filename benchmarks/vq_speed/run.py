"""Time to encode, decode and update, beside the bare distance matrix product and two other libraries; and its share of a tick.

python benchmarks/vq_speed/run.py [--cores=1] [--write]

`pip install torch vector-quantize-pytorch` adds the second library's columns; without it they say so.
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
os.sched_setaffinity(
    0, set(sorted(os.sched_getaffinity(0))[:CORES])
)  # before any library counts its threads

import harness  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from sklearn.cluster import MiniBatchKMeans  # noqa: E402

from dgl_jax import vq  # noqa: E402
from dgl_jax.engines.placement import put  # noqa: E402
from dgl_jax.run.build import make_experiment  # noqa: E402
from dgl_jax.types import Inbox  # noqa: E402

LIMIT = 2.0  # encode over the bare matrix product
HOPS = [
    (32, 32),
    (16, 64),
    (8, 128),
    (32, 128),
    (16, 256),
    (8, 512),
]  # (side, channels) of the 6-layer CNN at width 32 and 128
SIZES = [(256, 4), (256, 8), (256, 16), (16, 4), (16, 8), (16, 16)]  # (codes, dims)
TICKS = {
    "identity": {},
    "N 256, D 8": {"codec__name": "vq"},
    "N 16, D 4": {"codec__name": "vq", "codec__codes": 16, "codec__dims": 4},
}
BATCH = 128
MOST = 3e9  # bytes of all distances, above which the ways that hold several copies of them are left out


def distances(entries: jax.Array, x: jax.Array) -> jax.Array:
    """What a matrix product of that size costs, and nothing else."""
    vectors = x.reshape(-1, entries.shape[0], entries.shape[2])
    return jnp.einsum("gnd,bgd->gnb", entries, vectors, precision=jax.lax.Precision.HIGHEST)


def argmin(entries: jax.Array, x: jax.Array) -> jax.Array:
    """The naive way: the smallest of all distances, from a tensor that holds them."""
    return jnp.argmin(jnp.square(entries).sum(-1)[..., None] - 2 * distances(entries, x), axis=1)


def torch_way(entries: np.ndarray, x: np.ndarray) -> Callable[[], Any] | None:
    """vector-quantize-pytorch with a head a group, in evaluation mode."""
    if not importlib.util.find_spec("vector_quantize_pytorch"):
        return None
    import torch
    from vector_quantize_pytorch import VectorQuantize

    torch.set_num_threads(CORES)
    groups, codes, dims = entries.shape
    # Its inputs are [batch, positions, channels], channels cut into heads.
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


def sklearn_way(entries: np.ndarray, x: np.ndarray) -> Callable[[], Any]:
    """A model a group."""
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
    """All ways on one packet, interleaved."""
    random = np.random.default_rng(0)
    x = np.maximum(random.normal(size=(BATCH, side, side, channels)), 0).astype(
        np.float32
    )  # as after a ReLU
    key, there = jax.random.key(0), jnp.asarray(x)
    book = jax.jit(partial(vq.init, codes=codes, dims=dims))(key, there)
    for _ in range(3):
        book, _ = vq.update(book, key, there)
    encode, decode, update, product, naive = map(
        jax.jit, (vq.encode, vq.decode, vq.update, distances, argmin)
    )
    sent, entries = encode(book.entries, there), np.asarray(book.entries)
    all_distances = 4 * codes * x.size // dims
    ways: dict[str, Callable[[], Any] | None] = {
        "encode": lambda: encode(book.entries, there),
        "decode": lambda: decode(book.entries, sent),
        "update": lambda: update(book, key, there),
        "product": lambda: product(book.entries, there),
        "naive": None if all_distances > MOST else lambda: naive(book.entries, there),
        "torch": None if all_distances > MOST else torch_way(entries, x),
        "sklearn": sklearn_way(entries, x),
    }
    right = np.asarray(vq._unpack(sent, codes, channels // dims)).reshape(-1, channels // dims)
    theirs = np.stack(ways["sklearn"](), -1)  # type: ignore[misc]
    agree = {"sklearn": float((theirs == right).mean())}
    if ways["torch"]:
        agree["torch"] = float((ways["torch"]().numpy().reshape(right.shape) == right).mean())
    repeats = 2 if x.nbytes > 2**25 else 5
    spent: dict[str, list[float]] = {name: [] for name, way in ways.items() if way}
    for repeat in range(repeats + 1):
        for name in spent:
            # What takes seconds is called once, and needs no warm-up beside that.
            if name in ("naive", "torch", "sklearn") and x.nbytes >= 2**22 and repeat != 1:
                continue
            begin = time.perf_counter()
            jax.block_until_ready(ways[name]())  # type: ignore[misc]
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
    """What coding adds to each module's program and to the slowest one, which is the tick of a pipeline: 6-layer CNN, width 32."""
    programs: dict[str, list[list[float]]] = {}
    ready = {}
    for name, codec in TICKS.items():
        settings = harness.settings(
            data__name="synthetic", data__image_size=32, data__augment="crop_flip", model__name="cnn6", model__width=32,
            model__modules=modules, **codec,
        )  # fmt: skip
        made = make_experiment(settings)
        states, batch = made.spec.init(), made.engine.placement.put_batch(made.source.batch(0), 0)
        incoming, steps = batch, []
        for k, state in enumerate(states):
            step = jax.jit(made.spec.method.program(made.spec, k))
            arguments = (
                put(state, made.engine.placement.replicated(0)),
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
        name: [statistics.median(times) for times in of_modules]
        for name, of_modules in programs.items()
    }
    ticks, work = ({name: of(times) for name, times in medians.items()} for of in (max, sum))
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
        help="side,channels of one hop, or tick; with --write it replaces what result.json has",
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
    for hop in hops:
        for size in SIZES:
            rows.append(case(*hop, *size))
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
        rows, of_tick = others + rows, before["ticks"]
    if args.only in ("", "tick"):
        of_tick = [shares(k) for k in (2, 3, 6)]
        print(*of_tick, sep="\n")
    harness.finish(
        __file__, {"cores": CORES, "limit": LIMIT, "cases": rows, "ticks": of_tick}, args.write
    )


if __name__ == "__main__":
    main()
