"""Export of a trained network as safetensors and config.json, for use by other programs."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from dgl_jax.config import make_settings
from dgl_jax.core import ema
from dgl_jax.core.module import ModuleState
from dgl_jax.data.info import DatasetInfo
from dgl_jax.errors import UserError
from dgl_jax.methods.base import evaluate
from dgl_jax.run.build import make_spec
from dgl_jax.run.metrics import read
from dgl_jax.run.restore import load_trained
from dgl_jax.run.workdir import holds_run, read_json
from dgl_jax.run.writers import check_writable, write_atomically, writing
from dgl_jax.spec import TrainSpec
from dgl_jax.types import AnyArray


@dataclass(frozen=True)
class Exported:
    """Network loaded from an export.

    Attributes:
      spec: description of the run.
      class_names: names of the classes.
      variables: {"params": ..., "batch_stats": ..., "codebook": ..., "published": ...} per module,
        as host arrays. The codebook is `()` if the codec has none; `published` is {} if the
        objective reads no publication.
    """

    spec: TrainSpec
    class_names: tuple[str, ...]
    variables: tuple[dict[str, Any], ...]

    def logits(
        self, inputs: Shaped[AnyArray, "B ..."]
    ) -> list[Float[Array, "B *T classes"] | None]:
        """Computes the logits of every module's head for stored inputs.

        Args:
          inputs: batch of examples as the data set stores them, [B, ...]; images are uint8 with
            values from 0 to 255, [B, H, W, C], not normalized.

        Returns:
          The logits per module, [B, classes] or [B, T, classes]; None for a module without a head.
          The last entry holds the logits of the whole network.

        Raises:
          UserError: the data set has examples of another shape or dtype.
        """
        example = self.spec.task.example
        if (inputs.shape[1:], inputs.dtype) != (example.shape, example.dtype):
            raise UserError(
                f"logits: got {inputs.dtype} inputs of shape {inputs.shape}, but the network was "
                f"trained on {example.dtype} examples of shape {('B', *example.shape)}"
            )
        incoming: Any = inputs
        results = []
        for k, variables in enumerate(self.variables):
            incoming, logits = evaluate(self.spec, k, **variables, incoming=incoming)
            results.append(logits)
        return results


def export_run(
    workdir: str | Path, checkpoint: str = "newest", output: str | Path | None = None
) -> Path:
    """Writes `model.safetensors` and `config.json` of a trained run.

    Tensors are named `module_0/params/body/block_0/...`. config.json holds the configuration, the
    class names, shapes and normalization of the data set, the first block of each module, and the
    step.

    Args:
      workdir: directory of the run.
      checkpoint: checkpoint to export, see `load_trained`.
      output: folder to write to; by default `<workdir>/export`.

    Returns:
      The folder.

    Raises:
      UserError: `output` holds a run or cannot be written, or the checkpoint cannot be loaded.
    """
    folder = Path(output) if output else Path(workdir) / "export"
    name = f"--output={folder}"
    if holds_run(folder):
        raise UserError(
            f"{name}: holds a run, whose config.json would be lost; name another folder"
        )
    check_writable(folder, name, folder=True)
    trained = load_trained(Path(workdir), checkpoint)
    tree = {
        module.name: _variables(trained.spec, state)
        for module, state in zip(trained.spec.modules, trained.restored.state.modules)
    }
    tensors = read({_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)})
    described = {
        "config": trained.settings.to_dict(),
        "dataset": dataclasses.asdict(trained.info),
        "first_blocks": [module.first for module in trained.spec.modules],
        "step": trained.restored.step,
    }
    files = {
        # safetensors' save_file would make the file readable by its owner only.
        folder / "model.safetensors": save(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        ),
        folder / "config.json": (json.dumps(described, indent=2) + "\n").encode(),
    }
    with writing(name):
        write_atomically(files)
    return folder


def load_exported(folder: str | Path) -> Exported:
    """Loads an export that `export_run` wrote; needs neither the run nor its data set.

    Raises:
      UserError: the folder contains no export, or a damaged one.
    """
    described = read_json(Path(folder) / "config.json", "dataset", "config", "first_blocks")
    info = DatasetInfo.from_dict(described["dataset"])
    spec = make_spec(make_settings(described["config"]), info, described["first_blocks"])
    path = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export the run again") from error
    variables = []
    for module, state in zip(spec.modules, spec.abstract_states()):
        wanted = jax.eval_shape(partial(_variables, spec), state)
        names = jax.tree_util.tree_map_with_path(
            lambda place, _, prefix=module.name: f"{prefix}/{_name(place)}", wanted
        )
        if missing := sorted(set(jax.tree.leaves(names)) - tensors.keys()):
            raise UserError(f"{path}: lacks {missing[0]}; export the run again")
        variables.append(jax.tree.map(tensors.__getitem__, names))
    return Exported(spec, info.class_names, tuple(variables))


def _variables(spec: TrainSpec, state: ModuleState) -> dict[str, Any]:
    params, batch_stats = ema.evaluated(state)
    published = state.extras.get("published", {})
    return {
        "params": params,
        "batch_stats": batch_stats,
        "codebook": spec.codebook(state),
        "published": published,
    }


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
