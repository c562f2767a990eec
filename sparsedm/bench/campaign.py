"""All that needs a GPU, in one command and within so many minutes: `python -m sparsedm.bench.campaign --out DIR`.

The suites run in order of importance, each in a process of its own: a crash, a hang or a GPU error ends that suite and
not the campaign. Each has at most the time that is left; whatever it has measured when it is cut stays in results.csv.

DIR holds a few files: index.json (what ran, failed, was cut, was skipped), results.csv (all suites), log.txt (their
output, shortened), tuned.json (configurations found), counters.txt (of the best and worst shapes), plots.zip. The same
command with --resume runs what did not finish, and goes on inside a suite that was cut.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsedm.bench.environment import stamp
from sparsedm.bench.plot import draw_all
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, cache_folder, write_json, write_text

LOG_LIMIT = 200_000  # characters of each suite's output that are kept: the end, where the errors are
CUT = 3  # exit code of `sparsedm.bench.run` when it left something out for time
RESERVE = 20  # seconds kept for the pictures
GRACE = 5  # seconds that a suite may take beyond its time before it is ended


@dataclass(frozen=True)
class Suite:
    """One process. In `command`, {folder}, {csv} and {seconds} stand for the campaign's folder, its results file and
    the time that the process may take.

    share: the part of the time left that it may use at most, so that one suite cannot starve the rest. group: suites
    that follow each other with the same one run side by side; only for what is not timed. needs: a program that has to
    be on the PATH, else the suite is skipped.
    """

    name: str
    command: tuple
    share: float = 1.0
    group: str | None = None
    needs: str | None = None


def bench(suites, *arguments):
    """The command line that measures these suites."""
    fixed = ("-m", "sparsedm.bench.run", "--resume", "--out", "{csv}", "--seconds", "{seconds}", "--suite", suites)
    return (sys.executable, *fixed, *arguments)


TESTS = Path(__file__).parents[2] / "tests"


def pytest(*arguments):
    return (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--color=no", *arguments)


def sanitizer(tool):
    """The sparse kernels under compute-sanitizer, on memory that torch asks the driver for piece by piece: in its own
    pool an access beyond a tensor would be none beyond an allocation."""
    kernels = [str(path) for path in sorted(TESTS.glob("test_sparse24_*.py"))]
    watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest("-k", "random", *kernels))
    return Suite(tool, ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *watched), 0.3, "checks", "compute-sanitizer")


def gpu_suites():
    """In order of importance: a number is worth nothing before the tests, and little without its ceiling.

    What torch.compile has to tune for minutes comes after what is quick, and adds its rows to the same problems.
    """
    layers = "uvit-imagenet256-large@64,uvit-imagenet256-huge@64,dit-xl-2@64,uvit-cifar10-small@64"
    networks = ("--shapes", "uvit-imagenet256-large@64,uvit-imagenet256-huge@64,uvit-cifar10-small@64")
    # in several processes, one of which dies with a test that crashes or hangs, and is replaced
    workers = ("-n", str(max(1, (os.cpu_count() or 1) // 2))) if importlib.util.find_spec("xdist") else ()
    counters = (sys.executable, "-m", "sparsedm.bench.counters", "{csv}", "--out", "{folder}/counters.txt")
    quick = "--no-compile"
    return (
        Suite("tests", pytest(*workers, str(TESTS)), 0.3, "checks"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Suite("ceiling", bench("ceiling"), 0.2),
        Suite("gemm: square", bench("gemm", "--shapes", "square", quick), 0.3),
        Suite("gemm: models", bench("gemm", "--shapes", layers, quick), 0.4),
        Suite("end-to-end", bench("end-to-end", *networks, quick), 0.4),
        Suite("end-to-end: compiled", bench("end-to-end", *networks), 0.6),
        Suite("mask", bench("mask"), 0.2),
        Suite("masked-train", bench("masked-train", "--shapes", layers), 0.3),
        Suite("train", bench("train", "--shapes", "uvit-cifar10-small@128"), 0.5),
        Suite("counters", counters, 0.3, needs="ncu"),
        Suite("gemm: grid", bench("gemm", "--shapes", "grid,m-sweep", quick), 0.5),
        Suite("conv", bench("conv", "--shapes", "ddpm-cifar10@64,sd-1.5@16", quick), 0.5),
        Suite("gemm: compiled", bench("gemm", "--shapes", f"square,{layers}"), 0.6),
        Suite("table3", bench("table3", quick)),
        Suite("gemm: all", bench("gemm", quick)),
    )


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
        for suite, (entry, output) in _side_by_side(list(group), entries, folder, left(), now):
            entries[suite.name] = entry
            if output is not None:
                _log(folder, suite.name, output)
        index["suites"] = list(entries.values())
        write_json(folder / "index.json", index)
    _tuned(folder)
    index["plots"] = _pictures(folder)
    write_json(folder / "index.json", index)
    return index


def _index(folder):
    try:
        return json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"suites": []}


def _side_by_side(suites, entries, folder, seconds, now):
    """(suite, (what index.json says of it, what it printed)) of each; an interruption ends their processes."""
    processes = []
    with ThreadPoolExecutor(len(suites)) as pool:
        try:
            run = lambda suite: _entry(suite, entries.get(suite.name), folder, seconds, now, processes)  # noqa: E731
            yield from zip(suites, pool.map(run, suites))
        except BaseException:
            for process in processes:
                _signal(process, signal.SIGTERM)
            raise


def _entry(suite, before, folder, seconds, now, processes):
    if before and before["status"] == "ran":
        return before, None
    missing = suite.needs and not shutil.which(suite.needs)
    if missing or seconds <= 0:
        reason = f"{suite.needs} is not on the PATH" if missing else "no time was left"
        return {"name": suite.name, "status": "skipped", "reason": reason}, None
    return _run(suite, folder, suite.share * seconds, now, processes)


def _run(suite, folder, seconds, now, processes):
    """Run one suite; a process that outlives its time by GRACE is ended, with all its children."""
    places = {"folder": str(folder), "csv": str(folder / "results.csv"), "seconds": f"{seconds:.0f}"}
    command = [part.format(**places) if "{" in part else part for part in suite.command]
    began = now()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    processes.append(process)
    try:
        output, status, reason = process.communicate(timeout=seconds + GRACE)[0], None, ""
    except subprocess.TimeoutExpired:
        output, status, reason = _end(process), "cut", f"ended after {seconds:.0f} s without an answer: a hang, or slow"
    if status is None:
        status = {0: "ran", CUT: "cut"}.get(process.returncode, "failed")
        reason = {"ran": "", "cut": "its time was up"}.get(status, _reason(process.returncode, output))
    entry = {
        "name": suite.name,
        "status": status,
        "reason": reason,
        "seconds": round(now() - began, 1),
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
    }
    return entry, output


def _end(process):
    """Ask the whole process group to stop, then make it; what it has printed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        _signal(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)[0]
    return "it could not be ended: the device does not answer\n"


