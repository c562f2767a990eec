"""All that needs a GPU, in one command and within so many minutes: `python -m bench.campaign --out DIR`.

The suites run in order of importance, each in a process of its own: a crash, a hang or a GPU error ends that suite and
not the campaign. Each has at most the time that is left; whatever it has measured when it is cut stays in results.csv.

DIR holds a few files: index.json (what ran, failed, was cut, was skipped), results.csv (all suites), log.txt (their
output, shortened), targets.md (what was measured beside what the project wants), tuned.json (configurations found),
counters.txt (of the best and worst shapes), plots.zip; with --data also quality.zip, the reports of trainings, whose
checkpoints are in DIR-quality. The same command with --resume runs what did not finish, and goes on inside a suite that
was cut.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import torch

from bench import program
from bench.plot import draw_all
from bench.results import stamp
from bench.suite import Suite, side_by_side
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, cache_folder, write_json, write_text

LOG_LIMIT = 200_000  # characters of each suite's output that are kept: the end, where the errors are
RESERVE = 20  # seconds kept for the pictures


def bench(suites, *arguments):
    """The command line that measures these suites."""
    fixed = ("-m", "bench.run", "--resume", "--out", "{csv}", "--seconds", "{seconds}", "--suite", suites)
    return (sys.executable, *fixed, *arguments)


TESTS = Path(__file__).parents[1] / "tests"


def pytest(*arguments):
    return (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--color=no", *arguments)


def sanitizer(tool):
    """The sparse kernels under compute-sanitizer, on memory that torch asks the driver for piece by piece: in its own
    pool an access beyond a tensor would be none beyond an allocation."""
    names = ("mma", "mma_splitk", "mma_conv", "wgmma", "wgmma_conv")
    files = [str(TESTS / f"kernels/sparse24/test_{name}.py") for name in names]
    tests = pytest("--verbose", "-k", "random", *files)  # one problem of each kind
    watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests)
    return Suite(tool, ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched), 0.3, "checks", "compute-sanitizer")


def gpu_suites():
    """In order of importance: a number is worth nothing before the tests, and little without its ceiling; then what the
    project's targets ask for, then the curves. What torch.compile has to tune for minutes comes after what is quick,
    but for whole networks, whose dense and 2:4 times must come from the same rounds.
    """
    layers = "uvit-imagenet256-large@64,uvit-imagenet256-huge@64,dit-xl-2@64,uvit-cifar10-small@64"
    networks = "uvit-imagenet256-large@64,uvit-imagenet256-huge@64,uvit-cifar10-small@64"
    compared = ("--providers", "dense,dense compiled,sparsedm 2:4,sparsedm 2:4 compiled")
    # in several processes, one of which dies with a test that crashes or hangs, and is replaced
    workers = ("-n", str(max(1, (os.cpu_count() or 1) // 2))) if importlib.util.find_spec("xdist") else ()
    counters = (sys.executable, "-m", "bench.counters", "{csv}", "--out", "{folder}/counters.txt")
    quick = "--no-compile"
    return (
        Suite("tests", pytest(*workers, str(TESTS)), 0.3, "checks"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Suite("ceiling", bench("ceiling"), 0.2),
        Suite("gemm: 8192", bench("gemm", "--shapes", "square@8192", "--modes", "plain", quick), 0.3),
        Suite("gemm: models", bench("gemm", "--shapes", layers, quick), 0.4),
        Suite("mask", bench("mask"), 0.2),
        Suite("end-to-end", bench("end-to-end", "--shapes", networks, *compared), 0.6),
        Suite("masked-train", bench("masked-train", "--shapes", layers), 0.4),
        Suite("train", bench("train", "--shapes", "uvit-cifar10-small@128"), 0.6),
        Suite("counters", counters, 0.3, needs="ncu"),
        Suite("gemm: square", bench("gemm", "--shapes", "square", quick), 0.5),
        Suite("conv", bench("conv", "--shapes", "ddpm-cifar10@64,sd-1.5@16", quick), 0.5),
        Suite("gemm: grid", bench("gemm", "--shapes", "grid,m-sweep", quick), 0.5),
        Suite("gemm: compiled", bench("gemm", "--shapes", f"square,{layers}"), 0.6),
        Suite("table3", bench("table3", quick)),
        Suite("gemm: all", bench("gemm", quick)),
    )


def quality_suites(data):
    """What training and searching give, on images from `data`; their folders are too large for the campaign's own."""
    suites = []
    for name in ("arms", "search", "ratio", "fixed-vs-inplace-vs-chain"):
        command = (sys.executable, "-m", *(("sparsedm.cli",) if name == "search" else ("bench.experiments",)), name)
        places = ("--out", f"{{folder}}-quality/{name}", "--minutes", "{minutes}")
        suites.append(Suite(f"quality: {name}", (*command, "--scale", "lite", "--data", data, *places), least=120))
    return tuple(suites)


