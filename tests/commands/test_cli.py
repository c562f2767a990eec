"""The commands as a user runs them, on the smallest possible jobs."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm import cli, errors
from sparsedm.cli import COMMANDS, main, parse
from sparsedm.commands import evaluate, sample, train
from sparsedm.model_files import load_model, save_model
from sparsedm.models import MODELS, build_model
from sparsedm.stepaware.family import Strategy, family_of
from sparsedm.train import data
from sparsedm.train.stages import METHODS

TINY = ["--set", "image_size=8", "--set", "dim=32", "--set", "depth=2", "--set", "heads=2", "--set", "num_classes=6"]


def run(*arguments):
    """The exit code of `sparsedm arguments`."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as exit:  # argparse's own refusals
        return exit.code


@pytest.mark.parametrize(("old", "new"), [("bench", "inspect --time"), ("experiment", "python -m bench.experiments")])
def test_a_command_that_left_the_package_says_where_it_went(old, new, capsys):
    assert run(old, "--model", "uvit-tiny") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert new in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "chain"
    code = run(
        *("train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--batch-size", 8),
        *("--steps", 6, "--save-every", 2, "--log-every", 1, "--run", folder),
    )
    assert code == 0
    return folder


def test_train_leaves_a_run_folder(trained):
    assert [p.name for p in sorted(trained.glob("0*"))] == ["00-dense", "01-3of4", "02-2of4"]
    assert (trained / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((trained / "options.json").read_text())["data"] == "synthetic"


def test_train_again_has_nothing_to_do_and_other_options_are_refused(trained, capsys):
    same = ["train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--batch-size", 8]
    same += ["--steps", 6, "--save-every", 2, "--log-every", 1, "--run", trained]
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}
    assert run(*same) == 0
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}
    assert run(*same, "--lr", 1e-3) == 2
    assert "lr" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--compress"], ["--sampler", "ddim", "--label", "1"]], ids=str)
def test_sample_draws_a_picture(trained, tmp_path, extra, capsys):
    out = tmp_path / "samples.png"
    assert run("sample", trained, "--count", 4, "--sampling-steps", 2, "--out", out, *extra) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert str(out) in said
    assert bool(re.search(r"[\d.]+ images/s; the same network dense about [\d.]+", said)) == ("--compress" in extra)


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


def test_labels_must_be_the_models_own(trained, tmp_path, capsys):
    assert run("sample", trained, "--label", 6) == 2
    assert "the classes 0 to 5" in capsys.readouterr().err
    save_model(tmp_path / "plain.safetensors", build_model("uvit-tiny", image_size=8))
    assert run("sample", tmp_path / "plain.safetensors", "--label", 1) == 2
    assert "this one is unconditional" in capsys.readouterr().err


def test_methods_start_from_a_dense_run(trained, tmp_path, capsys):
    common = ["train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--batch-size", 8]
    common += ["--steps", 2, "--method", "sr-ste+kd", "--run", tmp_path / "method"]
    assert run(*common) == 2
    assert "--init" in capsys.readouterr().err
    assert run(*common, "--init", trained / "00-dense") == 0
    assert (tmp_path / "method" / "00-sr-ste+kd" / "checkpoints").is_dir()


def test_a_method_starts_from_the_dense_stage_of_a_chain(trained, tmp_path):
    common = ["--data", "synthetic", "--limit", 64, "--batch-size", 8, "--steps", 2, "--run", tmp_path / "oneshot"]
    assert run("train", "--init", trained, "--method", "oneshot", *common) == 0
    dense, pruned = (
        load_model(folder, build_model).model.in_blocks[0].mlp.fc1.weight
        for folder in (trained / "00-dense", tmp_path / "oneshot")
    )
    assert torch.equal(dense, pruned)


def test_init_must_be_dense_and_agree_with_the_named_model(trained, tmp_path, capsys):
    common = ["--data", "synthetic", "--limit", 64, "--batch-size", 8, "--steps", 2, "--run", tmp_path / "no"]
    assert run("train", "--init", trained / "02-2of4", "--method", "ste", *common) == 2
    assert "holds a masked network, not a dense one" in capsys.readouterr().err
    assert run("train", "--init", trained, "--model", "ddpm-tiny", "--method", "ste", *common) == 2
    assert "describes its own model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


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


