"""`python -m bench.experiments NAME`: trains and measures the runs of a plan that the folder lacks, then reports.

    OUT/results.csv                     every measurement, one per row; tables and pictures are made only from it
    OUT/seed-0/base/                    the dense network that all runs of this seed start from
    OUT/seed-0/RUN/                     a chain's folder: stages with checkpoints and metrics, and samples.png
    OUT/report.md  *.png                see `report.py`

To resume, run the same command again: finished runs are read from results.csv, which is written after every run; an
interrupted run continues. With --minutes it stops in time, and reports the finished runs. A run that diverges is left
out of the report and named at the end (exit code 2). To share the work, give every process its own seeds and folder
(--seed 1 --seeds 1 --out DIR), --time the folders, and join them with --merge.
"""

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.experiments import report, speed
from bench.experiments.plans import EXPERIMENTS, PRUNED, SCALES, SMALL, known
from bench.experiments.report import FP32, SAMPLING, SPEED, of_time
from bench.experiments.work import FREE, Work, folder_of, images_for
from bench.results import STAMPED, read_experiment, stamp, write_experiment
from sparsedm.commands.options import add_crop, add_model_arguments, deadline_of, dense_part, load_named, positive
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import check_writable, read_json
from sparsedm.model_files import load_model
from sparsedm.models import build_model, model_config, parse_overrides
from sparsedm.sparsity import masked_layers
from sparsedm.train import run_folder
from sparsedm.train.data import check_source
from sparsedm.train.loop import Interrupted, amp_of
from sparsedm.train.metrics import TrainingDiverged
from sparsedm.train.published import published

log = logging.getLogger(__name__)
MOST_SEEDS = 1000


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
    add_crop(parser, "as in the original of the model")
    parser.add_argument("--resize", action="store_true", help="fit images of another size than the network's")
    parser.add_argument(
        "--features",
        action="append",
        help="other features than the scale's, as for evaluate (may be repeated: the first decide)",
    )
    parser.add_argument("--out", metavar="DIR", help="(default: runs/experiment-NAME-SCALE)")
    parser.add_argument(
        "--minutes", type=positive, help="stop in time, with a report (exit code 3); the same command goes on"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="look at data, features and networks, list the runs, and stop"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="only make tables and pictures anew, of all rows in results.csv"
    )
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
    """Carry out the parsed command line.

    Raises: InputError for bad options or data, or after the report for runs that diverged; Interrupted if time was up.
    """
    if options.time and options.minutes:
        raise InputError("--time takes all times in turns and stops at no --minutes: leave one of them out")
    deadline = deadline_of(options.minutes)
    plan, scale = known("experiment", options.name), _scale(options)
    runs = plan.runs(scale)
    folder = Path(options.out or f"runs/experiment-{options.name}-{options.scale}")
    if unknown := set(options.only or ()) - {run.name for run in runs}:
        raise InputError(f"unknown run {', '.join(sorted(unknown))}: they are {', '.join(run.name for run in runs)}")
    only = {*options.only, *([plan.control] if options.time else [])} if options.only else ()
    runs = [run for run in runs if not only or run.name in only]
    count = scale.seeds if options.seeds is None else options.seeds
    if not 1 <= count <= MOST_SEEDS:
        raise InputError(f"--seeds {count}: at least one is needed, and at most {MOST_SEEDS}")
    if options.seed + count > 2**63:
        raise InputError(f"--seed {options.seed} --seeds {count}: the last seed must be at most {2**63 - 1}")
    check_writable(folder / "report.md")
    if options.dry_run:
        if options.report_only or options.merge or options.time:
            raise InputError("--dry-run shows the training: leave out --report-only, --merge and --time")
        _show(options, scale, runs, count, folder)
        return
    if options.report_only or options.merge:
        if options.time or options.minutes:
            raise InputError("--report-only and --merge measure nothing: leave out --time and --minutes")
        if options.merge:
            _merge(options, folder)
        _report(options, folder, plan)
        return
    if scale.threads and options.device.type == "cpu":
        torch.set_num_threads(min(scale.threads, torch.get_num_threads()))
    diverged = lost = ()
    with run_folder.folder_lock(folder):  # two at once would lose each other's rows
        if options.time:
            _time(options, scale, runs, folder)
        else:
            if options.device.type == "cuda":  # tuning every size for every pattern would take longer than these runs
                os.environ.setdefault("SPARSEDM_AUTOTUNE", "off")
            diverged, lost = _carry_out(options, plan, scale, runs, count, folder, deadline)
    if (folder / "results.csv").exists():
        _report(options, folder, plan)
    if diverged:
        diverged = [*diverged, "all other runs are done, and --only can leave these out"]
    if diverged or lost:
        raise InputError("; ".join([*diverged, *lost]))


