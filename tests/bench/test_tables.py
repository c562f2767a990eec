"""The page "Which table is which command" in bench/README.md: each row is a command, plans what runs, runs in small."""

import pathlib
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import run as speed
from bench.experiments import __main__ as experiments
from bench.experiments import work
from bench.experiments.plans import EXPERIMENTS, SCALES
from sparsedm import cli
from sparsedm.commands import evaluate, train
from sparsedm.models import build_model
from sparsedm.recipes import QUICKSTART, SEARCHES
from sparsedm.sparsity import sparsify
from sparsedm.stepaware import study
from sparsedm.train import checkpoint

README = pathlib.Path(__file__).parents[2] / "bench" / "README.md"
PAGE = README.read_text(encoding="utf-8").partition("## Which table is which command")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| (.+?) \|$", PAGE, re.MULTILINE)
PROGRAMS = {"bench.experiments": experiments.main, "bench.run": speed.main}
LABELS = [row for row, _, _ in ROWS]


def start(command, *more):
    """The exit code of a command line of the page."""
    words = [*shlex.split(command), *more]
    return cli.main(words[1:]) if words[0] == "sparsedm" else PROGRAMS[words[2]](words[3:])


def test_the_page_has_rows_for_both_papers():
    assert len(ROWS) == PAGE.count("\n| ") - 2, "every line of the tables but the heads"
    assert len(ROWS) > 20
    assert all(state.startswith(("runs here", "needs ")) for _, _, state in ROWS)


@pytest.mark.parametrize("command", [command for _, command, _ in ROWS], ids=LABELS)
def test_every_row_is_a_command(command):
    words = shlex.split(command)
    if words[0] == "sparsedm":
        cli.parse(words[1:])
    elif words[2] == "bench.run":
        speed.parser().parse_args(words[3:])
    else:
        assert words[:3] == ["python", "-m", "bench.experiments"]
        assert words[3] in EXPERIMENTS


# ---- what a command needs to be there, as small as it can be


def images(path, size, count=80, **arrays):
    generator = np.random.default_rng(0)
    np.savez(path, images=generator.integers(256, size=(count, *size, 3), dtype=np.uint8), **arrays)


def latents(path, **arrays):
    np.savez(path, x=np.random.default_rng(0).normal(size=(80, 4, 32, 32)).astype(np.float32), **arrays)


def run_folder(folder, network):
    optimizer = torch.optim.AdamW(network.parameters())
    state = {"updates": 1, "seconds": 1.0}
    checkpoint.save(folder, 1, model=network, ema=network, optimizer=optimizer, state=state)