def _signal(process, how):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _reason(code, output):
    lines = [line for line in output.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1].strip()[:300] if lines else 'no output'}"


def _log(folder, name, output):
    path = folder / "log.txt"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    # progress bars redraw their line: the last state of each is enough
    lines = [line.rsplit("\r", 1)[-1] for line in output.split("\n")]
    write_text(path, f"{before}==== {name}\n" + "\n".join(lines)[-LOG_LIMIT:] + "\n")


def _pictures(folder):
    """Draw plots.zip from results.csv. Returns how many pictures it holds, or why there are none."""
    try:
        paths = draw_all([folder / "results.csv"], folder / ".plots")
        with atomic_file(folder / "plots.zip") as partial, zipfile.ZipFile(partial, "w") as archive:
            for path in paths:
                archive.write(path, path.name)
        return f"{len(paths)} pictures"
    except InputError as error:
        return f"none: {error}"
    finally:
        shutil.rmtree(folder / ".plots", ignore_errors=True)


def _tuned(folder):
    """tuned.json: the tables of configurations that were found on this machine, by their file name."""
    tables = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in (cache_folder() / "tuned").glob("*.json")}
    if tables:
        write_json(folder / "tuned.json", tables)


def main(arguments=None):
    """Returns the exit code: 0 if every suite ran, 1 if one failed, 3 if time was short, 2 for bad input."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m sparsedm.bench.campaign", description=__doc__, formatter_class=text)
    names = [suite.name for suite in gpu_suites()]
    parser.add_argument("--out", default="bench-campaign", help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="for everything together (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=names, help="run only this suite (may be repeated)")
    parser.add_argument("--resume", action="store_true", help="run what an earlier campaign in this folder left")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench: a campaign measures a GPU, and torch sees none: use `make bench` on a CPU", file=sys.stderr)
        return 2
    suites = [suite for suite in gpu_suites() if not options.only or suite.name in options.only]
    try:
        index = run_campaign(suites, options.out, options.minutes, resume=options.resume, device="cuda")
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    for entry in index["suites"]:
        print(f"{entry['status']:<8} {entry['name']:<14} {entry.get('seconds', ''):>6}  {entry['reason']}")
    statuses = {entry["status"] for entry in index["suites"]}
    return 1 if "failed" in statuses else 3 if statuses - {"ran"} else 0


if __name__ == "__main__":
    sys.exit(main())
