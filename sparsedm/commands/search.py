"""`sparsedm search`: find which network of a family to use at which step. The family is trained, or taken from a run.

It writes family/ (if it trains), strategies/*.json, report.md, report.json, pictures, and the measurements of
`stepaware/study.py` into its folder. To resume, run the same command again; with --minutes it stops in time.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from sparsedm import samplers
from sparsedm.commands.drawing import beside
from sparsedm.commands.options import add_seed_and_device, count, deadline_of, finite, positive, sampling_steps
from sparsedm.commands.train import recipe_config, recipe_images, show_recipe, train_recipe
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import check_writable, read_json
from sparsedm.models import model_config
from sparsedm.recipes import SEARCHES
from sparsedm.stepaware.family import UNITS
from sparsedm.stepaware.report import NOTE, summary
from sparsedm.stepaware.search import SearchOptions, check_installed, first_generation
from sparsedm.stepaware.study import QUALITIES, Plan, study, without
from sparsedm.train.data import check_source
from sparsedm.train.stages import distilled

EXAMPLES = ("--scale smoke", "--scale smoke --family widths", "runs/quickstart", "--scale lite --family both --dry-run")


def add_arguments(sub):
    sub.add_argument("run", nargs="?", help="search among the networks of this run folder instead of training a family")
    sub.add_argument("--scale", choices=SEARCHES, default="smoke", help="how much to spend (default: smoke, on a CPU)")
    sub.add_argument(
        "--family",
        choices=("chain", "widths", "both"),
        help="which family to train: N:M students, the widths of a slimmable network, or its N:M students at all "
        "widths (default: chain)",
    )
    sub.add_argument("--distill", type=finite, help="as for train, if a family of widths is trained")
    sub.add_argument("--data", help="as for train (default: the run's data, or set by --scale)")
    sub.add_argument("--sampler", choices=samplers.SAMPLERS, default="dpm++2m", help="(default: dpm++2m)")
    sub.add_argument("--clip", choices=samplers.CLIPS, default="every", help="as for sample (default: every step)")
    sub.add_argument("--guidance", type=finite, help="as for sample; each step then costs twice as much")
    sub.add_argument("--networks", type=_names, default=(), help="search only among these of RUN, names with commas")
    sub.add_argument("--exclude", type=_names, default=(), help="leave these out; 8/8: every network of this width")
    much = sub.add_mutually_exclusive_group()
    much.add_argument(
        "--sampling-steps",
        type=sampling_steps,
        help="sampling steps; a strategy names one network for each (default: set by --scale)",
    )
    much.add_argument("--nfe", type=sampling_steps, help="as for sample, in place of steps")
    sub.add_argument("--population", type=count, help="strategies per generation (default: set by --scale)")
    sub.add_argument("--generations", type=count, help="how many, counting the first one (default: set by --scale)")
    sub.add_argument(
        "--weight",
        type=finite,
        help="minimise quality + WEIGHT x cost of an image, in --unit; strategies/best.json is the least. DDSM: 2e-10 "
        "/ steps (default: the whole front)",
    )
    sub.add_argument(
        "--quality",
        choices=QUALITIES,
        default="frechet",
        help="quality to minimise together with cost. frechet: distance of samples; proxy: sum of the logarithms of "
        "the losses at the steps, without samples (default: frechet)",
    )
    sub.add_argument(
        "--unit",
        choices=UNITS,
        default="MACs",
        help="unit of cost (default: MACs); seconds are measured on this machine",
    )
    sub.add_argument("--count", type=count, help="images per evaluation (default: set by --scale)")
    sub.add_argument("--final-count", type=count, help="images per row of the table (default: set by --scale)")
    sub.add_argument(
        "--workers",
        type=count,
        help="strategies measured at the same time, one thread each; changes only the time (default: all CPU cores)",
    )
    sub.add_argument("--minutes", type=positive, help="stop in time (exit code 3); the same command continues")
    sub.add_argument("--features", default="random-conv", help="as for evaluate (default: random-conv)")
    sub.add_argument(
        "--out",
        metavar="DIR",
        help="folder (default: runs/search-SCALE-FAMILY, or RUN/search; for a model file, in the current folder)",
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    add_seed_and_device(sub)


def run(options):
    started, scale = time.perf_counter(), SEARCHES[options.scale][options.family or "chain"]
    for name in ("family", "distill"):
        if options.run and getattr(options, name) is not None:
            raise InputError(f"--{name} says how to train a family, but RUN has one: leave out one of them")
    scale = replace(scale, stages=distilled(scale.stages, options.distill))
    plan = _plan(options, scale, deadline_of(options.minutes))
    config = None if options.run else model_config(scale.model, **scale.overrides)
    check_source(plan.data, config, out=plan.folder / "report.json")
    check_writable(plan.folder / "report.json")
    if not options.run:
        first_generation(len(_left(options, scale)), plan.steps, plan.search)
        samplers.check(model_config(scale.model, **scale.overrides), plan.sampler, plan.steps)
    if plan.quality == "frechet" and not (options.dry_run and plan.features == "inception"):  # which is downloaded
        load_features(plan.features, options.device)  # or a name mistyped would be refused after hours
    if options.dry_run:
        _show(options, scale, plan)
        return
    check_installed()  # before anything is trained
    if scale.threads and options.device.type == "cpu":
        torch.set_num_threads(min(scale.threads, torch.get_num_threads()))
    if options.device.type == "cuda" and options.unit == "MACs":  # tuning all sizes takes longer than the search
        os.environ.setdefault("SPARSEDM_AUTOTUNE", "off")
    if not options.run:
        images, validation = recipe_images(scale, plan.data)
        plan.check(recipe_config(scale, images), images)
        train_recipe(scale, images, validation, plan.run, options, plan.deadline)
    report = study(plan)
    print(f"\n{summary(report)}\n\n{NOTE}\n")
    print(f"look at {plan.folder / 'front.png'}, then strategies.png, samples.png and proxy.png beside it")
    print(f"({time.perf_counter() - started:.0f} s in all)")


def _left(options, scale):
    """The names of the networks to search among, of a family that is yet to be trained."""
    if options.networks:
        raise InputError("--networks names networks of a run folder: give RUN, or use --exclude")
    widths = getattr(model_config(scale.model, **scale.overrides), "eighths", ())
    ends = [f" {k}/8" for k in reversed(widths)] or [""]
    return without([f"{stage.pattern}{end}" for stage in scale.stages for end in ends], options.exclude)


def _names(text):
    return tuple(name.strip() for name in text.split(","))


def _plan(options, scale, deadline):
    name = f"search-{options.scale}-{options.family or 'chain'}"
    folder = Path(options.out or (beside(options.run) / "search" if options.run else f"runs/{name}"))
    steps = samplers.steps_for(options.sampler, options.nfe) if options.nfe else options.sampling_steps
    return Plan(
        run=Path(options.run or folder / "family"),
        folder=folder,
        data=options.data or (_data_of(options.run) if options.run else scale.data),
        sampler=options.sampler,
        clip=options.clip,
        guidance=options.guidance,
        networks=options.networks,
        exclude=options.exclude,
        steps=steps or scale.sampling_steps,
        count=options.count or scale.count,
        final_count=options.final_count or scale.samples,
        validation=scale.validation,
        search=SearchOptions(
            options.population or scale.population,
            options.generations or scale.generations,
            weight=options.weight,
            seed=options.seed,
        ),
        quality=options.quality,
        features=options.features,
        unit=options.unit,
        device=options.device,
        workers=options.workers or _workers(options.device),
        deadline=deadline,
    )


def _workers(device):
    """The cores that this process may use; a GPU has one worker."""
    if device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _data_of(run):
    """The data that a run folder was trained on."""
    if not Path(run).exists():
        raise InputError(f"{run} does not exist")
    try:
        return read_json(Path(run) / "options.json", data=str)["data"]
    except InputError as error:
        raise InputError(f"{run} does not name its training data: name it with --data ({error})") from None


def _show(options, scale, plan):
    """Print what the command would do; writes nothing."""
    if options.run:
        family = replace(plan, unit="MACs").family()
        check_source(plan.data, family.networks[0].config)
        first_generation(len(family.names), plan.steps, plan.search)
        costs = ", ".join(f"{name} {cost / 1e6:,.1f} M" for name, cost in zip(family.names, family.costs))
        print(f"family {family.name}: {costs}")
    else:
        show_recipe(scale, options, plan.run)
    search = plan.search
    how = "NSGA-II" if search.weight is None else f"DDSM with weight {search.weight:g}"
    calls = sum(samplers.evaluations(plan.sampler, plan.steps))
    print(
        f"search: {how}, {search.population} strategies x {search.generations} generations, {plan.steps} steps of "
        f"{plan.sampler} ({calls} network evaluations), {plan.count:,} images each; then {plan.final_count:,} images "
        "for each row of the table"
    )
    print(f"search folder: {plan.folder}   (dry run: nothing was trained or written)")
