"""`sparsedm search` from nothing, on a scale of a few steps, and its refusals."""

import itertools
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsedm.cli import main
from sparsedm.commands import options as command_options
from sparsedm.commands import train
from sparsedm.errors import InputError
from sparsedm.model_files import save_model
from sparsedm.models import build_model, model_config
from sparsedm.recipes import SEARCHES
from sparsedm.stepaware import study
from sparsedm.train import loop


@pytest.fixture
def tiny_scale(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    shapes = {"chain": {"dim": 16, "depth": 2, "heads": 2}, "both": {"multipliers": (1, 1), "attention": ()}}
    few = {"count": 4, "samples": 4, "validation": 4, "sampling_steps": 2, "population": 9, "generations": 1}
    for family, shape in shapes.items():
        scale = SEARCHES["smoke"][family]
        overrides, stages = scale.overrides | shape, tuple(replace(stage, steps=2) for stage in scale.stages)
        options = replace(scale.options, batch_size=4)
        tiny = replace(scale, overrides=overrides, stages=stages, options=options, **few)
        monkeypatch.setitem(SEARCHES["smoke"], family, tiny)
    load = study.load_images
    for module in (study, train):
        monkeypatch.setattr(module, "load_images", lambda *a, limit=None, **_: load(*a, limit=min(limit or 20, 20)))
    monkeypatch.setattr(study, "SHOWN", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", ["chain", pytest.param("both", marks=pytest.mark.slow)])
def test_from_nothing_and_again(tiny_scale, tmp_path, capsys, monkeypatch, family):
    command = ["search", "--scale", "smoke", "--family", family, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "out" / "front.png") in out
    assert "rank correlation" in out
    assert ("0 = dense, 1 = 2:4, 2 = 1:4, 3 = 1:8" if family == "chain" else "dense 8/8") in out
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"family", "front.png", "samples.png", "report.md"}
    monkeypatch.setattr(study, "_distance_to", lambda *_: pytest.fail)
    assert main(command) == 0, "finished: nothing is measured again"
    assert out.splitlines()[1:-1] == capsys.readouterr().out.splitlines()[1:-1]


@pytest.mark.gpu
@pytest.mark.parametrize("unit", ["MACs", "seconds"])
def test_on_a_gpu(tiny_scale, tmp_path, capsys, monkeypatch, unit):
    pytest.importorskip("pymoo")
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    assert main(["search", "--device", "cuda", "--unit", unit, "--out", str(tmp_path / "out")]) == 0
    assert "rank correlation" in capsys.readouterr().out


def test_an_existing_run_is_searched_on_the_data_it_was_trained_on(tiny_scale, tmp_path, capsys):
    run = tmp_path / "mine"
    train = ["train", "--set", "image_size=12", "--set", "dim=16", "--set", "depth=2", "--set", "heads=2"]
    small = ["--data", "synthetic", "--limit", "8", "--steps", "4", "--batch-size", "4", "--save-every", "10"]
    assert main([*train, *small, "--chain", "dense,2:4", "--run", str(run)]) == 0
    search = ["search", str(run), "--population", "4", "--generations", "1", "--quality", "proxy"]
    assert main([*search, "--dry-run"]) == 0
    assert f"search folder: {run / 'search'}" in capsys.readouterr().out
    assert not (run / "search").exists()
    assert main(search) == 0
    assert (run / "search" / "report.md").exists()
    (run / "options.json").unlink()
    assert main([*search, "--out", str(tmp_path / "other")]) == 2
    assert "does not name its training data: name it with --data" in capsys.readouterr().err


def test_without_pymoo_nothing_is_trained(tiny_scale, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.optimize", None)
    assert main(["search", "--out", str(tmp_path / "out")]) == 2
    assert "the search needs pymoo: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_features_that_cannot_be_had_are_refused_before_anything_is_trained(tiny_scale, tmp_path, capsys):
    assert main(["search", "--out", str(tmp_path / "out"), "--features", "random-cnov"]) == 2
    assert "unknown features 'random-cnov'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "option", "message"),
    [
        ("moments", ("--quality", "frechet"), "holds latents, not images for a Fréchet distance"),
        ("moments", ("--quality", "proxy"), "trained"),
        ("images", ("--guidance", "0.5"), "guidance 0.5 needs networks with classes"),
    ],
)
def test_only_what_can_be_searched_is_trained(tiny_scale, held, option, message, tmp_path, capsys, monkeypatch):
    def trained(start, stages, images, *others, **more):
        loop.check_data(start.model, images, more["validation"])
        raise InputError("trained")

    monkeypatch.setattr(train, "run_chain", trained)
    arrays = {"moments": torch.zeros(40, 8, 12, 12), "images": torch.zeros(40, 12, 12, 3, dtype=torch.uint8)}
    np.savez(tmp_path / "set.npz", **{held: arrays[held].numpy()})
    assert main(["search", "--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "out"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_search_that_is_cut_again_and_again_is_that_of_one_piece(tiny_scale, tmp_path, capsys, monkeypatch):
    """The clock goes on by a second whenever it is looked at, so that every place where time can be up is one."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    for module in (command_options, study, loop):
        monkeypatch.setattr(module, "time", clock)
    command = ["search", "--out", str(tmp_path / "cut"), "--workers", "1", "--minutes"]
    said = []
    while (code := main([*command, f"{(command_options.RESERVE + 4) / 60}"])) and len(said) < 20:
        assert code == 3
        said.append(capsys.readouterr().err)
    assert code == 0
    assert "after step 1, which is saved in" in said[0]
    assert any("before step" in words for words in said)
    assert "strategies of the search in" in said[-1]
    assert main(["search", "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("cut", "whole")]
    for report in reports:
        del report["seconds"], report["family"]  # which is the folder's name
    assert reports[0] == reports[1]


@pytest.mark.parametrize("family", ["chain", "widths", "both"])
@pytest.mark.parametrize("scale", SEARCHES)
def test_a_dry_run_shows_the_plan_and_writes_nothing(scale, family, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--scale", scale, "--family", family, "--weight", "0.1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dense" in out
    assert "search: DDSM with weight 0.1" in out
    assert f"search folder: runs/search-{scale}-{family}" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", SEARCHES)
def test_every_family_can_be_built_and_searched(scale):
    """The networks fit the data, the population holds every uniform strategy, a batch can be divided among widths."""
    for settings in SEARCHES[scale].values():
        config = model_config(settings.model, **settings.overrides)
        widths = getattr(config, "eighths", (8,))
        assert len(settings.stages) * len(widths) >= 2
        assert settings.population >= 1.5 * len(settings.stages) * len(widths)
        assert settings.options.batch_size >= getattr(config, "passes", 0)
    assert model_config("slimmable-cifar10").image_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--population", "1"], "search option population=1: must be at least 2"),
        (["--sampling-steps", "0"], "'0' is not a whole number from 1 to 100000"),
        (["--count", "1"], "count is 1: at least 2 images"),
        (["--workers", "0"], "'0' is not a whole number from 1"),
        (["--minutes", "0.5"], "--minutes 0.5: more than 40 seconds are needed to stop cleanly"),
        (["--minutes", "nan"], "'nan' is not a finite number"),
        (["--minutes", "-3"], "'-3' is not more than 0"),
        (["--weight", "-1"], "search option weight=-1.0"),
        (["--sampler", "ddpm-learned"], "sampler ddpm-learned needs a network that has learnt the variance"),
        (
            ["--family", "widths", "--sampler", "ddpm", "--sampling-steps", "1500"],
            "steps is 1500, but the schedule has only 1000 discrete times",
        ),
        (["--nfe", "9", "--sampling-steps", "5"], "argument --sampling-steps: not allowed with argument --nfe"),
        (["--population", "2"], "a population of 2 is too small"),
        (["nowhere"], "nowhere does not exist"),
        (["nowhere", "--data", "synthetic"], "nowhere does not exist"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
        (["nowhere", "--family", "chain"], "--family says how to train a family, but RUN has one"),
        (["nowhere", "--distill", "1"], "--distill says how to train a family, but RUN has one"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["search", *arguments, "--dry-run"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_evaluations_in_place_of_steps(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--nfe", "9", "--sampler", "heun", "--dry-run"]) == 0
    assert "5 steps of heun (9 network evaluations)" in capsys.readouterr().out


def test_a_search_in_a_model_file_writes_beside_no_file(capsys, tmp_path, monkeypatch):
    """But into the current folder, as sample does."""
    monkeypatch.chdir(tmp_path)
    shape = {"image_size": 12, "multipliers": (1, 1), "attention": (), "eighths": (4, 8)}
    save_model(tmp_path / "slim.safetensors", build_model("slimmable-tiny", **shape))
    few = ["--population", "4", "--sampling-steps", "3", "--data", "synthetic"]
    assert main(["search", str(tmp_path / "slim.safetensors"), *few, "--dry-run"]) == 0
    assert "search folder: search " in capsys.readouterr().out
