"""Reconstruction error against bits a value of every codec, on activations of a trained network; and how far vq is from k-means.

python benchmarks/vq_rate/run.py --data_dir=PATH [--write]

Trains a small network (a finished one in --workdir is taken as it is), passes all training images once through every codebook, and
measures on test images. The bound is scikit-learn's KMeans, run to convergence on vectors sampled from the same images.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness
import small_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgl_jax import eval_step, vq
from dgl_jax.codecs import Bf16, Int8, residual
from dgl_jax.run.restore import Trained, load_trained
from dgl_jax.train import train_and_evaluate

SIZES = [
    (256, 2, 1),
    (256, 4, 1),
    (256, 8, 1),
    (256, 16, 1),
    (16, 4, 1),
    (16, 8, 1),
    (256, 16, 2),
]  # (codes, dims, stages)
BOUNDED = [(256, 4, 1), (256, 8, 1), (256, 16, 1), (16, 8, 1)]
GROUPS = 1  # of each hop that k-means is run on
VECTORS = 50_000  # that k-means sees of a group
Size = tuple[int, int, int]
LIMIT = 1.05  # mean squared error of vq over that of k-means
BATCH = 128


def network(args: argparse.Namespace) -> Trained:
    """Trained without a codec."""
    config = small_runs.config(args, seed=0)
    config.checkpoint.every = 0
    train_and_evaluate(config, args.workdir)
    return load_trained(Path(args.workdir))


def activations(trained: Trained, images: np.ndarray) -> list[jax.Array]:
    """What each module hands on."""

    @jax.jit
    def forward(images: jax.Array) -> list[jax.Array]:
        x, found = trained.spec.task.evaluate(images), []
        for module, state in zip(trained.spec.modules[:-1], trained.restored.state.modules):
            x, _ = eval_step(module, state.params, state.batch_stats, x)
            found.append(x)
        return found

    return forward(images)


def sample(x: np.ndarray, a_position: np.ndarray) -> np.ndarray:
    """[B, H, W, C] -> vectors at so many positions of each example."""
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, a_position].reshape(-1, x.shape[-1])


def learn(
    trained: Trained, source: Any, sizes: list[Size], **how: Any
) -> dict[Size, list[vq.Codebook]]:
    """Codebooks of every hop after one pass over the training images."""
    key = jax.random.key(0)
    books: dict[Size, list[Any]] = {size: [] for size in sizes}
    update = jax.jit(partial(residual.update, **how))
    for step in range(source.steps_per_epoch):
        for hop, x in enumerate(activations(trained, source.batch(step).inputs)):
            for codes, dims, stages in sizes:
                found = books[codes, dims, stages]
                if step == 0:
                    found.append(
                        jax.jit(partial(residual.init, stages=stages, codes=codes, dims=dims))(
                            key, x
                        )
                    )
                found[hop], _ = update(found[hop], jax.random.fold_in(key, step), x)
    return books


def squares(entries: Any, vectors: np.ndarray) -> np.ndarray:
    """Mean squared error of each group's vectors [n, C], a vector."""
    decoded = vq.decode(entries, vq.encode(entries, vectors))
    _, groups, _, dims = entries.shape
    return np.square(np.asarray(decoded) - vectors).reshape(-1, groups, dims).sum(-1).mean(0)


def relative(x: np.ndarray, decoded: Any) -> float:
    return float(np.linalg.norm(np.asarray(decoded, np.float32) - x) / np.linalg.norm(x))


def collect(trained: Trained, batches: Any, positions: int) -> list[np.ndarray]:
    """Vectors [n, C] of each hop at random positions of the images."""
    random, found = np.random.default_rng(0), []
    for batch in batches:
        hops = [np.asarray(x) for x in activations(trained, batch)]
        found.append(
            [sample(x, random.integers(0, x.shape[1] * x.shape[2], positions)) for x in hops]
        )
    return [np.concatenate(of_hop) for of_hop in zip(*found)]


