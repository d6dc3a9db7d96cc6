"""Rows of a report: which runs are averaged, and how rows are grouped."""

import pytest
from reports import bold, grid, report_of, texts
from written_runs import write_run

from dgl_jax.tools.report_tables import labels, members, modules, results


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
    for seed, accuracies in enumerate(([0.5, 0.60], [0.5, 0.64], [0.8, 0.71])):
        write_run(tmp_path / f"seed_{seed}", accuracies, 0.7, seed=seed)
    (group,) = report_of(tmp_path).groups
    (row,) = group.rows
    # Mean 0.65; squared deviations 0.0025, 0.0001, 0.0036; their sum over n - 1 = 2 is 0.0031.
    assert row.accuracy(-1).mean == pytest.approx(0.65)
    assert row.accuracy(-1).deviation == pytest.approx(0.0031**0.5)
    assert row.accuracy(0).mean == pytest.approx(0.6)
    assert texts(results(group), "seeds", "last module, %", "ensemble, %") == [
        ["3", "65.00 ± 5.57", "70.00 ± 0.00"]
    ]
    assert texts(modules(group), "module 0", "module 1") == [["60.00 ± 17.32", "65.00 ± 5.57"]]
    assert texts(members(row), "seed", "last module, %") == [
        ["0", "60.00"],
        ["1", "64.00"],
        ["2", "71.00"],
    ]


def test_one_seed_has_no_deviation(tmp_path):
    write_run(tmp_path / "run", [0.5, 0.6], 0.6)
    (group,) = report_of(tmp_path).groups
    assert texts(results(group), "run", "seeds", "last module, %") == [["run", "1", "60.00"]]
    assert bold(results(group)) == []  # nothing to compare with


def test_field_without_a_value_in_a_foreign_configuration_is_no_difference(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["X"], "pad": null}')
    report = report_of(tmp_path)
    assert [row.name for group in report.groups for row in group.rows] == ["a", "foreign"]
    assert report.shared["pad"] is None


def test_second_run_of_a_seed_is_a_row_of_its_own(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name, [0.5, 0.6], 0.6)
    (group,) = report_of(tmp_path).groups
    assert texts(results(group), "run", "seeds") == [["first", "1"], ["second", "1"]]
    assert labels(group) == ["first", "second"]


def test_runs_on_other_devices_are_not_averaged(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    gpu = {"cpu_threads": None, "peak_memory_bytes": {"gpu:0": 2**30, "gpu:1": None}}
    write_run(tmp_path / "b", [0.5, 0.8], 0.8, seed=1, summary=gpu)
    (group,) = report_of(tmp_path).groups
    assert texts(results(group), "run", "last module, %", "peak memory") == [
        ["a", "60.00", "3.0 MiB (host)"],
        ["b", "80.00", "1.0 GiB"],
    ]


@pytest.mark.parametrize("field", ["data__name", "data__train_examples"])
def test_runs_on_other_data_are_not_averaged(field, tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    value = {"data__name": "digits", "data__train_examples": 40}[field]
    other = {"data__augment": "none", "data__image_size": 0} if value == "digits" else {}
    write_run(tmp_path / "b", [0.5, 0.8], 0.8, seed=1, **{field: value}, **other)
    rows = [row for group in report_of(tmp_path).groups for row in group.rows]
    assert [len(row.runs) for row in rows] == [1, 1]
    if field == "data__name":
        assert [bold(results(group)) for group in report_of(tmp_path).groups] == [[]]


def test_settings_that_do_not_influence_results_separate_no_rows(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    write_run(tmp_path / "b", [0.5, 0.8], 0.6, seed=1, log__every=7, checkpoint__every=1)
    (group,) = report_of(tmp_path).groups
    assert [len(row.runs) for row in group.rows] == [2]


def test_rows_are_grouped_by_the_setting_in_which_they_differ(tmp_path):
    grid(tmp_path, ("linear", "mlp"), (0.2, 0.1, 0.05))
    report = report_of(tmp_path)
    assert [(group.setting, dict(group.fixed)) for group in report.groups] == [
        ("optimizer.learning_rate", {"model.head": "linear"}),
        ("optimizer.learning_rate", {"model.head": "mlp"}),
    ]
    table = results(report.groups[0])
    # Numbers are sorted by size; the first column is the setting; the best row is bold.
    assert texts(table, "optimizer.learning_rate", "last module, %") == [
        ["0.05", "30.00"],
        ["0.1", "20.00"],
        ["0.2", "10.00"],
    ]
    assert bold(table) == ["0.05", "30.00"]  # the ensembles are equal
    assert labels(report.groups[0])[0] == "learning_rate=0.05"
    assert report.shared["data.name"] == "synthetic"
    assert "optimizer.learning_rate" not in report.shared


def test_larger_group_wins(tmp_path):
    grid(tmp_path, ("linear", "mlp", "mlp_sr"), (0.2, 0.1))
    assert [(group.setting, len(group.rows)) for group in report_of(tmp_path).groups] == [
        ("model.head", 3),
        ("model.head", 3),
    ]


def test_options_of_a_kind_belong_to_the_setting_that_chooses_it(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    for size in (10, 9):
        fields = {"engine__name": "simulated", "replay__size": size}
        age = {"staleness": [0.0, 1.25], "wire_bytes_down_per_image": [48.0]}
        write_run(tmp_path / f"b{size}", [0.5, 0.7], 0.6, summary=age, **fields)
    (group,) = report_of(tmp_path).groups
    assert (group.setting, group.columns) == ("engine.name", ("engine.name", "replay.size"))
    columns = ("engine.name", "replay.size", "staleness", "bytes up", "bytes down")
    assert texts(results(group), *columns) == [
        ["fused", "–", "–", "2.0 KiB", "0 B"],
        ["simulated", "9", "1.25", "2.0 KiB", "48 B"],
        ["simulated", "10", "1.25", "2.0 KiB", "48 B"],
    ]


def test_option_that_another_setting_brings_along_is_a_difference(tmp_path):
    write_run(tmp_path / "fused", [0.5, 0.6], 0.6)  # has no `replay.size`
    for codec, size in (("identity", 10), ("int8", 50), ("bf16", 50)):
        fields = {"engine__name": "simulated", "codec__name": codec, "replay__size": size}
        write_run(tmp_path / codec, [0.5, 0.6], 0.6, **fields)
    groups = [(group.setting, labels(group)) for group in report_of(tmp_path).groups]
    # The codecs at rings of 50 messages; identity and fused differ in the engine and its options.
    assert [setting for setting, _ in groups] == ["engine.name", "codec.name"]
    assert [len(rows) for _, rows in groups] == [2, 2]


def test_rows_without_a_partner_stand_together(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.6], 0.6)
    write_run(tmp_path / "b", [0.5, 0.7], 0.6, optimizer__learning_rate=0.5, model__head="mlp")
    (group,) = report_of(tmp_path).groups
    assert (group.setting, group.columns) == ("", ("model.head", "optimizer.learning_rate"))
    assert labels(group) == ["head=linear, learning_rate=0.05", "head=mlp, learning_rate=0.5"]
