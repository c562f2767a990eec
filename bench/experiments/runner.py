"""`python -m bench.experiments NAME`: trains and measures every run of a plan that the folder lacks, then draws it.

    OUT/results.csv                     every measurement, one a row; the tables and pictures are made of it alone
    OUT/seed-0/base/                    the dense network that all runs of this seed start from
    OUT/seed-0/RUN/                     a chain's folder: stages with checkpoints and metrics, and samples.png
    OUT/report.md  *.png                see `report.py`

To resume, run the same command again: finished runs are read from results.csv, a run that was cut goes on. With
--minutes it cuts itself in time, and leaves the report of what is finished.
"""

import bisect
import logging
import math
import os
import re
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.experiments import measures, report
from bench.experiments.plans import EXPERIMENTS, SCALES, planned
from bench.experiments.report import FLIPS
from bench.results import STAMPED, read_experiment, stamp, write_experiment
from sparsedm import diffusion, evaluate
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import cache_folder
from sparsedm.inspection import inspect
from sparsedm.models import build_model, model_config
from sparsedm.plots import save_grid
from sparsedm.sparsity import sparsify
from sparsedm.train import checkpoint
from sparsedm.train.chain import StageResult, Start, run_chain
from sparsedm.train.data import load_images
from sparsedm.train.loop import Interrupted, amp_of, train
from sparsedm.train.metrics import read_metrics, usual_speed
from sparsedm.train.stages import Stage
from sparsedm.train.step import Loss, Student

log = logging.getLogger(__name__)

POINTS = 12  # of the validation loss over a run, at least
SHOWN = 64  # images in a run's picture
RESERVE = 40  # seconds of --minutes for what is left after the deadline: a record, a checkpoint, the report
BASE = "validation loss of the start"  # of the dense network that the runs of a seed begin with
LOGGED = {  # a log's record: what it is called in the results
    "validation_loss": "validation over training",
    "flip_rate": "flip rate",
    "density": "density",
    "distance": "distance over training",
}


