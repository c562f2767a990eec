"""`sparsedm search`: train a small family of networks, or take those of a run, and find which to use at which step.

The folder it leaves: family/ (training, where there was any), strategies/*.json, report.md, report.json, pictures, and
what `search_study.py` keeps. To resume, run the same command again; with --minutes it cuts itself in time.
"""

import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsedm import diffusion, samplers
from sparsedm.commands.quickstart import SYNTHETIC, TRANSFER
from sparsedm.commands.train import show_plan
from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.stepaware import family as stepaware
from sparsedm.stepaware.report import NOTE, table
from sparsedm.stepaware.search import SearchOptions, check_installed
from sparsedm.stepaware.study import QUALITIES, Plan, study
from sparsedm.train.chain import Start, run_chain
from sparsedm.train.data import load_images
from sparsedm.train.loop import TrainOptions, amp_of
from sparsedm.train.stages import Stage, distilled

RESERVE = 40  # seconds of --minutes for what is left after the deadline: a checkpoint, or a strategy and the report


@dataclass(frozen=True)
class Scale:
    """What one search spends. families: {name: (model, its options, stages, options of training)}."""

    data: str
    families: dict
    count: int  # images per evaluation
    final_count: int  # images per row of the table
    validation: int  # images for the proxy
    steps: int
    population: int
    generations: int
    threads: int | None = None  # on a CPU; None: as torch likes


_NET = {"image_size": 12, "multipliers": (1, 2), "attention": (6,)}
_TRAINING = replace(SYNTHETIC.options, weighting="noise", lr=1e-3)
_STUDENTS = [Stage(p.replace(":", "of"), 150, p, lr=1e-3, **TRANSFER) for p in ("2:4", "1:4", "1:8")]
_LITE = TrainOptions(steps=1, lr=4e-4, ema=0.999, cosine=True, weighting="velocity")
_LITE_STUDENTS = [Stage(p.replace(":", "of"), 600, p, **TRANSFER) for p in ("3:4", "2:4", "1:4")]
_FULL_STUDENTS = [Stage(p.replace(":", "of"), 50_000, p, **TRANSFER) for p in ("3:4", "2:4", "1:4")]
_SUPERNET = TrainOptions(steps=1, batch_size=256, lr=4e-4, betas=(0.9, 0.999), weight_decay=0.0)
_LITE_SUPERNET = replace(_SUPERNET, ema=0.999, cosine=True)
_FULL_SUPERNET = replace(_SUPERNET, warmup=5000)

SCALES = {
    "smoke": Scale(
        data="synthetic",
        families={
            "chain": ("uvit-tiny", SYNTHETIC.model, [Stage("dense", 1600), *_STUDENTS], SYNTHETIC.options),
            "widths": ("slimmable-tiny", _NET, [Stage("dense", 1000)], _TRAINING),
            "both": ("slimmable-tiny", _NET, [Stage("dense", 800), replace(_STUDENTS[0], steps=200)], _TRAINING),
        },
        count=256,
        final_count=256,
        validation=256,
        steps=12,
        population=16,
        generations=6,
        threads=1,
    ),
    "lite": Scale(  # for two times ten minutes of one large GPU, not timed yet
        data="cifar10",
        families={
            "chain": ("uvit-cifar10-small", {"velocity": True}, [Stage("dense", 3000), *_LITE_STUDENTS], _LITE),
            "widths": ("slimmable-cifar10", {}, [Stage("dense", 4000)], _LITE_SUPERNET),
            "both": ("slimmable-cifar10", {}, [Stage("dense", 3000), _LITE_STUDENTS[1]], _LITE_SUPERNET),
        },
        count=1000,
        final_count=3000,
        validation=1024,
        steps=20,
        population=24,
        generations=6,
    ),
    "full": Scale(
        data="cifar10",
        families={
            "chain": ("uvit-cifar10-small", {}, [Stage("dense", 200_000), *_FULL_STUDENTS], TrainOptions(steps=1)),
            "widths": ("slimmable-cifar10", {}, [Stage("dense", 200_000)], _FULL_SUPERNET),
            "both": ("slimmable-cifar10", {}, [Stage("dense", 200_000), _FULL_STUDENTS[1]], _FULL_SUPERNET),
        },
        count=2000,
        final_count=10_000,
        validation=1024,
        steps=25,
        population=24,
        generations=12,
    ),
}


def run_search(options):
    """The command; `options` as `add_arguments` makes them."""
    started, scale = time.perf_counter(), SCALES[options.scale]
    plan = _plan(options, scale, _deadline(options.minutes))
    if options.dry_run:
        _show(options, scale, plan)
        return
    check_installed()  # before anything is trained
    if scale.threads and options.device.type == "cpu":
        torch.set_num_threads(min(scale.threads, torch.get_num_threads()))
    if options.device.type == "cuda" and options.unit == "MACs":  # tuning all sizes takes longer than the search
        os.environ.setdefault("SPARSEDM_AUTOTUNE", "off")
    if not options.run:
        _train(options, scale, plan)
    report = study(plan)
    print(f"\n{table(report)}\n\n{NOTE}\n")
    print(f"look at {plan.folder / 'front.png'}, then strategies.png, samples.png and proxy.png beside it")
    print(f"({time.perf_counter() - started:.0f} s in all)")


def _deadline(minutes):
    if minutes is None:
        return math.inf
    if 60 * minutes <= RESERVE:
        raise InputError(f"--minutes {minutes:g}: more than {RESERVE} seconds are needed to stop cleanly")
    return time.monotonic() + 60 * minutes - RESERVE


