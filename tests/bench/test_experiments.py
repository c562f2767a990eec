"""Plans are equal terms by construction; a run is made once; tables and pictures come from the results file alone."""

import argparse
import itertools
import os
import re
import shutil
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from bench import results
from bench.experiments import measures, report, runner, speed
from bench.experiments.__main__ import main
from bench.experiments.plans import EXPERIMENTS, SCALES, planned
from sparsedm.commands.options import add_seed_and_device
from sparsedm.diffusion import schedule_of, validation_loss
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.pattern import Pattern
from sparsedm.layers import CompressedLinear
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model, model_config
from sparsedm.recipes import QUICKSTART, Scale
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.train import checkpoint, data, loop
from sparsedm.train.metrics import read_metrics, usual_speed
from sparsedm.train.stages import LADDER, METHODS

TINY = Scale(
    summary="for the tests",
    model="uvit-tiny",
    overrides={**QUICKSTART["synthetic"].overrides, "dim": 32, "depth": 2, "heads": 2},
    conditional=True,
    data="synthetic",
    base_steps=6,
    steps=5,
    ladder=("3:4",),
    seeds=2,
    samples=16,
    sampling_steps=2,
    options=QUICKSTART["synthetic"].options,
    validation=16,
)
RUNS = ("dense", "chain", "oneshot", "small-dense")


def command(folder, *more):
    only = itertools.chain.from_iterable(("--only", run) for run in RUNS)
    return main(["arms", "--scale", "tiny", "--out", str(folder), *only, *more])


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SCALES, "tiny", TINY)
    monkeypatch.setattr(runner, "load_images", lambda *a, **_: data.load("synthetic", a[1], size=a[2], limit=64))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)
        assert command(folder) == 0
    return folder


@pytest.fixture
def text_alone(monkeypatch):
    """Reports without pictures, which take most of their time."""
    monkeypatch.setattr(report, "_save", lambda *arguments: False)


def work(folder, *more):
    """The _Work of a command line, on the CPU."""
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    add_seed_and_device(parser)
    options = parser.parse_args(["arms", "--scale", "tiny", "--device", "cpu", *more])
    return runner._Work(options, runner._scale(options), folder)


