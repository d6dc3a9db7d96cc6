"""Tests of `pipeline`, `fused` and `threads` on groups of eight CPU devices, as on a host's GPUs.

The other tests have four devices, so the runs are made by `eight_devices.py` in a process of its
own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    directory = tmp_path_factory.mktemp("eight") / "checkpoints"
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