def _carry_out(options, plan, scale, runs, count, folder, deadline):
    """Make the runs of all seeds. Returns what is to be said of the runs that diverged, and of the seeds whose dense
    network did."""
    check_source(scale.data, out=folder / "report.md")
    work = Work(options, scale, folder, deadline)
    todo = [(seed, run) for seed in range(options.seed, options.seed + count) for run in runs]
    bar = tqdm(todo, desc=options.name, disable=None)
    diverged, lost = [], {}
    try:
        for seed, run in bar:
            bar.set_postfix_str(f"seed {seed}, {run.name}")
            if seed in lost:
                continue
            try:
                work.do(seed, run)
            except TrainingDiverged as error:  # the other runs do not depend on it
                if seed in work.bases:
                    said = f"seed {seed}, {run.name}: {error}"
                    diverged.append(said)
                else:
                    base = f"seed {seed}, the dense network that all runs start from"
                    lost[seed] = said = f"{base}: {error}; none of its runs was made: use another --seed"
                log.warning("%s", said)
    except Interrupted:
        if work.rows:
            _report(options, folder, plan)
        raise
    return diverged, list(lost.values())


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


def _report(options, folder, plan):
    print(report.write(folder, read_experiment(folder / "results.csv", options.name, options.scale), plan))
    print(f"\ntables and pictures: {folder / 'report.md'}", flush=True)


def _merge(options, folder):
    """Join the rows of several folders, which may differ only in their seeds, into one results.csv."""
    if (folder / "options.json").exists():
        raise InputError(f"--out {folder} holds runs of its own: name another one")
    rows, settings = [], {}
    for other in options.merge:
        found = read_experiment(Path(other) / "results.csv", options.name, options.scale)
        settings[other] = read_json(Path(other) / "options.json")
        places = f"in {options.merge[0]}", f"in {other}"
        if different := run_folder.differences(settings[options.merge[0]], settings[other], places, FREE):
            raise InputError(f"the folders hold runs with different options, which have no mean: {different}")
        twice = {(row["run"], row["seed"]) for row in rows} & {(row["run"], row["seed"]) for row in found}
        if twice:
            run, seed = min(twice)
            raise InputError(f"{other} holds {run} of seed {seed}, as another one of the folders does")
        rows += found
    folder.mkdir(parents=True, exist_ok=True)
    write_experiment(folder / "results.csv", sorted(rows, key=lambda row: row["seed"]))


def _show(options, scale, runs, seeds, folder):
    """Print the plan, after checking that the data exist and fit, and the features. Nothing is downloaded."""
    check_source(scale.data, out=folder / "report.md")
    for name in scale.features:
        if name != "inception":
            load_features(name)
    amp_of(options.device, scale.options.amp or "auto")  # warns where bf16 is slower
    if scale.data != "cifar10":
        images, validation, config = images_for(scale, options.crop, options.resize)
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
    """Add the sampling times of the finished runs to results.csv, measured in turns."""
    file = folder / "results.csv"
    rows = read_experiment(file, options.name, options.scale)
    done = {row["run"] for row in rows if row["seed"] == options.seed}
    if done and not (folder / f"seed-{options.seed}").is_dir():
        rule = "--time needs the folders with the networks, before --merge joins their results"
        raise InputError(f"{folder} holds no networks of seed {options.seed}: {rule}")
    kinds = (SMALL, PRUNED, "")
    networks = {
        run.name: load_model(folder_of(folder, options.seed, run.name), build_model).model
        for run in runs
        if run.name in done and run.kind in kinds and run.stages
    }
    control = known("experiment", options.name).control
    if control not in networks or masked_layers(networks[control]):
        raise InputError(f"{folder} holds no dense run of seed {options.seed} to time the others against")
    seconds = speed.sampling_seconds(networks, scale.sampling_steps, options.device)
    now, seed = stamp(options.device), options.seed
    again = {(name, seed) for name in networks}
    rows = [row for row in rows if (row["run"], row["seed"]) not in again or not of_time(row["measure"])]
    fastest = {name: min(forms.values()) for name, forms in seconds.items()}
    for name, forms in seconds.items():
        like = next(row for row in rows if (row["run"], row["seed"]) == (name, seed))
        values = {SPEED: fastest[control] / fastest[name], SAMPLING: fastest[name]}
        if speed.BF16 in forms:
            values[SAMPLING + FP32] = min(value for form, value in forms.items() if form != speed.BF16)
        rows += [
            like | {n: str(now[n]) for n in STAMPED} | {"measure": measure, "x": None, "value": value}
            for measure, value in values.items()
        ]
    write_experiment(file, rows)
