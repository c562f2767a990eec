"""The GPU's counters where 2:4 gains most and least: `python -m bench.counters results.csv`.

It takes the shapes with the largest and the smallest speed-up from a results file, and runs dense and 2:4 once each
under `ncu` (Nsight Compute), which replays every kernel until it has read all counters. In the report each kernel has
the name of its shape, mode and provider. The clocks are not changed.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench import command_line, program
from bench.problems import LinearProblem
from bench.providers import OURS, Dense, Sparse24
from bench.results import read, speedups
from bench.shapes import LinearShape, select
from sparsedm.commands.options import count
from sparsedm.errors import InputError

SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
    *("SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy"),
)


def extremes(rows, count):
    """[(model, shape, mode, dtype)] of the `count` greatest and `count` least speed-ups of our 2:4 product.

    Raises: InputError if none was timed against dense.
    """
    ours = [s for s in speedups(rows, ("gemm",)) if s.row["provider"] == OURS]
    if not ours:
        raise InputError("these results hold no 2:4 product that was timed against dense: run --suite gemm first")
    ours.sort(key=lambda s: -s.p50)
    cases = [tuple(s.row[name] for name in ("model", "shape", "mode", "dtype")) for s in ours]
    return list(dict.fromkeys(cases[:count] + cases[-count:]))


def run(cases, device="cuda"):
    """The calls that ncu profiles: one of dense and one of 2:4 per case, each after an unprofiled call to tune."""
    for model, name, mode, dtype in cases:
        (shape,) = (shape for shape in select(model, LinearShape) if shape.name == name)
        problem = LinearProblem(shape, mode, getattr(torch, dtype), device)
        for provider in (Dense(), Sparse24()):
            call = provider.bind(problem, provider.prepare(problem)).run
            call()
            torch.cuda.synchronize()
            with torch.cuda.nvtx.range(re.sub(r"\W+", "_", f"{name} {mode} {provider.name}")):
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def command(cases):
    """The command line of ncu."""
    watched = (sys.executable, "-c", f"from bench.counters import run; run({cases!r})")
    options = ("--profile-from-start", "off", "--clock-control", "none", "--nvtx", "--print-nvtx-rename", "kernel")
    return ["ncu", *options, *(part for name in SECTIONS for part in ("--section", name)), *watched]


def parser():
    parsed = command_line("bench.counters", __doc__)
    parsed.add_argument("results", help="results file that `python -m bench.run --suite gemm` wrote")
    parsed.add_argument("--out", default="counters.txt", help="report (default: %(default)s)")
    parsed.add_argument("--count", type=count, default=2, help="shapes at each end (default: %(default)s)")
    return parsed


@program("bench")
def main(arguments=None):
    """Returns the exit code: ncu's, or 2 for bad input."""
    options = parser().parse_args(arguments)
    cases = extremes(read(options.results), options.count)
    if not shutil.which("ncu"):
        raise InputError("ncu (Nsight Compute) is not on the PATH")
    report = Path(options.out)
    report.parent.mkdir(parents=True, exist_ok=True)
    with open(report, "wb") as file:  # by ncu itself: what it has said stays if both are ended
        code = subprocess.run(command(cases), stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        print("\n".join(report.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