@pytest.fixture
def bench_in(tmp_path, monkeypatch):
    """A folder in which everything lies that the commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    latents("imagenet256-latents.npz", labels=np.arange(80) % 1000)
    latents("coco-latents.npz", context=generator.normal(size=(80, 77, 768)).astype(np.float32))
    from PIL import Image

    for number in range(80):
        pixels = generator.integers(256, size=(218, 178, 3), dtype=np.uint8)
        (tmp_path / "faces").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{number:03d}.jpg")
    shutil.make_archive("celeba", "zip", tmp_path / "faces")
    torch.manual_seed(0)
    tiny = {"image_size": 32, "width": 16, "multipliers": (1, 1), "attention": (), "groups": 4}
    run_folder(tmp_path / "runs/supernet/00-dense", build_model("slimmable-tiny", **tiny))
    run_folder(tmp_path / "runs/conditional/00-dense", build_model("slimmable-tiny", **tiny, num_classes=10))
    tiny = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
    for name in ("dense", "2-4", "1-4", "1-8"):
        network = sparsify(build_model("uvit-tiny", **tiny), name.replace("-", ":") if name != "dense" else None)
        run_folder(tmp_path / "runs/ratio/seed-0" / name / "00-last", network)
    steps = [1.0] * 400 + [0.75] * 200 + [0.5] * 400
    (tmp_path / "search.txt").write_text(str(steps))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for _, command, _ in ROWS], ids=LABELS)
def test_every_command_plans_what_runs(command, bench_in, capsys):
    before = sorted(bench_in.rglob("*"))
    assert start(command, "--dry-run") == 0, capsys.readouterr().err
    written = [path for path in sorted(bench_in.rglob("*")) if path not in before and "cache" not in path.parts]
    assert not written


# ---- the smallest version of each


TINY = {
    "uvit-cifar10-small": ["uvit-tiny", "--set", "dim=32", "--set", "depth=2"],
    "uvit-celeba64-small": ["uvit-tiny", "--set", "image_size=64", "--set", "dim=32", "--set", "depth=2"],
    "uvit-imagenet256-large": ["uvit-tiny", "--set", "channels=4", "--set", "dim=32", "--set", "num_classes=1000"],
    "uvit-coco-small": ["uvit-coco-small", "--set", "dim=32", "--set", "depth=2", "--set", "heads=2"],
    "ddpm-cifar10": ["ddpm-tiny", "--set", "width=16"],
    "ddpm-celeba64": ["ddpm-tiny", "--set", "width=16", "--set", "image_size=64", "--set", "attention=[16]"],
    "slimmable-cifar10": ["slimmable-tiny", "--set", "width=16", "--set", "attention=[]"],
}
FEW = {
    "--count": "8", "--population": "9", "--generations": "1", "--steps": "12", "--sampling-steps": "3",
    "--scale": "smoke", "--features": "random-conv", "--seeds": "1",
}  # fmt: skip


def smallest(command):
    """The command line with the tiniest network, drawn images where no file is named, and next to no steps."""
    words, small = shlex.split(command), []
    if words[2] == "bench.run":
        return [*words, "--quick", "--no-sampling", "--no-compile"]
    while words:
        word = words.pop(0)
        small.append(word)
        if word in FEW:
            small.append((words.pop(0), FEW[word])[1])
        elif word == "--model":
            small += TINY[words.pop(0)]
        elif word == "--data" and words[0] == "cifar10":
            small.append((words.pop(0), "synthetic:32")[1])
    if "train" in small:
        small += ["--batch-size", "6", "--limit", "12", "--save-every", "100", "--weighting", "noise"]
    if "search" in small and "runs/" in command:
        defaults = {"--count": "8", "--population": "9", "--generations": "1", "--sampling-steps": "3"}
        small += [word for option, value in defaults.items() if option not in small for word in (option, value)]
        small += ["--final-count", "8"]
    if "search.txt" in small:
        small[small.index("search.txt")] = "few.txt"
    if small[2] == "bench.experiments":
        small += ["--crop", "celeba"] * ("celeba.zip" in small)
        small += ["--only", "dense"] * ("--only" not in small)
        small += ["--only", {"claims": "2:4 chain", "ratio": "1:8", "ablate": "w_kd=1"}.get(small[3], "chain")]
        small[small.index("--only") + 1] = "default" if small[3] == "ablate" else "dense"
    return small


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for _, command, _ in ROWS], ids=LABELS)
def test_the_smallest_version_of_every_command_runs(command, bench_in, capsys, monkeypatch):
    (bench_in / "few.txt").write_text("[1, 0.75, 0.5]")
    shape = {"dim": 16, "depth": 2, "heads": 2}
    few = {"samples": 8, "validation": 8, "sampling_steps": 2}
    options = replace(QUICKSTART["synthetic"].options, batch_size=4)
    scale = SCALES["smoke"]
    tiny = replace(scale, overrides=scale.overrides | shape, base_steps=4, steps=9, seeds=1, options=options, **few)
    monkeypatch.setitem(SCALES, "smoke", tiny)
    for name, search in SEARCHES["smoke"].items():
        changed = {"multipliers": (1, 1), "attention": ()} if name != "chain" else shape
        stages = tuple(replace(stage, steps=2) for stage in search.stages)
        small = replace(search, overrides=search.overrides | changed, stages=stages, options=options, population=9)
        monkeypatch.setitem(SEARCHES["smoke"], name, replace(small, generations=1, count=8, **few))
    for module in (work, train, evaluate, study):
        load = module.load_images
        monkeypatch.setattr(module, "load_images", lambda *a, load=load, **s: load(*a, **s | {"limit": 40}))
    words = smallest(command)
    if "--run" in words:  # where the other commands find a finished one
        shutil.rmtree(words[words.index("--run") + 1])
    assert start(shlex.join(words)) == 0, capsys.readouterr().err
