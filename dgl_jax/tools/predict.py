"""Class predictions for images, from files (`--mode=predict`) or from arrays."""

import csv
import glob
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dgl_jax.config.registry import DATA_SETS, TASKS
from dgl_jax.data.decode import decode_images, image_kinds
from dgl_jax.data.folder import SUFFIXES, is_image, kind_of_file, log_ignored, log_lost
from dgl_jax.errors import UserError
from dgl_jax.run.evaluator import Evaluator
from dgl_jax.run.metrics import read
from dgl_jax.run.restore import Trained, load_trained, read_settings
from dgl_jax.run.writers import check_writable, write_stdout, write_text, writing
from dgl_jax.types import PADDING, Batch


def predict_probabilities(
    trained: Trained, images: UInt8[np.ndarray, "N H W C"]
) -> tuple[Float[np.ndarray, "N classes"], Float[np.ndarray, "N classes"]]:
    """Computes class probabilities with the last module's head and with the ensemble of all heads.

    Args:
      trained: a network restored by `load_trained`.
      images: uint8 images (0 to 255) of the size the network was trained on, [N, H, W, C].

    Returns:
      Probabilities of the last module's head and of the ensemble, in which the head of module k has
      a weight proportional to 2^k; both float32, [N, classes].
    """
    evaluator = Evaluator(trained.spec, trained.placement, trained.settings.eval.codec)
    results = []
    for batch, real in _batches(images, trained.spec.batch_size, trained.info.example_dtype):
        heads, ensemble, _ = evaluator.answers(trained.restored.state.modules, batch)
        results.append([part[:real] for part in read((heads[-1], ensemble))])
    last_head, ensembles = zip(*results)
    return np.concatenate(last_head), np.concatenate(ensembles)


def predict_run(
    workdir: str | Path, checkpoint: str, patterns: Sequence[str], output: str | Path | None
) -> None:
    """Writes one row per image with the labels and probabilities of last head and ensemble.

    Args:
      workdir: folder of a trained run.
      checkpoint: `newest`, `best` or a step.
      patterns: image files, folders (searched recursively) or glob patterns.
      output: a .csv or .jsonl file; None writes CSV to standard output.

    Raises:
      UserError: if the run's task does not use images, no image is found, an image cannot be read,
        or the output has an unknown suffix or cannot be written.
    """
    task = read_settings(Path(workdir)).task.name
    if not TASKS[task].images:
        raise UserError(
            f"config.task.name={task}: --mode=predict reads images; "
            "--mode=export writes a network that takes arrays"
        )
    if output is not None:
        if Path(output).suffix not in (".csv", ".jsonl"):
            raise UserError(f"--output={output}: must end in .csv or .jsonl")
        check_writable(Path(output), f"--output={output}")
    files = find_images(patterns)
    log_lost("--images", image_kinds(files))
    trained = load_trained(Path(workdir), checkpoint)
    images = _read(
        files, trained.info.example_shape, DATA_SETS[trained.settings.data.name].photographs
    )
    names = trained.info.class_names
    rows = []
    for file, last, combined in zip(files, *predict_probabilities(trained, images)):
        rows.append(
            {
                "image": str(file),
                "label": names[int(last.argmax())],
                "probability": round(float(last.max()), 6),
                "ensemble_label": names[int(combined.argmax())],
                "ensemble_probability": round(float(combined.max()), 6),
            }
        )
    text = (
        _as_jsonl(rows) if output is not None and Path(output).suffix == ".jsonl" else _as_csv(rows)
    )
    if output is None:
        write_stdout(text)
    else:
        with writing(f"--output={output}"):
            write_text(Path(output), text)


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Returns the image files that the patterns name, in the order of the patterns.

    Args:
      patterns: files, folders (searched recursively) or glob patterns. A pattern that is the name
        of an existing file or folder means that one. Files and folders whose names begin with a dot
        are skipped unless they are named explicitly.

    Raises:
      UserError: if there is no pattern, or one matches no image.
    """
    if not patterns:
        raise UserError("--images is missing: a file, a folder or a pattern such as 'photos/*.png'")
    files: list[Path] = []
    for pattern in patterns:
        if os.path.exists(
            pattern
        ):  # for example a[1].png, which as a glob pattern would mean a1.png
            matches = [Path(pattern)]
        else:
            matches = sorted(
                path
                for path in map(Path, glob.glob(pattern, recursive=True))
                if not path.name.startswith(".")
            )
        matched = [
            file for path in matches for file in (_images_below(path) if path.is_dir() else [path])
        ]
        if not matched:
            raise UserError(f"--images={pattern}: no image there ({', '.join(sorted(SUFFIXES))})")
        files += matched
    return files


def _images_below(folder: Path) -> list[Path]:
    """Lists the images below a folder; logs how many other files there are."""
    visible = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    images = sorted(filter(is_image, visible))
    others = {path for path in visible if not path.is_dir()} - {*images}
    log_ignored(folder, Counter(map(kind_of_file, others)), len(images))
    return images


def _read(
    files: Sequence[Path], shape: tuple[int, ...], center: bool
) -> UInt8[np.ndarray, "N H W C"]:
    return decode_images(
        len(files),
        lambda i: files[i],
        channels=shape[2],
        image_size=(shape[0], shape[1]),
        center=center,
        describe=lambda i: str(files[i]),
    )


def _batches(
    images: UInt8[np.ndarray, "N H W C"], size: int, dtype: str
) -> Iterator[tuple[Batch, int]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padded = np.zeros((size, *part.shape[1:]), dtype)
        padded[: len(part)] = part
        none = np.full(size, PADDING, np.int32)
        yield Batch(padded, {"label": none, "id": none}, np.zeros((), np.int32)), len(part)


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
