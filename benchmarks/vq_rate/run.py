"""Reconstruction error against bits per value of every codec, and distance of vq from k-means.

python benchmarks/vq_rate/run.py --data_dir=PATH [--write]

Trains a small network (or reuses a finished one in --workdir), passes all training images once
through every codebook, and measures on activations of test images. The bound is scikit-learn's
KMeans, run to convergence on vectors sampled from the same training images.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from dgl_jax import eval_step, vq
from dgl_jax.codecs import Bf16, Int8, residual
from dgl_jax.config import make_settings
from dgl_jax.configs.claims import asynchronous
from dgl_jax.data import Source, make_source
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
GROUPS = 1  # groups per hop that k-means is run on
VECTORS = 50_000  # vectors per group that k-means is fitted to
Size = tuple[int, int, int]
LIMIT = 1.05  # largest ratio of the mean squared errors of vq and k-means
BATCH = 128


def configured(args: argparse.Namespace) -> ConfigDict:
    """Returns the synchronous row of the claim `asynchronous`, for fewer epochs."""
    config = asynchronous.base(full=False)
    config.data.dir = args.data_dir
    config.train.epochs = args.epochs
    config.eval.every = config.checkpoint.every = 0
    return config


def network(args: argparse.Namespace) -> Trained:
    """Trains a network without a codec, or loads it if it is finished."""
    train_and_evaluate(configured(args), args.workdir)
    return load_trained(Path(args.workdir))


def all_images(args: argparse.Namespace) -> Source:
    """Returns the source of all training images."""
    config = configured(args)
    config.data.train_examples = 0
    settings = make_settings(config)
    return make_source(settings.data, settings.seed)


def activations(trained: Trained, images: np.ndarray) -> list[jax.Array]:
    """Computes the activations that each module sends."""

    @jax.jit
    def forward(images: jax.Array) -> list[jax.Array]:
        x, outputs = trained.spec.task.evaluate(images), []
        for module, state in zip(trained.spec.modules[:-1], trained.restored.state.modules):
            x, _ = eval_step(module, state.params, state.batch_stats, x)
            outputs.append(x)
        return outputs

    return forward(images)


def sample(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the vectors [n, C] of x [B, H, W, C] at some positions of each example."""
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].reshape(-1, x.shape[-1])


def learn(
    trained: Trained, source: Any, sizes: list[Size], **options: Any
) -> dict[Size, list[vq.Codebook]]:
    """Learns the codebooks of every hop in one pass over the training images."""
    key = jax.random.key(0)
    books: dict[Size, list[Any]] = {size: [] for size in sizes}
    update = jax.jit(partial(residual.update, **options))
    for step in range(source.steps_per_epoch):
        for hop, x in enumerate(activations(trained, source.batch(step).inputs)):
            for codes, dims, stages in sizes:
                per_hop = books[codes, dims, stages]
                if step == 0:
                    per_hop.append(
                        jax.jit(partial(residual.init, stages=stages, codes=codes, dims=dims))(
                            key, x
                        )
                    )
                per_hop[hop], _ = update(per_hop[hop], jax.random.fold_in(key, step), x)
    return books


def squares(entries: Any, vectors: np.ndarray) -> np.ndarray:
    """Computes the mean squared error per vector of each group, for vectors [n, C]."""
    decoded = vq.decode(entries, vq.encode(entries, vectors))
    _, groups, _, dims = entries.shape
    return np.square(np.asarray(decoded) - vectors).reshape(-1, groups, dims).sum(-1).mean(0)


def relative(x: np.ndarray, decoded: Any) -> float:
    """Computes the norm of the reconstruction error relative to the norm of x."""
    return float(np.linalg.norm(np.asarray(decoded, np.float32) - x) / np.linalg.norm(x))


def collect(trained: Trained, batches: Any, positions: int) -> list[np.ndarray]:
    """Samples vectors [n, C] of each hop at random positions of the images."""
    random, samples = np.random.default_rng(0), []
    for batch in batches:
        hops = [np.asarray(x) for x in activations(trained, batch)]
        samples.append(
            [sample(x, random.integers(0, x.shape[1] * x.shape[2], positions)) for x in hops]
        )
    return [np.concatenate(batches_of_hop) for batches_of_hop in zip(*samples)]


