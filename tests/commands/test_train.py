"""`sparsedm train` as a user runs it, on the smallest possible jobs."""

import json
import os
import re

import pytest
import torch
from PIL import Image
from torch._dynamo.exc import BackendCompilerFailed

from sparsedm.commands import train
from sparsedm.model_files import load_model
from sparsedm.models import build_model
from tests.commands.command import TINY, run


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
    for option, value in (("lr", 1e-3), ("crop", "celeba")):
        assert run(*same, f"--{option}", value) == 2
        assert f"{option} is " in capsys.readouterr().err
    assert run(*same, "--crop", "square") == 0, "which is its own"


def test_the_crop_is_recorded_where_a_folder_without_it_means_another(tmp_path, monkeypatch):
    records = []
    monkeypatch.setattr(train, "original_crop", lambda config: "celeba")
    monkeypatch.setattr(train, "run_chain", lambda *_, record, **__: records.append(record.get("crop")) or [])
    command = ["train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--run", tmp_path / "x"]
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    for crop in ((), ("--crop", "square")):
        assert run(*command, *crop) == 0
    assert records == ["celeba", None]


def test_methods_start_from_a_dense_run(trained, tmp_path, capsys):
    common = ["train", "--model", "uvit-tiny", *TINY, "--data", "synthetic", "--limit", 64, "--batch-size", 8]
    common += ["--steps", 2, "--method", "sr-ste+kd", "--run", tmp_path / "method"]
    assert run(*common) == 2
    assert "--init" in capsys.readouterr().err
    assert run(*common, "--init", trained / "00-dense") == 0
    assert (tmp_path / "method" / "00-sr-ste+kd" / "checkpoints").is_dir()


def test_the_run_folder_is_named_after_the_link_that_was_given(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to(trained)
    assert run("train", "--init", "mine", "--data", "synthetic", "--method", "oneshot", "--dry-run") == 0
    assert "runs/mine-oneshot" in capsys.readouterr().out


def test_a_method_starts_from_the_dense_stage_of_a_chain(trained, tmp_path):
    common = ["--data", "synthetic", "--limit", 64, "--batch-size", 8, "--steps", 2, "--run", tmp_path / "oneshot"]
    assert run("train", "--init", trained, "--method", "oneshot", *common) == 0
    dense, pruned = (
        [load_model(folder, build_model, which=which).model.in_blocks[0].mlp.fc1.weight for which in ("model", "ema")]
        for folder in (trained / "00-dense", tmp_path / "oneshot")
    )
    assert all(map(torch.equal, dense, pruned))
    assert not torch.equal(*dense)


def test_init_must_be_dense_and_agree_with_the_named_model(trained, tmp_path, capsys):
    common = ["--data", "synthetic", "--limit", 64, "--batch-size", 8, "--steps", 2, "--run", tmp_path / "no"]
    assert run("train", "--init", trained / "02-2of4", "--method", "ste", *common) == 2
    assert "holds a masked network, not a dense one" in capsys.readouterr().err
    assert run("train", "--init", trained, "--model", "ddpm-tiny", "--method", "ste", *common) == 2
    assert "describes its own model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


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


def test_no_command_writes_among_its_images(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(6):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(f"{index}.png")
    for command in (
        ["train", "--data", "."],
        ["quickstart", "--data", "."],
        ["search", "--data", "."],
        ["evaluate", trained, "--data", ".", "--out", "e.json"],
        ["encode", "--data", ".", "--vae", "vae", "--size", 8, "--out", "latents.npz"],
    ):
        assert run(*command) == 2
        assert "would be read as an image: write to another folder" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 6


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


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "nothing"
    arguments = ["train", "--model", "uvit-cifar10-small", "--data", "cifar10", "--steps", 1000, "--run", folder]
    assert run(*arguments, "--dry-run") == 0
    assert not folder.exists()
    text = capsys.readouterr().out
    assert "44,255,328" in text
    assert "11,321.6 M" in text
    assert "8,694.1 M" in text


def test_a_variance_is_learned_at_discrete_times_alone(tmp_path, capsys):
    shape = ["--set", "learn_sigma=true", "--set", "schedule=vp-sde"]
    for more in ((), ("--dry-run",)):
        assert run("train", "--data", "synthetic", "--model", "dit-tiny", *shape, "--run", tmp_path / "x", *more) == 2
        assert "a learned variance needs discrete times" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_dry_run_refuses_what_the_run_would_refuse(capsys):
    assert run("train", "--data", "synthetic", "--chain", "2:4", "--dry-run") == 2
    assert "begin with a dense stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lacking",
    [
        *(MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")),
        *((2**62,), (2**40, 2**40)),  # more than there is, and more than a number of bytes
        BackendCompilerFailed(lambda: None, torch.OutOfMemoryError("CUDA out of memory."), None),  # says it in line 2
    ],
    ids=lambda lacking: str(lacking) or type(lacking).__name__,
)
def test_a_lack_of_memory_is_one_sentence(lacking, monkeypatch, tmp_path, capsys):
    def run_chain(*_, **__):
        if isinstance(lacking, Exception):
            raise lacking
        torch.empty(*lacking, dtype=torch.uint8)  # torch's own refusal, on a CPU

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


@pytest.mark.parametrize(
    "said",
    [
        "shapes cannot be multiplied",
        "C++ compile error\n\nOutput:\nvec512_int.h:544: warning: overflow in conversion from 'int' to 'short int'",
        "value cannot be converted to type uint8_t without overflow",
    ],
)
def test_a_defect_is_not_a_lack_of_memory(said, monkeypatch, tmp_path):
    def run_chain(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(train, "run_chain", run_chain)
    with pytest.raises(RuntimeError, match=re.escape(said)):
        run("train", "--data", "synthetic", "--set", "image_size=12", "--run", tmp_path / "run")


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


@pytest.mark.parametrize(
    "options",
    [("--decay", 0.1), ("--w-kd", 0.1), ("--where", "mlp"), ("--method", "dense", "--pattern", "1:4")],
    ids=lambda options: options[-2],
)
def test_an_option_for_sparse_stages_is_refused_where_all_are_dense(options, tmp_path, capsys):
    how = () if "--method" in options else ("--chain", "dense")
    assert run("train", "--data", "synthetic", *how, *options, "--run", tmp_path / "run") == 2
    assert f"{options[-2]} {options[-1]} is for sparse stages, but all stages are dense" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
