"""Bytes per second into and out of the replay ring, NumPy copies and flashbax's item buffer.

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

TARGET = 0.8  # least ratio to the speed of the plain copy
BATCH = 128
KIB, MIB = 2**10, 2**20
# (bytes per message, slots of the ring, messages added and then sampled per repeat, repeats). The
# second ring has small messages like the first, but does not fit into the cache of a core. Repeats
# are short, so that few of them are interrupted by other processes.
CASES = [
    (64 * KIB, 50, 50, 401),
    (64 * KIB, 4096, 64, 401),
    (2 * MIB, 50, 4, 201),
    (64 * MIB, 3, 1, 41),
]
# The argument is a number of messages; returns the seconds to add them and to sample as many.
Variant = Callable[[int], tuple[float, float]]


def make_message(size: int) -> tuple[np.ndarray, Context]:
    """Returns a float32 payload and a context of labels and ids, `size` bytes in total."""
    width = (size - 2 * 4 * BATCH) // (4 * BATCH)
    numbers = np.arange(BATCH, dtype=np.int32)
    payload = np.random.default_rng(0).random((BATCH, width), np.float32)
    assert payload.nbytes + 2 * numbers.nbytes == size
    return payload, {"label": numbers, "id": numbers + 1}


def timed(add: Callable[[int], Any], sample: Callable[[int], Any]) -> Variant:
    """Returns a variant that times `add(n)` and then `sample(n)`."""

    def run(count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        add(count)
        middle = time.perf_counter()
        sample(count)
        return middle - begin, time.perf_counter() - middle

    return run


def ring_variant(payload: np.ndarray, context: Context, size: int) -> Variant:
    """Returns `Ring.add` and `Ring.sample` with the default rule, which reads newest first."""
    ring, header = Ring((payload, context), size), Header(0, 0)

    def add(count: int) -> None:
        for _ in range(count):
            ring.add(payload, context, header)

    def sample(count: int) -> None:
        for _ in range(count):
            message = ring.sample()
        assert message

    return timed(add, sample)


def numpy_variant(arrays: list[np.ndarray], size: int, reuse: bool = False) -> Variant:
    """Returns handwritten copies into preallocated slots and out, in the order of the ring.

    Args:
      arrays: arrays of a message; one, or three that are copied separately.
      size: number of slots.
      reuse: samples into the same output array instead of a new one; for one array only.
    """
    rings = [np.full((size, *array.shape), 0, array.dtype) for array in arrays]
    ring, array, out, written = rings[0], arrays[0], arrays[0].copy(), 0

    def add_one(count: int) -> None:
        nonlocal written
        for n in range(written, written + count):
            ring[n % size] = array
        written += count

    def sample_one(count: int) -> None:
        for n in range(written - 1, written - 1 - count, -1):
            copied = ring[n % size].copy()
        assert copied.nbytes

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
            copied = ring1[slot].copy(), ring2[slot].copy(), ring3[slot].copy()
        assert copied

    return timed(add, sample)


def flashbax_variant(payload: np.ndarray, context: Context, size: int) -> Variant:
    """Returns flashbax's item buffer, jitted, with donated state and uniform sampling.

    Its messages are JAX arrays from the start, so nothing is copied from NumPy.
    """
    import flashbax

    buffer = flashbax.make_item_buffer(max_length=size, min_length=1, sample_batch_size=1)
    # Copy: on the CPU a JAX array may share the memory of a NumPy array.
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
            sampled = jax.block_until_ready(sample_jit(state, keys[n]))
        assert sampled.experience

    return timed(add, sample)


def case(size: int, slots: int, count: int, repeats: int) -> dict[str, Any]:
    """Measures all variants on messages of one size, interleaved."""
    payload, context = make_message(size)
    flat = np.concatenate([array.view(np.uint8).ravel() for array in (payload, *context.values())])
    variants = {
        "ring": ring_variant(payload, context, slots),
        "numpy": numpy_variant([flat], slots),
        "numpy, array by array": numpy_variant([payload, *context.values()], slots),
        "numpy, output reused": numpy_variant([flat], slots, reuse=True),
    }
    if importlib.util.find_spec("flashbax"):
        variants["flashbax"] = flashbax_variant(payload, context, slots)
    for run in variants.values():
        for _ in range(-(-slots // count) + 1):  # compiles and fills the ring
            run(count)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(repeats):
        order.append(order.pop(0))  # another variant comes first in each repeat
        for name in order:
            spent[name].append(variants[name](count))
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in spent.items()}

    def rates(pairs: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
        moved = 1e-9 * size * count
        return {
            "both": harness.quartiles([2 * moved / (a + b) for a, b in pairs]),
            "add": harness.quartiles([moved / a for a, _ in pairs]),
            "sample": harness.quartiles([moved / b for _, b in pairs]),
        }

    return {
        "message_bytes": size,
        "slots": slots,
        "messages_per_repeat": count,
        "repeats": repeats,
        "gigabytes_per_second": {name: rates(pairs) for name, pairs in spent.items()},
        "ring_over": {
            name: harness.quartiles(harness.ratios(totals[name], totals["ring"]))
            for name in variants
            if name != "ring"
        },
        "microseconds_per_message_beyond_numpy": harness.quartiles(
            [1e6 * (a - b) / count for a, b in zip(totals["ring"], totals["numpy"], strict=True)]
        ),
    }


def shown(rates: dict[str, dict[str, float]]) -> str:
    """Formats the rates of a variant as "both (add, sample)"."""
    return "{:.2f} ({:.2f}, {:.2f})".format(
        *(rates[part]["median"] for part in ("both", "add", "sample"))
    )


def main() -> None:
    """Measures all cases and prints the table; `--write` stores the result beside this file."""
    args = harness.parser(__doc__).parse_args()
    results = [case(*arguments) for arguments in CASES]
    columns = ["ring", "numpy", "numpy, array by array", "numpy, output reused", "flashbax"]
    rows = []
    for result in results:
        size = result["message_bytes"]
        name = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        rate = result["gigabytes_per_second"]
        over = result["ring_over"]
        verdict = "yes" if over["numpy"]["median"] >= TARGET else "NO"
        cells = [shown(rate[column]) if column in rate else "not installed" for column in columns]
        rows.append(
            [
                name,
                result["slots"],
                *cells,
                harness.shown(over["numpy"]),
                f"{over['numpy, array by array']['median']:.3g}",
                verdict,
            ]
        )
    harness.table(
        [
            "message",
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
