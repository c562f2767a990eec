"""`sparsedm sample` and `sparsedm evaluate` on the smallest possible run."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm import errors
from sparsedm.commands import drawing, evaluate, sample
from sparsedm.compression import compress
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model
from sparsedm.stepaware.family import Strategy, family_of
from sparsedm.train import data
from tests.commands.command import TINY, run


@pytest.mark.parametrize("extra", [[], ["--compress"], ["--sampler", "ddim", "--label", "1"]], ids=str)
def test_sample_draws_a_picture(trained, tmp_path, extra, capsys):
    out = tmp_path / "samples.png"
    assert run("sample", trained, "--count", 4, "--sampling-steps", 2, "--out", out, *extra) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert str(out) in said
    assert ("--compress" in extra) == bool(
        re.search(
            r"[\d.]+ images/s, with all.*\none call on 4 images: [\d.]+ ms; of the same network dense: [\d.]+ ms", said
        )
    )


@pytest.mark.parametrize("bad", [("--count", -1), ("--count", 0), ("--batch-size", 0)], ids=str)
def test_no_images_are_no_job(trained, bad, capsys):
    assert run("sample", trained, *bad) == 2
    assert "is not a whole number from 1" in capsys.readouterr().err


def test_a_cuda_graph_off_a_gpu_is_refused(trained, tmp_path, capsys):
    out = tmp_path / "samples.png"
    assert run("sample", trained, "--count", 4, "--cuda-graph", "--device", "cpu", "--out", out) == 2
    assert "a CUDA graph needs a CUDA device, and the network is on cpu" in capsys.readouterr().err
    assert not out.exists()


def test_compressed_samples_are_those_of_the_masked_model(trained, tmp_path):
    for name, extra in (("masked", []), ("compressed", ["--compress"])):
        assert (
            run("sample", trained, "--count", 4, "--sampling-steps", 2, "--out", tmp_path / f"{name}.png", *extra) == 0
        )
    assert (tmp_path / "masked.png").read_bytes() == (tmp_path / "compressed.png").read_bytes()


def test_a_compressed_file_is_drawn_as_what_compress_makes(trained, tmp_path, monkeypatch, capsys):
    seen, dtype = set(), drawing.network_dtype
    monkeypatch.setattr(drawing, "network_dtype", lambda o, compressed: seen.add(compressed) or dtype(o, compressed))
    save_model(tmp_path / "small.safetensors", compress(load_model(trained, build_model).model))
    command = ["sample", tmp_path / "small.safetensors", "--count", 4, "--sampling-steps", 2, "--out"]
    assert run(*command, tmp_path / "small.png") == 0
    assert seen == {True}, "on a GPU in bf16"
    assert run(*command, tmp_path / "again.png", "--compress") == 2
    assert "is compressed already: leave the option out" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "vae", "clip"), [(3, None, "every"), (3, "a", "never"), (4, None, "never")])
def test_latents_are_never_clipped(channels, vae, clip, monkeypatch):
    asked = []
    monkeypatch.setattr(drawing.samplers, "sample", lambda *a, **more: asked.append(more["clip"]) or torch.zeros(a[2]))
    network = build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2, channels=channels)
    options = SimpleNamespace(vae=vae, count=2, device=torch.device("cpu"), dtype="fp32", batch_size=2, seed=0)
    options.cuda_graph = False
    drawing.draw(drawing.Source("", [network], "ddim", 1), drawing.Conditions(), options)
    assert asked == [clip]


def test_evaluate_writes_numbers(trained, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    code = run(
        *("evaluate", trained, "--data", "synthetic", "--count", 16, "--sampling-steps", 2),
        *("--split", "test", "--dense", trained / "00-dense", "--out", out),
    )
    assert code == 0
    numbers = json.loads(out.read_text())
    assert numbers["frechet_distance"] > 0
    assert -1 <= numbers["ssim"] <= 1
    assert numbers["features"] in capsys.readouterr().out


def test_a_dry_run_of_evaluate_refuses_what_cannot_be_drawn(trained, tmp_path, capsys):
    save_model(tmp_path / "m.safetensors", build_model("ddpm-tiny", image_size=8, attention=()))
    command = ["evaluate", tmp_path / "m.safetensors", "--data", "synthetic", "--dry-run", "--sampler"]
    assert run(*command, "ddpm-learned") == 2
    assert "needs a network that has learnt the variance" in capsys.readouterr().err
    assert run(*command, "ddpm", "--sampling-steps", 1001) == 2
    assert "steps is 1001, but the schedule has only 1000 discrete times" in capsys.readouterr().err
    assert run(*command, "heun", "--nfe", 9) == 0
    assert "heun in 5 steps (9 network evaluations)" in capsys.readouterr().out


def test_a_dry_run_of_evaluate_refuses_a_dense_network_that_cannot_be_drawn_likewise(tmp_path, capsys):
    shape = {"image_size": 8, "dim": 32, "depth": 1, "heads": 2}
    for name, learnt in (("m", True), ("dense", False)):
        save_model(tmp_path / f"{name}.safetensors", build_model("dit-tiny", **shape, learn_sigma=learnt))
    command = ["evaluate", tmp_path / "m.safetensors", "--data", "synthetic", "--dry-run", "--sampler", "ddpm-learned"]
    assert run(*command) == 0
    assert run(*command, "--dense", tmp_path / "dense.safetensors") == 2
    assert re.search(r"--dense \S+: sampler ddpm-learned needs a network", capsys.readouterr().err)


def test_samples_are_compared_with_the_dense_network_of_a_chain_not_with_themselves(trained, tmp_path):
    out, found = tmp_path / "numbers.json", []
    for dense in (trained, trained / "00-dense"):
        command = ("evaluate", trained, "--data", "synthetic", "--split", "test", "--count", 16, "--out", out)
        assert run(*command, "--sampling-steps", 2, "--dense", dense) == 0
        found.append(json.loads(out.read_text())["ssim"])
    assert found[0] == found[1] < 1


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_where_nothing_can_be_written_nothing_is_drawn(command, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for module in (sample, evaluate):
        monkeypatch.setattr(module, "draw", lambda *_: pytest.fail("drawn"))
    data = ["--data", "synthetic"] if command == "evaluate" else []
    assert run(command, trained, *data, "--out", tmp_path / "file" / "drawn.png") == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_classes_stand_below_one_another(trained, tmp_path):
    out = tmp_path / "drawn.png"
    assert run("sample", trained, "--count", 24, "--sampling-steps", 1, "--out", out) == 0
    tile = 64 + 2
    assert Image.open(out).size == (12 * tile, 2 * tile)


def test_label_and_which_decide_what_is_drawn(trained, tmp_path, monkeypatch):
    asked = []

    def sampled(networks, schedule, count, shape, *, y, **more):
        asked.append((networks[0].in_blocks[0].mlp.fc1.weight, y.tolist()))
        return torch.zeros(count, *shape)

    monkeypatch.setattr(drawing.samplers, "sample", sampled)
    for more in ((), ("--label", 1), ("--which", "model")):
        assert run("sample", trained, "--count", 2, "--sampling-steps", 2, "--out", tmp_path / "a.npz", *more) == 0
    weights, labels = zip(*asked)
    assert labels == ([0, 1], [1, 1], [0, 1])
    for weight, which in zip(weights, ("ema", "ema", "model")):
        assert torch.equal(weight, load_model(trained, build_model, which=which).model.in_blocks[0].mlp.fc1.weight)
    assert not torch.equal(weights[0], weights[2])


def test_labels_must_be_the_models_own(trained, tmp_path, capsys):
    assert run("sample", trained, "--label", 6) == 2
    assert "the classes 0 to 5" in capsys.readouterr().err
    save_model(tmp_path / "plain.safetensors", build_model("uvit-tiny", image_size=8))
    assert run("sample", tmp_path / "plain.safetensors", "--label", 1) == 2
    assert "this one is unconditional" in capsys.readouterr().err


def test_a_foreign_file_is_read_as_the_named_model(tmp_path, capsys):
    file = tmp_path / "official.pth"
    torch.save(build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2).state_dict(), file)
    named = ["--model", "uvit-tiny", *TINY[:-2]]
    out = tmp_path / "drawn.png"
    assert run("sample", file, *named, "--count", 2, "--sampling-steps", 2, "--out", out) == 0
    assert out.exists()
    assert run("sample", file, "--model", "uvit-tiny") == 2
    error = capsys.readouterr().err
    assert "missing" in error
    assert "of another shape" in error or "for" in error


def test_a_strategy_draws_with_the_network_of_each_step(trained, tmp_path, capsys):
    family = family_of(trained)
    names, file, out = family.names, tmp_path / "s.json", tmp_path / "drawn.npz"
    draw = ["sample", trained, "--count", 3, "--out", out]
    for index, stage in ((0, "00-dense"), (2, "02-2of4")):  # one network at every step is that network's own sampling
        Strategy(family.name, names, "ddim", (index,) * 3, "", family.fingerprints).save(file)
        assert run(*draw, "--strategy", file) == 0
        mine = np.load(out)["images"]
        assert run(*draw[:1], trained / stage, *draw[2:], "--sampler", "ddim", "--sampling-steps", 3) == 0
        assert np.array_equal(np.load(out)["images"], mine)
    mixed = Strategy(family.name, names, "heun", (2, 0, 1), "", family.fingerprints)
    mixed.save(file)
    assert run(*draw, "--strategy", file, "--compress") == 0
    share = mixed_share(family, mixed)
    assert f"{share:.0%} of the MACs of dense, compressed, heun in 3 steps" in capsys.readouterr().out
    few = ("--data", "synthetic", "--split", "test", "--count", 16)
    assert run("evaluate", trained, *few, "--strategy", file) == 0
    written = json.loads((trained / "evaluation.json").read_text())
    assert written["sampler"] == "heun"
    assert written["strategy"] == str(file)
    assert written["macs_per_image"] == family.cost("heun", (2, 0, 1))
    assert written["share_of_macs"] == share
    for extra, message in [
        (["--sampler", "ddim"], "the strategy is for sampler heun, not ddim"),
        (["--sampling-steps", 4], "the strategy is for steps 3, not 4"),
        (["--which", "model"], "--strategy needs a run folder"),
    ]:
        assert run(*draw, "--strategy", file, *extra) == 2
        assert message in capsys.readouterr().err
    replace(mixed, fingerprints=("another",) * len(names)).save(tmp_path / "other.json")
    assert run(*draw, "--strategy", tmp_path / "other.json") == 2
    assert "the weights of dense" in capsys.readouterr().err
    assert run(*draw, "--strategy", tmp_path / "other.json", "--other-weights") == 0
    assert run(*draw, "--other-weights") == 2
    assert "--other-weights goes with --strategy" in capsys.readouterr().err
    assert run(*draw, "--strategy", tmp_path / "none.json") == 2
    assert "none.json is missing or unreadable" in capsys.readouterr().err
    assert run("sample", trained, "--sampling-steps", 0) == 2


def test_options_that_would_do_nothing_or_mislead_are_refused(trained, capsys):
    file = sorted((trained / "00-dense").glob("checkpoints/*/ema.safetensors"))[-1]
    assert run("sample", file, "--which", "model") == 2
    assert f"--which model goes with a run folder: the file {file} holds one network" in capsys.readouterr().err
    assert run("evaluate", file, "--data", "synthetic", "--dense", file, "--which", "model") == 2
    assert "--which model goes with a run folder" in capsys.readouterr().err
    few = ("--data", "synthetic", "--split", "test", "--count", 16, "--dense", trained / "02-2of4")
    assert run("evaluate", trained, *few) == 2
    assert "ema.safetensors holds a masked network, not a dense one" in capsys.readouterr().err


def mixed_share(family, strategy):
    return family.cost(strategy.sampler, strategy.indices) / family.cost(strategy.sampler, (0,) * strategy.steps)


def test_the_network_computes_in_the_dtype_that_is_asked_for(trained, tmp_path):
    drawn = {}
    for dtype in ("fp32", "auto", "bf16"):
        out = tmp_path / f"{dtype}.npz"
        assert run("sample", trained, "--count", 32, "--sampling-steps", 1, "--dtype", dtype, "--out", out) == 0
        drawn[dtype] = np.load(out)["images"].astype(int)
    assert np.array_equal(drawn["fp32"], drawn["auto"])
    assert 0 < abs(drawn["bf16"] - drawn["fp32"]).mean() < 10


def test_latents_are_written_as_numbers_that_train_reads(tmp_path, capsys):
    file, out = tmp_path / "dit.safetensors", tmp_path / "latents.npz"
    config = {"kind": "dit", "image_size": 8, "dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    save_model(file, build_model(config))
    assert run("sample", file, "--count", 3, "--sampling-steps", 2) == 2
    assert (
        "latents of 4 channels, not a picture: decode them with --vae DIR, or write the numbers"
        in capsys.readouterr().err
    )
    assert run("sample", file, "--count", 3, "--sampling-steps", 2, "--guidance", 0.5, "--out", out) == 0
    latents = data.load(out, "train")
    assert latents.is_latent
    assert latents.images.shape[1:] == (4, 8, 8)
    broken = build_model(config)
    torch.nn.init.constant_(list(broken.parameters())[-1], torch.nan)
    save_model(file, broken)
    assert run("sample", file, "--count", 3, "--sampling-steps", 2, "--out", tmp_path / "nan.npz") == 2
    assert "3 of 3 samples hold NaN or infinity: nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "nan.npz").exists()


def test_a_picture_needs_a_picture_name(trained, tmp_path, capsys):
    assert run("sample", trained, "--out", tmp_path / "x.foo") == 2
    assert "must end in .png" in capsys.readouterr().err


def test_a_picture_too_large_for_its_format_is_refused_before_it_is_drawn(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "draw", lambda *_: pytest.fail("drawn"))
    assert run("sample", trained, "--count", 10_000, "--out", tmp_path / "x.webp") == 2
    assert "such a file holds 16383: write .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_drawn_batch_larger_than_the_machine_is_refused_before_it_is_drawn(trained, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(drawing, "live_per_image", lambda network: measured.append(network) or 1 << 20)
    monkeypatch.setattr(errors, "_memory", lambda: 1 << 30)
    options = [trained, "--sampling-steps", 1, "--out", tmp_path / "a.png", "--batch-size", 10_000, "--count"]
    for command, takes in (
        (["sample", *options, 10_000], 9.77),
        (["sample", *options, 10_000, "--dtype", "bf16"], 4.88),
        (["evaluate", *options, 10_000, "--data", "synthetic"], 9.77),
    ):
        assert run(*command) == 2
        assert f"not enough memory: --batch-size 10000 takes {takes} GiB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    measured.clear()
    assert run("sample", *options, 9) == 0
    assert not measured, "nine images surely fit: no seconds are spent on that"


def test_a_scale_of_latents_needs_an_autoencoder(trained, capsys):
    assert run("sample", trained, "--latent-scale", 2) == 2
    assert "--latent-scale goes with --vae" in capsys.readouterr().err


def test_the_home_folder_is_found_behind_an_equals_sign(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("sample", trained, "--count", 1, "--sampling-steps", 1, "--out=~/a.png") == 0
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize("read", ["model", "data", "features", "dense"])
def test_numbers_do_not_replace_what_they_are_computed_from(read, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("model", "dense", "features")}
    for file in files.values():
        save_model(file, build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2))
    files["data"] = tmp_path / "data.npz"
    np.savez(files["data"], x=np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8))
    before = files[read].read_bytes()
    command = ["evaluate", files["model"], "--data", files["data"], "--count", 4, "--sampling-steps", 1]
    command += [f"--{read}", files[read]] if read in ("features", "dense") else []
    (tmp_path / "link").symlink_to(files[read])
    assert run(*command, "--out", tmp_path / "link") == 2
    assert "link is an input of this command, or of a later one: write to another file" in capsys.readouterr().err
    assert files[read].read_bytes() == before
    assert (tmp_path / "link").is_symlink()


def test_images_do_not_replace_the_texts_that_they_show(tmp_path, capsys):
    network = build_model("uvit-tiny", image_size=8, dim=32, depth=2, heads=2, context_tokens=2, context_dim=4)
    save_model(tmp_path / "m.safetensors", network)
    np.savez(tmp_path / "texts.npz", context=np.zeros((2, 2, 4), np.float32))
    command = ["sample", tmp_path / "m.safetensors", "--count", 2, "--sampling-steps", 1, "--context"]
    assert run(*command, tmp_path / "texts.npz", "--out", tmp_path / "texts.npz") == 2
    assert "texts.npz is an input of this command" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["options.json", "metrics.jsonl", "state.json", "ema.safetensors"])
def test_numbers_replace_no_part_of_a_run(inside, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    file = next((tmp_path / "run").rglob(inside))
    before = file.read_bytes()
    assert run("evaluate", tmp_path / "run", "--data", "synthetic", "--count", 4, "--out", file) == 2
    assert run("inspect", tmp_path / "run", "--json", file) == 2
    assert capsys.readouterr().err.count("is an input of this command, or of a later one: write to another file") == 2
    assert file.read_bytes() == before
