"""A run is made once, from the dense network of its seed."""

import itertools
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from bench import results
from bench.experiments import measures, work
from bench.experiments.__main__ import main
from sparsedm import samplers
from sparsedm.diffusion import schedule_of, validation_loss
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model, model_config
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.stepaware.family import family_of
from sparsedm.train import data
from sparsedm.train.metrics import read_metrics, usual_speed
from tests.bench.experiments.tiny_plan import RUNS, TINY, command, numbers, use, work_in


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
    base = work_in(done).base(1).ema
    pruned = sparsify(base, "2:4")
    x, y = data.batch(data.load("synthetic", "test", size=12, limit=64), torch.arange(64))
    expected = float(validation_loss(pruned, x, schedule_of(pruned), y=y))
    assert numbers(done, "oneshot", "validation loss", 1) == [(None, expected)]


def test_a_study_keeps_to_its_crop(tiny, tmp_path, monkeypatch):
    made = work_in(tmp_path / "study", "--crop", "celeba")
    assert made.training["record"] == {"data": "synthetic", "crop": "celeba"}
    (tmp_path / "study" / "seed-0").mkdir()
    with pytest.raises(InputError, match="crop is celeba there and not set here"):
        work_in(tmp_path / "study")
    work_in(tmp_path / "old")
    (tmp_path / "old" / "seed-0").mkdir()
    with pytest.raises(InputError, match="old began before crops were recorded, or with another crop: choose another"):
        work_in(tmp_path / "old", "--crop", "celeba")
    (tmp_path / "old" / "options.json").unlink()
    work_in(tmp_path / "old", "--crop", "celeba")  # of nothing that is known
    assert "crop" not in work_in(tmp_path / "new", "--crop", "square").training["record"], "as older folders"
    monkeypatch.setattr(work, "unrecorded_crop", lambda config: "celeba")
    assert work_in(tmp_path / "other").training["record"]["crop"] == "square"


def test_a_start_that_is_not_that_of_the_other_runs_is_refused(done, tiny, text_alone, tmp_path, capsys):
    """On a GPU a second training of the dense network gives other bits: then the terms would not be equal."""
    folder = tmp_path / "moved"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns("seed-*"))
    rows = [row for row in results.read_experiment(folder / "results.csv") if row["run"] != "oneshot"]
    results.write_experiment(folder / "results.csv", rows)
    assert command(folder, "--seeds", "1") == 0, "on a CPU the bits are the same"
    for row in rows:
        row["value"] += 1e-6 * (row["measure"] == work.BASE and row["seed"] == 1)
    results.write_experiment(folder / "results.csv", rows)
    assert command(folder) == 2
    assert "holds runs of seed 1 that began from another dense network" in capsys.readouterr().err
    assert {row["run"] for row in results.read_experiment(folder / "results.csv") if row["seed"] == 0} == set(RUNS)


@pytest.mark.parametrize(
    ("init", "loss", "said"),
    [
        ("given.safetensors", 0.1 + 1e-7, None),
        ("given.safetensors", 0.1001, "began from another network than --init given.safetensors"),
        (None, 0.1, None),
        (None, 0.1 + 1e-7, "began from another dense network, now lost"),
    ],
)
def test_a_given_start_is_measured_anew_and_may_differ_by_rounding(init, loss, said):
    """On another CPU the same file has another loss in its last digits."""
    rows = [{"run": "dense", "seed": 0, "measure": work.BASE, "value": 0.1}]

    class Trains(Exception):
        pass

    def train(*arguments):
        raise Trains

    made = SimpleNamespace(init=init, rows=rows, folder="out", device=torch.device("cpu"), train=train)
    made.base = lambda seed: work.Base(None, None, loss)
    with pytest.raises(InputError if said else Trains, match=said):
        work.Work.do(made, 0, SimpleNamespace(name="chain"))


@pytest.mark.parametrize("model", ["uvit-tiny", "uvit-cifar10-small"])
def test_the_small_dense_network_has_the_macs_of_the_sparse_one(model):
    config = asdict(model_config(model))
    target = inspect(sparsify(build_model(config, device="meta"), "2:4")).totals()["macs_after"]
    small = work.small_config(config)
    macs = inspect(build_model(small, device="meta")).totals()["macs"]
    assert small["dim"] < config["dim"]
    assert abs(macs / target - 1) < 0.05