def test_mixed_sizes_are_refused_and_another_size_is_fitted(tmp_path, capsys):
    common = ["train", *TINY[:-2], "--set", "image_size=8", "--data", tmp_path / "images", "--batch-size", 4]
    common += ["--steps", 4, "--run", tmp_path / "run"]
    for index in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "odd.png")
    assert run(*common) == 2
    assert "all need one size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "images" / "odd.png").unlink()
    assert run(*common) == 0
    assert "of 16x16 pixels are cropped to squares and resized to 8x8" in capsys.readouterr().out


def test_a_refused_run_leaves_no_folder_and_the_corrected_one_starts(tmp_path, capsys):
    common = ["train", "--data", "synthetic", "--limit", 64, "--batch-size", 8, "--steps", 4, "--run", tmp_path / "run"]
    tiny = TINY[:-2]
    assert run(*common, *tiny, "--set", "num_classes=2") == 2
    assert "expects labels 0..1" in capsys.readouterr().err
    assert run(*common, *tiny, "--w-kd", "nan") == 2
    assert "--w-kd: 'nan' is not a finite number" in capsys.readouterr().err
    assert run(*common, *tiny, "--decay", "-1") == 2
    assert "decay=-1.0 must be 0 or more, and finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(*common, *tiny) == 0


def test_a_picture_needs_a_picture_name(trained, tmp_path, capsys):
    assert run("sample", trained, "--out", tmp_path / "x.foo") == 2
    assert "must end in .png" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "nothing"
    arguments = ["train", "--model", "uvit-cifar10-small", "--data", "cifar10", "--steps", 1000, "--run", folder]
    assert run(*arguments, "--dry-run") == 0
    assert not folder.exists()
    text = capsys.readouterr().out
    assert "44,255,328" in text
    assert "11,321.6 M" in text
    assert "8,694.1 M" in text


def test_dry_run_refuses_what_the_run_would_refuse(capsys):
    assert run("train", "--data", "synthetic", "--chain", "2:4", "--dry-run") == 2
    assert "begin with a dense stage" in capsys.readouterr().err


INSPECT_TOTALS = {
    None: ("11.32 G ->       6.07 G", "12.20 G ->       6.95 G"),
    "all": ("11.32 G ->       5.66 G", "12.20 G ->       6.54 G"),
}


@pytest.mark.parametrize("where", INSPECT_TOTALS)
def test_inspect_prints_the_published_totals(where, tmp_path, capsys):
    chart = tmp_path / "layers.png"
    arguments = ["inspect", "--model", "uvit-cifar10-small", "--pattern", "2:4", "--plot", chart]
    assert run(*arguments, *(["--where", where] if where else [])) == 0
    text = capsys.readouterr().out
    assert all(total in text for total in INSPECT_TOTALS[where])
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_inspect_names_the_chart_after_what_it_shows(trained, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "mine.safetensors", build_model("uvit-tiny"))
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "mine.safetensors", "--pattern", "2:4") == 0
    assert (tmp_path / "mine-2of4-layers.png").exists()
    monkeypatch.chdir(trained)
    assert run("inspect", ".") == 0
    assert (trained / f"{trained.name}-layers.png").exists()


