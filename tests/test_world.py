"""Runs of several processes, as real processes on CPU devices of this machine.

Three processes at least: with two, every process takes part in every move between devices.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT, Processes, distributed, free_port

from dgl_jax.data import make_source
from dgl_jax.run.arrays import raw
from dgl_jax.run.restore import load_trained

pytestmark = pytest.mark.slow

# One thread count everywhere: it decides how sums are rounded.
THREADS = {"NPROC": "6"}
DIGITS = ("--config=configs/digits.py", "--config.model.width=4", "--config.log.every=5")
STEPS = 60
PIPELINE = (
    *DIGITS,
    "--config.model.modules=3",
    "--config.engine.name=pipeline",
    f"--config.train.steps={STEPS}",
    "--config.checkpoint.every=10",
    "--config.codec.name=vq",
    "--config.codec.dims=4",
    "--config.codec.codes=16",
)
BATCH, FUSED_STEPS = 96, 3
FUSED = (
    *DIGITS,
    "--config.model.modules=2",
    "--config.engine.name=fused",
    f"--config.train.steps={FUSED_STEPS}",
    f"--config.data.batch_size={BATCH}",
)
TIMED = re.compile("per_second|time")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--compilation_cache={tmp_path_factory.mktemp('programs')}"


def alone(workdir, devices, *flags):
    """Trains in one process; returns its standard output."""
    result = subprocess.run(
        [
            *(sys.executable, "launch.py", f"--cpu_devices={devices}", f"--workdir={workdir}"),
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | THREADS | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def recorded(count, folder, *flags):
    """Trains in several processes that write what they did; returns how they ended."""
    folder.mkdir()
    commands = [
        [command[0], str(ROOT / "tests" / "world_run.py"), str(folder), *command[2:]]
        for command in distributed(count, *flags)
    ]
    ended = Processes(commands, **THREADS).end()
    assert [each.code for each in ended] == [0] * count, [each.log for each in ended]
    return ended


def facts(folder):
    paths = sorted(folder.glob("process_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def arrays(workdir):
    state = load_trained(Path(workdir)).restored.state
    leaves = jax.tree_util.tree_flatten_with_path(raw(state.modules))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def unequal(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


def metrics(workdir):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not TIMED.search(k)} for line in lines]


def numbers(workdir):
    """Returns the summary without times, devices and memory."""
    summary = json.loads((Path(workdir) / "summary.json").read_text())
    for module in summary["modules"]:
        del module["devices"]
    left_out = ("images_per_second", "wall_seconds", "peak_host_bytes")
    return {name: value for name, value in summary.items() if name not in left_out}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """Trains the pipeline in one process with three devices; returns workdir and output."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, alone(workdir, 3, *PIPELINE, cache)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, cache):
    """Trains it in three processes; returns workdir, recorded facts and results."""
    folder = tmp_path_factory.mktemp("pipeline")
    workdir = folder / "run"
    ended = recorded(3, folder / "facts", *PIPELINE, cache, f"--workdir={workdir}")
    return workdir, facts(folder / "facts"), ended


def test_pipeline_in_three_processes_equals_three_devices_bit_for_bit(pipeline, undisturbed):
    workdir, _, ended = pipeline
    alone_in, output = undisturbed
    assert not unequal(arrays(workdir), arrays(alone_in))
    assert metrics(workdir) == metrics(alone_in)
    assert numbers(workdir) == numbers(alone_in)
    assert [each.output for each in ended] == [output, "", ""]


def test_twin_another_checkpoint_is_not_equal(undisturbed):
    newest, older = (
        load_trained(undisturbed[0], str(step)).restored.state.modules[0].params
        for step in (STEPS, STEPS - 10)
    )
    assert not jax.tree.all(jax.tree.map(np.array_equal, newest, older))


def test_a_process_compiles_only_its_own_module(pipeline):
    assert [set(each["compiled"]) for each in pipeline[1]] == [{0}, {1}, {2}]


def test_only_the_first_module_opens_the_data(pipeline):
    assert [each["opened"] for each in pipeline[1]] == [1, 0, 0]
    assert [bool(each["ids"]) for each in pipeline[1]] == [True, False, False]


def test_every_process_issues_every_move(pipeline):
    moves = [each["moves"] for each in pipeline[1]]
    assert len(set(moves)) == 1
    # At least payload, label and id over two hops per batch.
    assert moves[0] >= 6 * STEPS


def test_bytes_equal_what_was_handed_to_jax(pipeline):
    counted = [each["bytes"] for each in pipeline[1]]
    assert counted[0] == counted[1] == counted[2]
    # Two codes of 4 bits at each of 4 x 4 positions; 4 bytes each of id and label.
    images = STEPS * 64
    assert [total for *_, total in counted[0]] == [images] * 2
    assert [messages for messages, *_ in counted[0]] == [(16 + 8) * images] * 2
    summary = json.loads((pipeline[0] / "summary.json").read_text())
    assert summary["wire"] == "measured"
    assert summary["wire_bytes_per_image"] == [
        (messages + codebooks) / total for messages, codebooks, total in counted[0]
    ]


def test_nothing_listens_outside_loopback(pipeline):
    # As /proc/net prints them: 127.0.0.1, and ::1 or ::ffff:127.0.0.1.
    loopback = {
        "0100007F",
        "00000000000000000000000001000000",
        "0000000000000000FFFF00000100007F",
    }
    addresses = [set(each["listening"]) for each in pipeline[1]]
    assert all(addresses)  # at least the port of the transfers
    assert set().union(*addresses) <= loopback


