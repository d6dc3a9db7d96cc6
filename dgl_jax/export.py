"""Parameters as safetensors beside a config.json: what other programs read."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors.numpy import load_file, save

from dgl_jax import average
from dgl_jax.engines import Recipe
from dgl_jax.experiment import load_trained, make_recipe
from dgl_jax.metrics import read
from dgl_jax.module import ModuleState
from dgl_jax.settings import make_settings
from dgl_jax.step import eval_step
from dgl_jax.stored import DatasetInfo, read_json
from dgl_jax.writers import check_writable, write_atomically, writing


@dataclass(frozen=True)
class Exported:
    """A network read back from an export.

    Attributes:
      variables: of each module {"params": ..., "batch_stats": ..., "codebook": ...}, host arrays; `()` where the codec has none.
    """

    recipe: Recipe
    class_names: tuple[str, ...]
    variables: tuple[dict[str, Any], ...]

    def logits(self, images: UInt8[Array | np.ndarray, "B H W C"]) -> list[Float[Array, "B classes"] | None]:
        """Logits of each module's head (None without one; the last are the network's) for images as stored, 0 to 255."""
        x, results = self.recipe.preprocess.evaluate(images), []
        for k, (module, variables) in enumerate(zip(self.recipe.modules, self.variables)):
            if k:
                codebook = self.variables[k - 1]["codebook"]
                x = self.recipe.codec.decode(codebook, self.recipe.codec.encode(codebook, x))
            x, logits = eval_step(module, variables["params"], variables["batch_stats"], x)
            results.append(logits)
        return results


def export_run(workdir: str | Path, checkpoint: str = "newest", output: str | Path | None = None) -> Path:
    """Writes `model.safetensors` and `config.json` to `output` (default: `<workdir>/export`); gives the folder.

    Tensors are named `module_0/params/body/block_0/...`; config.json holds the configuration, the data set's class names, image
    shape and normalisation, the first block of each module, and the step.

    Raises:
      UserError: `output` cannot be written; or see `load_trained`.
    """
    folder = Path(output) if output else Path(workdir) / "export"
    name = f"--output={folder}"
    check_writable(folder, name, folder=True)
    trained = load_trained(Path(workdir), checkpoint)
    tree = {
        module.name: _variables(trained.recipe, state)
        for module, state in zip(trained.recipe.modules, trained.restored.state.modules)
    }
    tensors = read({_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)})
    described = {
        "config": trained.settings.to_dict(),
        "dataset": dataclasses.asdict(trained.info),
        "first_blocks": [module.first for module in trained.recipe.modules],
        "step": trained.restored.step,
    }
    files = {
        # Not safetensors' own save_file, whose files nobody but the owner may read.
        folder / "model.safetensors": save({name: np.ascontiguousarray(value) for name, value in tensors.items()}),
        folder / "config.json": (json.dumps(described, indent=2) + "\n").encode(),
    }
    with writing(name):
        write_atomically(files)
    return folder


def load_exported(folder: str | Path) -> Exported:
    """Reads what `export_run` wrote; needs neither the run nor its data set.

    Raises:
      UserError: the folder holds no export.
    """
    described = read_json(Path(folder) / "config.json", "dataset", "config")
    info = DatasetInfo.from_dict(described["dataset"])
    recipe = make_recipe(make_settings(described["config"]), info, first_blocks=described.get("first_blocks", ()))
    tensors = load_file(Path(folder) / "model.safetensors")
    variables = []
    for module, state in zip(recipe.modules, recipe.abstract_states()):
        wanted = jax.eval_shape(partial(_variables, recipe), state)
        names = jax.tree_util.tree_map_with_path(lambda path, _: _name(path), wanted)
        variables.append(jax.tree.map(lambda name, prefix=module.name: tensors[f"{prefix}/{name}"], names))
    return Exported(recipe, info.class_names, tuple(variables))


def _variables(recipe: Recipe, state: ModuleState) -> dict[str, Any]:
    params, batch_stats = average.evaluated(state)
    return {"params": params, "batch_stats": batch_stats, "codebook": recipe.codebook(state)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