def test_inspect_reads_a_run_folder(trained, tmp_path, capsys):
    assert run("inspect", trained, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json") == 0
    assert "2:4" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["totals"]["parameters"] > 0


def test_quickstart_dry_run_prints_the_plan(capsys):
    assert run("quickstart", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "3:4" in plan
    assert "1,065,711" in plan, "the network that is trained: with its classes"


def _not_an_image_archive(folder):
    (folder / "x.zip").write_bytes(b"PK\x03\x04 cut short")
    return folder / "x.zip"


BAD = {
    "unknown model": (["inspect", "--model", "uvit-giant"], "unknown model 'uvit-giant'"),
    "unknown pattern": (["inspect", "--model", "uvit-tiny", "--pattern", "half"], "unknown pattern 'half'"),
    "3:2": (["inspect", "--model", "uvit-tiny", "--pattern", "3:2"], "pattern 3:2"),
    "0:4": (["inspect", "--model", "uvit-tiny", "--pattern", "0:4"], "pattern 0:4"),
    "2:5": (["inspect", "--model", "uvit-tiny", "--pattern", "2:5"], "pattern 2:5"),
    "unknown option": (["inspect", "--model", "uvit-tiny", "--set", "size=3"], "unknown model option 'size'"),
    "--set without =": (["inspect", "--model", "uvit-tiny", "--set", "size"], "write name=value"),
    "nothing to inspect": (["inspect"], "name something to inspect"),
    "two hyphens": (["train", "--steps=--", "--data", "synthetic"], "--steps=-- gives no value"),
    "no data": (["quickstart", "--data", "{folder}/none", "--run", "{folder}/run"], "none"),
    "empty data": (["quickstart", "--data", "{folder}", "--run", "{folder}/run"], "{folder}"),
    "truncated zip": (["quickstart", "--data", "{zip}", "--run", "{folder}/run"], "x.zip"),
    "no checkpoint": (["sample", "{folder}"], "holds no checkpoint"),
    "foreign checkpoint": (["sample", "{zip}"], "x.zip"),
    "no cuda": (["quickstart", "--device", "cuda:99"], "cuda:99 was asked for"),
    "no such device": (["quickstart", "--device", "gpu"], "'gpu' is not a device"),
    "unknown method": (["train", "--data", "synthetic", "--method", "magic"], "unknown method 'magic'"),
    "negative seed": (["train", "--data", "synthetic", "--seed", "-1"], "'-1' is not a whole number"),
    "device not served": (["quickstart", "--device", "mps"], "'mps' is not supported"),
    "where without pattern": (["inspect", "--model", "uvit-tiny", "--where", "qkv"], "give one with --pattern"),
    "no batch": (["inspect", "--model", "uvit-tiny", "--batch", "0"], "'0' is not a whole number from 1"),
    "no chart": (
        ["inspect", "--model", "uvit-tiny", "--plot", "x.txt"],
        "x.txt must end in .png, .jpg, .jpeg or .webp",
    ),
    "numbers in a folder": (["inspect", "--model", "uvit-tiny", "--json", "."], "cannot write .: it is a folder"),
    "more bytes than there are": (
        ["inspect", "--model", "uvit-tiny", "--set", "image_size=1000000000"],
        "model option image_size=1000000000: must be from -16777216 to 16777216",
    ),
    "too deep": (["inspect", "--model", "uvit-tiny", "--set", "depth=257"], "depth=257: must be from -256 to 256"),
    "a split below zero": (["train", "--data", "synthetic", "--split", "-1,2"], "split [-1.0, 2.0] must be"),
    "less than nothing": (["train", "--data", "synthetic", "--decay", "-inf"], "argument --decay: '-inf' is not a"),
    "begins with -": (["train", "--data", "synthetic", "--where", "-x"], "if it begins with -, write --where=VALUE"),
    "no flag": (["inspect", "--model", "uvit-tiny", "--set", "velocity=yes"], "must be of type bool, true or false"),
    "guidance without end": (["sample", "{folder}", "--guidance", "nan"], "argument --guidance: 'nan' is not a finite"),
    "guidance in words": (["sample", "{folder}", "--guidance", "much"], "argument --guidance: 'much' is not a finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(name, tmp_path, capsys):
    arguments, message = BAD[name]
    places = {"folder": tmp_path / "data", "zip": tmp_path / "x.zip"}
    places["folder"].mkdir()
    _not_an_image_archive(tmp_path)
    assert run(*(a.format(**places) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1, "one sentence"
    assert not (places["folder"] / "run").exists(), "a refused command must leave nothing behind"


@pytest.mark.parametrize(
    "lacking",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"), 2**62],
    ids=repr,
)
def test_a_lack_of_memory_is_one_sentence(lacking, monkeypatch, tmp_path, capsys):
    def run_chain(*_, **__):
        if isinstance(lacking, Exception):
            raise lacking
        torch.empty(lacking, dtype=torch.uint8)  # torch's own refusal, on a CPU

    monkeypatch.setattr(train, "run_chain", run_chain)
    assert run("train", "--data", "synthetic", "--set", "image_size=12", "--run", tmp_path / "run") == 2
    assert "not enough memory (" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--accumulate", 1000)])
def test_a_batch_larger_than_the_machine_is_refused_before_anything_is_written(more, tmp_path, capsys):
    command = ["train", "--data", "synthetic", "--batch-size", 2_000_000_000, "--run", tmp_path / "run", *more]
    assert run(*command) == 2
    assert "not enough memory: --batch-size 2000000000 takes" in capsys.readouterr().err
    assert run(*command, "--dry-run") == 0, "the plan may be for another machine"
    assert "not enough memory: --batch-size 2000000000 takes" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_drawn_batch_larger_than_the_machine_is_refused_before_it_is_drawn(trained, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(sample, "live_per_image", lambda network: measured.append(network) or 1 << 20)
    monkeypatch.setattr(errors, "_memory", lambda: 1 << 30)
    options = [trained, "--sampling-steps", 1, "--out", tmp_path / "a.png", "--batch-size", 10_000, "--count"]
    for command, takes in (
        (["sample", *options, 10_000], 10),
        (["sample", *options, 10_000, "--dtype", "bf16"], 5),
        (["evaluate", *options, 10_000, "--data", "synthetic"], 10),
    ):
        assert run(*command) == 2
        assert f"not enough memory: --batch-size 10000 takes {takes} GiB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    measured.clear()
    assert run("sample", *options, 9) == 0
    assert not measured, "nine images surely fit: no seconds are spent on that"


def test_a_defect_is_not_a_lack_of_memory(monkeypatch, tmp_path):
    def run_chain(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(train, "run_chain", run_chain)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run("train", "--data", "synthetic", "--set", "image_size=12", "--run", tmp_path / "run")


def test_output_reaches_a_pipe_at_once_and_in_any_encoding(monkeypatch, tmp_path):
    class Pipe(io.BytesIO):
        lines = 0

        def write(self, piece):
            self.lines += 1
            return super().write(piece)

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="ascii"))
    assert run("inspect", "--model", "uvit-tiny", "--plot", tmp_path / "wei\udcffß.png") == 0
    assert b"wei\\udcff\\xdf.png\n" in pipe.getvalue()
    assert pipe.lines > 1, "one write at the end of the command would come too late for who is waiting"


def test_a_reader_that_leaves_ends_the_command_without_a_word(monkeypatch, tmp_path, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("inspect", "--model", "uvit-tiny", "--plot", tmp_path / "a.png") == 141
    assert not (tmp_path / "a.png").exists()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train", "sample", "evaluate", "inspect", "quickstart"])
def test_help_teaches(command, capsys):
    assert run(*filter(None, [command]), "--help") == 0
    text = capsys.readouterr().out
    assert "examples" in text or not command
    assert all(name in text for name in MODELS) or "--model" not in text, "a name cut at a hyphen cannot be copied"
    assert all(f"  {name}: " in text for name in METHODS) or "--method" not in text, "a line for each"
    assert ("--seed" in text) == (command not in ("", "inspect")), "an option is there where it does something"
    assert "exit codes:" in text


@pytest.mark.parametrize("library", ["glibc", "musl", None])
def test_freed_memory_is_kept_where_the_c_library_is_glibc(library, monkeypatch):
    told = {}
    glibc = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda option, size: told.update({option: size}))
    known = {"glibc": glibc, "musl": SimpleNamespace(mallopt=glibc.mallopt)}

    def load(name):
        if library is None:
            raise OSError("no such library")
        return known[library]

    monkeypatch.setattr(cli.ctypes, "CDLL", load)
    cli.keep_freed_memory()
    assert set(told) == ({cli.M_MMAP_THRESHOLD, cli.M_TRIM_THRESHOLD} if library == "glibc" else set())


def test_help_does_not_wait_for_torch():
    code = "import runpy, sys, time; sys.argv = ['sparsedm', '--help']"
    code += "\ntry: runpy.run_module('sparsedm', run_name='__main__')  # as python -m does"
    code += "\nexcept SystemExit as end: code = end.code"
    code += "\ncode = code or any(name in sys.modules for name in ('torch', 'matplotlib', 'numpy', 'PIL'))"
    code += "\nsys.exit(code or time.process_time() > 0.3)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(f"\n    {name}" in shown.stdout for name in COMMANDS)


def test_every_command_is_a_module_of_its_own():
    for module, summary in COMMANDS.values():
        command = importlib.import_module(module)
        assert callable(command.run)
        assert callable(command.add_arguments)
        assert command.EXAMPLES
        assert summary


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_commands(command):
    for example in importlib.import_module(COMMANDS[command][0]).EXAMPLES:
        assert parse([command, *example.split()]).run_command


def test_cuda_is_refused_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    assert run("quickstart", "--device", "cuda") == 2
    assert "torch sees 0 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--where", "--betas", "--init"])
def test_an_empty_value_names_its_option(option, capsys):
    assert run("train", "--data", "synthetic", option, "") == 2
    assert f"sparsedm train: argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1e39", "-1e308", "١", "1_0"])
def test_a_number_that_a_network_cannot_hold_is_refused(number, capsys):
    assert run("train", "--data", "synthetic", f"--lr={number}") == 2
    assert f"{number!r} is not a finite number of 32 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [("--pattern", "1:4"), ("--method", "dense", "--decay", 1), ("--method", "dense", "--w-kd", 1)],
    ids=lambda options: options[-2],
)
def test_an_option_that_would_do_nothing_is_refused(options, tmp_path, capsys):
    assert run("train", "--data", "synthetic", *options, "--run", tmp_path / "run") == 2
    assert f"{options[-2]}{' 1:4' if len(options) == 2 else ''} needs --" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_scale_of_latents_needs_an_autoencoder(trained, capsys):
    assert run("sample", trained, "--latent-scale", 2) == 2
    assert "--latent-scale goes with --vae" in capsys.readouterr().err


def test_what_cannot_be_written_after_training_is_refused_before(tmp_path, capsys):
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    (tmp_path / "file").touch()
    for folder, reason in (("run", "loss.png: it is a folder"), ("file", "Not a directory")):
        for more in ((), ("--dry-run",)):
            assert run("train", "--data", "synthetic", "--run", tmp_path / folder, *more) == 2
            assert reason in capsys.readouterr().err
    for command in (["quickstart", "--run"], ["search", "--out"]):
        assert run(*command, tmp_path / "file", "--dry-run") == 2
        assert "Not a directory" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["loss.png"]


@pytest.mark.parametrize("command", [["train"], ["quickstart"], ["evaluate", "{run}"], ["search"]])
def test_a_dry_run_refuses_data_of_a_kind_that_nothing_reads(command, trained, tmp_path, capsys):
    (tmp_path / "data.txt").touch()
    command = [word.format(run=trained) for word in command]
    assert run(*command, "--data", tmp_path / "data.txt", "--dry-run") == 2
    assert "data.txt: must be a folder, or end in .zip, .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["evaluate", "{run}", "--features", "inceptoin"], "unknown features 'inceptoin'"),
        (["evaluate", "{run}", "--dense", "none"], "none does not exist"),
        (["evaluate", "{run}", "--count", 3], "3 generated"),
        (["search", "--features", "inceptoin"], "unknown features 'inceptoin'"),
        (["search", "--networks", "dense"], "--networks names networks of a run folder"),
        (["search", "--exclude", "2:5"], "no network to leave out is named '2:5': dense, 2:4, 1:4, 1:8"),
        (["search", "--family", "widths", "--exclude", "9/8"], "no network to leave out is named '9/8': dense 8/8"),
        (["search", "{run}", "--sampling-steps", 2, "--population", 100], "a population of 100 is more than"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value[-2:])),
)
def test_a_dry_run_refuses_what_would_be_refused_later(options, said, trained, capsys):
    assert run(*(str(word).format(run=trained) for word in options), "--data", "synthetic", "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_the_home_folder_is_found_behind_an_equals_sign(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("sample", trained, "--count", 1, "--sampling-steps", 1, "--out=~/a.png") == 0
    assert (tmp_path / "a.png").exists()


def test_a_link_to_itself_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    for command in (["inspect"], ["import"], ["sample"], ["evaluate", "--data", "synthetic"], ["quickstart", "--data"]):
        assert main([*command, "a.safetensors"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