def bounds(books: Any, train: list[np.ndarray], test: list[np.ndarray]) -> list[dict[str, Any]]:
    """Error of vq over that of k-means, on held-out vectors."""
    rows = []
    for codes, dims, stages in BOUNDED:
        for hop, (seen, held_out) in enumerate(zip(train, test)):
            ours = squares(books[codes, dims, stages][hop].entries, held_out)
            for group in range(min(GROUPS, seen.shape[1] // dims)):
                part = slice(group * dims, (group + 1) * dims)
                fit = KMeans(codes, n_init=1, max_iter=500, tol=0.0, random_state=0).fit(
                    seen[:VECTORS, part]
                )
                nearest = fit.cluster_centers_[fit.predict(np.ascontiguousarray(held_out[:, part]))]
                theirs = float(np.square(nearest - held_out[:, part]).sum(-1).mean())
                row = {
                    "codes": codes,
                    "dims": dims,
                    "hop": hop,
                    "group": group,
                    "iterations": int(fit.n_iter_),
                }
                rows.append(
                    row
                    | {
                        "vq": float(ours[group]),
                        "kmeans": theirs,
                        "ratio": round(float(ours[group]) / theirs, 4),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def rates(books: Any, hops: list[np.ndarray]) -> list[dict[str, Any]]:
    """Bits a value and relative error of every codec on whole images."""
    rows = []
    for hop, x in enumerate(hops):
        for name, codec in (("bf16", Bf16()), ("int8", Int8(8))):
            payload = codec.encode((), jnp.asarray(x))
            bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(payload)) / x.size
            rows.append(
                {
                    "codec": name,
                    "hop": hop,
                    "bits": bits,
                    "error": relative(x, codec.decode((), payload)),
                }
            )
        for (codes, dims, stages), found in books.items():
            entries = found[hop].entries
            payload = vq.encode(entries, x)
            row = {
                "codec": "vq",
                "codes": codes,
                "dims": dims,
                "stages": stages,
                "hop": hop,
                "bits": 8 * payload.nbytes / x.size,
            }
            rows.append(row | {"error": relative(x, vq.decode(entries, payload))})
    return rows


def kind_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Codec, N, D and stages of a row."""
    return (row["codec"], *(row.get(key, "") for key in ("codes", "dims", "stages")))


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8.6, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for hop, color in enumerate(("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")):
        of_hop = [row for row in rows if row["hop"] == hop]
        line = sorted(
            (r for r in of_hop if (r.get("codes"), r.get("stages")) == (256, 1)),
            key=lambda r: r["bits"],
        )
        axes.plot(
            [r["bits"] for r in line],
            [r["error"] for r in line],
            "o-",
            color=color,
            label=f"vq, N = 256, after module {hop}",
        )
        for marker, kind in (("^", (16, 1)), ("*", (256, 2))):
            others = [r for r in of_hop if (r.get("codes"), r.get("stages")) == kind]
            axes.plot(
                [r["bits"] for r in others], [r["error"] for r in others], marker, color=color
            )
        for r in of_hop:
            if r["codec"] != "vq":
                axes.plot(r["bits"], r["error"], "s" if r["codec"] == "int8" else "D", color=color)
    for text, x, y in (
        ("int8", 8.6, 6e-3),
        ("bf16", 16.5, 2.2e-3),
        ("triangles: N = 16\nstars: two stages", 0.55, 0.06),
    ):
        axes.annotate(text, (x, y), fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes.set_xlabel("bits a value (of 32)")
    axes.set_ylabel("relative reconstruction error on test images")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    flags = harness.parser(__doc__)
    small_runs.add_flags(flags, "runs/vq_rate")
    flags.set_defaults(epochs=6.0)
    args = flags.parse_args()
    trained = network(args)
    source = small_runs.source(argparse.Namespace(**vars(args) | {"images": 0}))  # 0: all there are
    seen = source.steps_per_epoch * source.batch(0).inputs.shape[0]
    train = collect(
        trained,
        (source.batch(n).inputs for n in range(source.steps_per_epoch)),
        1 + VECTORS // seen,
    )
    tests = [batch.inputs for batch in source.evaluation("test")][:15]
    test = collect(trained, tests, 20)
    books = learn(trained, source, SIZES)
    whole = [np.asarray(x) for x in activations(trained, tests[0])]
    against = bounds(books, train, test)
    rows = rates(books, whole)
    sizes = [(b["codes"], b["dims"]) for b in against]
    harness.table(
        ["N", "D", *(f"hop {hop}" for hop in range(len(whole))), f"worst, limit {LIMIT}"],
        [
            [codes, dims]
            + [
                max(
                    b["ratio"]
                    for b in against
                    if (b["codes"], b["dims"], b["hop"]) == (codes, dims, hop)
                )
                for hop in range(len(whole))
            ]
            + [max(b["ratio"] for b in against if (b["codes"], b["dims"]) == (codes, dims))]
            for codes, dims in dict.fromkeys(sizes)
        ],
    )
    kinds = dict.fromkeys(map(kind_of, rows))
    of_kind = {kind: [r for r in rows if kind_of(r) == kind] for kind in kinds}
    harness.table(
        [
            "codec",
            "N",
            "D",
            "stages",
            "bits a value",
            *(f"error, hop {hop}" for hop in range(len(whole))),
        ],
        [
            [
                *kind,
                round(of_kind[kind][0]["bits"], 3),
                *(f"{r['error']:.3g}" for r in of_kind[kind]),
            ]
            for kind in kinds
        ],
    )
    settings = {key: getattr(args, key) for key in ("images", "width", "epochs")}
    harness.finish(
        __file__,
        {"settings": settings, "limit": LIMIT, "kmeans": against, "rates": rows},
        args.write,
    )
    if args.write:
        picture(rows, Path(__file__).with_name("rate.png"))


if __name__ == "__main__":
    main()
