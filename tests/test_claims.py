"""The sweeps in configs/claims/: their rows are valid, distinct, and say what they claim."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
from image_folders import write_image_folder

from dgl_jax.config import make_settings
from dgl_jax.configs.claims import _common as common
from dgl_jax.data import make_source
from dgl_jax.errors import UserError

FOLDER = Path(__file__).parents[1] / "configs" / "claims"
CLAIMS = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if "CHOSEN" in path.read_text())


def claim(name):
    return importlib.import_module(f"dgl_jax.configs.claims.{name}")


def rows(name, size):
    return {row: make_settings(config) for row, config in claim(name).get_sweep(size)}


@pytest.mark.parametrize("size", common.SIZES)
@pytest.mark.parametrize("name", CLAIMS)
def test_rows_are_valid_and_distinct(name, size):
    names = [row for row, _ in claim(name).get_sweep(size)]
    assert not [row for row, count in Counter(names).items() if count > 1]
    settings = rows(name, size)
    assert len({each.hash() for each in settings.values()}) == len(names)
    assert not any(each.ignored for each in settings.values())


@pytest.mark.parametrize("name", CLAIMS)
def test_every_row_is_tried_with_three_rates_and_run_with_three_seeds(name):
    module = claim(name)
    tried, run, full = (rows(name, size) for size in ("rates", "small", "full"))
    for row in module.ROWS:
        of_full = {s.optimizer.learning_rate for n, s in full.items() if n.startswith(f"{row}/")}
        rates = {s.optimizer.learning_rate for n, s in tried.items() if n.startswith(f"{row}/")}
        final = {s.optimizer.learning_rate for n, s in run.items() if n.startswith(f"{row}/")}
        seeds = {s.seed for n, s in run.items() if n.startswith(f"{row}/")}
        assert len(rates) == 3
        assert of_full == rates
        assert len(final) == 1
        assert final <= rates
        assert seeds == {0, 1, 2}
    assert set(module.CHOSEN) <= set(module.ROWS)


@pytest.mark.parametrize("name", CLAIMS)
def test_sweeps_of_rates_and_of_seeds_share_a_run_of_every_row(name):
    tried, run = rows(name, "rates"), rows(name, "small")
    shared = tried.keys() & run.keys()
    assert len(shared) == len(claim(name).ROWS)
    assert all(tried[row] == run[row] for row in shared)


@pytest.mark.parametrize(
    ("size", "networks"),
    [("small", [("cnn6", 32), ("resnet20", 8)]), ("full", [("cnn6", 128), ("resnet32", 16)])],
)
def test_final_rows_have_their_network_and_number_of_modules(size, networks):
    settings = rows("gap_final", size)
    assert {(s.model.name, s.model.width) for s in settings.values()} == set(networks)
    for name, each in settings.items():
        _, row, rate, _ = name.split("/")
        modules = int(row.rpartition("=")[2]) if "=" in row else 1
        assert each.model.modules == modules
        assert (each.objective.name == "auglocal") == row.startswith("best")
        assert f"lr={each.optimizer.learning_rate:g}" == rate


def test_final_rows_have_the_rates_that_were_chosen_for_their_number_of_modules():
    rates = {
        n.split("/lr")[0]: s.optimizer.learning_rate for n, s in rows("gap_final", "small").items()
    }
    assert rates["cnn6/dgl,K=2"] == 0.01
    assert rates["cnn6/dgl,K=6"] == rates["cnn6/best,K=3"] == 0.03
    assert rates["cnn6/best,K=6"] == rates["resnet/best,K=8"] == rates["resnet/dgl,K=4"] == 0.1


def test_small_imagenet_reads_a_folder_of_images(tmp_path):
    _, config = next(iter(claim("imagenet").get_sweep("small")))
    config.data.dir = str(write_image_folder(tmp_path / "images"))
    config.data.train_examples, config.data.batch_size = 0, 8
    source = make_source(make_settings(config).data, 0)
    assert source.batch(0).inputs.shape == (8, 64, 64, 3)


@pytest.mark.parametrize(("size", "rate"), [("small", 0.0001), ("full", 0.00003)])
def test_synthesizers_have_the_published_rate_at_full_size(size, rate):
    for each in rows("synthetic_gradients", size).values():
        if each.method.name in ("dni", "cdni"):
            assert each.method.synthesizer_learning_rate == rate


def test_unknown_size_is_refused():
    with pytest.raises(UserError, match="huge: must be one of rates, small, full"):
        list(claim("heads").get_sweep("huge"))
