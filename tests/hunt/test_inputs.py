"""Hostile inputs: what every command and the bench read and every option, damaged, strange or absurd, under limits.

    pytest -m slow tests/hunt/test_inputs.py -s       all of them (fixed seeds; the counts are printed)

Every case runs one command in a fork with 2 GiB and a minute of CPU. Right is: exit code 0 or 2; with 2 one sentence on
stderr, nothing new in the folders and nothing half-written; with 0 no half-written file, and a run that was resumed
ends with the bits of one that was not, and damage in the cache changes no number. Anything else is counted: traceback,
hang, crash, wrong, left, ran (the code of a pickle).

Seen red (one fault planted each): a RecursionError that `parse_json` lets pass -> traceback, at a header of brackets;
`regular_file` without its look at the kind of file -> hang, at a pipe; a partial file that `atomic_file` leaves
-> left, on a full disk; features read from the cache without their checksums -> wrong, 4 of 20 cases; `read_csv`,
`read_image_files`, `read_table` or `_arrays` without what they catch or check -> traceback, 1 of 8, 4 of 6, 3 of 10 and
1 of 20; an unpickler of batches that knows every class -> ran, 1 of 10.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench import campaign, plot, program, results, targets
from bench.experiments import __main__ as experiments
from sparsedm import cli
from sparsedm.compression import compress
from sparsedm.kernels import tuning
from sparsedm.model_files import save_model
from sparsedm.models import build_model
from sparsedm.models.diffusers import config_to_diffusers, to_diffusers
from sparsedm.sparsity import sparsify
from tests.hunt.damage import FORMATS, RAN, change
from tests.hunt.forked import forked

NETWORK = {"image_size": 8, "dim": 16, "depth": 2, "heads": 2, "num_classes": 3}
SET = [word for name, value in NETWORK.items() for word in ("--set", f"{name}={value}")]
TRAIN = ["train", "--data", "{npz}", "--run", "{run}", "--steps", "6", "--save-every", "2", "--log-every", "1", *SET]
TRAIN += ["--batch-size", "4", "--chain", "dense,2:4", "--warmup", "2"]

# ---- options ---------------------------------------------------------------------------------------------------------

VALUES = (
    *("", " ", "-1", "-0", "0", "1", "1.5", "nan", "inf", "-inf", "1e400", "1e308", "1e308,1e308", "0x10", "1_0", "٣"),
    *("9" * 30, "9" * 5000, "2147483647", "x" * 300, "\udcff", "$x_{$", "a\nb", "-", "--", "a/b", "/", ".", "..", "~"),
    *("[", "{}", "dense", "2:4", "2:4,2:4", "2:4,,", "0:4", "4:4", "999999999:1000000000", "(", "*", "(a", "mlp"),
    *("mlpp", "all", "1,1", ",", "0,0", "-1,1", "none", "cuda:-1", "cuda:9", "cpu:9", "meta", "{pipe}", "{zero}"),
    *("{socket}", "{folder}", "{file}", "{run}/x", "{model}", "{npz}", "=", "a\x01b", "﻿", "%s%n", "`id`"),
)
SETTINGS = (
    *(
        "depth=1000000",
        "depth=-1",
        "depth=" + "9" * 30,
        "dim=0",
        "dim=1000000000",
        "heads=0",
        "image_size=-4",
        "dim=[1]",
    ),
    *("patch_size=0", "channels=0", "num_classes=-2", "num_classes=1e9", "dim=nan", "dim=NaN", "dim=" + "[" * 5000),
    *(
        "dim=" + "[" * 500 + "]" * 500,
        "kind=dit",
        "=",
        "image_size=1000000007",
        "velocity=1",
        "mlp_ratio=0",
        "dim=1e400",
    ),
    *(
        "mlp_ratio=1000000",
        "dim=null",
        "dim={}",
        "x" * 300 + "=1",
        "dim",
        "dim=16=16",
        "DIM=16",
        "dim =16",
        "schedule=x",
    ),
    *("patch_size=3", "heads=3", "depth=1", "dim=16.0", "dim=true", 'dim="16"', "channels=16777216", "depth=1001"),
)
BASE = {  # as little work as there can be
    "quickstart": ["--dry-run"],
    "train": ["--data", "synthetic", "--model", "uvit-tiny", "--dry-run"],
    "sample": ["{model}", "--count", "2", "--sampling-steps", "1", "--out", "{out}/a.png"],
    "evaluate": ["{model}", "--data", "{npz}", "--count", "4", "--sampling-steps", "1", "--out", "{out}/a.json"],
    "inspect": ["{model}", "--plot", "{out}/a.png"],
    "import": ["{foreign}", "--out", "{out}/b.safetensors", *("--set", "heads=2")],
    "encode": ["--data", "{npz}", "--vae", "{out}", "--out", "{out}/b.npz"],
    "search": ["--dry-run"],
}


def options_of(command):
    """(option strings, takes a value) of every option of a command."""
    parser = cli.parser_for([command])
    subs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [(a.option_strings, a.nargs != 0) for a in subs.choices[command]._actions if a.dest != "help"]


def absurd(command, most=8):
    """Command lines with `most` strange values of every option, chosen by its name."""
    base = BASE[command]
    for strings, takes_value in options_of(command):
        values = SETTINGS if "--set" in strings else VALUES
        values = random.Random(f"{command} {strings}").sample(values, most)
        for value in values if takes_value else [None]:
            given = [f"{strings[-1]}={value}" if takes_value else strings[-1]] if strings else [value]
            kept = base if strings else base[1:] if base and not base[0].startswith("-") else base
            if strings and strings[-1] in kept:
                place = kept.index(strings[-1])
                kept = kept[:place] + kept[place + 2 :]
            yield [command, *given, *kept]


# ---- files -----------------------------------------------------------------------------------------------------------


class World:
    """A folder of good files, made once, and a copy of it for every case. `suffix`: their names in command lines."""

    suffix = dict.fromkeys(("images", "batches", "pickles", "run", "finished", "again", "search", "cache", "file"), "")
    suffix |= dict.fromkeys(("folder", "socket", "out", "diffusers", "vae", "arms", "campaign"), "")
    suffix |= dict.fromkeys(("model", "compressed", "textual"), ".safetensors")
    suffix |= dict.fromkeys(("npz", "pipe", "text", "moments"), ".npz") | dict.fromkeys(("zip", "zero"), ".zip")
    suffix |= {"foreign": ".pth", "shards": ".safetensors.index.json", "tar": ".tar.gz", "features": ".pt"}
    suffix |= {"strategy": ".json", "widths": ".json", "results": ".csv"}

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, name):
        return self.folder / (name + self.suffix[name])

    def fill(self, arguments):
        for name in self.suffix:
            arguments = [argument.replace("{" + name + "}", str(self[name])) for argument in arguments]
        return arguments

    def make(self, runs):
        self.folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = build_model("uvit-tiny", **NETWORK)
        torch.save({"model": model.state_dict(), "ema": model.state_dict()}, self["foreign"])
        masked = sparsify(model, "2:4")
        save_model(self["model"], masked)
        save_model(self["compressed"], compress(masked))
        save_model(self.folder / "shards.safetensors", masked, shard_bytes=20_000)
        random_images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
        np.savez(self["npz"], images=random_images, labels=np.arange(40) % 3)
        self._make_images(random_images)
        self._make_cifar10()
        self._make_others()
        for name in ("folder", "out", "cache"):
            self[name].mkdir(exist_ok=True)
        self["file"].write_text("x")
        if runs:
            self._make_runs()
            self._make_measurements()

    def _make_images(self, pixels):
        labels = []
        with zipfile.ZipFile(self["zip"], "w", zipfile.ZIP_DEFLATED) as archive:
            for i, image in enumerate(pixels):
                file, form = io.BytesIO(), FORMATS[i % len(FORMATS)]
                name = f"{'abc'[i % 3]}/{i}.{form}"
                labels.append([name, i % 3])
                Image.fromarray(image).save(file, form)
                archive.writestr(name, file.getvalue())
                path = self["images"] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.getvalue())
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
            (self["images"] / "dataset.json").write_text(json.dumps({"labels": labels}))

    def _make_cifar10(self):
        self["batches"].mkdir()
        self["pickles"].mkdir()
        with tarfile.open(self["tar"], "w:gz") as archive:
            for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
                records = np.random.default_rng(1).integers(0, 10, (20, 3073), np.uint8)
                (self["batches"] / f"{name}.bin").write_bytes(records.tobytes())
                archive.add(self["batches"] / f"{name}.bin", f"cifar-10-batches-bin/{name}.bin")
                batch = {b"data": records[:, 1:].copy(), b"labels": records[:, 0].tolist(), b"batch_label": b"x"}
                (self["pickles"] / name).write_bytes(pickle.dumps(batch, protocol=2))

    def _make_others(self):
        """Texts, latents, a folder of diffusers, an autoencoder's options, features, and widths as of DDSM."""
        random = np.random.default_rng(2)
        textual = NETWORK | {"num_classes": 0, "context_tokens": 2, "context_dim": 4}
        save_model(self["textual"], build_model("uvit-tiny", **textual))
        texts = {"context": random.random((6, 2, 4), np.float32), "null_context": random.random((2, 4), np.float32)}
        np.savez(self["text"], **texts)
        np.savez(self["moments"], moments=random.random((40, 6, 8, 8), np.float32), labels=np.arange(40) % 3)
        dit = build_model("dit-tiny", image_size=8, dim=16, depth=2, heads=2, num_classes=3)
        for name in ("diffusers", "vae"):
            self[name].mkdir()
        options = config_to_diffusers(dit.config)
        (self["diffusers"] / "config.json").write_text(json.dumps(options))
        weights = self["diffusers"] / "diffusion_pytorch_model.safetensors"
        save_file({key: value.clone() for key, value in to_diffusers(dit.state_dict(), dit.config).items()}, weights)
        (self["vae"] / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))
        shutil.copy(weights, self["vae"])
        torch.jit.save(torch.jit.script(MeanColours()), self["features"])
        self["widths"].write_text(json.dumps([0.25, 0.5, 1.0, 1.0]))

    def _make_runs(self):
        os.environ["SPARSEDM_CACHE"] = str(self["cache"])
        self.go(TRAIN)
        self["run"].rename(self["finished"])
        shutil.copytree(self["finished"], self["run"])
        for stage in sorted(self["run"].glob("[0-9]*")):  # as if it had been ended in its last stage
            for old in sorted(stage.glob("checkpoints/step-*"))[-1:] if stage.name.startswith("01") else ():
                shutil.rmtree(old)
        self.go(SEARCH)
        shutil.copy(next((self["search"] / "strategies").iterdir()), self["strategy"])
        self.go(["evaluate", "{model}", "--data", "{zip}", *BASE["evaluate"][3:]])
        assert networks(self["finished"])

    def _make_measurements(self):
        """What the bench reads: results, an experiment, a campaign, a table of tuned configurations."""
        held = Path(results.__file__).parent / "results" / "cpu"
        rows = results.read(held / "results.csv")
        results.write(self["results"], [row for row in rows if row["suite"] in ("mask", "train")])
        rows = results.read_experiment(held / "arms-smoke.csv")
        runs = list(dict.fromkeys(row["run"] for row in rows))[:3]
        for folder in (self["arms"], self["campaign"]):
            folder.mkdir()
        results.write_experiment(self["arms"] / "results.csv", [row for row in rows if row["run"] in runs])
        (self["arms"] / "options.json").write_text(json.dumps({"seeds": 2, "options": {"steps": 4}}))
        self.go(["tuned"])
        suites = [{"name": name, "status": "ran", "reason": "", "seconds": 1.5} for name in ("step", "mask")]
        index = {"suites": suites, "environment": results.stamp("cpu")}
        for name, held in (("index", index), ("first", {"configurations": {"a": "right"}})):
            (self["campaign"] / f"{name}.json").write_text(json.dumps(held))
        shutil.copy(self["results"], self["campaign"] / "results.csv")
        with zipfile.ZipFile(self["campaign"] / "plots.zip", "w") as archive:
            archive.write(self["images"] / "a" / "0.png", "speed.png")
            archive.write(self["images"] / "a" / "6.png", "masks.png")
        self.go(["campaign", "{campaign}"])

    def go(self, arguments):
        outcome = forked(lambda: call(self.fill(arguments)), 300)
        assert outcome.code == 0, outcome

    def special(self):
        """What no copy takes along."""
        os.mkfifo(self["pipe"])
        self["zero"].symlink_to("/dev/zero")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made, contextlib.chdir(self.folder):
            made.bind("socket")

    def listing(self):
        paths = [path for path in self.folder.rglob("*") if self["cache"] not in path.parents]
        return {path for path in paths if path.is_file() and not path.is_symlink()}


