"""Memory of the replay rings of the full-width network with each codec, measured on filled rings.

python benchmarks/vq_memory/run.py [--write]

Uses the network of the authors' asynchronous experiments at full width, with batch size 128 and 50
messages per ring. Rings that fit into memory are filled; the others hold fewer messages, and
their memory is extrapolated.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax.engines import ring_specs
from dgl_jax.replay import Ring
from dgl_jax.run.build import DatasetInfo, choose_cuts, make_spec
from dgl_jax.run.parts import make_blocks
from dgl_jax.types import Header

MESSAGES, BATCH = 50, 128
GIB = 2**30
# (name, fields, number of messages that the measured ring holds).
CODECS: list[tuple[str, dict[str, Any], int]] = [
    ("identity", {}, 5),
    ("bf16", {}, 10),
    ("int8", {}, 20),
    ("vq", {"dims": 2}, 50),
    ("vq", {"dims": 4}, 50),
    ("vq", {"dims": 8}, 50),
    ("vq", {"dims": 16}, 50),
]


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def filled(name: str, fields: dict[str, Any], held: int) -> dict[str, Any]:
    """Fills every ring with `held` messages of one codec and measures the memory."""
    options = {f"codec__{field}": value for field, value in fields.items()}
    settings = harness.settings(
        model__name="cnn6_replay",
        model__width=128,
        model__modules=6,
        model__head="mlp",
        codec__name=name,
        data__batch_size=BATCH,
        **options,
    )
    info = DatasetInfo("cifar10", tuple(map(str, range(10))), (32, 32, 3), (0.5,) * 3, (0.25,) * 3)
    spec = make_spec(settings, info, choose_cuts(settings, make_blocks(settings, info)))
    forms, rings = ring_specs(spec), []
    context = {"label": np.zeros(BATCH, np.int32), "id": np.arange(BATCH, dtype=np.int32)}
    gc.collect()
    before = resident()
    for form, hop in zip(forms, spec.hops, strict=True):
        ring = Ring(form.message, held, codebook=form.codebook)
        random = np.random.default_rng(0)
        x = jnp.asarray(np.maximum(random.standard_normal(hop.activations.shape, np.float32), 0))
        codebook = jax.tree.map(
            lambda leaf, random=random: random.standard_normal(leaf.shape, np.float32), hop.codebook
        )
        payload = jax.tree.map(np.asarray, jax.jit(spec.codec.encode)(codebook, x))
        # Every slot is written twice, so that the ring holds as many codebooks as it ever will.
        for n in range(2 * held):
            due = hop.period and n % hop.period == 0
            published = jax.tree.map(np.copy, codebook) if due else None
            ring.add(payload, context, Header(n, n), published)
        del x, payload
        rings.append(ring)
    gc.collect()
    grown, counted = resident() - before, sum(ring.nbytes for ring in rings)
    planned = sum(form.nbytes(MESSAGES) for form in forms)
    factor = MESSAGES / held
    return {
        "codec": name,
        "fields": fields,
        "messages_held": held,
        "ring_gib": round(factor * counted / GIB, 3),
        "resident_gib": round(factor * grown / GIB, 3),
        "planned_gib": round(planned / GIB, 3),
    }


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    rows = [filled(*arguments) for arguments in CODECS]
    plain = rows[0]["ring_gib"]
    for row in rows:
        row["smaller"] = round(plain / row["ring_gib"], 2)
    harness.table(
        [
            "codec",
            "D",
            "messages held",
            "rings, GiB at 50",
            "growth of the process, GiB at 50",
            "predicted, GiB",
            "times smaller",
        ],
        [
            [
                r["codec"],
                r["fields"].get("dims", ""),
                *(
                    r[key]
                    for key in (
                        "messages_held",
                        "ring_gib",
                        "resident_gib",
                        "planned_gib",
                        "smaller",
                    )
                ),
            ]
            for r in rows
        ],
    )
    harness.finish(__file__, {"messages": MESSAGES, "batch": BATCH, "rows": rows}, args.write)


if __name__ == "__main__":
    main()
