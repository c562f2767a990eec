"""Both parts of the campaign on the stand-in driver, on small shapes: one configuration hangs, one is wrong."""

import json
import zipfile
from dataclasses import replace

import pytest

from bench import campaign
from bench.campaign import HUGE, LARGE, SMALL, run_campaign, suites_of
from bench.results import read
from tests.bench import stand_in

PLANTED = {1: "hangs", 2: "wrong"}


def small(suite):
    """The same suite on small shapes, and of the tests a file, whose tests are skipped without a GPU."""
    tests, one = str(campaign.TESTS), str(campaign.TESTS / "bench/test_timing.py")
    command = [one if part.startswith(tests) else part for part in suite.command]
    if "--shapes" in command:
        at = command.index("--shapes") + 1
        kinds = {"square": "square@256", "grid": "grid@256", "ddpm": "ddpm-tiny@1"}
        found = [next((k for n, k in kinds.items() if n in s), "uvit-tiny@1") for s in command[at].split(",")]
        command[at] = ",".join(dict.fromkeys(found))
    command += ["--quick"] * ("bench.run" in command) + ["--small", "--timeout", "90"] * (
        "bench.first_contact" in command
    )
    return replace(suite, command=tuple(command), seconds=10 * suite.seconds)


def broken(rows):
    """But for cuSPARSELt, which a CUDA build of torch has and the stand-in has not."""
    found = {(r["suite"], r["provider"], r["reason"]) for r in rows if r["status"] in ("failed", "wrong")}
    return {row for row in found if not row[1].startswith("cuSPARSELt")}


@pytest.mark.slow
def test_both_parts_in_their_time_with_a_hang_and_a_wrong_configuration(tmp_path, monkeypatch):
    for name, value in stand_in.environment(tmp_path, PLANTED).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = tmp_path / "gpu"
    first = run_campaign([small(suite) for suite in suites_of("first", folder)], folder, 1500)
    assert {e["name"]: e["status"] for e in first["suites"]} == {
        "environment": "skipped",
        "first contact": "ran",
        "step": "ran",
        "training step": "ran",
        "mask: 8192": "ran",
    }
    verdicts = json.loads((folder / "first.json").read_text())["configurations"]
    assert verdicts.pop("wgmma 1") == "hangs: more than 90 s"
    assert "weights are not in their place" in verdicts.pop("wgmma 2")
    assert set(verdicts.values()) == {"right"}
    rows = read(folder / "results.csv")
    assert broken(rows) == set()
    timed = {r["provider"] for r in rows if r["suite"] == "first" and r["status"] == "ok"}
    assert timed == {"dense", *(name for name in verdicts if name.startswith("wgmma"))}
    suites = [small(s) for s in suites_of("second", folder)]
    second = run_campaign(suites[: [s.name for s in suites].index("conv")], folder, 3000)
    states = {e["name"]: (e["status"], e["reason"]) for e in second["suites"]}
    assert {name: state for name, state in states.items() if state[0] == "failed"} == {}
    assert {p.name for p in folder.iterdir()} == {
        *("index.json", "first.json", "results.csv", "log.txt", "targets.md", "plots.zip", "tuned.json"),
    }
    (table,) = json.loads((folder / "tuned.json").read_text()).values()
    found = [entry for section in table.values() for entry in section.values() if entry["config"]["backend"] == "wgmma"]
    why = ("Refused: a process ended while it ran", "Refused: first contact: ")  # configurations 1 and 2
    assert found
    for entry in found:
        assert all(reason.startswith(start) for (_, reason), start in zip(entry["failed"], why, strict=True))
    rows = read(folder / "results.csv")
    # torch's path through CUTLASS refuses tensors that are not really on a GPU
    assert {provider for _, provider, _ in broken(rows)} == {"CUTLASS"}
    names = set(zipfile.ZipFile(folder / "plots.zip").namelist())
    assert names >= {"first-contact.png", "end-to-end.png", "train.png", "masks.png", "speedup-square.png"}


def test_the_shapes_that_are_made_small_are_named_so():
    assert {LARGE, HUGE, SMALL} == {f"uvit-{n}@64" for n in ("imagenet256-large", "imagenet256-huge", "cifar10-small")}
