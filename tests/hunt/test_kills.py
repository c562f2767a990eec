"""A run that is killed (SIGKILL) at random moments, resumed, killed again, ends with the bits of one that was not.

    pytest -m slow tests/hunt/test_kills.py -s        200 kills (fixed seeds; the moments depend on the machine)

A run takes a second or two and saves every third step. It is started by a fork, killed, and started again with the same
command until it ends. Then every tensor of every last checkpoint, the states, and the records of all steps are compared
with a run that nobody killed. Counted are kills, runs, and what differed.

Seen red (one fault planted each): the state of the optimizer not loaded; the average's file loaded into the model.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch

from sparsedm import cli
from sparsedm.commands import train
from tests.hunt.forked import forked

NETWORK = ("image_size=8", "dim=16", "depth=2", "heads=2", "num_classes=3")
RUNS = {
    "chain": ["--chain", "dense,3:4,2:4"],
    "parts": ["--chain", "dense,2:4", "--accumulate", "2", "--cosine"],
    "asp": ["--init", "{dense}", "--method", "asp"],
    "in place": ["--init", "{dense}", "--method", "inplace"],
    "transfer": ["--init", "{dense}", "--method", "sr-ste+kd", "--clip", "0", "--ema", "0.9"],
}


def command(folder, name, run, steps):
    line = [
        "train",
        "--data",
        str(folder / "images.npz"),
        "--run",
        str(run),
        "--steps",
        str(steps),
        "--batch-size",
        "4",
    ]
    line += ["--batch-size", "4", "--save-every", "3", "--log-every", "1", "--warmup", "3", "--seed", "5"]
    line += [word for setting in NETWORK for word in ("--set", setting)] if "--init" not in RUNS[name] else []
    return line + [word.replace("{dense}", str(folder / "dense" / "00-dense")) for word in RUNS[name]]


def killed(line, seconds):
    """Start the command, kill it after so many seconds; whether it had ended before."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            code = cli.main(line)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, f"{line} was refused after a kill"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def outcome(run):
    """Everything that a finished run is compared by; times are left out."""
    found = {}
    for stage in sorted(run.glob("[0-9]*")):
        last = sorted(stage.glob("checkpoints/step-*"))[-1]
        for file in sorted(last.glob("*.safetensors")):
            found[f"{stage.name}/{file.name}"] = file.read_bytes()
        state = json.loads((last / "state.json").read_text())
        found[f"{stage.name}/state"] = {name: state[name] for name in ("step", "updates", "loss", "validation_loss")}
        records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        names = ("step", "lr", "loss", "gradient_norm", "density", "flip_rate", "validation_loss")
        found[f"{stage.name}/records"] = [[record.get(name) for name in names] for record in records]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "plot_losses", lambda *arguments: None)  # a third of a run, and nothing of it is compared
    folder = tmp_path_factory.mktemp("kills")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(40) % 3)
    patch.setenv("SPARSEDM_CACHE", str(folder / "cache"))
    patch.setitem(RUNS, "dense", ["--chain", "dense"])

    def run():
        code = cli.main(command(folder, "dense", folder / "dense", 4))
        (folder / "modules").write_text("\n".join(sys.modules))
        return code

    assert forked(run, 100).code == 0
    for name in (folder / "modules").read_text().splitlines():  # so that no later fork need import anything
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    yield folder
    patch.undo()


def hunt(folder, name, kills, steps, seed):
    """Kill runs `kills` times in all and let each end; the names of what differed from a run that was not killed."""
    chooser, done, runs, different = random.Random(seed), 0, 0, []
    start, whole = time.monotonic(), folder / f"{name}-{seed}-whole"
    assert forked(lambda: cli.main(command(folder, name, whole, steps)), 200).code == 0
    length, expected = time.monotonic() - start, outcome(whole)
    while done < kills:
        run = folder / f"{name}-{seed}-{runs}"
        for _ in range(50):  # else a run might never end
            last = done >= kills
            if killed(command(folder, name, run, steps), 600 if last else chooser.uniform(0.02, 1.0) * length):
                break
            done += 1
        else:
            assert killed(command(folder, name, run, steps), 600)
        found = outcome(run)
        different += [f"{run.name}/{key}" for key in expected | found if expected.get(key) != found.get(key)]
        runs += 1
    print(
        f"{name}: {done} kills in {runs} runs of {length:.1f} s, {len(different)} lost or different: {different[:5]}",
        flush=True,
    )
    return different


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(RUNS))
def test_kills(folder, name, seed):
    assert not hunt(folder, name, kills=10, steps=9, seed=seed)