@pytest.mark.parametrize("model", ["uvit-tiny", "ddpm-tiny", "slimmable-tiny", "dit-imagenet256-small"])
def test_what_is_narrowed_has_the_macs_of_2of4(model):
    config = asdict(model_config(model))
    small = build_model(work.small_config(config), device="meta")
    target = inspect(sparsify(build_model(config | {"kind": small.config.kind} if "eighths" not in config else model,
                                          device="meta"), "2:4")).totals()["macs_after"]  # fmt: skip
    assert 0.7 < inspect(small).totals()["macs"] / target < 1.3


def test_networks_run_in_the_precision_of_their_training_and_the_measures_exactly(done, tiny, monkeypatch):
    made = work_in(done)
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
    base = work_in(done).base(0).ema
    off = torch.autocast("cpu", enabled=False)
    whole = measures.draw(base, TINY, 1, off)
    monkeypatch.setattr(samplers, "batch_of", lambda device: 5)
    assert (measures.draw(base, TINY, 1, off).int() - whole.int()).abs().max() <= 1


# ---- other starts --------------------------------------------------------------------------------------------------


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
        use(patch)
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
        assert numbers(kinds, run, work.BASE) == [(None, expected)]


def test_the_first_block_stays_dense(kinds):
    network = load_model(kinds / "seed-0" / "first-block-dense", build_model).model
    masked = {name for name, _ in masked_layers(network)}
    every = {name for name, _ in masked_layers(sparsify(build_model(network.config), "2:4"))}
    assert every - masked == {f"in_blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    with pytest.raises(InputError, match=r"the layers first, second .* belong to no blocks"):
        work.without_first_block(["first", "second"])
    assert work.without_first_block(["down.0.blocks.0.conv1", "down.1.blocks.0.conv1", "mid.blocks.0.conv1"]) == [
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


def test_a_run_of_activations_is_not_taken_for_a_dense_network(kinds):
    """Its hooks are in no file."""
    assert set(family_of(kinds / "seed-0").names) == {"dense", "first-block-dense"}
    with pytest.raises(InputError, match=r"cannot be run: the network had hooks that prune its inputs to 2:4, which"):
        load_model(kinds / "seed-0" / "activations", build_model)


def test_two_kinds_of_features_are_two_columns(kinds):
    text = (kinds / "report.md").read_text()
    name = next(part for part in text.split(" | ") if part.startswith("Fréchet distance, colours.pt-"))
    for run in KINDS:
        assert numbers(kinds, run, name.strip()) != numbers(kinds, run, "Fréchet distance")


def test_measures_bear_their_own_names(monkeypatch):
    names = ("frechet_distance", "kernel_distance", "precision", "recall", "count", "reference_count")
    monkeypatch.setattr(measures.evaluate, "evaluate", lambda *_: dict(zip(names, range(1, 7))))
    network = build_model("uvit-tiny", image_size=12, patch_size=3, dim=16, depth=2, heads=2)
    images = data.load("synthetic", "test", size=12, limit=4)
    found = measures.measure(network, None, images, [(None, None)], network, torch.autocast("cpu", enabled=False))
    columns = ("Fréchet distance", "kernel distance", "precision", "recall", "samples", "reference images")
    assert [found[name] for name in columns] == [[(None, value)] for value in range(1, 7)]


def test_calibration_is_told_times_in_the_networks_units():
    images = data.load("synthetic", "train", size=12, limit=32)
    made = SimpleNamespace(images=images, device=torch.device("cpu"), config={"num_classes": 0})
    made.scale = SimpleNamespace(options=SimpleNamespace(batch_size=8))
    base = build_model("uvit-tiny", image_size=12, patch_size=3, dim=16, depth=2, heads=2)
    times = torch.cat([t for _, t in work.Work._noisy(made, 0, work.Base(base, base, 0.0))])
    assert 900 < times.max() < 999
    assert times.min() < 99
