"""`python -m bench.experiments NAME`: trains and measures the runs of a plan that the folder lacks, then reports.

OUT/results.csv                     every measurement, one per row; tables and pictures are made only from it
    OUT/seed-0/base/                    the dense network that all runs of this seed start from
    OUT/seed-0/RUN/                     a chain's folder: stages with checkpoints and metrics, and samples.png
    OUT/report.md  *.png                see `report.py`

To resume, run the same command again: finished runs are read from results.csv, which is written after every run; an
interrupted run continues. With --minutes it stops in time, and reports the finished runs. To share the work, give every
process its own seeds and folder (--seed 1 --seeds 1 --out DIR), and join the folders with --merge.
"""

import bisect
import copy
import logging
import math
import os
import re
import resource
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from bench.experiments import activations, channels, measures, report, speed
from bench.experiments.plans import ACTIVATIONS, CALIBRATED, EXPERIMENTS, PRUNED, SCALES, SMALL, known
from bench.experiments.report import DISTANCE, FLIPS, SAMPLING, SPEED
from bench.results import STAMPED, read_experiment, stamp, write_experiment
from sparsedm import diffusion, evaluate
from sparsedm.commands.options import add_crop, add_model_arguments, dense_part, load_named, positive
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import cache_folder, check_writable, read_json
from sparsedm.inspection import inspect
from sparsedm.model_files import load_model
from sparsedm.models import build_model, model_config, parse_overrides
from sparsedm.models.ddpm import DDPMConfig
from sparsedm.plots import save_grid
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.train import checkpoint
from sparsedm.train.chain import StageResult, Start, run_chain
from sparsedm.train.data import batch, batch_indices, check_source, load_images
from sparsedm.train.image_files import CROPS
from sparsedm.train.loop import Interrupted, amp_of, check_data, train
from sparsedm.train.metrics import read_metrics, usual_speed
from sparsedm.train.published import Published, published
from sparsedm.train.stages import Stage
from sparsedm.train.step import Loss, Student

log = logging.getLogger(__name__)

