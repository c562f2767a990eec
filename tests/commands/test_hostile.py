"""Every option of every command, given what it should not be: one sentence and an exit code, no traceback, no hang."""

import argparse
import os
import random
import time

import pytest
import torch

from sparsedm import cli
from sparsedm.model_files import save_model
from sparsedm.models import build_model

VALUES = (
    *("", " ", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e308", "1e308,1e308", "9" * 30, "9" * 5000, "x" * 300),
    *("\udcff", "$x_{$", "a/b", "[", "{}", "dense", "2:4", "2:4,2:4", "999999999:1000000000", "(", "*"),
    *(
        "mlp",
        "mlpp",
        "all",
        "1,1",
        "none",
        "cuda:-1",
        "cpu:9",
        "{pipe}",
        "{zero}",
        "{folder}",
        "{file}",
        "{run}/x",
        "=",
    ),
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
    *(
        "patch_size=0",
        "channels=0",
        "num_classes=-2",
        "num_classes=1e9",
        "dim=nan",
        "dim=" + "[" * 5000,
        "kind=dit",
        "=",
    ),
    *(
        "image_size=1000000007",
        "velocity=1",
        "mlp_ratio=0",
        "mlp_ratio=1000000",
        "dim=null",
        "dim={}",
        "x" * 300 + "=1",
    ),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    model = build_model("uvit-tiny", image_size=8, dim=16, depth=2, heads=2)
    save_model(folder / "model.safetensors", model)
    os.mkfifo(folder / "pipe.npz")
    (folder / "zero.zip").symlink_to("/dev/zero")
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    named = {"run": folder / "run", "pipe": folder / "pipe.npz", "zero": folder / "zero.zip"}
    return {"model": folder / "model.safetensors", "file": folder / "file", "folder": folder / "folder", **named}


BASE = {  # as little work as there can be
    "quickstart": ["--dry-run"],
    "train": ["--data", "synthetic", "--model", "uvit-tiny", "--dry-run"],
    "sample": ["{model}", "--count", "2", "--sampling-steps", "1", "--out", "{run}/a.png"],
    "evaluate": ["{model}", "--data", "{folder}", "--count", "4", "--sampling-steps", "1", "--out", "{run}/a.json"],
    "inspect": ["{model}", "--plot", "{run}/a.png"],
    "import": ["{file}", "--out", "{run}/b.safetensors"],
    "encode": ["--data", "{folder}", "--vae", "{folder}", "--out", "{run}/z.npz"],
    "search": ["--dry-run"],
}


def options_of(command):
    """(option strings, takes a value) of every option of a command."""
    parser = cli.parser_for([command])
    subs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [(a.option_strings, a.nargs != 0) for a in subs.choices[command]._actions if a.dest != "help"]


def attempts(command):
    base = BASE[command]
    for strings, takes_value in options_of(command):
        values = SETTINGS if "--set" in strings else VALUES
        for value in values if takes_value else [None]:
            given = [f"{strings[-1]}={value}" if takes_value else strings[-1]] if strings else [value]
            kept = base if strings else base[1:] if base and not base[0].startswith("-") else base
            if strings and strings[-1] in kept:
                place = kept.index(strings[-1])
                kept = kept[:place] + kept[place + 2 :]
            yield [command, *given, *kept]


def check(arguments, places, capsys, monkeypatch, tmp_path):
    """Run one command; the complaint about it, or None."""
    monkeypatch.chdir(tmp_path)
    filled = [a.replace("{", "\0").replace("\0}", "{}") for a in arguments]
    for name, path in places.items():
        filled = [a.replace(f"\0{name}}}", str(path)) for a in filled]
    filled = [a.replace("\0", "{") for a in filled]
    start = time.monotonic()
    try:
        code = cli.main(filled)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    said = capsys.readouterr().err
    if code not in (0, 2):
        return f"exit code {code}"
    if time.monotonic() - start > 60:
        return f"{time.monotonic() - start:.0f} s"
    lines = [line for line in said.splitlines() if line.startswith("sparsedm")]
    return f"{len(lines)} sentences: {said[:300]}" if code and len(lines) != 1 else None


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_some_strange_options(command, places, capsys, monkeypatch, tmp_path):
    every = list(attempts(command))
    chosen = random.Random(command).sample(every, min(len(every), 6))
    wrong = {str(a): said for a in chosen if (said := check(a, places, capsys, monkeypatch, tmp_path))}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_all_strange_options(command, places, capsys, monkeypatch, tmp_path):
    every = list(attempts(command))
    wrong = {str(a): said for a in every if (said := check(a, places, capsys, monkeypatch, tmp_path))}
    assert not wrong, f"{len(wrong)} of {len(every)}"
