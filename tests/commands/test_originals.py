"""What the command line offers so that a published network is trained and sampled as its original was."""

import json

import pytest

from sparsedm.cli import main
from sparsedm.model_files import save_model
from sparsedm.models import build_model


@pytest.fixture
def file(tmp_path):
    return str(save_model(tmp_path / "m.safetensors", build_model("uvit-tiny", image_size=8)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nfe", "9", "--sampler", "heun", "--clip", "final"], "heun in 5 steps (9 network evaluations)"),
        (["--nfe", "4", "--sampler", "ddpm-large", "--clip", "never"], "ddpm-large in 4 steps (4 network evaluations)"),
        (["--sampling-steps", "2", "--sampler", "euler-maruyama-uvit"], "schedule vp-sde, seed 0"),
    ],
)
def test_sampling_says_what_it_costs(file, tmp_path, capsys, options, said):
    assert main(["sample", file, "--count", "2", "--out", str(tmp_path / "a.png"), *options]) == 0
    assert said in capsys.readouterr().out


def test_a_network_that_nobody_published_has_no_published_sampler(file, tmp_path, capsys):
    assert main(["sample", file, "--sampler", "published", "--out", str(tmp_path / "a.png")]) == 2
    assert "is not a published one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", file, "--nfe", "0", "--out", str(tmp_path / "a.png")])
    assert "'0' is not a whole number from 1" in capsys.readouterr().err


def test_training_takes_the_recipe_of_the_original_and_options_above_it(tmp_path, capsys):
    plan = ["train", "--data", "synthetic", "--dry-run", "--run", str(tmp_path / "a")]
    assert main([*plan, "--model", "ddpm-cifar10", "--lr", "0.5"]) == 0
    said = capsys.readouterr().out
    assert (
        "recipe of the original: optimizer=adam, betas=(0.9, 0.999), weight_decay=0.0, warmup_most=5000, lr=0.5" in said
    )
    assert main([*plan, "--model", "uvit-imagenet256-huge", "--set", "schedule=vp-sde"]) == 0
    assert "schedule vp-sde: uvit-imagenet256-huge was published with scaled-linear" in capsys.readouterr().out


def test_every_option_of_a_recipe_is_an_option(tmp_path):
    asked = ["--optimizer=adam", "--betas=0.8,0.9", "--weight-decay=0", "--clip=0.5", "--label-dropout=0.2"]
    command = ["train", "--data", "synthetic", "--limit", "16", "--steps", "1", "--batch-size", "4", "--chain", "dense"]
    model = ["--set", "image_size=8", "--set", "dim=16", "--set", "heads=2", "--run", str(tmp_path / "a")]
    assert main([*command, *model, *asked, "--ema-warmup=3"]) == 0
    options = json.loads((tmp_path / "a" / "options.json").read_text())["options"]
    expected = {"optimizer": "adam", "betas": [0.8, 0.9], "weight_decay": 0, "clip": 0.5, "label_dropout": 0.2}
    assert options | expected | {"ema_warmup": 3} == options
