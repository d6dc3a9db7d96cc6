"""Tests of sweeps: checks of the rows, division of the machine, scheduling, and real processes."""

import json
import shutil
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from runs import small_config
from written_runs import store_run

from dgl_jax.config import make_settings
from dgl_jax.errors import UserError
from dgl_jax.run.workdir import check, lock
from dgl_jax.tools import rows
from dgl_jax.tools.rows import check_given, make_rows, overridden
from dgl_jax.tools.sweep import sweep
from dgl_jax.train import train_and_evaluate

ROOT = Path(__file__).parents[1]


def test_fields_of_the_command_line_change_all_rows_but_not_what_the_sweep_yields():
    config = small_config()
    pairs = [("a", config), ("b", small_config(seed=1)), "no row"]
    fields = {"optimizer.learning_rate": 0.25, "train.steps": 7}
    *changed, other = overridden(iter(pairs), fields)
    assert [
        (name, c["optimizer"]["learning_rate"], c["train"]["steps"], c["seed"])
        for name, c in changed
    ] == [("a", 0.25, 7, 0), ("b", 0.25, 7, 1)]
    assert other == "no row"
    assert config == small_config()
    assert list(rows.overridden(iter(pairs), {})) == pairs


def test_rows_of_another_sweep_stay_in_the_table(tmp_path):
    path = tmp_path / "sweep.json"
    first, second = (
        make_rows(iter([(name, small_config(seed=n)) for n, name in enumerate(names)]), tmp_path)
        for names in (("a", "b"), ("b", "c"))
    )
    first[0].state = first[1].state = "finished"
    for table in (first, second):
        rows.write(path, "name", table)
    states = {name: row["state"] for name, row in json.loads(path.read_text())["rows"].items()}
    assert states == {"a": "finished", "b": "waiting", "c": "waiting"}
    path.write_text("{")
    rows.write(path, "name", second)
    assert list(json.loads(path.read_text())["rows"]) == ["b", "c"]


def test_run_in_the_folder_of_a_sweep_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="holds the rows of a sweep"):
        check(tmp_path, make_settings(small_config()))


def test_finished_rows_are_marked_and_others_wait(tmp_path):
    store_run(tmp_path / "a" / "seed=0", small_config(), steps=12)
    store_run(tmp_path / "b", small_config(seed=1))
    store_run(tmp_path / "long", small_config(), steps=12)
    pairs = [("a/seed=0", small_config(log__every=5)), ("b", small_config(seed=1))]
    pairs += [("c", small_config(seed=2)), ("long", small_config(train__steps=24))]
    table = make_rows(iter(pairs), tmp_path)
    assert [(row.state, row.resumes) for row in table] == [
        ("finished", True),
        ("waiting", True),
        ("waiting", False),
        ("waiting", True),  # more steps than before: the run is extended
    ]
    assert table[0].seconds == 24.0
    assert table[0].outcome() == "test accuracy 0.5000, ensemble 0.7500"
    assert table[2].command.startswith("python launch.py --config=configs/")
    assert f"--workdir={tmp_path}/c" in table[2].command


def test_a_finished_run_without_checkpoints_cannot_be_extended(tmp_path):
    store_run(tmp_path / "a", small_config(), steps=12)
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    assert make_rows([("a", small_config())], tmp_path)[0].state == "finished"
    for steps, settings in ((24, small_config(train__steps=24)), (12, small_config(seed=1))):
        reason = "without checkpoints" if steps == 24 else r"another configuration: config\.seed"
        with pytest.raises(UserError, match=rf"^row a: {tmp_path}/a holds a.* run .*{reason}"):
            make_rows([("a", settings)], tmp_path)
        with pytest.raises(UserError, match=rf"^--workdir={tmp_path}/a: holds a.*{reason}"):
            train_and_evaluate(settings, tmp_path / "a")
    assert (tmp_path / "a" / "summary.json").exists()


@pytest.mark.parametrize("kind", [dict, ConfigDict, make_settings])
def test_a_field_of_the_command_line_changes_rows_of_every_kind(kind, tmp_path):
    fields = {"model.width": 8, "seed": 3, "replay.size": 5}
    values = {"model": {"name": "cnn4"}, "engine": {"name": "simulated"}}
    (row,) = make_rows(overridden([("a", kind(values))], fields), tmp_path)
    chosen = row.settings
    assert (chosen.model.name, chosen.model.width) == ("cnn4", 8)
    assert (chosen.seed, chosen.replay.size) == (3, 5)
    assert "width" not in values["model"]
    (wrong,) = overridden([("a", {"model": None})], fields)
    with pytest.raises(UserError, match=r"^row a: config\.model=None: a group"):
        make_rows([wrong], tmp_path)