def _plan(options, scale, deadline):
    name = f"search-{options.scale}-{options.family}"
    folder = Path(options.out or (Path(options.run) / "search" if options.run else f"runs/{name}"))
    return Plan(
        run=Path(options.run or folder / "family"),
        folder=folder,
        data=options.data or (_data_of(options.run) if options.run else scale.data),
        sampler=options.sampler,
        clip=options.clip,
        steps=scale.steps if options.sampling_steps is None else options.sampling_steps,
        count=scale.count if options.count is None else options.count,
        final_count=scale.final_count if options.final_count is None else options.final_count,
        validation=scale.validation,
        search=SearchOptions(
            scale.population if options.population is None else options.population,
            scale.generations if options.generations is None else options.generations,
            weight=options.weight,
            seed=options.seed,
        ),
        quality=options.quality,
        features=options.features,
        unit=options.unit,
        device=options.device,
        workers=_workers(options.device) if options.workers is None else options.workers,
        deadline=deadline,
    )


def _workers(device):
    """The cores that this process may use; a GPU has one worker."""
    if device.type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _data_of(run):
    if not Path(run).exists():
        raise InputError(f"{run} does not exist")
    try:
        return json.loads((Path(run) / "options.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{run} does not say what data it was trained on: name it with --data") from None


def _family(options, scale):
    """(model, its options, stages, options of training) of the family to train."""
    name, overrides, stages, training = scale.families[options.family]
    return name, overrides, distilled(stages, options.distill), training


def _train(options, scale, plan):
    name, overrides, stages, training = _family(options, scale)
    size = build_model(name, device="meta", **overrides).config.image_size
    images = load_images(plan.data, "train", size)
    validation = load_images(plan.data, "test", size, limit=1024)
    channels, classes = images.images.shape[1], len(images.class_names)
    torch.manual_seed(options.seed)
    model = build_model(name, **overrides, channels=channels, num_classes=classes)
    print(f"training the family {' -> '.join(s.pattern for s in stages)} of {name} on {len(images):,} images")
    run_chain(
        Start(model),
        stages,
        images,
        diffusion.schedule_of(model),
        replace(training, seed=options.seed, amp=amp_of(options.device)),
        plan.run,
        validation=validation,
        record={"data": plan.data},
        deadline=plan.deadline,
        device=options.device,
    )


def _show(options, scale, plan):
    """Print what the command would do; writes nothing."""
    if options.run:
        family = stepaware.family_of(plan.run, device=plan.device)
        print(
            f"family {family.name}: " + ", ".join(f"{n} {c / 1e6:,.1f} M" for n, c in zip(family.names, family.costs))
        )
    else:
        name, overrides, stages, training = _family(options, scale)
        training = replace(training, seed=options.seed, amp=amp_of(options.device))
        show_plan(stages, training, build_model(name, device="meta", **overrides), plan.run)
    search = plan.search
    how = "NSGA-II" if search.weight is None else f"DDSM with weight {search.weight:g}"
    print(
        f"search: {how}, {search.population} strategies x {search.generations} generations, {plan.steps} steps of "
        f"{plan.sampler}, {plan.count:,} images each; then {plan.final_count:,} images for each row of the table"
    )
    print(f"search folder: {plan.folder}   (dry run: nothing was trained or written)")


def add_arguments(sub):
    """The options of `sparsedm search`, beyond those that every command has."""
    sub.add_argument("run", nargs="?", help="search among the networks of this run folder instead of training a family")
    sub.add_argument("--scale", choices=SCALES, default="smoke", help="how much to spend (default: smoke, on a CPU)")
    sub.add_argument(
        "--family",
        choices=("chain", "widths", "both"),
        default="chain",
        help="what to train: N:M students, the widths of a slimmable network, or its N:M students at all widths",
    )
    sub.add_argument("--distill", type=float, help="as for train, while a family of widths is trained")
    sub.add_argument("--data", help="as for train (default: what the run was trained on, or the scale's own)")
    sub.add_argument("--sampler", choices=samplers.SAMPLERS, default="dpm++2m", help="(default: dpm++2m)")
    sub.add_argument("--clip", choices=samplers.CLIPS, default="every", help="as for sample (default: every step)")
    sub.add_argument("--sampling-steps", type=int, help="genes of a strategy (default: of the scale)")
    sub.add_argument("--population", type=int, help="strategies per generation (default: of the scale)")
    sub.add_argument("--generations", type=int, help="with the first (default: of the scale)")
    sub.add_argument(
        "--weight",
        type=float,
        help="minimise quality + WEIGHT x cost of an image, in --unit; DDSM: 2e-10 / steps (default: the whole front)",
    )
    sub.add_argument("--quality", choices=QUALITIES, default="frechet", help="what to minimise beside cost")
    sub.add_argument("--unit", choices=stepaware.UNITS, default="MACs", help="of cost; seconds are measured here")
    sub.add_argument("--count", type=int, help="images per evaluation (default: of the scale)")
    sub.add_argument("--final-count", type=int, help="images per row of the table (default: of the scale)")
    sub.add_argument(
        "--workers",
        type=int,
        help="strategies measured at the same time, one thread each; changes nothing but time (default: all CPU cores)",
    )
    sub.add_argument("--minutes", type=float, help="stop in time (exit code 3); the same command goes on")
    sub.add_argument("--features", default="random-conv", help="as for evaluate (default: random-conv)")
    sub.add_argument("--out", metavar="DIR", help="folder (default: runs/search-SCALE-FAMILY, or RUN/search)")
    sub.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