def run_campaign(suites, folder, minutes, *, resume=False, now=time.monotonic, device="cpu"):
    """Run `suites` into `folder` within `minutes`. Returns the index, which is also written after every suite.

    Raises: InputError if the folder holds a campaign already and resume is not asked for.
    """
    folder, start = Path(folder), now()
    entries = {e["name"]: e for e in _index(folder)["suites"]}
    if not resume and (folder / "index.json").exists():
        raise InputError(f"{folder} holds a campaign: choose another --out, or go on with --resume")
    folder.mkdir(parents=True, exist_ok=True)
    index = {"environment": stamp(device), "minutes": minutes, "suites": []}

    def left():
        return 60 * minutes - RESERVE - (now() - start)

    for _, group in itertools.groupby(suites, key=lambda suite: suite.group or suite.name):
        todo = [suite for suite in group if entries.get(suite.name, {}).get("status") != "ran"]
        for entry, output in side_by_side(todo, folder, left()):
            if entry["status"] == "skipped":
                entries.setdefault(entry["name"], entry)
            else:
                entries[entry["name"]] = entry
                _log(folder, entry["name"], output)
        index["suites"] = list(entries.values())
        write_json(folder / "index.json", index)
    _tuned(folder)
    _quality(folder)
    index["plots"] = _pictures(folder)
    write_json(folder / "index.json", index)
    return index


def _index(folder):
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"suites": []}


def _log(folder, name, output):
    path = folder / "log.txt"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    # progress bars redraw their line: the last state of each is enough
    lines = [line.rsplit("\r", 1)[-1] for line in output.split("\n")]
    write_text(path, f"{before}==== {name}\n" + "\n".join(lines)[-LOG_LIMIT:] + "\n")


def _pictures(folder):
    """Make plots.zip and targets.md of results.csv. Returns how many pictures there are, or why there are none."""
    try:
        paths = draw_all([folder / "results.csv"], folder / ".plots")
        pictures = [path for path in paths if path.suffix == ".png"]
        with atomic_file(folder / "plots.zip") as partial, zipfile.ZipFile(partial, "w") as archive:
            for path in pictures:
                archive.write(path, path.name)
        for path in set(paths) - set(pictures):
            os.replace(path, folder / path.name)
        return f"{len(pictures)} pictures"
    except InputError as error:
        return f"none: {error}"
    finally:
        shutil.rmtree(folder / ".plots", ignore_errors=True)


def _quality(folder):
    """quality.zip: reports, tables and pictures of the studies and their runs, without checkpoints."""
    studies = folder.with_name(f"{folder.name}-quality")
    paths = [path for path in sorted(studies.rglob("*")) if path.suffix in (".md", ".csv", ".png")]
    if paths:
        with atomic_file(folder / "quality.zip") as partial, zipfile.ZipFile(partial, "w") as archive:
            for path in paths:
                archive.write(path, "-".join(path.relative_to(studies).parts))


def _tuned(folder):
    """tuned.json: the tables of configurations that were found on this machine, by their file name."""
    tables = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in (cache_folder() / "tuned").glob("*.json")}
    if tables:
        write_json(folder / "tuned.json", tables)


@program("bench")
def main(arguments=None):
    """Returns the exit code: 0 if every suite ran, 1 if one failed, 3 if time was short, 2 for bad input."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.campaign", description=__doc__, formatter_class=text)
    names = [suite.name for suite in (*gpu_suites(), *quality_suites(""))]
    parser.add_argument("--out", default="bench-campaign", help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="for everything together (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=names, help="run only this suite (may be repeated)")
    parser.add_argument("--data", help="images to train on besides, as for `sparsedm train`: comparisons of lite scale")
    parser.add_argument("--resume", action="store_true", help="run what an earlier campaign in this folder left")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("a campaign measures a GPU, and torch sees none: use `make bench` on a CPU")
    suites = (*gpu_suites(), *(quality_suites(options.data) if options.data else ()))
    suites = [suite for suite in suites if not options.only or suite.name in options.only]
    index = run_campaign(suites, options.out, options.minutes, resume=options.resume, device="cuda")
    for entry in index["suites"]:
        print(f"{entry['status']:<8} {entry['name']:<14} {entry.get('seconds', ''):>6}  {entry['reason']}")
    if (targets := Path(options.out) / "targets.md").exists():
        print(f"\n{targets.read_text(encoding='utf-8')}")
    statuses = {entry["status"] for entry in index["suites"]}
    return 1 if "failed" in statuses else 3 if statuses - {"ran"} else 0


if __name__ == "__main__":
    sys.exit(main())
