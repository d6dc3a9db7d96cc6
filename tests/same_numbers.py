"""Compares the parameters that two commits export after 60 steps, bit for bit, on this machine.

    python tests/same_numbers.py OLD NEW

Runs every deterministic engine and codec, back-propagation, an average of the parameters,
micro-batches and a resumed run with the command line of each commit (`.` is the working tree).
Prints one line per run, and exits with 1 if any arrays differ.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from runs import FIELDS  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

SHARED = FIELDS | {
    "train.steps": 60,
    "checkpoint.every": 60,
    "eval.every": 60,
    "log.every": 60,
    "model.modules": 4,
}
VQ = {"codec.name": "vq", "codec.codes": 16, "codec.dims": 2}
RUNS: dict[str, dict[str, object]] = {
    "fused": {"engine.name": "fused"},
    "fused, bf16": {"engine.name": "fused", "codec.name": "bf16"},
    "fused, int8": {"engine.name": "fused", "codec.name": "int8", "codec.dims": 2},
    "fused, vq": {"engine.name": "fused", **VQ},
    "fused, vq in two stages": {"engine.name": "fused", **VQ, "codec.stages": 2},
    "fused, average": {"engine.name": "fused", "train.ema": 0.9},
    "fused, micro-batches": {"engine.name": "fused", "train.accumulate": 2},
    "pipeline": {"engine.name": "pipeline"},
    "pipeline, vq": {"engine.name": "pipeline", **VQ},
    "simulated": {"engine.name": "simulated", "replay.size": 3},
    "simulated, slowed, vq": {
        "engine.name": "simulated",
        "engine.slowdown": "(1,1,2,1)",
        "replay.size": 3,
        **VQ,
    },
    "backprop": {"method.name": "backprop"},
    "resumed": {"engine.name": "pipeline"},  # resumes at step 30
}


def launch(tree: Path, *arguments: str) -> str:
    """Runs the command line of the package in `tree` and returns its output."""
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "launch.py", "--cpu_devices=4", *arguments]
    process = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        sys.exit(f"{tree}: {' '.join(command)}\n{process.stderr}")
    return process.stdout


def parameters(tree: Path, name: str, workdir: Path) -> dict[str, np.ndarray]:
    """Trains one of `RUNS` and returns the exported parameters."""
    for steps in (30, 60) if name == "resumed" else (60,):
        fields = SHARED | RUNS[name] | {"train.steps": steps}
        if "method.name" in fields:
            del fields["model.head"]  # back-propagation refuses this field
        if "method.name" in fields and not list((tree / "dgl_jax").rglob("registry.py")):
            # Old commits have back-propagation as an engine.
            fields["engine.name"] = fields.pop("method.name")
        launch(
            tree,
            "--config=configs/digits.py",
            f"--workdir={workdir}",
            *(f"--config.{k}={v}" for k, v in fields.items()),
        )
    arrays = load_file(
        Path(launch(tree, "--mode=export", f"--workdir={workdir}").splitlines()[-1])
        / "model.safetensors"
    )
    # In old commits the objective is called head.
    return {name.replace("/head/", "/objective/"): array for name, array in arrays.items()}


def unequal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Returns the names of arrays that differ in any bit or exist on one side only."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or one[name].tobytes() != other[name].tobytes()
    )


def main(commits: list[str]) -> int:
    """Compares two commits and returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        trees = []
        for side, commit in zip("ab", commits):
            tree = ROOT if commit == "." else Path(folder) / side
            if commit != ".":
                subprocess.run(
                    ["git", "worktree", "add", "--quiet", "--detach", tree, commit],
                    cwd=ROOT,
                    check=True,
                )
            trees.append(tree)
        try:
            different = 0
            for number, name in enumerate(RUNS):
                exported = [
                    parameters(tree, name, Path(folder) / f"run_{number}_{side}")
                    for side, tree in zip("ab", trees)
                ]
                unequal_names = unequal(*exported)
                different += bool(unequal_names)
                result = (
                    f"{len(unequal_names)} arrays differ, first {unequal_names[0]}"
                    if unequal_names
                    else f"{len(exported[0])} arrays are equal"
                )
                print(f"{name}: {result}", flush=True)
            return int(different > 0)
        finally:
            for tree in trees:
                if tree != ROOT:
                    subprocess.run(
                        ["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True
                    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
