"""The main job from start to end, on a recipe of a few steps."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsedm.cli import main
from sparsedm.commands import quickstart
from sparsedm.recipes import QUICKSTART
from sparsedm.train.data import load
from sparsedm.train.stages import Stage


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    recipe = QUICKSTART["synthetic"]
    stages = tuple(replace(stage, steps=2) for stage in recipe.stages)
    overrides = {**recipe.overrides, "dim": 32, "depth": 2, "heads": 2}
    recipe = replace(recipe, stages=stages, overrides=overrides, samples=24, sampling_steps=2, threads=1)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(QUICKSTART, "synthetic", recipe)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(few_steps, tmp_path_factory):
    """The folder of a finished run, and what the command has said."""
    folder, out = tmp_path_factory.mktemp("quickstart"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["quickstart", "--run", str(folder)]) == 0
    return folder, out.getvalue()


def test_it_leaves_what_it_says(finished):
    folder, out = finished
    assert "one-shot 2:4" in out
    assert str(folder / "samples.png") in out
    left = {p.name for p in folder.iterdir()}
    assert left >= {
        *("00-dense", "01-3of4", "02-2of4", "one-shot-2of4.safetensors", "chain-2of4-compressed.safetensors"),
        *("samples.png", "loss.png", "layers.png", "report.md", "report.json"),
    }
    report = json.loads((folder / "report.json").read_text())
    rows = {row["model"]: row for row in report["models"]}
    assert list(rows) == ["dense", "one-shot 2:4", "chain 3:4", "chain 2:4"]
    assert rows["dense"]["density"] == 1
    assert 0.5 < rows["chain 2:4"]["density"] == rows["one-shot 2:4"]["density"] < rows["chain 3:4"]["density"] < 1
    assert all(row["validation_loss"] > 0 and row["frechet_distance"] > 0 for row in rows.values())
    assert rows["dense"]["features"] == "random-conv-1"
    assert "not an FID" in (folder / "report.md").read_text()


def test_the_networks_it_leaves_can_be_sampled_and_a_rerun_changes_nothing(finished, tmp_path):
    folder, _ = finished
    before = (folder / "samples.png").read_bytes()
    for file in ("one-shot-2of4.safetensors", "chain-2of4-compressed.safetensors"):
        out = tmp_path / "drawn.png"
        sample = ["sample", str(folder / file), "--count", "2", "--sampling-steps", "2", "--out", str(out)]
        assert main(sample) == 0
        assert out.exists()
    (folder / "samples.png").unlink()
    assert main(["quickstart", "--run", str(folder)]) == 0
    assert (folder / "samples.png").read_bytes() == before


def test_a_column_shows_one_class():
    images = load("synthetic", size=12)
    shown = quickstart._real_row(images)
    matches = (images.images[None] == shown[:, None]).flatten(2).all(2).int().argmax(1)
    assert images.labels[matches].tolist() == [column % 5 for column in range(quickstart.SHOWN)]
    assert len(shown.unique(dim=0)) == quickstart.SHOWN
    assert len(quickstart._real_row(replace(images, labels=images.labels.clamp(max=3)))) == quickstart.SHOWN
    assert len(quickstart._real_row(replace(images, labels=None, class_names=()))) == quickstart.SHOWN


def test_latents_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "latents.npz", x=np.zeros((80, 4, 32, 32), np.float32))
    assert main(["quickstart", "--data", str(tmp_path / "latents.npz"), "--run", str(tmp_path / "run")]) == 2
    assert "holds latents" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_recipes_are_the_chain_of_the_readme():
    for recipe in QUICKSTART.values():
        assert [stage.pattern for stage in recipe.stages] == ["dense", "3:4", "2:4"]
        assert all(isinstance(stage, Stage) for stage in recipe.stages)


def test_fewer_images_than_a_distance_needs_are_refused_before_training(tmp_path, capsys):
    np.savez(tmp_path / "few.npz", x=np.random.default_rng(0).integers(0, 255, (5, 20, 20, 3), np.uint8))
    assert main(["quickstart", "--data", str(tmp_path / "few.npz"), "--run", str(tmp_path / "run")]) == 2
    assert "3 real images to compare them with" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