def bounds(books: Any, train: list[np.ndarray], test: list[np.ndarray]) -> list[dict[str, Any]]:
    """Compares the errors of vq and k-means on held-out vectors."""
    rows = []
    for codes, dims, stages in BOUNDED:
        for hop, (seen, held_out) in enumerate(zip(train, test)):
            vq_errors = squares(books[codes, dims, stages][hop].entries, held_out)
            for group in range(min(GROUPS, seen.shape[1] // dims)):
                part = slice(group * dims, (group + 1) * dims)
                fit = KMeans(codes, n_init=1, max_iter=500, tol=0.0, random_state=0).fit(
                    seen[:VECTORS, part]
                )
                nearest = fit.cluster_centers_[fit.predict(np.ascontiguousarray(held_out[:, part]))]
                bound = float(np.square(nearest - held_out[:, part]).sum(-1).mean())
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
                        "vq": float(vq_errors[group]),
                        "kmeans": bound,
                        "ratio": round(float(vq_errors[group]) / bound, 4),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def rates(books: Any, hops: list[np.ndarray]) -> list[dict[str, Any]]:
    """Measures the bits per value and the relative error of every codec on whole images."""
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
        for (codes, dims, stages), per_hop in books.items():
            entries = per_hop[hop].entries
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
    """Returns codec, N, D and stages of a row."""
    return (row["codec"], *(row.get(key, "") for key in ("codes", "dims", "stages")))


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the relative error against bits per value, with one color per hop."""
    figure = Figure(figsize=(8.6, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for hop, color in enumerate(("#56b4e9", "#0072b2", "#009e73", "#d55e00", "#cc79a7")):
        hop_rows = [row for row in rows if row["hop"] == hop]
        line = sorted(
            (r for r in hop_rows if (r.get("codes"), r.get("stages")) == (256, 1)),
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
            others = [r for r in hop_rows if (r.get("codes"), r.get("stages")) == kind]
            axes.plot(
                [r["bits"] for r in others], [r["error"] for r in others], marker, color=color
            )
        for r in hop_rows:
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
    axes.set_xlabel("bits per value (of 32)")
    axes.set_ylabel("relative reconstruction error on test images")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--data_dir", default="", help="a prepared TFDS directory")
    flags.add_argument("--epochs", type=float, default=6.0)
    flags.add_argument("--workdir", default="runs/vq_rate")
    args = flags.parse_args()
    trained = network(args)
    source = all_images(args)
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
    comparisons = bounds(books, train, test)
    rows = rates(books, whole)
    sizes = [(b["codes"], b["dims"]) for b in comparisons]
    harness.table(
        ["N", "D", *(f"hop {hop}" for hop in range(len(whole))), f"worst, limit {LIMIT}"],
        [
            [codes, dims]
            + [
                max(
                    b["ratio"]
                    for b in comparisons
                    if (b["codes"], b["dims"], b["hop"]) == (codes, dims, hop)
                )
                for hop in range(len(whole))
            ]
            + [max(b["ratio"] for b in comparisons if (b["codes"], b["dims"]) == (codes, dims))]
            for codes, dims in dict.fromkeys(sizes)
        ],
    )
    kinds = dict.fromkeys(map(kind_of, rows))
    by_kind = {kind: [r for r in rows if kind_of(r) == kind] for kind in kinds}
    harness.table(
        [
            "codec",
            "N",
            "D",
            "stages",
            "bits per value",
            *(f"error, hop {hop}" for hop in range(len(whole))),
        ],
        [
            [
                *kind,
                round(by_kind[kind][0]["bits"], 3),
                *(f"{r['error']:.3g}" for r in by_kind[kind]),
            ]
            for kind in kinds
        ],
    )
    settings = {key: getattr(args, key) for key in ("images", "width", "epochs")}
    harness.finish(
        __file__,
        {"settings": settings, "limit": LIMIT, "kmeans": comparisons, "rates": rows},
        args.write,
    )
    if args.write:
        picture(rows, Path(__file__).with_name("rate.png"))


if __name__ == "__main__":
    main()
