"""What the tests of experiments share: a scale of seconds, four runs, and the command line that makes them."""

import argparse
import itertools

from bench import results
from bench.experiments import runner, work
from bench.experiments.__main__ import main
from bench.experiments.plans import SCALES, known
from sparsedm.commands.options import add_seed_and_device
from sparsedm.recipes import QUICKSTART, Scale
from sparsedm.train import data

TINY = Scale(
    summary="for the tests",
    model="uvit-tiny",
    overrides={**QUICKSTART["synthetic"].overrides, "dim": 32, "depth": 2, "heads": 2},
    conditional=True,
    data="synthetic",
    base_steps=6,
    steps=5,
    ladder=("3:4",),
    seeds=2,
    samples=16,
    sampling_steps=2,
    options=QUICKSTART["synthetic"].options,
    validation=16,
)
RUNS = ("dense", "chain", "oneshot", "small-dense")


def command(folder, *more):
    only = itertools.chain.from_iterable(("--only", run) for run in RUNS)
    return main(["arms", "--scale", "tiny", "--out", str(folder), *only, *more])


def use(patch):
    """Add the scale `tiny`, with 64 drawn images. patch: a MonkeyPatch."""
    patch.setitem(SCALES, "tiny", TINY)
    patch.setattr(work, "load_images", lambda *a, **_: data.load("synthetic", a[1], size=a[2], limit=64))


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    add_seed_and_device(parser)
    return parser.parse_args(arguments)


def work_in(folder, *more):
    """The Work of a command line, on the CPU."""
    options = parsed("arms", "--scale", "tiny", "--device", "cpu", *more)
    return work.Work(options, runner._scale(options), folder)


def planned(name, scale):
    """(Experiment, recipes.Scale, [Run])"""
    plan, scale = known("experiment", name), known("scale", scale)
    return plan, scale, plan.runs(scale)


def numbers(folder, run, measure, seed=0):
    rows = results.read_experiment(folder / "results.csv")
    return [(r["x"], r["value"]) for r in rows if (r["run"], r["measure"], r["seed"]) == (run, measure, seed)]