def test_stopped_and_killed_runs_resume_exactly_also_in_fewer_processes(
    tmp_path, cache, undisturbed
):
    flags = (*PIPELINE, cache, f"--workdir={tmp_path / 'run'}")
    running = Processes(distributed(3, *flags), **THREADS)
    running.wait_for(0, "step 10/")
    running.kill(2, signal.SIGTERM)
    ended = running.end()
    assert [each.code for each in ended] == [128 + signal.SIGTERM] * 3
    steps = {re.search(r"SIGTERM: stopped at step (\d+)", each.log)[1] for each in ended}
    assert len(steps) == 1
    assert (tmp_path / "run" / "checkpoints" / steps.pop()).is_dir()

    running = Processes(distributed(3, *flags), **THREADS)
    running.wait_for(0, f"step {STEPS - 20}/")
    running.kill(1)
    codes = [each.code for each in running.end()]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert codes[2] != 0
    assert not (tmp_path / "run" / "summary.json").exists()

    ended = Processes(distributed(2, *flags), **THREADS).end()
    assert [each.code for each in ended] == [0, 0], [each.log for each in ended]
    assert not unequal(arrays(tmp_path / "run"), arrays(undisturbed[0]))


@pytest.fixture(scope="module")
def fused(tmp_path_factory, cache):
    """Trains twice in three processes and once in one; returns the folder and recorded facts."""
    folder = tmp_path_factory.mktemp("fused")
    for name in ("one", "two"):
        recorded(3, folder / f"facts_{name}", *FUSED, cache, f"--workdir={folder / name}")
    alone(folder / "alone", 1, *FUSED, cache)
    return folder, facts(folder / "facts_one")


def test_fused_runs_in_three_processes_equal_each_other(fused):
    assert not unequal(arrays(fused[0] / "one"), arrays(fused[0] / "two"))


def test_fused_in_three_processes_equals_one_up_to_rounding(fused):
    three, one = arrays(fused[0] / "one"), arrays(fused[0] / "alone")
    assert three.keys() == one.keys()
    for name, value in three.items():
        np.testing.assert_allclose(value, one[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_no_process_holds_examples_of_another(fused):
    settings = load_trained(fused[0] / "one").settings
    source = make_source(settings.data, settings.seed)
    for step in range(FUSED_STEPS):
        rows = [each["ids"][step] for each in fused[1]]
        assert [len(ids) for ids in rows] == [BATCH // 3] * 3
        assert [i for ids in rows for i in ids] == source.batch(step).context["id"].tolist()


@pytest.mark.parametrize(
    ("name", "flags", "each", "message"),
    [
        (
            "seed",
            ("--config.engine.name=pipeline",),
            lambda i: ("--config.seed=7",) if i == 2 else (),
            r"process 2 of 3 differs from process 0: config.seed \(was 0, is now 7\)",
        ),
        (
            "data",
            ("--config.data.name=folder", "--config.data.dir=/nowhere"),
            lambda i: (),
            r"(process 0: )?config.data.dir=/nowhere: no such directory",
        ),
        (
            "groups",
            (
                "--cpu_devices=2",
                "--config.engine.name=pipeline",
                "--config.model.modules=2",
                "--config.engine.group_sizes=(4,2)",
            ),
            lambda i: (),
            r"module_0 has 4 devices and module_1 2, on processes \[0, 1\] and \[2\]",
        ),
        (
            "engine",
            ("--config.engine.name=threads",),
            lambda i: (),
            "config.engine.name=threads: runs in one process",
        ),
        (
            "flag of the first process",
            (),
            lambda i: ("--config.sed=7",) if i == 0 else (),
            "^(process 0: )?--config.sed: no such field",
        ),
        (
            "flag of another process",
            (),
            lambda i: ("--no_such_flag",) if i == 2 else (),
            "^(process 2: )?Unknown command line flag 'no_such_flag'",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_in_every_process(
    tmp_path, name, flags, each, message
):
    commands = distributed(3, *DIGITS, *flags, f"--workdir={tmp_path / 'run'}", each=each)
    ended = Processes(commands).end()
    assert [process.code for process in ended] == [2, 2, 2], [process.log for process in ended]
    for process in ended:
        assert len(process.errors()) == 1
        assert re.search(message, process.errors()[0])
    assert not (tmp_path / "run" / "config.json").exists()


def test_neighbors_hold_each_other_to_the_credit_and_stop_together():
    address = f"127.0.0.1:{free_port()}"
    script = str(ROOT / "tests" / "world_pace.py")
    commands = [[sys.executable, script, address, str(i)] for i in range(3)]
    ended = Processes(commands).end()
    assert [each.code for each in ended] == [0, 0, 0], [each.log for each in ended]
    result = json.loads(ended[0].output)
    # The reader has finished ticks 0 to 9, and the credit is 2: tick 13 has to wait for tick 10.
    assert result["credit"] == 13
    assert result["no credit"] == 50
    assert len(set(result["stopped"])) == 1
    assert result["union"] == {"0": 0, "1": 1, "2": 2, "all": 0}


def test_a_process_that_never_comes_is_named_as_the_reason():
    script = (
        "from dgl_jax.engines import world\n"
        f"world.join('127.0.0.1:{free_port()}', 3, {{}}, on_cpu=True, start_seconds=3)"
    )
    ended = Processes([[sys.executable, "-c", script.format(i)] for i in range(2)]).end()
    assert [each.code for each in ended] == [2, 2], [each.log for each in ended]
    message = "--distributed: not all processes joined within 3 s"
    assert [len(each.errors()) for each in ended] == [1, 1]
    assert all(each.errors()[0].startswith(message) for each in ended)