class MeanColours(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))


# ---- what reads them -------------------------------------------------------------------------------------------------


@program("bench")
def publish(arguments):
    """Into the folders of the world, not into the package."""
    campaign.publish(*map(Path, arguments))
    return 0


@program("bench")
def go_on(arguments):
    """A campaign whose suites have all run."""
    folder = Path(arguments[0])
    if (folder / "first.json").exists():
        campaign.suites_of("second", folder)
    index = campaign.run_campaign((), folder, 60)
    campaign._leave(folder)
    print([(entry["name"], entry["status"]) for entry in index["suites"]])
    return 0


def tuned(arguments):
    """Take a configuration from the table, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "device_name", lambda device: "NVIDIA Imaginary sm_90")
        patch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
        tuner = tuning.Autotuner("product", [{"BLOCK": 16}, {"BLOCK": 32}], [Path(__file__)], lambda run: len(run()))
        found = tuner.verdict(lambda config: torch.ones(2), torch.device("cuda", 0), M=16)
    assert found.config in tuner.candidates
    print([f"{microseconds:.1f}" for _, microseconds in found.times], [why.splitlines() for _, why in found.failed])
    return 0


PROGRAMS = {"plot": plot.main, "targets": targets.main, "experiments": experiments.main}
PROGRAMS |= {"publish": publish, "campaign": go_on, "tuned": tuned}


def call(arguments):
    """The exit code of a command of the package, or of a program of the bench."""
    return PROGRAMS[arguments[0]](arguments[1:]) if arguments[0] in PROGRAMS else cli.main(arguments)


SEARCH = ["search", "{finished}", "--out", "{search}", "--data", "{npz}", "--sampling-steps", "2", "--population", "4"]
SEARCH += ["--generations", "1", "--count", "8", "--final-count", "8", "--workers", "1"]
SAMPLE, EVALUATE = BASE["sample"][1:], BASE["evaluate"][3:]
ONE_STEP = ("--run", "{again}", "--steps", "1", "--batch-size", "4", "--warmup", "1")
ARMS = ("experiments", "arms", "--scale", "smoke")
READERS = {  # command line: files that it reads, as patterns below the world
    ("inspect", "{model}", "--plot", "{out}/a.png"): ["model.safetensors"],
    ("inspect", "{compressed}", "--plot", "{out}/a.png"): ["compressed.safetensors"],
    ("inspect", "{finished}"): ["finished/01*/checkpoints/step-00000003/*"],
    ("sample", "{compressed}", *SAMPLE): ["compressed.safetensors"],
    ("sample", "{shards}", *SAMPLE): ["shards.safetensors.index.json", "shards-*.safetensors"],
    ("sample", "{finished}", *SAMPLE): ["finished/01*/checkpoints/step-00000003/*"],
    ("sample", "{finished}", "--strategy", "{strategy}", "--count", "2", "--out", "{out}/a.png"): ["strategy.json"],
    ("sample", "{finished}", "--strategy", "{widths}", "--count", "2", "--out", "{out}/a.png"): ["widths.json"],
    ("sample", "{textual}", "--context", "{text}", "--guidance", "2", *SAMPLE): ["text.npz", "textual.safetensors"],
    ("import", *BASE["import"]): ["foreign.pth"],
    ("import", "{diffusers}", "--out", "{out}/b.safetensors"): ["diffusers/*"],
    ("encode", "--data", "{npz}", "--vae", "{vae}", "--out", "{out}/b.npz"): ["vae/config.json"],
    ("evaluate", "{model}", "--data", "{npz}", *EVALUATE): ["npz.npz"],
    ("evaluate", "{model}", "--data", "{npz}", "--features", "{features}", *EVALUATE): ["features.pt"],
    ("evaluate", "{model}", "--data", "{zip}", *EVALUATE): ["zip.zip", "cache/*/*", "cache/*.safetensors"],
    ("evaluate", "{model}", "--data", "{images}", *EVALUATE): ["images/*/*", "images/dataset.json"],
    ("evaluate", "{model}", "--data", "{tar}", *EVALUATE): ["tar.tar.gz"],
    ("evaluate", "{model}", "--data", "{batches}", *EVALUATE): ["batches/*"],
    ("evaluate", "{model}", "--data", "{pickles}", *EVALUATE): ["pickles/*"],
    ("train", "--data", "{moments}", "--chain", "dense", *SET, *ONE_STEP): ["moments.npz"],
    ("train", "--data", "{npz}", "--init", "{finished}/00-dense", "--method", "asp", *ONE_STEP): ["finished/00*/**/*"],
    tuple(TRAIN): ["run/**/*.json", "run/**/*.jsonl", "run/**/*.safetensors"],
    tuple(SEARCH): ["search/*.json", "search/*.jsonl", "search/strategies/*", "finished/**/*.json*"],
    ("plot", "{results}", "--out", "{out}"): ["results.csv"],
    ("targets", "{results}"): ["results.csv"],
    (*ARMS, "--report-only", "--out", "{arms}"): ["arms/results.csv"],
    (*ARMS, "--merge", "{arms}", "--out", "{again}"): ["arms/*"],
    ("publish", "{campaign}", "{out}/results", "{out}/tuned"): ["campaign/*"],
    ("campaign", "{campaign}"): ["campaign/*", "cache/tuned/*"],
    ("tuned",): ["cache/tuned/*"],
}


def complaint(world, arguments, result=None, expected=None):
    """Run one command in the world; what is wrong with what it did, or None. result(world) must be `expected`."""
    filled, before = world.fill(arguments), world.listing()
    with contextlib.chdir(world["folder"]):
        outcome = forked(lambda: call(filled))
    said = outcome.said[-400:]
    if outcome.code is None or outcome.code in (-24, -9):
        return f"hang: {outcome.code} {said}"
    if outcome.code < 0:
        return f"crash: {outcome.code} {said}"
    if outcome.code not in (0, 2) or "Traceback" in outcome.said:
        return f"traceback: {outcome.code} {said}"
    if (world["folder"] / RAN).exists():
        return "ran: the code of a pickle"
    partial = [path for path in world.folder.rglob("*.partial*")]
    if partial:
        return f"left: {partial}"
    if outcome.code == 2:
        sentences = [line for line in outcome.said.splitlines() if line.startswith(SPEAKERS)]
        if len(sentences) != 1 or outcome.said.splitlines()[-1] != sentences[0]:
            return f"unclear: {len(sentences)} sentences: {said}"
        if new := world.listing() - before:
            return f"left: {new}"
    elif result is not None and result(world) != expected:
        return "wrong: the result is another"
    return None


SPEAKERS = ("sparsedm", "bench:", "experiments:")


def distances(world):
    found = json.loads((world["out"] / "a.json").read_text())
    return {name: found[name] for name in ("frechet_distance", "kernel_distance", "precision", "recall", "count")}


def result_of(arguments, pattern):
    """A function of a world: what must not depend on the damage; None: everything may."""
    if arguments[0] == "evaluate" and pattern.startswith("cache/"):
        return distances
    return (lambda world: networks(world["run"])) if tuple(arguments) == tuple(TRAIN) else None


def networks(run):
    files = sorted(run.glob("*/checkpoints/step-00000003/*.safetensors"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@contextlib.contextmanager
def made(folder, runs):
    """The World that is copied; everything that a command imports is imported, so that a fork need not."""
    torch.set_num_threads(1)
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(module)
    names = ["matplotlib.figure", "matplotlib.backends.backend_agg", "pymoo.optimize", "torch._dynamo"]
    for name in names + ["diffusers.models.autoencoders.autoencoder_kl"] * runs:
        with contextlib.suppress(ImportError, RuntimeWarning):
            importlib.import_module(name)
    patch = pytest.MonkeyPatch()
    world = World(folder)
    patch.setenv("SPARSEDM_CACHE", str(world["cache"]))
    world.make(runs)
    yield world
    patch.undo()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    with made(tmp_path_factory.mktemp("good"), runs=True) as world:
        yield world


def hunt(good, folder, cases):
    """Run (label, arguments, file to change or None, seed) each in a copy of the good world; {label: complaint}."""
    found, counts = {}, collections.Counter()
    for number, (label, arguments, pattern, seed) in enumerate(cases):
        world = World(folder / str(number))
        shutil.copytree(good.folder, world.folder)
        for file in world.folder.glob("*/options.json"):  # which name the data, and so the folder
            file.write_text(file.read_text().replace(str(good.folder), str(world.folder)))
        world.special()
        os.environ["SPARSEDM_CACHE"] = str(world["cache"])
        result = expected = None
        if pattern:
            chooser = random.Random(seed)
            file = chooser.choice(sorted(path for path in world.folder.glob(pattern) if path.is_file()))
            others = sorted({*world.folder.glob(pattern), *world.folder.glob("*.*"), *file.parent.glob("*")})
            label = f"{label} {file.relative_to(world.folder)} {change(file, chooser, others)} {seed}"
            if result := result_of(arguments, pattern):
                expected = networks(good["finished"]) if arguments[0] == "train" else distances(good)
        said = complaint(world, list(arguments), result, expected)
        counts[said.partition(":")[0] if said else "right"] += 1
        if said:
            found[label] = said
            print(f"{label}\n    {said}", flush=True)
        shutil.rmtree(world.folder, ignore_errors=True)
    print(f"{sum(counts.values())} cases: {dict(counts)}")
    return found


def damages(count, readers=READERS, start=0):
    """`count` cases of one damaged file each, in turn for every command line and pattern."""
    every = [(arguments, pattern) for arguments, patterns in readers.items() for pattern in patterns]
    for seed in range(start, start + count):
        arguments, pattern = every[seed % len(every)]
        yield arguments[0], arguments, pattern, seed


def lines(commands):
    for command in commands:
        for arguments in absurd(command):
            yield repr(arguments)[:300], arguments, None, None


def test_some_damaged_files_and_strange_options(tmp_path):
    cheap = {
        arguments: files
        for arguments, files in READERS.items()
        if arguments[0] in ("inspect", "import") and "{finished}" not in arguments
    }
    every = [random.Random(command).choice(list(lines([command]))) for command in cli.COMMANDS]
    with made(tmp_path / "good", runs=False) as good:
        assert not hunt(good, tmp_path, [*damages(6, cheap), *every])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_damaged_files(good, tmp_path, part):
    assert not hunt(good, tmp_path, damages(100, start=100 * part))


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_strange_options(good, tmp_path, command):
    assert not hunt(good, tmp_path, lines([command]))
