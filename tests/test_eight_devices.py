"""Tests of `pipeline`, `fused` and `threads` on groups of eight CPU devices, as on a host's GPUs.

The other tests have four devices, so the runs are made by `eight_devices.py` in a process of its
own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import small_config
from safetensors.numpy import load_file
from test_engines import furthest
from test_launch import SMALL, fails, launch

from dgl_jax.tools.export import export_run
from dgl_jax.train import train_and_evaluate

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "eight_devices.py"
ROWS = {
    "equal": [[12, 12]] * 4,
    "unequal": [[6] * 4, [12, 12], [24], [24]],
    "growing": [[24], [8] * 3, [6] * 4],
    "vq": [[6] * 4, [8] * 3],
}
# Two threads of XLA's pool per device, as the command line sets it.
ENVIRONMENT = {"NPROC": "16", "PYTHONPATH": str(SCRIPT.parents[1])}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("eight")
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", [*ROWS, "fused"])
def test_single_steps_on_groups_agree_with_one_device(results, layout):
    assert results[layout]["worst"] < 1e-5
    assert results[layout]["other batch"] > 1e-3  # twin


@pytest.mark.parametrize("layout", ROWS)
def test_every_device_of_a_group_reads_its_share_of_the_rows(results, layout):
    assert results[layout]["rows"] == ROWS[layout]


@pytest.mark.parametrize("layout", ROWS)
def test_ids_belong_to_their_activations(results, layout):
    assert results[layout]["ids"]
    assert results[layout]["belong"]
    # Twin: activations move by one row on their way to the next group.
    assert not results[layout]["belong, other rows"]
    assert results[layout]["other rows"] > 1e-3


def test_steps_of_threads_on_groups_agree_with_one_device(results):
    threads = results["threads"]
    assert threads["updates"] == [4, 4, 4]
    assert threads["rows"] == ROWS["growing"]
    assert threads["worst"] < 1e-5
    assert threads["other labels"] > 1e-3  # twin


def test_ids_of_threads_belong_to_their_activations(results):
    threads = results["threads"]
    assert threads["ids"]
    assert threads["belong"]
    # Twin: rings store ids and labels that are moved by one row.
    assert not threads["ids, other rows"]
    assert not threads["belong, other rows"]


@pytest.mark.parametrize("layout", ["equal", "fused", "one device"])
def test_checkpoint_of_unequal_groups_resumes_on_other_groups(results, layout):
    resumed = results["resume"][layout]
    assert resumed["same"]
    assert resumed["updates"] == [3] * 4
    assert resumed["worst"] < 1e-5
    assert resumed["no momentum"] > 1e-3  # twin


def test_threads_resume_on_other_groups(results):
    for step, groups in ((4, [[0, 1, 2, 3], [4, 5]]), (8, [[0, 1], [2, 3, 4, 5]])):
        run = results["threads run"][str(step)]
        assert run == {"updates": [step] * 2, "devices": groups, "wire": "measured"}


GROUPED = [
    *SMALL,
    "--cpu_devices=8",
    "--config.engine.name=pipeline",
    "--config.model.modules=4",
    "--config.schedule.name=constant",
    "--config.train.steps=2",
]


def test_command_line_trains_resumes_evaluates_and_exports(tmp_path):
    # NPROC of the test session is too small for eight devices.
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = launch(f"--workdir={tmp_path / 'groups'}", *arguments, env=env)
        assert process.returncode == 0, process.stderr
        return process

    run(*GROUPED, "--config.train.steps=1", "--config.engine.group_sizes=(4,2,1,1)")
    modules = json.loads((tmp_path / "groups" / "summary.json").read_text())["modules"]
    assert [m["devices"] for m in modules] == [[0, 1, 2, 3], [4, 5], [6], [7]]
    resumed = run(*GROUPED, "--config.engine.group_sizes=(2,2,2,2)")
    assert "resuming from step 1" in resumed.stderr
    assert "module 0 on 0,1; module 1 on 2,3; module 2 on 4,5; module 3 on 6,7" in resumed.stderr
    summary = json.loads((tmp_path / "groups" / "summary.json").read_text())
    assert [m["updates"] for m in summary["modules"]] == [2] * 4

    metrics = json.loads(run("--mode=eval").stdout)  # on one device
    for m in summary["modules"]:
        assert metrics[f"test/{m['name']}/accuracy"] == m["test_accuracy"]
    exported = load_file(Path(run("--mode=export").stdout.strip()) / "model.safetensors")

    def fused(**fields: int) -> dict[str, np.ndarray]:
        workdir = tmp_path / f"fused{len(fields)}"
        train_and_evaluate(small_config(model__modules=4, train__steps=2, **fields), workdir)
        return load_file(export_run(workdir) / "model.safetensors")

    assert furthest(exported, fused()) < 1e-4  # the rounding of two steps adds up
    assert furthest(exported, fused(seed=1)) > 1e-1  # twin


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("(4,2,1,2)", "needs 9 devices, and there are 8"),
        ("(3,2,2,1)", "batch_size=8: not divisible by the 3 devices of module_0; 12 would do"),
    ],
)
def test_wrong_group_sizes_are_one_line(sizes, message, tmp_path):
    given = f"--config.engine.group_sizes={sizes}"
    line = fails(*GROUPED, f"--workdir={tmp_path / 'run'}", given)
    assert message in line
    assert not (tmp_path / "run").exists()