MOST_SEEDS = 1000
POINTS = 12  # least number of validation losses over a run
WATCHED = 1024  # images of the validation loss while a run trains; at its end all are used
CALIBRATION = 16  # batches whose inputs choose a calibrated mask
SHOWN = 64  # images in a run's picture
RESERVE = 40  # seconds of --minutes for the work after the deadline: a record, a checkpoint, the report
BASE = "validation loss of the start"  # of the dense network that the runs of a seed begin with
LOGGED = {  # a key of a log record: its name in the results
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
    add_model_arguments(parser, " (default: the scale's)")
    parser.add_argument("--init", metavar="FILE", help="start from this dense model file or run, for all seeds")
    parser.add_argument("--data", help="other data than the scale's, as for train")
    add_crop(parser)
    parser.add_argument("--resize", action="store_true", help="fit images of another size than the network's")
    parser.add_argument(
        "--features",
        action="append",
        help="other features than the scale's, as for evaluate (may be repeated: the first decide)",
    )
    parser.add_argument("--out", metavar="DIR", help="(default: runs/experiment-NAME-SCALE)")
    parser.add_argument(
        "--minutes",
        type=positive,
        help="stop in time, with a report (exit code 3); the same command goes on",
    )
    parser.add_argument("--dry-run", action="store_true", help="look at data and networks, list the runs, and stop")
    parser.add_argument("--report-only", action="store_true", help="only make tables and pictures of results.csv anew")
    parser.add_argument(
        "--merge",
        action="append",
        metavar="DIR",
        help="only join the results of these folders, one or more seeds each, into --out, and report (may be repeated)",
    )
    parser.add_argument(
        "--time", action="store_true", help="only time the sampling of the finished runs; let nothing else run then"
    )


def experiment(options):
    began = time.monotonic()
    plan, scale = known("experiment", options.name), _scale(options)
    runs = plan.runs(scale)
    folder = Path(options.out or f"runs/experiment-{options.name}-{options.scale}")
    if unknown := set(options.only or ()) - {run.name for run in runs}:
        raise InputError(f"unknown run {', '.join(sorted(unknown))}: they are {', '.join(run.name for run in runs)}")
    runs = [run for run in runs if not options.only or run.name in options.only]
    count = scale.seeds if options.seeds is None else options.seeds
    if not 1 <= count <= MOST_SEEDS:
        raise InputError(f"--seeds {count}: at least one is needed, and at most {MOST_SEEDS}")
    if options.minutes is not None and 60 * options.minutes <= RESERVE:
        raise InputError(f"--minutes {options.minutes:g}: more than {RESERVE} seconds are needed to stop cleanly")
    check_writable(folder / "report.md")
    if options.dry_run:
        _show(options, scale, runs, count, folder)
        return
    if options.report_only or options.merge:
        if options.merge:
            _merge(options, folder)
        _report(options, folder, plan)
        return
    if scale.threads and options.device.type == "cpu":
        torch.set_num_threads(min(scale.threads, torch.get_num_threads()))
    if options.device.type == "cuda":  # tuning every size for every pattern would take longer than these runs
        os.environ.setdefault("SPARSEDM_AUTOTUNE", "off")
    deadline = math.inf if options.minutes is None else began + 60 * options.minutes - RESERVE
    with checkpoint.folder_lock(folder):  # two at once would lose each other's rows
        if options.time:
            _time(options, scale, runs, folder)
        else:
            _carry_out(options, plan, scale, runs, count, folder, deadline)
    _report(options, folder, plan)


def _carry_out(options, plan, scale, runs, count, folder, deadline):
    work = _Work(options, scale, folder, deadline)
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


def _scale(options):
    """The Scale of that name, with the changes of the command line."""
    scale, changes = known("scale", options.scale), {}
    if options.model or options.init:
        network = _given(options)
        # the scale's own training suits its own network
        recipe = published(network) if options.scale == "full" else None
        weighting = "velocity" if getattr(network, "velocity", False) else "noise"
        training = replace(scale.options, weighting=weighting, **(recipe.training if recipe else {}))
        changes = {"model": asdict(network), "overrides": {}, "conditional": None, "native": None, "options": training}
    elif options.set:
        changes = {"overrides": scale.overrides | parse_overrides(options.set)}
    changes |= {"data": options.data} if options.data else {}
    return replace(scale, **changes, features=tuple(options.features or [scale.features]))


def _given(options):
    """The configuration of the network that the command line names."""
    if options.init:
        return load_named(options, dense_part(options.init)).model.config
    return model_config(options.model, **parse_overrides(options.set))


def _images(scale, crop, resize):
    """(training images, test images, configuration of the network for them).

    Raises: InputError for images of another size, unless the scale or the command line allows resizing.
    """
    config = model_config(scale.model, **scale.overrides)
    crop = crop or (published(config) or Published({}, 0)).crop
    parts = []
    for split, limit in (("train", None), ("test", scale.validation)):
        found = load_images(scale.data, split, config.image_size, limit=limit, crop=crop)
        held = next(iter(found.sizes), None)
        sides = {config.image_size, scale.native}
        may = {None, *(f"{side}x{side}" for side in sides)} | (
            {"{}x{}".format(*CROPS[crop][0])} if CROPS[crop] else set()
        )
        if held not in may and not resize:
            raise InputError(
                f"{scale.data} holds images of {held} pixels and the network takes "
                f"{config.image_size}x{config.image_size}: choose another --model, or say --resize"
            )
        parts.append(found)
    if scale.conditional is not None:
        classes = len(parts[0].class_names) if scale.conditional else 0
        config = replace(config, channels=parts[0].images.shape[1], num_classes=classes)
    check_data(build_model(config, device="meta"), *parts)
    return *parts, config


def _report(options, folder, plan):
    print(report.write(folder, read_experiment(folder / "results.csv", options.name, options.scale), plan))
    print(f"\ntables and pictures: {folder / 'report.md'}", flush=True)


def _merge(options, folder):
    """Join the rows of several folders, which may differ only in their seeds, into one results.csv."""
    rows, settings = [], {}
    for other in options.merge:
        found = read_experiment(Path(other) / "results.csv", options.name, options.scale)
        settings[other] = read_json(Path(other) / "options.json")
        if settings[other] != settings[options.merge[0]]:
            raise InputError(f"{other} and {options.merge[0]} hold runs with different options: they have no mean")
        twice = {(row["run"], row["seed"]) for row in rows} & {(row["run"], row["seed"]) for row in found}
        if twice:
            run, seed = min(twice)
            raise InputError(f"{other} holds {run} of seed {seed}, as another one of the folders does")
        rows += found
    if str(folder) in map(str, map(Path, options.merge)):
        raise InputError(f"--out {folder} is one of the folders to be joined: name another one")
    folder.mkdir(parents=True, exist_ok=True)
    write_experiment(folder / "results.csv", sorted(rows, key=lambda row: row["seed"]))


def _show(options, scale, runs, seeds, folder):
    """Print the plan, after checking that the data exist and fit. Nothing is downloaded."""
    check_source(scale.data)
    if scale.data != "cifar10":
        images, validation, config = _images(scale, options.crop, options.resize)
        print(
            f"{len(images):,} images to train and {len(validation):,} to validate on, {config.image_size} pixels wide"
        )
    start = f"from {options.init}" if options.init else f"{scale.base_steps:,} dense steps for each of {seeds} seeds"
    name = options.model or options.init or scale.model
    print(f"{name} on {scale.data}: {start}, then each run:")
    for run in runs:
        stages = " -> ".join(f"{s.pattern} ({s.steps:,})" for s in run.stages)
        notes = ", ".join(filter(None, [run.kind, run.first_dense and "first block dense", run.where]))
        print(f"  {run.group + ': ' if run.group else ''}{run.name:<18} {stages}{f'  [{notes}]' if notes else ''}")
    base = 0 if options.init else scale.base_steps
    steps = seeds * (base + sum(stage.steps for run in runs for stage in run.stages))
    print(
        f"{steps:,} steps of {scale.options.batch_size} images in all; {scale.samples:,} samples per run; into {folder}"
    )


def _time(options, scale, runs, folder):
    """Add the sampling times of the finished runs to results.csv, measured in turns with the fastest dense form."""
    file = folder / "results.csv"
    rows = [
        row for row in read_experiment(file, options.name, options.scale) if row["measure"] not in (SPEED, SAMPLING)
    ]
    done = {row["run"] for row in rows if row["seed"] == options.seed}
    kinds = (SMALL, PRUNED, "")
    networks = {
        run.name: load_model(_folder(folder, options.seed, run.name), build_model).model
        for run in runs
        if run.name in done and run.kind in kinds and run.stages
    }
    control = known("experiment", options.name).control
    if control not in networks or masked_layers(networks[control]):
        raise InputError(f"{folder} holds no dense run of seed {options.seed} to time the others against")
    seconds = speed.sampling_seconds(networks, control, scale.sampling_steps, options.device)
    now = stamp(options.device)
    for name in networks:
        like = next(row for row in rows if (row["run"], row["seed"]) == (name, options.seed))
        values = {SPEED: seconds[control] / seconds[name], SAMPLING: seconds[name]}
        rows += [
            like | {n: str(now[n]) for n in STAMPED} | {"measure": measure, "x": None, "value": value}
            for measure, value in values.items()
        ]
    write_experiment(file, rows)


def _folder(folder, seed, name):
    return folder / f"seed-{seed}" / re.sub(r"[^\w.=+-]+", "-", name)


class _Base(NamedTuple):
    """The dense network that all runs of a seed start from. speed: images per second of its training, if known."""

    model: nn.Module
    ema: nn.Module
    loss: float
    speed: float | None = None


class _Work:
    """The runs of one experiment in one folder."""

    def __init__(self, options, scale, folder, deadline=math.inf):
        self.scale, self.folder, self.device, self.deadline = scale, folder, options.device, deadline
        self.init, self.options = options.init, options
        self.amp = amp_of(self.device, scale.options.amp or "auto")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")
        self.labels = {"experiment": options.name, "scale": options.scale, "data": scale.data}
        self.labels["features"] = scale.features[0]
        self.images, self.validation, config = _images(scale, options.crop, options.resize)
        self.watched = self.validation.every(WATCHED)
        self.config = asdict(config)
        self.rows = []
        if (folder / "results.csv").exists():
            self.rows = read_experiment(folder / "results.csv", options.name, options.scale)
        self.judges = []
        for name in scale.features:
            features, source = load_features(name, self.device), f"{self.images.source} train"
            summary = evaluate.summarize(self.images.images, features, source, cache=cache_folder(), progress=True)
            self.judges.append((features, summary))
        facts = {**self.labels, "settings": asdict(scale), "amp": self.amp, "init": self.init}
        checkpoint.claim(folder, facts, free=("seeds", "threads", "summary"))
        self.bases = {}

    def do(self, seed, run):
        """Train and measure one run, unless its rows exist."""
        if any(row["run"] == run.name and row["seed"] == seed for row in self.rows):
            return
        base = self.base(seed)
        if {row["value"] for row in self.rows if (row["seed"], row["measure"]) == (seed, BASE)} - {base.loss}:
            raise InputError(
                f"{self.folder} holds runs of seed {seed} that began from another dense network, now lost: "
                "use another --seed or another --out"
            )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        network, results = self.train(seed, run, base)
        seconds, trained = sum(result.result.seconds for result in results), time.perf_counter()
        images = measures.draw(network, self.scale, seed, self.autocast, self.deadline)
        measured = measures.measure(network, images, self.validation, self.judges, base.ema, self.autocast)
        shown = images[:SHOWN].split(16)
        save_grid(_folder(self.folder, seed, run.name) / "samples.png", [("", row) for row in shown])
        measured[BASE] = [(None, base.loss)]
        measured["images"] = [(None, sum(s.steps for s in run.stages) * self.scale.options.batch_size)]
        measured["seconds"] = [(None, seconds)]
        measured["seconds with measuring"] = [(None, seconds + time.perf_counter() - trained)]
        measured["peak memory"] = [(None, self._peak_memory())]
        if results and (quick := usual_speed(results[-1].folder)):
            measured["training images per second"] = [(None, quick)]
        if run.x is not None:
            measured["axis"] = [(None, run.x)]
        measured |= self._logged(results, before=self.scale.base_steps if run.kind == SMALL else 0)
        now = stamp(self.device)
        common = {**self.labels, "group": run.group, "run": run.name, "seed": seed}
        common |= {name: str(now[name]) for name in STAMPED}
        self.rows += [
            common | {"measure": measure, "x": x, "value": float(value)}
            for measure, values in measured.items()
            for x, value in values
        ]
        write_experiment(self.folder / "results.csv", self.rows)
        loss, distance = (measured[name][0][1] for name in ("validation loss", DISTANCE))
        log.info("seed %d, %s: validation loss %.4f, Fréchet distance %.2f", seed, run.name, loss, distance)

    def base(self, seed):
        """The _Base of a seed: trained here, or from --init."""
        if seed not in self.bases:
            if self.init:
                self.bases = {seed: self._given_base()}
            else:
                torch.manual_seed(seed)
                dense = [Stage("dense", self.scale.base_steps)]
                found = self._chain(seed, "base", Start(self.build()), dense)[-1]
                quick = usual_speed(found.folder)
                self.bases = {seed: _Base(found.model, found.ema, found.result.validation_loss, quick)}
        return self.bases[seed]

    def _given_base(self):
        average, path = load_named(self.options, dense_part(self.init)), dense_part(self.init)
        if average.kind != "dense":
            raise InputError(f"--init {self.init}: {average.file} holds a {average.kind} network, not a dense one")
        model = load_named(self.options, path, which="model").model.to(self.device)
        ema = average.model.to(self.device)
        x, y = batch(self.watched.to(self.device), torch.arange(len(self.watched)))
        with self.autocast:
            y = y if self.config["num_classes"] else None
            loss = diffusion.validation_loss(ema, x, diffusion.schedule_of(ema), y=y)
        return _Base(model, ema, loss.item())

    def train(self, seed, run, base):
        """(the network to measure, [StageResult]) of one run."""
        where = self._where(run, base)
        if run.kind == CALIBRATED:
            network = copy.deepcopy(base.ema)
            return sparsify(network, run.pattern, where, calibrate=self._noisy(seed, base)), []
        if run.kind in (SMALL, PRUNED):
            results = [self._narrow(seed, run, base)]
        else:
            start = Start(base.model, base.ema, base.speed, self.build)
            if run.kind == ACTIVATIONS:
                hooked = [activations.sparsify_activations(copy.deepcopy(n), where, run.pattern) for n in base[:2]]
                start = replace(start, model=hooked[0], ema=hooked[1])
                where = None
            results = self._chain(seed, run.name, start, run.stages, where=where)
        return results[-1].ema, results

    def _narrow(self, seed, run, base):
        """StageResult of a dense network with the MACs of 2:4, taught by the dense network."""
        torch.manual_seed(seed)
        config, (stage,) = small_config(self.config), run.stages
        if run.kind == SMALL:
            network = build_model(config)
        else:
            whole = base.ema.export(8) if self.config["kind"] == "slimmable" else base.ema
            importance = channels.taylor(whole, self.images, self.scale.options.batch_size, seed)
            network = channels.prune(whole, config["width"], importance)
        result = train(
            Student(network),
            self.images,
            Loss(diffusion.schedule_of(network), base.ema, stage.w_kd),
            replace(self._options(seed, stage.steps), lr=stage.lr or self.scale.options.lr),
            _folder(self.folder, seed, run.name),
            validation=self.watched,
            record=self._record(),
            deadline=self.deadline,
            device=self.device,
        )
        return StageResult(stage, _folder(self.folder, seed, run.name), result)

    def _where(self, run, base):
        """The layers of a run: names, or the argument `where` of `sparsify`."""
        if not run.first_dense and run.kind != ACTIVATIONS:
            return run.where
        probe = sparsify(copy.deepcopy(base.ema), run.pattern, run.where)
        names = [name for name, _ in masked_layers(probe)]
        return without_first_block(names) if run.first_dense else names

    def _noisy(self, seed, base):
        """Batches of (x_t, t, y?) over all noise levels, for masks selected by inputs."""
        schedule, generator = diffusion.schedule_of(base.ema), torch.Generator().manual_seed(seed)
        images, size = self.images.to(self.device), self.scale.options.batch_size
        for number in range(CALIBRATION):
            x, y = batch(images, batch_indices(len(images), size, number, seed))
            u, noise = (
                draw(*s, generator=generator).to(x) for draw, s in ((torch.rand, (size,)), (torch.randn, x.shape))
            )
            t = schedule.training_time(u)
            noisy = diffusion.diffuse(x, t, noise, schedule), schedule.model_time(t)
            yield (*noisy, y) if self.config["num_classes"] else noisy

    def build(self):
        return build_model(self.config)

    def _chain(self, seed, name, start, stages, **settings):
        return run_chain(
            start,
            stages,
            self.images,
            diffusion.schedule_of(start.model),
            self._options(seed, sum(stage.steps for stage in stages)),
            _folder(self.folder, seed, name),
            validation=self.watched,
            record=self._record(),
            deadline=self.deadline,
            device=self.device,
            **settings,
        )

    def _options(self, seed, steps):
        options = replace(self.scale.options, steps=steps, seed=seed, amp=self.amp)
        return replace(options, validate_every=max(1, min(options.validate_every, steps // POINTS)))

    def _record(self):
        return {"data": self.scale.data}

    def _logged(self, results, before):
        """Curves from the logs, over the images seen since the dense start. `before`: steps before the dense start."""
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


def without_first_block(names):
    """The names of layers, in the network's order, without the layers of its first block.

    Raises: InputError if the names show no blocks.
    """
    first = next((found[0] for name in names if (found := re.match(r"(.*\.)?\w*blocks\.0\.", name))), None)
    if first is None:
        raise InputError(
            f"the layers {', '.join(names[:3])} ... belong to no blocks: there is no first block to keep dense"
        )
    return [name for name in names if not name.startswith(first)]


def small_config(config):
    """`config` narrowed until its dense MACs are nearest to those of `config` at 2:4.

    The number of heads of a transformer and of groups of a U-Net does not change.
    """
    axis, step = ("dim", config.get("heads")) if "dim" in config else ("width", math.lcm(config.get("groups"), 2))
    plain = config
    if config["kind"] == "slimmable":
        plain = {field.name: config[field.name] for field in fields(DDPMConfig)} | {"kind": "ddpm"}

    def totals(network):
        return inspect(network).totals()

    def macs(width):
        return totals(build_model({**plain, axis: width}, device="meta"))["macs"]

    target = totals(sparsify(build_model(plain, device="meta"), "2:4"))["macs_after"]
    widths = range(step, plain[axis], step)
    above = min(bisect.bisect_left(widths, target, key=macs), len(widths) - 1)
    return {**plain, axis: min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(macs(width) - target))}