def numbers(folder, run, measure, seed=0):
    rows = results.read_experiment(folder / "results.csv")
    return [(r["x"], r["value"]) for r in rows if (r["run"], r["measure"], r["seed"]) == (run, measure, seed)]


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["smoke", "cpu", "cpu-short", "lite", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_runs_of_a_plan_are_distinct_and_spend_the_same(name, scale):
    _, scale, runs = planned(name, scale)
    assert len({run.name for run in runs}) == len(runs)
    spent = {run.name: sum(stage.steps for stage in run.stages) for run in runs}
    exceptions = {name: 0 for name in spent if "shot" in name}
    exceptions |= {name: scale.steps // 3 for name in spent if "a third" in name}
    exceptions["small-dense"] = scale.base_steps + scale.steps
    assert spent == {name: exceptions.get(name, scale.steps) for name in spent}


@pytest.mark.parametrize("scale", ["smoke", "cpu", "cpu-short", "lite", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_run_of_a_plan_is_made_twice_under_two_names(name, scale):
    plan, _, runs = planned(name, scale)
    made = [
        (tuple(replace(stage, name="-") for stage in run.stages), run.where, run.first_dense, run.kind) for run in runs
    ]
    assert len({*made}) == len(made)
    assert plan.control in {run.name for run in runs}


def test_what_the_plans_vary():
    def stages(experiment):
        return {run.name: run.stages for run in planned(experiment, "full")[2]}

    assert [s.pattern for s in stages("arms")["chain"]] == ["31:32", "15:16", "7:8", "3:4", "2:4"]
    ratio = {run.name: run.x for run in planned("ratio", "full")[2]}
    assert ratio == {"dense": 1.0} | {p: Pattern.parse(p).density for p in LADDER}
    others = {"small-dense", "chain of eighths", "first block dense", "oneshot, calibrated", "activations"}
    assert set(stages("arms")) == {*METHODS, *others}
    assert [s.pattern for s in stages("arms")["chain of eighths"]] == ["7:8", "6:8", "5:8", "4:8", "2:4"]
    ablate = stages("ablate")
    changed = {name: stages[0] for name, stages in ablate.items()}
    assert [changed[f"w_kd={w}"].w_kd for w in ("0", "0.01", "1")] == [0, 0.01, 1]
    assert [changed[f"decay={d}"].decay for d in ("0", "2e-05", "0.002")] == [0, 2e-5, 2e-3]
    assert (changed["default"].w_kd, changed["default"].decay, changed["default"].teacher) == (0.1, 2e-4, "dense")
    assert {s.teacher for s in ablate["5 students, teacher previous"]} == {"previous"}
    assert {s.learns_from for s in ablate["5 students, no teacher"]} == {"none"}
    assert ablate["teacher alone"][0].w_noise == 0
    assert [len(ablate[name]) for name in ("default", "3 students", "5 students")] == [1, 3, 5]
    assert all(stage.inplace for stage in stages("fixed-vs-inplace-vs-chain")["inplace"])


def test_what_answers_the_question_comes_first():
    first = {name: [run.name for run in planned(name, "lite")[2]][:2] for name in EXPERIMENTS}
    assert first["arms"] == first["fixed-vs-inplace-vs-chain"] == ["dense", "chain"]
    assert first["ratio"] == ["dense", "2:4"]
    assert first["ablate"][0] == EXPERIMENTS["ablate"].control


@pytest.mark.parametrize("model", ["uvit-tiny", "uvit-cifar10-small"])
def test_the_small_dense_network_has_the_macs_of_the_sparse_one(model):
    config = runner.asdict(model_config(model))
    target = inspect(sparsify(build_model(config, device="meta"), "2:4")).totals()["macs_after"]
    small = runner.small_config(config)
    macs = inspect(build_model(small, device="meta")).totals()["macs"]
    assert small["dim"] < config["dim"]
    assert abs(macs / target - 1) < 0.05


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_everything(done):
    text = (done / "report.md").read_text()
    assert all(f"| {run} |" in text for run in RUNS)
    assert "Mean of 2 seeds" in text
    for picture in ("compare.png", "training.png", "noise-levels.png", "health.png", "flips.png"):
        assert (done / picture).stat().st_size > 5000
        assert picture in text
    for run in RUNS:
        assert len(numbers(done, run, "validation loss")) == len(numbers(done, run, "validation loss", 1)) == 1
        assert len(numbers(done, run, "loss at noise level")) == measures.LEVELS
    assert numbers(done, "dense", "validation loss") != numbers(done, "dense", "validation loss", 1)
    base = done / "seed-0" / "base" / "00-dense"
    for record in read_metrics(done / "seed-0" / "dense" / "00-dense"):
        assert record["speed_to_dense"] == record["images_per_second"] / usual_speed(base)
    assert numbers(done, "chain", "density")[-1][1] == 0.5
    assert numbers(done, "chain", "distance over training")[-1][1] > 0.1
    assert len(numbers(done, "chain", "flip rate of in_blocks.0.attn.qkv")) == len(numbers(done, "chain", "flip rate"))
    assert numbers(done, "chain", "validation over training")[-1][0] == 5 * TINY.options.batch_size
    assert numbers(done, "small-dense", "images") == [(None, 11 * TINY.options.batch_size)]


def test_every_run_starts_from_the_base_of_its_seed(done, tiny):
    """Pruning in one shot is the base with its masks and nothing else."""
    base = work(done).base(1).ema
    pruned = sparsify(base, "2:4")
    x, y = data.batch(data.load("synthetic", "test", size=12, limit=64), torch.arange(64))
    expected = float(validation_loss(pruned, x, schedule_of(pruned), y=y))
    assert numbers(done, "oneshot", "validation loss", 1) == [(None, expected)]


def test_a_start_that_is_not_that_of_the_other_runs_is_refused(done, tiny, text_alone, tmp_path, capsys):
    """On a GPU a second training of the dense network gives other bits: then the terms would not be equal."""
    folder = tmp_path / "moved"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("seed-*"))
    rows = [row for row in results.read_experiment(folder / "results.csv") if row["run"] != "oneshot"]
    results.write_experiment(folder / "results.csv", rows)
    assert command(folder, "--seeds", "1") == 0, "on a CPU the bits are the same"
    for row in rows:
        row["value"] += 1e-6 * (row["measure"] == runner.BASE and row["seed"] == 1)
    results.write_experiment(folder / "results.csv", rows)
    assert command(folder) == 2
    assert "holds runs of seed 1 that began from another dense network" in capsys.readouterr().err
    assert {row["run"] for row in results.read_experiment(folder / "results.csv") if row["seed"] == 0} == set(RUNS)


def test_on_a_gpu_nothing_is_tuned_unless_it_is_asked_for(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise InputError(f"SPARSEDM_AUTOTUNE={os.environ.get('SPARSEDM_AUTOTUNE')}")

    monkeypatch.setattr(runner, "_Work", refuse)
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "on")
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    add_seed_and_device(parser)
    options = parser.parse_args(["arms", "--scale", "lite", "--out", str(tmp_path)])
    for device, given, expected in (("cuda", "on", "on"), ("cpu", None, None), ("cuda", None, "off")):
        if given is None:
            monkeypatch.delenv("SPARSEDM_AUTOTUNE", raising=False)
        with pytest.raises(InputError, match=f"SPARSEDM_AUTOTUNE={expected}"):
            runner.experiment(argparse.Namespace(**vars(options) | {"device": torch.device(device)}))


# ---- other starts, other data ----------------------------------------------------------------------------------------

KINDS = ("dense", "first block dense", "oneshot, calibrated", "activations")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One seed of the runs that are no method, from the base of a given file, with two kinds of features."""
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    model = build_model("uvit-tiny", **TINY.overrides, num_classes=5)
    torch.nn.init.normal_(model.decoder_pred.weight, std=0.1)
    save_model(folder / "given.safetensors", model)
    torch.jit.save(torch.jit.script(MeanColours()), folder / "colours.pt")
    more = ["--init", str(folder / "given.safetensors"), "--features", "random-conv"]
    more += ["--features", str(folder / "colours.pt"), "--seeds", "1"]
    only = itertools.chain.from_iterable(("--only", run) for run in KINDS)
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)
        assert main(["arms", "--scale", "tiny", "--out", str(folder), *only, *more]) == 0
    return folder


class MeanColours(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))


def test_a_given_network_is_where_all_runs_start(kinds):
    assert {path.name for path in (kinds / "seed-0").iterdir()} == {re.sub(r"[^\w.-]+", "-", run) for run in KINDS}
    given = load_model(kinds / "given.safetensors", build_model).model
    x, y = data.batch(data.load("synthetic", "test", size=12, limit=64), torch.arange(64))
    expected = float(validation_loss(given, x, schedule_of(given), y=y))
    for run in KINDS:
        assert numbers(kinds, run, runner.BASE) == [(None, expected)]


def test_the_first_block_stays_dense(kinds):
    network = load_model(kinds / "seed-0" / "first-block-dense", build_model).model
    masked = {name for name, _ in masked_layers(network)}
    every = {name for name, _ in masked_layers(sparsify(build_model(network.config), "2:4"))}
    assert every - masked == {f"in_blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    with pytest.raises(InputError, match=r"the layers first, second .* belong to no blocks"):
        runner.without_first_block(["first", "second"])
    assert runner.without_first_block(["down.0.blocks.0.conv1", "down.1.blocks.0.conv1", "mid.blocks.0.conv1"]) == [
        "down.1.blocks.0.conv1",
        "mid.blocks.0.conv1",
    ]


def test_runs_of_activations_and_calibrated_masks_count_what_they_keep(kinds):
    dense, half = (numbers(kinds, run, "MACs")[0][1] for run in ("dense", "first block dense"))
    assert numbers(kinds, "activations", "MACs") == [(None, half)], "half the products, of weights or of inputs"
    assert half < numbers(kinds, "dense", "MACs")[0][1] == dense
    given = load_model(kinds / "given.safetensors", build_model).model
    x, y = data.batch(data.load("synthetic", "test", size=12, limit=64), torch.arange(64))
    by_magnitude = float(validation_loss(sparsify(given, "2:4"), x, schedule_of(given), y=y))
    assert 0 < numbers(kinds, "oneshot, calibrated", "validation loss")[0][1] != by_magnitude
    assert numbers(kinds, "oneshot, calibrated", "images") == [(None, 0)]


def test_two_kinds_of_features_are_two_columns(kinds):
    text = (kinds / "report.md").read_text()
    name = next(part for part in text.split(" | ") if part.startswith("Fréchet distance, colours.pt-"))
    for run in KINDS:
        assert numbers(kinds, run, name.strip()) != numbers(kinds, run, "Fréchet distance")


def images_of(path, side, width=None):
    generator = np.random.default_rng(0)
    np.savez(path, images=generator.integers(256, size=(80, side, width or side, 3), dtype=np.uint8))
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
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    scale = runner._scale(parser.parse_args(["arms", "--scale", "full", "--model", "ddpm-cifar10"]))
    assert (scale.options.optimizer, scale.options.weight_decay) == ("adam", 0)
    scale = runner._scale(parser.parse_args(["arms", "--scale", "lite", "--model", "uvit-celeba64-small"]))
    assert (scale.options.weighting, scale.options.lr) == ("noise", 4e-4), "the network computes the noise"
    assert runner.model_config(scale.model) == model_config("uvit-celeba64-small")


@pytest.mark.parametrize("model", ["uvit-tiny", "ddpm-tiny", "slimmable-tiny"])
def test_what_is_narrowed_has_the_macs_of_2of4(model):
    config = asdict(model_config(model))
    small = build_model(runner.small_config(config), device="meta")
    target = inspect(sparsify(build_model(config | {"kind": small.config.kind} if "eighths" not in config else model,
                                          device="meta"), "2:4")).totals()["macs_after"]  # fmt: skip
    assert 0.7 < inspect(small).totals()["macs"] / target < 1.3


# ---- several folders, and speed --------------------------------------------------------------------------------------


def parts_of(done, tmp_path):
    """The results of each seed in a folder of its own."""
    rows = results.read_experiment(done / "results.csv")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        results.write_experiment(tmp_path / str(seed) / "results.csv", [r for r in rows if r["seed"] == seed])
        shutil.copy(done / "options.json", tmp_path / str(seed))
    return ["--merge", str(tmp_path / "1"), "--merge", str(tmp_path / "0")]


def test_folders_of_one_seed_each_are_joined(done, tiny, tmp_path):
    assert command(tmp_path / "both", *parts_of(done, tmp_path)) == 0
    assert (tmp_path / "both" / "report.md").read_text() == (done / "report.md").read_text()


def test_folders_that_do_not_belong_together_are_not_joined(done, tiny, tmp_path, capsys):
    both = parts_of(done, tmp_path)
    assert command(tmp_path / "new", *both, "--merge", str(done)) == 2
    assert "holds chain of seed 0, as another one of the folders does" in capsys.readouterr().err
    assert command(tmp_path / "0", *both) == 2
    assert "is one of the folders to be joined" in capsys.readouterr().err
    text = (tmp_path / "0" / "options.json").read_text()
    (tmp_path / "0" / "options.json").write_text(text.replace('"samples": 16', '"samples": 17'))
    assert command(tmp_path / "new", *both) == 2
    assert "hold runs with different options" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_speed_is_measured_of_the_finished_networks(done, tiny, tmp_path, monkeypatch):
    """Whole sampling of all runs in turns; the denominator is the fastest of the dense forms."""
    shutil.copytree(done, tmp_path / "timed")
    timed = []

    def clock(calls, device, rounds):
        for call in calls:
            assert call().shape == (speed.IMAGES, 3, 12, 12)
            timed.append(call.args[0])
        return [4.0, 2.0, 1.0, 1.0, 3.2, 3.6]  # the last two are the dense one, compiled and packed

    monkeypatch.setattr(speed, "interleaved_seconds", clock)
    monkeypatch.setattr(speed, "IMAGES", 4)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert command(tmp_path / "timed", "--time") == 0
    assert [any(isinstance(m, CompressedLinear) for m in network.modules()) for network in timed] == [
        False, True, True, False, False, False,
    ]  # fmt: skip
    found = {run: numbers(tmp_path / "timed", run, report.SPEED)[0][1] for run in RUNS}
    assert found == {"dense": 1.0, "chain": 1.6, "oneshot": 3.2, "small-dense": 3.2}
    assert numbers(tmp_path / "timed", "dense", report.SAMPLING) == [(None, 0.8)]
    assert (tmp_path / "timed" / "speed.png").stat().st_size > 5000
    assert "| sampling speed-up |" in (tmp_path / "timed" / "report.md").read_text()
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    assert command(tmp_path / "timed", "--time") == 0, "again: measured anew, once in the file"
    assert len(numbers(tmp_path / "timed", "chain", report.SPEED)) == 1


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


def test_what_is_finished_is_not_repeated(done, tiny, text_alone, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(done, folder)
    before = (folder / "results.csv").read_text()
    kept = [row for row in results.read_experiment(folder / "results.csv") if (row["run"], row["seed"]) != ("chain", 1)]
    results.write_experiment(folder / "results.csv", kept)
    measured, train = [], runner._Work.train
    monkeypatch.setattr(runner._Work, "train", lambda *a: measured.append((a[1], a[2].name)) or train(*a))
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
    for module in (runner, measures, loop):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(measures, "BATCH", {"cpu": 8})
    cuts = []
    while (code := command(tmp_path, "--seeds", "1", "--minutes", f"{(runner.RESERVE + 6) / 60}")) and len(cuts) < 20:
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


def test_networks_run_in_the_precision_of_their_training_and_the_measures_exactly(done, tiny, monkeypatch):
    made = work(done)
    base, measured, ran = made.base(0).ema, [], []
    evaluate = measures.evaluate.evaluate
    for name, function in (("evaluate", evaluate), ("weight_distance", measures.weight_distance)):
        place = measures.evaluate if name == "evaluate" else measures
        monkeypatch.setattr(
            place, name, lambda *a, f=function: measured.append(torch.is_autocast_enabled("cpu")) or f(*a)
        )
    base.mid_block.mlp.fc1.register_forward_hook(lambda module, inputs, out: ran.append((out.device.type, out.dtype)))
    bf16 = torch.autocast("cpu", torch.bfloat16)
    images = measures.draw(base, TINY, 0, bf16)
    assert set(ran) == {("cpu", torch.bfloat16)}
    ran.clear()
    measures.measure(base, images, made.validation, made.judges, base, bf16)
    assert set(ran) == {("cpu", torch.bfloat16), ("meta", torch.float32)}, "meta: where MACs are counted"
    assert measured == [False, False]


def test_samples_are_those_of_one_batch(done, tiny, monkeypatch):
    base = work(done).base(0).ema
    off = torch.autocast("cpu", enabled=False)
    whole = measures.draw(base, TINY, 1, off)
    monkeypatch.setattr(measures, "BATCH", {"cpu": 5})
    assert (measures.draw(base, TINY, 1, off).int() - whole.int()).abs().max() <= 1


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_needs_the_results_file_alone(done, tiny, tmp_path, capsys):
    shutil.copy(done / "results.csv", tmp_path)
    assert command(tmp_path, "--report-only") == 0
    assert (tmp_path / "report.md").read_text() == (done / "report.md").read_text()
    assert (tmp_path / "compare.png").read_bytes() == (done / "compare.png").read_bytes()
    assert "| chain |" in capsys.readouterr().out


def test_the_table_is_the_mean_and_half_the_range():
    assert report._cell([0.02, 0.04], "validation loss") == "0.0300 ± 0.0100"
    assert report._cell([3.0], "Fréchet distance") == "3.00"
    assert report._cell([float("nan")], "distance to dense weights") == "-"


def test_the_report_says_whether_a_run_is_as_good_as_dense(done, text_alone, tmp_path):
    """Within 5% of the control of the same seed; and that the measure sees nothing, where it does not."""
    distances = {"dense": (10, 20), "chain": (10.4, 20.9), "small-dense": (10.4, 21.1), "oneshot": (11, 40)}

    def rows(distances):
        found = results.read_experiment(done / "results.csv")
        planted = [row for row in found if row["measure"] == "Fréchet distance"]
        others = [row for row in found if row["measure"] != "Fréchet distance"]
        return [*(row | {"value": distances[row["run"]][row["seed"]]} for row in planted), *others]

    text = report.write(tmp_path, rows(distances), EXPERIMENTS["arms"])
    assert "| against dense | Fréchet distance | validation loss | within 5% |" in text
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.count("|") == 5}
    assert lines["chain"][0] == "1.042 ± 0.002"
    assert {run: line[-1] for run, line in lines.items() if run in RUNS} == {
        "chain": "yes |",
        "small-dense": "in some seeds |",
        "oneshot": "no |",
    }
    losses = [numbers(done, run, "validation loss", s)[0][1] for s in (0, 1) for run in ("chain", "dense")]
    first, second = losses[0] / losses[1], losses[2] / losses[3]
    assert lines["chain"][1] == f"{(first + second) / 2:.3f} ± {abs(first - second) / 2:.3f}"
    assert "Even pruning without training" not in text
    text = report.write(tmp_path, rows(distances | {"oneshot": (10, 20)}), EXPERIMENTS["arms"])
    assert "Even pruning without training is within it" in text
    alone = [row for row in rows(distances) if row["run"] != "dense"]
    assert "against dense" not in report.write(tmp_path, alone, EXPERIMENTS["arms"])


def test_a_noise_level_without_a_loss_of_the_control_is_left_out():
    measure = "loss at noise level"
    values = {("dense", measure): {0: [(0.5, 2.0), (1.0, 0.0)]}}
    values |= {("chain", measure): {0: [(0.25, 1.0), (0.5, 3.0), (1.0, 1.0)]}}
    figure, plan = Figure(), EXPERIMENTS["arms"]
    assert report._levels(figure, values, report._styles(["dense", "chain"], plan.control), plan)
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "chain")
    assert line.get_xydata().tolist() == [[0.5, 1.5]]


def test_a_plan_with_an_axis_is_drawn_over_it(done, tmp_path):
    rows = results.read_experiment(done / "results.csv")
    for run, x in (("dense", 1.0), ("chain", 0.5)):
        rows += [{**rows[0], "run": run, "seed": seed, "measure": "axis", "x": None, "value": x} for seed in (0, 1)]
    rows = [row for row in rows if row["run"] in ("dense", "chain")]
    text = report.write(tmp_path, rows[::-1], EXPERIMENTS["ratio"])
    assert (tmp_path / "ratio.png").stat().st_size > 5000
    assert text.index("| dense |") < text.index("| chain |"), "from the densest, in whatever order they were made"


def test_every_run_of_a_plan_has_a_line_of_its_own(done, tmp_path):
    names = {name: [run.name for run in planned(name, "full")[2]] for name in EXPERIMENTS}
    for name, runs in names.items():
        assert len({*report._styles(runs, EXPERIMENTS[name].control).values()}) == len(runs)
    longest = max(names, key=lambda name: len(names[name]))
    rows = [row for row in results.read_experiment(done / "results.csv") if row["run"] == "chain"]
    report.write(tmp_path, [row | {"run": run} for run in names[longest] for row in rows], EXPERIMENTS[longest])
    assert (tmp_path / "training.png").stat().st_size > 5000


@pytest.mark.parametrize("drawn", [(0.98, 1.1), (0.08, 0.17), (1, 90)])
def test_every_range_has_several_numbers_on_its_axis(drawn):
    axes = Figure().subplots()
    axes.plot(drawn)
    report._logarithmic(axes)
    axes.figure.draw_without_rendering()
    shown = [label for label in axes.get_yticklabels() if drawn[0] <= label.get_position()[1] <= drawn[1]]
    assert 3 <= len({label.get_text() for label in shown}) == len(shown) <= 7


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arm"], "unknown experiment 'arm': one of arms, claims, ratio"),
        (["arms", "--scale", "huge"], "unknown scale 'huge': one of smoke, cpu, lite, full"),
        (["arms", "--only", "sgd"], "unknown run sgd: they are dense, chain, oneshot"),
        (["arms", "--seeds", "0"], "--seeds 0: at least one is needed"),
        (["arms", "--minutes", "0.5"], "--minutes 0.5: more than 40 seconds are needed to stop cleanly"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main([*arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_experiment_is_refused(done, tiny, capsys):
    assert command(done, "--data", "cifar10") == 2
    assert "has other options" in capsys.readouterr().err


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
        (lambda found: [found[0], found[1].replace(",0,", ",zero,", 1)], "could not convert string to float: 'zero'"),
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


def test_a_mistyped_option_leaves_the_folder_free_for_the_right_one(tiny, tmp_path, capsys):
    assert command(tmp_path, "--features", "random-cnov") == 2
    assert "unknown features 'random-cnov': random-conv" in capsys.readouterr().err
    assert not (tmp_path / "options.json").exists()


def test_two_processes_do_not_share_a_folder(done, tiny, capsys):
    before = (done / "results.csv").read_bytes()
    with checkpoint.folder_lock(done):
        assert command(done) == 2
    assert f"another process is training in {done}" in capsys.readouterr().err
    assert (done / "results.csv").read_bytes() == before


def test_the_table_says_which_runs_have_fewer_seeds_and_what_they_ran_on(done, text_alone, tmp_path):
    rows = [row for row in results.read_experiment(done / "results.csv") if (row["run"], row["seed"]) != ("chain", 1)]
    rows[-1]["device"] = "another"
    text = report.write(tmp_path, rows, EXPERIMENTS["arms"])
    assert "Mean of 2 seeds ± half their range (chain has 1)." in text
    assert f"{rows[0]['device']}, {rows[0]['threads']} threads" in text
    assert " and another, " in text


def test_outside_of_a_repository_the_version_stands_for_the_commit(done, text_alone, tmp_path):
    rows = [row | {"commit": ""} for row in results.read_experiment(done / "results.csv")]
    assert f"commit {rows[0]['sparsedm']}" in report.write(tmp_path, rows, EXPERIMENTS["arms"])


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path, capsys):
    assert main(["arms", "--scale", "full", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_smoke_ranks_dense_above_pruning_in_one_shot(tmp_path):
    assert main(["arms", "--out", str(tmp_path), "--seeds", "1"]) == 0
    losses = {run: numbers(tmp_path, run, "validation loss")[0][1] for run in ("dense", "sr-ste+kd", "oneshot")}
    assert losses["dense"] < losses["sr-ste+kd"] < losses["oneshot"]
