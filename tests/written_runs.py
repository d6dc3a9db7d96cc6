"""Folders of runs written by hand, as training would write them, without training."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from runs import small_config

from dgl_jax.config import make_settings


def write_run(
    folder: Path,
    accuracies: list[float] | None = None,
    ensemble: float | None = None,
    steps: int = 6,
    summary: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """Writes the files of a run of two modules.

    Args:
      folder: workdir of the run.
      accuracies: test accuracy of each module; None for an unfinished run.
      ensemble: test accuracy of the ensemble.
      steps: steps in metrics.jsonl; twelve are the whole run. Validation accuracy of module k is
        (step + k) / 20 at every third step, and the training loss of module k is 1 / step + k.
      summary: changes to the summary.
      **fields: fields of the configuration, with `__` in place of the dot.

    Returns:
      The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = make_settings(small_config(**fields))
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / 6, "time": 0.0}
        line |= {f"train/module_{k}/loss": 1 / step + k for k in (0, 1)}
        line |= {f"train/module_{k}/accuracy": (step + k) / 25 for k in (0, 1)}
        if step % 3 == 0:
            line |= {f"validation/module_{k}/accuracy": (step + k) / 20 for k in (0, 1)}
            line |= {f"validation/module_{k}/loss": 2 / step + k for k in (0, 1)}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if accuracies is not None:
        content = {
            "engine": settings.engine.name,
            "method": settings.method.name,
            "seed": settings.seed,
            "steps": 12,
            "epochs": 2.0,
            "modules": [
                {"name": f"module_{k}", "updates": 12, "test_accuracy": accuracy}
                for k, accuracy in enumerate(accuracies)
            ],
            "ensemble_accuracy": ensemble,
            "images_per_second": 100.0,
            "wire_bytes_per_image": [2048.0],
            "cpu_threads": 16,
            "peak_memory_bytes": None,
            "peak_host_bytes": 3 * 2**20,
        }
        (folder / "summary.json").write_text(json.dumps(content | (summary or {})))
    return folder


def store_run(folder: Path, config: ConfigDict, **summary) -> None:
    """Writes the files of a run; its summary only if there are fields of it."""
    settings = make_settings(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    (folder / "checkpoints" / "4").mkdir(parents=True)
    (folder / "checkpoints" / "4" / "item").write_bytes(b"x" * 1000)
    if summary:
        values = {
            "engine": "fused",
            "method": "dgl",
            "config_hash": settings.hash(),
            "seed": 0,
            "epochs": 2.0,
            "steps": 12,
            "modules": [{"updates": 12, "test_accuracy": 0.5}],
            "ensemble_accuracy": 0.75,
            "images_per_second": 1.0,
            "wire_bytes_per_image": [],
            "raw_bytes_per_image": [],
            "wire": "simulated",
            "codebook_share": [],
            "codec_error": [],
            "wall_seconds": 24.0,
            "dataset": "synthetic",
            "versions": {},
        }
        (folder / "summary.json").write_text(json.dumps(values | summary))