def add_arguments(parser):
    names = "; ".join(f"{name}: {experiment.summary}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("name", metavar="NAME", help=names)
    scales = "; ".join(f"{name}: {scale.summary}" for name, scale in SCALES.items())
    parser.add_argument("--scale", default="smoke", help=f"{scales} (default: smoke)")
    parser.add_argument("--seeds", type=int, help="how many, from --seed on (default: the scale's, 2)")
    parser.add_argument("--only", action="append", metavar="RUN", help="only this run (may be repeated)")
    parser.add_argument("--data", help="other data than the scale's, as for train")
    parser.add_argument("--features", help="other features than the scale's, as for evaluate")
    parser.add_argument("--out", metavar="DIR", help="(default: runs/experiment-NAME-SCALE)")
    parser.add_argument(
        "--minutes", type=float, help="stop in time, with checkpoint and report (exit code 3); the same command goes on"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and stop")
    parser.add_argument("--report-only", action="store_true", help="only make tables and pictures of results.csv anew")


def experiment(options):
    began = time.monotonic()
    plan, scale, runs = planned(options.name, options.scale)
    scale = replace(scale, data=options.data or scale.data, features=options.features or scale.features)
    folder = Path(options.out or f"runs/experiment-{options.name}-{options.scale}")
    if unknown := set(options.only or ()) - {run.name for run in runs}:
        raise InputError(f"unknown run {', '.join(sorted(unknown))}: they are {', '.join(run.name for run in runs)}")
    runs = [run for run in runs if not options.only or run.name in options.only]
    count = scale.seeds if options.seeds is None else options.seeds
    if count < 1:
        raise InputError(f"--seeds {count}: at least one is needed")
    if options.minutes is not None and 60 * options.minutes <= RESERVE:
        raise InputError(f"--minutes {options.minutes:g}: more than {RESERVE} seconds are needed to stop cleanly")
    if options.dry_run:
        _show(scale, runs, count, folder)
        return
    if options.report_only:
        _report(options, folder, plan)
        return
    if scale.threads and options.device.type == "cpu":
        torch.set_num_threads(min(scale.threads, torch.get_num_threads()))
    if options.device.type == "cuda":  # tuning every size for every pattern would take longer than these runs
        os.environ.setdefault("SPARSEDM_AUTOTUNE", "off")
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes - RESERVE
    with checkpoint.folder_lock(folder):  # two at once would lose each other's rows
        work = _Work(options.name, options.scale, scale, folder, options.device, deadline)
        todo = [(seed, run) for seed in range(options.seed, options.seed + count) for run in runs]
        bar = tqdm(todo, desc=options.name, disable=None)
        try:
            for seed, run in bar:
                bar.set_postfix_str(f"seed {seed}, {run.name}")
                work.do(seed, run)
        except Interrupted:
            if work.rows:
                _report(options, folder, plan)
            raise
    _report(options, folder, plan)


def _report(options, folder, plan):
    print(report.write(folder, read_experiment(folder / "results.csv", options.name, options.scale), plan))
    print(f"\ntables and pictures: {folder / 'report.md'}", flush=True)


def _show(scale, runs, seeds, folder):
    print(f"{scale.model} on {scale.data}: {scale.base_steps:,} dense steps for each of {seeds} seeds, then each run:")
    for run in runs:
        stages = " -> ".join(f"{s.pattern} ({s.steps:,})" for s in run.stages)
        print(f"  {run.group + ': ' if run.group else ''}{run.name:<18} {stages}")
    steps = seeds * (scale.base_steps + sum(stage.steps for run in runs for stage in run.stages))
    print(
        f"{steps:,} steps of {scale.options.batch_size} images in all; {scale.samples:,} samples per run; into {folder}"
    )


class _Work:
    """The runs of one experiment in one folder."""

    def __init__(self, name, scale_name, scale, folder, device, deadline=math.inf):
        self.scale, self.folder, self.device, self.deadline = scale, folder, device, deadline
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp_of(device) == "bf16")
        self.labels = {"experiment": name, "scale": scale_name, "data": scale.data, "features": scale.features}
        size = model_config(scale.model, **scale.overrides).image_size
        self.images = load_images(scale.data, "train", size)
        self.validation = load_images(scale.data, "test", size, limit=scale.validation)
        classes = len(self.images.class_names) if scale.conditional else 0
        fitting = {"channels": self.images.images.shape[1], "num_classes": classes}
        self.config = asdict(model_config(scale.model, **scale.overrides, **fitting))
        self.rows = (
            read_experiment(folder / "results.csv", name, scale_name) if (folder / "results.csv").exists() else []
        )
        self.features = load_features(scale.features, device)
        self.reference = evaluate.summarize(
            self.images.images, self.features, f"{self.images.source} train", cache=cache_folder(), progress=True
        )
        checkpoint.claim(folder, {**self.labels, "settings": asdict(scale)}, free=("seeds", "threads", "summary"))
        self.bases = {}

    def do(self, seed, run):
        """Train and measure one run, unless its rows are there."""
        if any(row["run"] == run.name and row["seed"] == seed for row in self.rows):
            return
        base = self.base(seed)
        mark = base.result.validation_loss
        if {row["value"] for row in self.rows if (row["seed"], row["measure"]) == (seed, BASE)} - {mark}:
            raise InputError(
                f"{self.folder} holds runs of seed {seed} that began from another dense network than the one that is "
                "there now: its folder was lost; go on with another --seed, or in another --out"
            )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        results = self.train(seed, run, base)
        seconds, trained = sum(result.result.seconds for result in results), time.perf_counter()
        network = results[-1].ema
        images = measures.draw(network, self.scale, seed, self.autocast, self.deadline)
        measured = measures.measure(
            network, images, self.validation, self.reference, self.features, base.ema, self.autocast
        )
        shown = images[:SHOWN].split(16)
        save_grid(self._folder(seed, run.name) / "samples.png", [("", row) for row in shown])
        measured[BASE] = [(None, mark)]
        measured["images"] = [(None, sum(s.steps for s in run.stages) * self.scale.options.batch_size)]
        measured["seconds"] = [(None, seconds)]
        measured["seconds with measuring"] = [(None, seconds + time.perf_counter() - trained)]
        measured["peak memory"] = [(None, self._peak_memory())]
        if run.x is not None:
            measured["axis"] = [(None, run.x)]
        measured |= self._logged(results, before=self.scale.base_steps if run.small else 0)
        now = stamp(self.device)
        common = {**self.labels, "group": run.group, "run": run.name, "seed": seed}
        common |= {name: str(now[name]) for name in STAMPED}
        self.rows += [
            common | {"measure": measure, "x": x, "value": float(value)}
            for measure, values in measured.items()
            for x, value in values
        ]
        write_experiment(self.folder / "results.csv", self.rows)
        loss, distance = (measured[name][0][1] for name in ("validation loss", "Fréchet distance"))
        log.info("seed %d, %s: validation loss %.4f, Fréchet distance %.2f", seed, run.name, loss, distance)

    def base(self, seed):
        """StageResult of the dense training that all runs of this seed start from."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            dense = [Stage("dense", self.scale.base_steps)]
            self.bases = {seed: self._chain(seed, "base", Start(self.build()), dense)[-1]}
        return self.bases[seed]

    def train(self, seed, run, base):
        """[StageResult] of one run."""
        if not run.small:
            start = Start(base.model, base.ema, usual_speed(base.folder), self.build)
            return self._chain(seed, run.name, start, run.stages, where=run.where)
        torch.manual_seed(seed)
        small, (stage,) = build_model(small_config(self.config)), run.stages
        result = train(
            Student(small),
            self.images,
            Loss(diffusion.schedule_of(small), base.ema, stage.w_kd),
            self._options(seed, stage.steps),
            self._folder(seed, run.name),
            validation=self.validation,
            record=self._record(),
            deadline=self.deadline,
            device=self.device,
        )
        return [StageResult(stage, self._folder(seed, run.name), result)]

    def build(self):
        return build_model(self.config)

    def _chain(self, seed, name, start, stages, **settings):
        return run_chain(
            start,
            stages,
            self.images,
            diffusion.schedule_of(start.model),
            self._options(seed, sum(stage.steps for stage in stages)),
            self._folder(seed, name),
            validation=self.validation,
            record=self._record(),
            deadline=self.deadline,
            device=self.device,
            **settings,
        )

    def _options(self, seed, steps):
        options = replace(self.scale.options, steps=steps, seed=seed, amp=amp_of(self.device))
        return replace(options, validate_every=max(1, min(options.validate_every, steps // POINTS)))

    def _folder(self, seed, name):
        return self.folder / f"seed-{seed}" / re.sub(r"[^\w.=+-]+", "-", name)

    def _record(self):
        return {"data": self.scale.data}

    def _logged(self, results, before):
        """Curves over the images seen since the dense start, which was `before` steps into the run, from its logs."""
        curves, start = {}, -before * self.scale.options.batch_size
        for result in results:
            for record in read_metrics(result.folder):
                seen = start + record["step"] * self.scale.options.batch_size
                logged = {measure: record.get(name) for name, measure in LOGGED.items()}
                logged |= {f"{FLIPS}{layer}": rate for layer, rate in record.get("flip_rates", {}).items()}
                for measure, value in logged.items():
                    if value is not None:
                        curves.setdefault(measure, []).append((seen, value))
            start += result.stage.steps * self.scale.options.batch_size
        return curves

    def _peak_memory(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process, so far


def small_config(config):
    """`config` narrowed until its dense MACs are nearest to those of `config` at 2:4; its heads stay as many."""

    def totals(network):
        return inspect(network).totals()

    def macs(dim):
        return totals(build_model({**config, "dim": dim}, device="meta"))["macs"]

    target = totals(sparsify(build_model(config, device="meta"), "2:4"))["macs_after"]
    widths = range(config["heads"], config["dim"], config["heads"])
    above = min(bisect.bisect_left(widths, target, key=macs), len(widths) - 1)
    return {**config, "dim": min(widths[max(above - 1, 0) : above + 1], key=lambda dim: abs(macs(dim) - target))}
