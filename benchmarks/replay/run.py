"""How many bytes a second go into the replay ring and out again, beside NumPy copies by hand and flashbax's item buffer.

python benchmarks/replay/run.py [--write]
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness

from dgl_jax import system
from dgl_jax.replay import Ring
from dgl_jax.types import Context, Header

TARGET = 0.8  # of the plain copy
BATCH = 128
KIB, MIB = 2**10, 2**20
# (bytes of a packet, packets of the ring, packets added and then sampled in a repeat, repeats). The second ring is as large as the
# others but does not fit into a core's cache. Repeats are short: few of them lose their core to something else in the middle.
CASES = [
    (64 * KIB, 50, 50, 401),
    (64 * KIB, 4096, 64, 401),
    (2 * MIB, 50, 4, 201),
    (64 * MIB, 3, 1, 41),
]
Way = Callable[
    [int], tuple[float, float]
]  # packets -> (seconds of adding them, seconds of sampling as many)


def packet(size: int) -> tuple[np.ndarray, Context]:
    """Float32 payload, label and id of a batch: `size` bytes in all."""
    width = (size - 2 * 4 * BATCH) // (4 * BATCH)
    numbers = np.arange(BATCH, dtype=np.int32)
    payload = np.random.default_rng(0).random((BATCH, width), np.float32)
    assert payload.nbytes + 2 * numbers.nbytes == size
    return payload, {"label": numbers, "id": numbers + 1}


def timed(add: Callable[[int], Any], sample: Callable[[int], Any]) -> Way:
    """A way of `add(n)` and `sample(n)`: n packets in, then the same n out."""

    def go(count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        add(count)
        middle = time.perf_counter()
        sample(count)
        return middle - begin, time.perf_counter() - middle

    return go


def ring_way(payload: np.ndarray, context: Context, size: int) -> Way:
    """`Ring.add` and `Ring.sample` with the default rule, which reads the packets of a block newest first."""
    ring, header = Ring((payload, context), size), Header(0, 0)

    def add(count: int) -> None:
        for _ in range(count):
            ring.add(payload, context, header)

    def sample(count: int) -> None:
        for _ in range(count):
            found = ring.sample()
        assert found

    return timed(add, sample)


def numpy_way(arrays: list[np.ndarray], size: int, reuse: bool = False) -> Way:
    """What one writes by hand: into slots taken before, and copied out in the order in which the ring reads."""
    rings = [np.full((size, *array.shape), 0, array.dtype) for array in arrays]
    ring, array, out, written = rings[0], arrays[0], arrays[0].copy(), 0

    def add_one(count: int) -> None:
        nonlocal written
        for n in range(written, written + count):
            ring[n % size] = array
        written += count

    def sample_one(count: int) -> None:
        for n in range(written - 1, written - 1 - count, -1):
            found = ring[n % size].copy()
        assert found.nbytes

    def sample_into(count: int) -> None:
        for n in range(written - 1, written - 1 - count, -1):
            np.copyto(out, ring[n % size])

    if len(arrays) == 1:
        return timed(add_one, sample_into if reuse else sample_one)
    (ring1, ring2, ring3), (array1, array2, array3) = rings, arrays

    def add(count: int) -> None:
        nonlocal written
        for n in range(written, written + count):
            slot = n % size
            ring1[slot], ring2[slot], ring3[slot] = array1, array2, array3
        written += count

    def sample(count: int) -> None:
        for n in range(written - 1, written - 1 - count, -1):
            slot = n % size
            found = ring1[slot].copy(), ring2[slot].copy(), ring3[slot].copy()
        assert found

    return timed(add, sample)


def flashbax_way(payload: np.ndarray, context: Context, size: int) -> Way:
    """flashbax's item buffer, jitted, its state donated; packets are JAX arrays already, the choice is uniform."""
    import flashbax

    buffer = flashbax.make_item_buffer(max_length=size, min_length=1, sample_batch_size=1)
    # Copies: on the CPU a JAX array may be a view of a NumPy one.
    item = jax.block_until_ready(
        jax.tree.map(lambda x: jax.numpy.array(x, copy=True), (payload, context))
    )
    add_jit, sample_jit = jax.jit(buffer.add, donate_argnums=0), jax.jit(buffer.sample)
    state = buffer.init(item)
    keys = list(jax.random.split(jax.random.key(0), 1024))

    def add(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state = add_jit(state, item)
        jax.block_until_ready(state)

    def sample(count: int) -> None:
        for n in range(count):
            found = jax.block_until_ready(sample_jit(state, keys[n]))
        assert found.experience

    return timed(add, sample)


def case(size: int, slots: int, count: int, repeats: int) -> dict[str, Any]:
    """All ways on packets of one size, interleaved."""
    payload, context = packet(size)
    flat = np.concatenate([array.view(np.uint8).ravel() for array in (payload, *context.values())])
    ways = {
        "ring": ring_way(payload, context, slots),
        "numpy": numpy_way([flat], slots),
        "numpy, array by array": numpy_way([payload, *context.values()], slots),
        "numpy, output reused": numpy_way([flat], slots, reuse=True),
    }
    if importlib.util.find_spec("flashbax"):
        ways["flashbax"] = flashbax_way(payload, context, slots)
    for go in ways.values():
        for _ in range(-(-slots // count) + 1):  # compiles, fills the ring
            go(count)
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    order = list(ways)
    for _ in range(repeats):
        order.append(order.pop(0))  # none always comes after the same other
        for way in order:
            spent[way].append(ways[way](count))
    totals = {way: [sum(pair) for pair in pairs] for way, pairs in spent.items()}

    def rates(pairs: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
        moved = 1e-9 * size * count
        return {
            "both": harness.quartiles([2 * moved / (a + b) for a, b in pairs]),
            "add": harness.quartiles([moved / a for a, _ in pairs]),
            "sample": harness.quartiles([moved / b for _, b in pairs]),
        }

    return {
        "packet_bytes": size,
        "slots": slots,
        "packets_a_repeat": count,
        "repeats": repeats,
        "gigabytes_per_second": {way: rates(pairs) for way, pairs in spent.items()},
        "ring_over": {
            way: harness.quartiles(harness.ratios(totals[way], totals["ring"]))
            for way in ways
            if way != "ring"
        },
        "microseconds_a_packet_beyond_numpy": harness.quartiles(
            [1e6 * (a - b) / count for a, b in zip(totals["ring"], totals["numpy"], strict=True)]
        ),
    }


def shown(rates: dict[str, dict[str, float]]) -> str:
    """Of a way's rates: both (add, sample)."""
    return "{:.2f} ({:.2f}, {:.2f})".format(
        *(rates[part]["median"] for part in ("both", "add", "sample"))
    )


def main() -> None:
    """Prints the table; `--write` keeps the result beside this file."""
    args = harness.parser(__doc__).parse_args()
    results = [case(*one) for one in CASES]
    columns = ["ring", "numpy", "numpy, array by array", "numpy, output reused", "flashbax"]
    rows = []
    for found in results:
        size = found["packet_bytes"]
        name = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        rate = found["gigabytes_per_second"]
        over = found["ring_over"]
        verdict = "yes" if over["numpy"]["median"] >= TARGET else "NO"
        cells = [shown(rate[way]) if way in rate else "not installed" for way in columns]
        rows.append(
            [
                name,
                found["slots"],
                *cells,
                harness.shown(over["numpy"]),
                f"{over['numpy, array by array']['median']:.3g}",
                verdict,
            ]
        )
    harness.table(
        [
            "packet",
            "slots",
            *columns,
            "ring over numpy",
            "over array by array",
            f"at least {TARGET}",
        ],
        rows,
    )
    other = {"flashbax": version("flashbax")} if importlib.util.find_spec("flashbax") else {}
    peak = system.process_peak()
    peak_mib = peak and round(peak / 2**20)
    harness.finish(
        __file__,
        {"target": TARGET, "versions": other, "peak_memory_mib": peak_mib, "rows": results},
        args.write,
    )


if __name__ == "__main__":
    main()