def test_a_field_of_the_command_line_that_no_row_uses_is_refused(tmp_path):
    pairs = [(name, small_config(engine__name=name)) for name in ("fused", "simulated")]
    fields = {"replay.size": 7}
    check_given(make_rows(overridden(pairs, fields), tmp_path), fields)
    with pytest.raises(UserError, match=r"replay\.size=7: applies .* not to fused in any row"):
        check_given(make_rows(overridden(pairs[:1], fields), tmp_path), fields)


def test_rows_may_reuse_one_configuration(tmp_path):
    config = small_config()

    def pairs():
        for seed in range(3):
            config.seed = seed
            yield f"seed={seed}", config

    assert [row.settings.seed for row in make_rows(pairs(), tmp_path)] == [0, 1, 2]


def test_a_row_that_stopped_before_its_first_checkpoint_may_change(tmp_path):
    store_run(tmp_path / "a", small_config(optimizer__learning_rate=1.0))
    pairs = [("a", small_config())]
    with pytest.raises(
        UserError, match=r"row a: .*config\.optimizer\.learning_rate \(was 1\.0, is"
    ):
        make_rows(pairs, tmp_path)
    (tmp_path / "a" / "checkpoints" / "4" / "item").unlink()
    assert make_rows(pairs, tmp_path)[0].state == "waiting"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "the sweep yields no rows"),
        ([3], "the sweep yields int '3'; yield pairs"),
        ([("a", {}), ("a", {})], "row a: the sweep yields this name twice"),
        ([("a/b", {}), ("a", {})], "row a/b: lies inside the folder of row a"),
        *(
            ([(name, {})], f"row {name!r}: not a valid name")
            for name in ("", "/a", "a/../b", "a b", "a[0]", "lock", "sweep.json", 7)
        ),
        ([("a", 5)], "row a: its configuration is a int"),
        ([("a", {"model": {"width": 0}})], "row a: config.model.width=0: "),
        ([("a", {"model": {"widht": 3}})], "row a: config.model.widht: no such field"),
    ],
)
def test_wrong_rows_are_refused_by_name(pairs, message, tmp_path):
    with pytest.raises(UserError) as caught:
        sweep(pairs, tmp_path / "new")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_folder_for_a_sweep(tmp_path):
    store_run(tmp_path / "run", small_config())
    with pytest.raises(UserError, match=r"--workdir=.*/run: holds a run; a sweep needs a folder"):
        sweep([("a", small_config())], tmp_path / "run")


def test_two_sweeps_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("dgl_jax.tools.sweep.backend", lambda: ("cpu", 1))
    with lock(tmp_path), pytest.raises(UserError, match="another sweep is running there"):
        sweep([("a", small_config())], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def sweep_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "file.py"
    path.write_text(text)
    return str(path)


def test_the_argument_of_a_sweep_follows_the_colon(tmp_path):
    path = sweep_file(tmp_path, "def get_sweep(argument='none'):\n    yield argument, 1\n")
    assert list(rows.load(path)) == [("none", 1)]
    assert list(rows.load(f"{path}:small:2")) == [("small:2", 1)]


@pytest.mark.parametrize("name", ["digits", "claims/digits", "configs/claims/digits.py"])
def test_a_shipped_sweep_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = make_rows(rows.load(f"{name}:tiny"), tmp_path)
    assert [row.name for row in table] == [
        "dgl/seed=0",
        "dgl/seed=1",
        "backprop/seed=0",
        "backprop/seed=1",
    ]
    assert [row.settings.method.name for row in table[1:3]] == ["dgl", "backprop"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_sweep"),
        ("import nothing_there\n", "No module named 'nothing_there'"),
        ("def get_sweep():\n    yield 1 / 0\n", r"ZeroDivisionError: .*file\.py:2"),
        ("def get_sweep():\n    return 3\n", "TypeError: 'int' object is not iterable"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        list(rows.load(sweep_file(tmp_path, text)))
    assert str(caught.value).startswith("--sweep")


def test_a_missing_file_is_reported_with_similar_names(tmp_path):
    with pytest.raises(UserError, match=r"--sweep=digit: neither a file nor a sweep .*digits"):
        rows.load("digit")
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        rows.load(str(tmp_path / "nowhere.py"))
