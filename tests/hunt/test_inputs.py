"""Hostile inputs: what every command reads and every option it takes, damaged, strange or absurd, under limits.

    pytest -m slow tests/hunt/test_inputs.py -s       all of them (fixed seeds; the counts are printed)

Every case runs one command in a fork with 2 GiB and a minute of CPU. Right is: exit code 0 or 2; with 2 one sentence on
stderr, nothing new in the folders and nothing half-written; with 0 no half-written file, and a run that was resumed
ends with the bits of one that was not. Anything else is counted: traceback, hang, crash, wrong, left.

Seen red (one fault planted each): a RecursionError that `parse_json` lets pass -> traceback, at a header of brackets;
`regular_file` without its look at the kind of file -> hang, at a pipe; a partial file that `atomic_file` leaves
-> left, on a full disk.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import socket
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sparsedm import cli
from sparsedm.model_files import save_model
from sparsedm.models import build_model
from sparsedm.sparsity import compress, sparsify
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
    """A folder of good files, made once, and a copy of it for every case. `names` are what command lines call them."""

    names = ("model", "compressed", "foreign", "shards", "diffusers", "npz", "zip", "images", "tar", "batches", "run")
    names += ("finished", "strategy", "search", "cache", "file", "folder", "pipe", "zero", "socket", "out")
    suffix = {"model": ".safetensors", "compressed": ".safetensors", "foreign": ".pth", "npz": ".npz", "zip": ".zip"}
    suffix |= {
        "tar": ".tar.gz",
        "pipe": ".npz",
        "zero": ".zip",
        "strategy": ".json",
        "shards": ".safetensors.index.json",
    }

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, name):
        return self.folder / (name + self.suffix.get(name, ""))

    def fill(self, arguments):
        for name in self.names:
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
        for name in ("folder", "out", "cache"):
            self[name].mkdir(exist_ok=True)
        self["file"].write_text("x")
        if runs:
            self._make_runs()

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
        with tarfile.open(self["tar"], "w:gz") as archive:
            for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
                content = np.random.default_rng(1).integers(0, 10, 3073 * 20, np.uint8).tobytes()
                (self["batches"] / f"{name}.bin").write_bytes(content)
                archive.add(self["batches"] / f"{name}.bin", f"cifar-10-batches-bin/{name}.bin")

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

    def go(self, arguments):
        outcome = forked(lambda: cli.main(self.fill(arguments)), 300)
        assert outcome.code == 0, outcome

    def special(self):
        """What no copy takes along."""
        os.mkfifo(self["pipe"])
        self["zero"].symlink_to("/dev/zero")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made, contextlib.chdir(self.folder):
            made.bind("socket")

    def listing(self):
        paths = [path for path in self.folder.rglob("*") if self["cache"] not in path.parents and path.name != ".lock"]
        return {path for path in paths if path.is_file() and not path.is_symlink()}


SEARCH = ["search", "{finished}", "--out", "{search}", "--data", "{npz}", "--sampling-steps", "2", "--population", "4"]
SEARCH += ["--generations", "1", "--count", "8", "--final-count", "8", "--workers", "1"]
READERS = {  # command line: files that it reads, as patterns below the world
    ("inspect", "{model}", "--plot", "{out}/a.png"): ["model.safetensors"],
    ("inspect", "{compressed}", "--plot", "{out}/a.png"): ["compressed.safetensors"],
    ("sample", "{compressed}", *BASE["sample"][1:]): ["compressed.safetensors"],
    ("sample", "{shards}", *BASE["sample"][1:]): ["shards.safetensors.index.json", "shards-*.safetensors"],
    ("sample", "{finished}", *BASE["sample"][1:]): ["finished/01*/checkpoints/step-00000003/*"],
    ("sample", "{finished}", "--strategy", "{strategy}", "--count", "2", "--out", "{out}/a.png"): ["strategy.json"],
    ("import", *BASE["import"]): ["foreign.pth"],
    ("evaluate", "{model}", "--data", "{npz}", *BASE["evaluate"][3:]): ["npz.npz"],
    ("evaluate", "{model}", "--data", "{zip}", *BASE["evaluate"][3:]): ["zip.zip", "cache/*/*"],
    ("evaluate", "{model}", "--data", "{images}", *BASE["evaluate"][3:]): ["images/*/*", "images/dataset.json"],
    ("evaluate", "{model}", "--data", "{tar}", *BASE["evaluate"][3:]): ["tar.tar.gz"],
    ("evaluate", "{model}", "--data", "{batches}", *BASE["evaluate"][3:]): ["batches/*"],
    tuple(TRAIN): ["run/**/*.json", "run/**/*.jsonl", "run/**/*.safetensors"],
    tuple(SEARCH): ["search/*.json", "search/*.jsonl", "search/strategies/*"],
}
FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff")
JUNK = (b"", b"\0" * 64, b"[]", b"{}", b"null", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000, b"NaN", b"1e999")
JUNK += (b"PK\3\4", b"\x80\4.", b"(" * 5000)
STRANGE = (None, True, -1, 0, 2**70, 10**400, 1.5, -0.0, "", "x" * 300, "\0", "\ud800", [], {}, [[]], {"a": {"a": []}})
STRANGE += ("2:4", "-1", 1e300)


def places(value, prefix=()):
    """The path to every value in JSON."""
    yield prefix
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*prefix, key))


def changed_json(text, random):
    """A JSON text of the same kind with one value replaced, removed, added or repeated."""
    value = json.loads(text)
    *path, last = random.choice([place for place in places(value) if place] or [(None,)])
    if last is None:
        return json.dumps(random.choice(STRANGE))
    inside = value
    for key in path:
        inside = inside[key]
    match random.choice(["replace", "replace", "replace", "remove", "add", "repeat", "infinite"]):
        case "replace":
            inside[last] = random.choice(STRANGE)
        case "remove":
            del inside[last]
        case "add" if isinstance(inside, dict):
            inside["another"] = random.choice(STRANGE)
        case "repeat" if isinstance(last, str):
            return text.replace(f'"{last}":', f'"{last}": 7, "{last}":', 1)
        case _:
            inside[last] = float("nan") if random.random() < 0.5 else float("inf")
    return json.dumps(value)


def changed_tensors(file, random):
    """Change one tensor of a safetensors file, or its header, so that the file itself stays whole."""
    tensors = load_file(file)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size]).get("__metadata__", {})
    name = random.choice(sorted(tensors))
    value = tensors[name]
    match random.choice(["dtype", "shape", "missing", "extra", "nan", "bit", "header", "header", "rename"]):
        case "dtype":
            tensors[name] = value.to(
                random.choice([torch.float16, torch.int64, torch.bool, torch.float64, torch.uint8])
            )
        case "shape":
            tensors[name] = random.choice([value[None], value.flatten()[:1], value.new_zeros(0)]).contiguous()
        case "missing":
            del tensors[name]
        case "extra":
            tensors["another.weight"] = torch.ones(2)
        case "rename":
            tensors[random.choice([name.upper(), "module." + name, "", name + "\n"])] = tensors.pop(name)
        case "nan" if value.is_floating_point():
            tensors[name] = torch.full_like(value, random.choice([float("nan"), float("inf"), 1e38]))
        case "bit":
            flat = value.clone().flatten().view(torch.uint8)
            flat[random.randrange(len(flat))] ^= 1 << random.randrange(8)
            tensors[name] = flat.view(value.dtype).view(value.shape)
        case _ if header:
            key = random.choice(sorted(header))
            with contextlib.suppress(ValueError):
                header[key] = changed_json(header[key], random)
    save_file(tensors, file, header or None)


def change(file, random):
    """Damage one file in one of many ways; returns which."""
    content, kind = file.read_bytes(), random.random()
    text = file.suffix == ".json" or file.suffix == ".jsonl"
    if kind < 0.08:
        file.unlink()
        how = random.choice(["gone", "folder", "pipe", "zero", "dangling", "itself"])
        if how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)
        elif how != "gone":
            file.symlink_to({"zero": "/dev/zero", "dangling": "nowhere", "itself": file.name}[how])
        return how
    if kind < 0.16:
        file.write_bytes(random.choice(JUNK))
        return "junk"
    if kind < 0.6 and text:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        place = random.randrange(len(lines))
        lines[place] = changed_json(lines[place], random)
        file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
        return "json"
    if kind < 0.6 and file.suffix == ".safetensors":
        changed_tensors(file, random)
        return "tensors"
    damaged, place = bytearray(content), random.randrange(len(content) + 1)
    match random.randrange(6):
        case 0:
            del damaged[place:]
        case 1:
            damaged += random.randbytes(random.choice([1, 100]))
        case 2:
            damaged[place : place + 16] = bytes(16)
        case 3:
            damaged[place : place + 40] = damaged[place : place + 40] * 3
        case _:
            near_an_end = random.choice([0, max(0, len(content) - 200)])  # where headers and tables of contents are
            for _ in range(random.choice([1, 1, 8])):
                at = near_an_end + random.randrange(200) if random.random() < 0.5 else random.randrange(len(content))
                if at < len(damaged):
                    damaged[at] ^= 1 << random.randrange(8)
    file.write_bytes(damaged)
    return "bytes"


def complaint(world, arguments, expected=None):
    """Run one command in the world; what is wrong with what it did, or None. expected: bytes of finished networks."""
    filled, before = world.fill(arguments), world.listing()
    with contextlib.chdir(world["folder"]):
        outcome = forked(lambda: cli.main(filled))
    said = outcome.said[-400:]
    if outcome.code is None or outcome.code in (-24, -9):
        return f"hang: {outcome.code} {said}"
    if outcome.code < 0:
        return f"crash: {outcome.code} {said}"
    if outcome.code not in (0, 2) or "Traceback" in outcome.said:
        return f"traceback: {outcome.code} {said}"
    partial = [path for path in world.folder.rglob("*.partial*")]
    if partial:
        return f"left: {partial}"
    if outcome.code == 2:
        sentences = [line for line in outcome.said.splitlines() if line.startswith("sparsedm")]
        if len(sentences) != 1 or outcome.said.splitlines()[-1] != sentences[0]:
            return f"unclear: {len(sentences)} sentences: {said}"
        if new := world.listing() - before:
            return f"left: {new}"
    elif expected is not None and networks(world["run"]) != expected:
        return "wrong: the run ended with other bits"
    return None


def networks(run):
    files = sorted(run.glob("*/checkpoints/step-00000003/*.safetensors"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@contextlib.contextmanager
def made(folder, runs):
    """The World that is copied; everything that a command imports is imported, so that a fork need not."""
    torch.set_num_threads(1)
    for module, _ in cli.COMMANDS.values():
        importlib.import_module(module)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "pymoo.optimize", "torch._dynamo"):
        with contextlib.suppress(ImportError):
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
    expected = networks(good["finished"])
    for number, (label, arguments, pattern, seed) in enumerate(cases):
        world = World(folder / str(number))
        shutil.copytree(good.folder, world.folder)
        for file in world.folder.glob("*/options.json"):  # which name the data, and so the folder
            file.write_text(file.read_text().replace(str(good.folder), str(world.folder)))
        world.special()
        os.environ["SPARSEDM_CACHE"] = str(world["cache"])
        if pattern:
            chooser = random.Random(seed)
            file = chooser.choice(sorted(path for path in world.folder.glob(pattern) if path.is_file()))
            label = f"{label} {file.relative_to(world.folder)} {change(file, chooser)} {seed}"
        said = complaint(world, list(arguments), expected if tuple(arguments) == tuple(TRAIN) else None)
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
    cheap = {arguments: files for arguments, files in READERS.items() if arguments[0] in ("inspect", "import")}
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
