"""Runs with diagnostics, and the comparison of a run with and without them."""

import json

import numpy as np
from runs import arrays, records, small_config

# k-means++ draws with weights that are rounded differently in different programs.
VQ = {"codec__name": "vq", "codec__dims": 2, "codec__codes": 4, "codec__start": "sample"}
OURS = ("diagnostics/", "final/")
ASYNCHRONOUS = {
    "engine__name": "simulated",
    "engine__slowdown": (1.0, 2.0),
    "replay__size": 3,
    **VQ,
}


# With other training examples the inputs of module 1 change by less than a test can tell.
EXAMPLES = {"data__validation_fraction": 0.1}


def config(**fields):
    """Returns the small run with probes at steps 0, 4, 8 and 12, where it saves as well."""
    return small_config(
        **EXAMPLES | {"diagnostics__enabled": True, "diagnostics__every": 4} | fields
    )


def others(workdir):
    """Returns the lines of metrics.jsonl without the diagnostics."""
    lines = [
        {key: v for key, v in line.items() if not key.startswith(OURS)} for line in records(workdir)
    ]
    return [line for line in lines if line.keys() - {"step", "epoch"}]


def ours(workdir):
    """Returns the lines of the diagnostics."""
    lines = records(workdir)
    return [line for line in lines if any(key.startswith(OURS) for key in line)]


def measured(workdir):
    """Returns the fields of the summary that do not depend on time or configuration."""
    summary = json.loads((workdir / "summary.json").read_text())
    names = ("modules", "steps", "wire_bytes_per_image", "raw_bytes_per_image", "codebook_share")
    return {name: summary[name] for name in names}


def unchanged(plain, probed):
    """Returns True if two runs have the same states, other metrics and summaries."""
    pairs = zip(arrays(plain), arrays(probed), strict=True)
    return (
        all(np.array_equal(a, b) for a, b in pairs)
        and others(plain) == others(probed)
        and measured(plain) == measured(probed)
    )
