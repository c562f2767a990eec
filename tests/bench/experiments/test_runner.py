"""The command line: what it makes, continues, joins, times and refuses."""

import argparse
import itertools
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import results
from bench.experiments import measures, report, runner, speed, work
from bench.experiments.__main__ import main
from sparsedm import samplers
from sparsedm.commands import options as command_options
from sparsedm.compressed import CompressedLinear
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import rules
from sparsedm.models import model_config
from sparsedm.train import loop, run_folder
from sparsedm.train.metrics import TrainingDiverged
from sparsedm.train.stages import METHODS
from tests.bench.experiments.tiny_plan import RUNS, command, numbers, parsed


def test_what_is_finished_is_not_repeated(done, tiny, text_alone, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(done, folder)
    before = (folder / "results.csv").read_text()
    kept = [row for row in results.read_experiment(folder / "results.csv") if (row["run"], row["seed"]) != ("chain", 1)]
    results.write_experiment(folder / "results.csv", kept)
    measured, train = [], work.Work.train
    monkeypatch.setattr(work.Work, "train", lambda *a: measured.append((a[1], a[2].name)) or train(*a))
    monkeypatch.setattr("sparsedm.train.step.Step.__call__", lambda *a: pytest.fail("trained again"))
    assert command(folder) == 0
    assert measured == [(1, "chain")]
    fresh = {
        (r["run"], r["seed"], r["measure"], r["x"]): r["value"] for r in results.read_experiment(folder / "results.csv")
    }
    (tmp_path / "before.csv").write_text(before)
    for row in results.read_experiment(tmp_path / "before.csv"):
        if "seconds" not in row["measure"] and row["measure"] != "peak memory":
            key = (row["run"], row["seed"], row["measure"], row["x"])
            assert fresh[key] == row["value"] or row["value"] != row["value"], key


def test_a_study_that_is_cut_again_and_again_is_that_of_one_piece(
    done, tiny, text_alone, tmp_path, monkeypatch, capsys
):
    """The clock goes on by a second whenever it is looked at, so that every place where time can be up is one."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
    for module in (command_options, work, measures, loop):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(samplers, "batch_of", lambda device: 8)
    cuts, few = [], ("--seeds", "1", "--minutes", f"{(command_options.RESERVE + 6) / 60}")
    while (code := command(tmp_path, *few)) and len(cuts) < 20:
        assert code == 3
        cuts.append(capsys.readouterr())
        assert cuts[-1].err.rstrip().endswith("to continue, run the same command again")
    assert code == 0
    assert "before step" in "".join(cut.err for cut in cuts)
    assert "is saved in" in "".join(cut.err for cut in cuts)
    assert "of 16 samples" in "".join(cut.err for cut in cuts)
    for number, cut in enumerate(cuts):
        finished = [run for run in RUNS if f"| {run} |" in cut.out]
        assert finished == list(RUNS)[: len(finished)], "the report of what was finished then"
        assert bool(finished) == ("report.md" in cut.out), number

    def values(folder):
        rows = [row for row in results.read_experiment(folder / "results.csv") if row["seed"] == 0]
        return {(r["run"], r["measure"], r["x"]): r["value"] for r in rows}

    whole, pieces = values(done), values(tmp_path)
    assert whole.keys() == pieces.keys()
    timed = ("seconds", "seconds with measuring", "peak memory", "training images per second")
    different = {key for key in whole if key[1] not in timed and whole[key] != pieces[key]}
    assert all(whole[key] != whole[key] for key in different), "NaN, and nothing else"
    ends = [f"seed-0/{run}/checkpoints" for run in ("small-dense", "chain/01-2of4", "dense/00-dense")]
    for end in ends:
        for file in sorted((done / end).glob("step-*/*.safetensors"))[-3:]:
            assert file.read_bytes() == (tmp_path / file.relative_to(done)).read_bytes()


def parts_of(done, tmp_path):
    """The results of each seed in a folder of its own."""
    rows = results.read_experiment(done / "results.csv")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        results.write_experiment(tmp_path / str(seed) / "results.csv", [r for r in rows if r["seed"] == seed])
        shutil.copy(done / "options.json", tmp_path / str(seed))
    return ["--merge", str(tmp_path / "1"), "--merge", str(tmp_path / "0")]


def test_folders_of_one_seed_each_are_joined(done, tiny, tmp_path, capsys):
    both = parts_of(done, tmp_path)
    assert command(tmp_path / "both", *both) == 0
    assert (tmp_path / "both" / "report.md").read_text() == (done / "report.md").read_text()
    rows = (tmp_path / "both" / "results.csv").read_bytes()
    assert command(tmp_path / "both") == 2, "runs of any other network would join them"
    assert "holds joined or copied rows, without the options of their runs" in capsys.readouterr().err
    assert (tmp_path / "both" / "results.csv").read_bytes() == rows
    assert not (tmp_path / "both" / "options.json").exists()
    for useless in (["--time"], ["--minutes", "5"]):
        assert command(tmp_path / "new", *both, *useless) == 2
        assert "measure nothing: leave out" in capsys.readouterr().err


def test_folders_that_a_resume_calls_equal_are_joined(done, tiny, text_alone, tmp_path):
    both = parts_of(done, tmp_path)
    text = (tmp_path / "1" / "options.json").read_text()
    for old, new in (('"seeds": 2', '"seeds": 1'), ('"threads": null', '"threads": 1')):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "1" / "options.json").write_text(text)
    assert command(tmp_path / "both", *both) == 0


def test_folders_that_do_not_belong_together_are_not_joined(done, tiny, tmp_path, capsys):
    both = parts_of(done, tmp_path)
    assert command(tmp_path / "new", *both, "--merge", str(done)) == 2
    assert "holds chain of seed 0, as another one of the folders does" in capsys.readouterr().err
    shutil.copytree(tmp_path / "1", tmp_path / "own")
    for name in ("0", "own"):
        assert command(tmp_path / name, *both) == 2
        assert f"--out {tmp_path / name} holds runs of its own: name another one" in capsys.readouterr().err
    assert (tmp_path / "own/results.csv").read_bytes() == (tmp_path / "1/results.csv").read_bytes()
    text = (tmp_path / "0" / "options.json").read_text()
    (tmp_path / "0" / "options.json").write_text(text.replace('"samples": 16', '"samples": 17'))
    assert command(tmp_path / "new", *both) == 2
    said = capsys.readouterr().err
    where = f"settings.samples is 16 in {tmp_path / '1'} and 17 in {tmp_path / '0'}"
    assert f"the folders hold runs with different options, which have no mean: {where}" in said
    assert not (tmp_path / "new").exists()


def test_speed_is_measured_of_the_finished_networks(done, tiny, tmp_path, monkeypatch):
    """Whole sampling of all runs in turns; the denominator is the fastest of the dense forms."""
    shutil.copytree(done, tmp_path / "timed")
    timed = []

    def clock(calls, device, rounds):
        for call in calls:
            assert call().shape == (speed.IMAGES, 3, 12, 12)
            timed.append(call.args[0])
        dense, small = [4.0, 3.8, 3.6, 3.2], [1.0, 2.0, 0.8, 0.9]  # as they are, compiled, packed and in bf16
        return [*dense, 2.0, 1.0, *small]

    monkeypatch.setattr(speed, "interleaved_seconds", clock)
    monkeypatch.setattr(speed, "IMAGES", 4)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    monkeypatch.setattr(rules, "bf16_instructions", lambda: ["avx512_bf16"])
    assert command(tmp_path / "timed", "--time") == 0
    compressed = [any(isinstance(m, CompressedLinear) for m in network.modules()) for network in timed]
    assert compressed == 4 * [False] + 2 * [True] + 4 * [False]
    in_bf16 = [next(network.parameters()).dtype == torch.bfloat16 for network in timed]
    assert in_bf16 == [False, False, False, True, False, False, False, False, False, True]
    found = {run: numbers(tmp_path / "timed", run, report.SPEED)[0][1] for run in RUNS}
    assert found == {"dense": 1.0, "chain": 1.6, "oneshot": 3.2, "small-dense": 4.0}
    assert numbers(tmp_path / "timed", "dense", report.SAMPLING) == [(None, 0.8)]
    assert numbers(tmp_path / "timed", "dense", report.SAMPLING + report.FP32) == [(None, 0.9)]
    assert not numbers(tmp_path / "timed", "chain", report.SAMPLING + report.FP32)
    assert (tmp_path / "timed" / "speed.png").stat().st_size > 5000
    assert "| sampling speed-up |" in (tmp_path / "timed" / "report.md").read_text()
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    assert command(tmp_path / "timed", "--time") == 0, "again: measured anew, once in the file"
    assert len(numbers(tmp_path / "timed", "chain", report.SPEED)) == 1
    assert command(tmp_path / "timed", "--time", "--seed", "1") == 0
    assert [len(numbers(tmp_path / "timed", "chain", report.SPEED, seed)) for seed in (0, 1)] == [1, 1]


def test_joined_folders_were_to_be_timed_before(done, tiny, text_alone, tmp_path, capsys):
    assert command(tmp_path / "both", *parts_of(done, tmp_path)) == 0
    assert command(tmp_path / "both", "--time") == 2
    said = "both holds no networks of seed 0: --time needs the folders with the networks, before --merge joins"
    assert said in capsys.readouterr().err


def test_the_control_is_timed_with_whatever_is_named(done, tiny, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "timed")
    monkeypatch.setattr(speed, "sampling_seconds", lambda networks, *_: {name: {"eager": 2.0} for name in networks})
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    named = ["arms", "--scale", "tiny", "--out", str(tmp_path / "timed"), "--time", "--only", "small-dense"]
    assert main(named) == 0
    assert [len(numbers(tmp_path / "timed", run, report.SPEED)) for run in RUNS] == [1, 0, 0, 1]


def test_runs_that_diverge_do_not_end_a_study(done, tiny, text_alone, tmp_path, monkeypatch, capsys):
    shutil.copytree(done, tmp_path / "out")
    tried = []

    def do(self, seed, run):
        tried.append((seed, run.name))
        if seed == 1 or run.name == "chain":
            raise TrainingDiverged("training diverged at step 3")

    made = SimpleNamespace(bases={0: None}, rows=[], do=lambda *a: do(None, *a))
    monkeypatch.setattr(runner, "Work", lambda *_: made)
    assert command(tmp_path / "out") == 2
    assert tried == [*((0, run) for run in RUNS), (1, "dense")], "a seed without its dense network is left"
    out, err = capsys.readouterr()
    assert "| oneshot |" in out
    one = "seed 0, chain: training diverged at step 3; all other runs are done, and --only can leave these out"
    assert f"{one}; seed 1, the dense network that all runs start from: training diverged" in err
    assert err.rstrip().endswith("; none of its runs was made: use another --seed")


@pytest.mark.gpu
def test_a_study_on_a_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")  # as the command sets it, and taken back
    assert command(tmp_path, "--device", "cuda", "--seeds", "1") == 0
    for run in RUNS:
        for measure in ("validation loss", "Fréchet distance"):
            [(_, value)] = numbers(tmp_path, run, measure)
            assert 0 < value < float("inf")
    assert numbers(tmp_path, "chain", "density")[-1][1] == 0.5
    assert "within 5%" in (tmp_path / "report.md").read_text()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arm"], "unknown experiment 'arm': one of arms, claims, ratio"),
        (["arms", "--scale", "huge"], "unknown scale 'huge': one of smoke, cpu, lite, full"),
        (["arms", "--only", "sgd"], "unknown run sgd: they are dense, chain, oneshot"),
        (["arms", "--seeds", "0"], "--seeds 0: at least one is needed"),
        (["arms", "--minutes", "0.5"], "--minutes 0.5: more than 40 seconds are needed to stop cleanly"),
        (["arms", "--minutes", "5", "--time"], "--time takes all times in turns and stops at no --minutes"),
        (
            ["arms", "--seed", str(2**63 - 1)],
            f"--seed {2**63 - 1} --seeds 2: the last seed must be at most {2**63 - 1}",
        ),
        (["arms", "--features", "inception", "--features", "nonsense"], "unknown features 'nonsense'"),
        *(
            (["arms", *what], "--dry-run shows the training")
            for what in (["--merge", "x"], ["--report-only"], ["--time"])
        ),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_experiment_is_refused(done, tiny, capsys):
    assert command(done, "--data", "cifar10") == 2
    assert "has other options" in capsys.readouterr().err


def test_a_mistyped_option_leaves_the_folder_free_for_the_right_one(tiny, tmp_path, capsys):
    assert command(tmp_path, "--features", "random-cnov") == 2
    assert "unknown features 'random-cnov': random-conv" in capsys.readouterr().err
    assert not (tmp_path / "options.json").exists()


def test_two_processes_do_not_share_a_folder(done, tiny, capsys):
    before = (done / "results.csv").read_bytes()
    with run_folder.folder_lock(done):
        assert command(done) == 2
    assert f"another process is at work in {done}" in capsys.readouterr().err
    assert (done / "results.csv").read_bytes() == before


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path, capsys):
    assert main(["arms", "--scale", "full", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)
    assert not (tmp_path / "x").exists()


def test_a_dry_run_warns_where_bf16_is_slower(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    for scale, warnings in (("smoke", 0), ("cpu", 1)):
        data = images_of(tmp_path / "cifar.npz", 32) if scale == "cpu" else "synthetic"
        assert main(["claims", "--scale", scale, "--data", data, "--device", "cpu", "--dry-run"]) == 0
        assert ["bf16 is slower than fp32 on this CPU" in said for said in caplog.messages] == [True] * warnings


@pytest.mark.slow
def test_smoke_ranks_dense_above_pruning_in_one_shot(tmp_path):
    assert main(["arms", "--out", str(tmp_path), "--seeds", "1"]) == 0
    losses = {run: numbers(tmp_path, run, "validation loss")[0][1] for run in ("dense", "sr-ste+kd", "oneshot")}
    assert losses["dense"] < losses["sr-ste+kd"] < losses["oneshot"]


@pytest.mark.parametrize(
    "content", ["", "seed,x,value\n", ",".join(results.OF_EXPERIMENTS), ",".join(results.OF_EXPERIMENTS) + "\n1,2\n"]
)
def test_a_damaged_results_file_is_refused(tmp_path, content):
    (tmp_path / "results.csv").write_text(content)
    if not content:
        (tmp_path / "results.csv").unlink()
    with pytest.raises(InputError, match=r"results\.csv"):
        results.read_experiment(tmp_path / "results.csv")


def lines(done):
    return (done / "results.csv").read_text().splitlines()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: [found[0].replace("group,", ""), *found[1:]], "it has no column group"),
        (lambda found: [*found[:5], found[5].rpartition(",")[0]], "a row is broken or cut short"),
        (
            lambda found: [line for line in found if ",chain,1,Fréchet" not in line],
            "chain of seed 1 has no Fréchet",
        ),
        (lambda found: [found[0], found[1].replace(",0,", ",zero,", 1)], "its seed 'zero' is not a whole number"),
    ],
    ids=["column", "row", "measure", "seed"],
)
def test_a_results_file_that_lost_something_is_refused(done, tiny, tmp_path, capsys, damage, message):
    changed = damage(lines(done))
    assert changed != lines(done)
    (tmp_path / "results.csv").write_text("\n".join(changed))
    assert command(tmp_path, "--report-only") == 2
    assert message in capsys.readouterr().err


def test_results_of_another_experiment_are_refused(done, tiny, tmp_path, capsys):
    shutil.copy(done / "results.csv", tmp_path)
    for more in ([], ["--report-only"]):
        assert main(["ratio", "--scale", "tiny", "--out", str(tmp_path), *more]) == 2
        assert "holds results of arms (tiny), not of ratio (tiny)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["results.csv"]


def test_on_a_gpu_nothing_is_tuned_for_training_unless_it_is_asked_for(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise InputError(f"SPARSEDM_AUTOTUNE={os.environ.get('SPARSEDM_AUTOTUNE')}")

    for name in ("Work", "_time"):
        monkeypatch.setattr(runner, name, refuse)
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "on")
    for device, more, given, expected in (
        ("cuda", [], "on", "on"),
        ("cpu", [], None, None),
        ("cuda", ["--time"], None, None),
        ("cuda", [], None, "off"),
    ):
        if given is None:
            monkeypatch.delenv("SPARSEDM_AUTOTUNE", raising=False)
        options = parsed("arms", "--scale", "lite", "--out", str(tmp_path), *more)
        with pytest.raises(InputError, match=f"SPARSEDM_AUTOTUNE={expected}"):
            runner.experiment(argparse.Namespace(**vars(options) | {"device": torch.device(device)}))


def images_of(path, side, width=None, count=80):
    generator = np.random.default_rng(0)
    np.savez(path, images=generator.integers(256, size=(count, side, width or side, 3), dtype=np.uint8))
    return str(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scale", "smoke"], "holds images of 218x178 pixels and the network takes 12x12: choose another --model"),
        (["--model", "uvit-celeba64-small", "--crop", "square"], "and the network takes 64x64"),
        (["--model", "uvit-imagenet64-mid", "--resize"], "the network expects labels 0..999"),
        (["--model", "uvit-small"], "unknown model 'uvit-small'"),
        (["--data", "celeba.zip"], "data 'celeba.zip': no such file or folder"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(more, message, tmp_path, capsys):
    data = images_of(tmp_path / "photos.npz", 178, 218)
    for end in (["--dry-run"], []):
        assert main(["arms", "--data", data, "--out", str(tmp_path / "out"), *more, *end]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "options.json").exists()


def test_fewer_images_than_a_distance_needs_are_refused_before_anything_is_written(tmp_path, capsys):
    data = images_of(tmp_path / "photos.npz", 12, count=5)
    for end in (["--dry-run"], []):
        assert main(["arms", "--data", data, "--out", str(tmp_path / "out"), *end]) == 2
        assert "3 real images to compare them with" in capsys.readouterr().err
        assert not (tmp_path / "out" / "options.json").exists()


def test_other_images_are_resized_where_that_is_said(tmp_path, capsys):
    photos, cifar = images_of(tmp_path / "photos.npz", 178, 218), images_of(tmp_path / "cifar.npz", 32)
    assert main(["arms", "--data", photos, "--resize", "--dry-run"]) == 0
    assert "resized to 12x12" in capsys.readouterr().out
    assert main(["claims", "--scale", "cpu", "--data", cifar, "--dry-run"]) == 0, "which this scale is defined by"
    assert "16 pixels wide" in capsys.readouterr().out
    assert main(["arms", "--scale", "full", "--model", "ddpm-cifar10", "--data", cifar, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pruned channels" in out
    assert "dense steps for each of 2 seeds" in out


def test_a_preset_is_trained_by_the_recipe_of_its_original(tmp_path):
    scale = runner._scale(parsed("arms", "--scale", "full", "--model", "ddpm-cifar10"))
    assert (scale.options.optimizer, scale.options.weight_decay) == ("adam", 0)
    scale = runner._scale(parsed("arms", "--scale", "lite", "--model", "uvit-celeba64-small"))
    assert (scale.options.weighting, scale.options.lr) == ("noise", 4e-4), "the network computes the noise"
    assert model_config(scale.model) == model_config("uvit-celeba64-small")
