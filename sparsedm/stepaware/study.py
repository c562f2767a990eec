"""One search, from a run folder to a report: family, loss table, evolution, and a comparison on fresh noise.

The folder stores all slow results at once, so that a resume reuses them: table.json, evaluations.jsonl, final.jsonl.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsedm import evaluate, samplers
from sparsedm.errors import InputError, check_memory
from sparsedm.features import load_features, to_uint8
from sparsedm.files import cache_folder, read_json, write_json
from sparsedm.kernels.cpu.library import cpu_name
from sparsedm.model_files import read_state
from sparsedm.plots import save_grid
from sparsedm.stepaware.family import Family, Strategy, family_of, loss_table, sample
from sparsedm.stepaware.report import write_report
from sparsedm.stepaware.search import (
    Evaluations,
    SearchOptions,
    best_of,
    first_generation,
    front,
    proxy_optima,
    rank_correlation,
    search,
)
from sparsedm.timing import interleaved_seconds
from sparsedm.train import run_folder
from sparsedm.train.data import ImageSet, batch, load_images
from sparsedm.train.loop import OutOfTime, amp_of
from sparsedm.train.published import trained_crop

QUALITIES = ("frechet", "proxy")
SHOWN = 16  # images of each strategy in the picture
CLOCKED, ROUNDS = 64, 3  # images drawn at once to time a strategy; the median of so many, in turns


@dataclass(frozen=True)
class Plan:
    """The settings of a search. Its noise comes from search.seed; the noise of the comparison from search.seed + 1."""

    run: Path  # the run folder with the networks of the family
    folder: Path
    data: str
    sampler: str
    steps: int
    count: int  # images per evaluation
    final_count: int  # images per row of the table
    validation: int  # images for the loss table
    search: SearchOptions
    quality: str = "frechet"  # one of QUALITIES
    features: str = "random-conv"
    unit: str = "MACs"
    clip: str = "every"  # one of samplers.CLIPS
    guidance: float | None = None  # see `samplers.guided`
    networks: tuple = ()  # the names to search among; (): all
    exclude: tuple = ()  # names, or ends of names such as 8/8, to leave out
    device: torch.device | str = "cpu"
    workers: int = 1  # strategies measured at the same time, on one thread each
    deadline: float = math.inf  # a value of time.monotonic(): no measurement starts after it

    def __post_init__(self):
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}: at least 1 is needed")
        if self.workers > 1 and torch.device(self.device).type != "cpu":
            raise InputError(f"workers is {self.workers}: a GPU measures one strategy at a time")
        for name in ("count", "final_count", "validation"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is {getattr(self, name)}: at least 2 images are needed")
        samplers.evaluations(self.sampler, self.steps)

    def check_time(self, done):
        """Raise OutOfTime at the deadline. done: what is done and what becomes of it, in words."""
        if time.monotonic() >= self.deadline:
            raise OutOfTime(f"after {done}")

    def facts(self, family):
        """The settings that the stored measurements depend on. Population and generations are not among them."""
        names = ("data", "sampler", "steps", "count", "final_count", "validation", "quality", "features", "unit")
        networks = dict(zip(family.names, family.fingerprints))
        facts = {"networks": networks, "seed": self.search.seed, **{name: getattr(self, name) for name in names}}
        younger = {"clip": self.clip, "guidance": self.guidance, "crop": self.crop(family)}
        older = {"clip": "every", "guidance": None, "crop": "square"}  # in folders that have none of these
        return facts | {name: value for name, value in younger.items() if value != older[name]}

    def machine(self):
        """What measures here, in words."""
        if torch.device(self.device).type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{cpu_name()}, {torch.get_num_threads()} threads"

    def crop(self, family):
        """How images are cropped: as for the training of the networks."""
        return trained_crop(self.run, family.networks[0].config)

    def family(self):
        """The Family to search in. Raises InputError for an unknown name, or if no network is left."""
        found = family_of(self.run, self.unit, self.device)
        if self.networks:
            found.only(self.networks)  # raises for an unknown name
            found = found.only([name for name in found.names if name in self.networks])  # costliest first
        found = found.only(without(found.names, self.exclude))
        self.check(found.networks[0].config)
        return found

    def check(self, config, images=None):
        """Raise InputError if networks of `config` cannot be searched, with an ImageSet: or not on these images."""
        samplers.check(config, self.sampler, self.steps)
        if self.guidance and not (config.num_classes and getattr(config, "null_label", True)):
            raise InputError(f"guidance {self.guidance:g} needs networks with classes and a null label")
        if images is None:
            return
        if images.is_latent and self.quality != "proxy":
            raise InputError(f"data {self.data} holds latents, not images for a Fréchet distance: use --quality proxy")
        if self.quality != "proxy" and len(images) < 2:
            raise InputError(f"data {self.data} holds {len(images)} image to train on: a Fréchet distance needs 2")
        most = self.workers * max(self.count, self.final_count)
        check_memory(8 * most * config.channels * config.image_size**2, f"drawing {most} images")


def without(names, exclude):
    """The names of networks that are left if those named in `exclude`, or with such an end, are left out."""
    for end in exclude:
        left = [name for name in names if name != end and not name.endswith(f" {end}")]
        if len(left) == len(names):
            raise InputError(f"no network to leave out is named {end!r}: {', '.join(names)}")
        names = left
    return names


def study(plan):
    """Carry out a Plan, or continue it. Returns the report, a dict, and writes it into the folder.

    Raises InputError if the folder belongs to another plan or process, if the data are latents (these need
    quality="proxy"), or if the search is impossible. Raises OutOfTime at the deadline; the measurements so far are
    stored.
    """
    with run_folder.folder_lock(plan.folder):
        return _study(plan)


def _study(plan):
    setting = _prepare(plan)
    tried = setting.evaluations("evaluations.jsonl", plan.count, plan.search.seed)
    compared = _compared(setting, *_evolved(setting, tried))
    final = setting.evaluations("final.jsonl", plan.final_count, plan.search.seed + 1)
    rows = _rows(compared, tried, final)
    if plan.unit == "seconds":
        rows = _clocked(setting, rows)
    report = _report(setting, tried, final, rows)
    _save_strategies(setting, compared["found"])
    write_report(plan.folder, report)
    if not setting.images.is_latent:
        _save_samples(setting, report)
    return report


@dataclass(frozen=True)
class _Setting:
    """Shared by all measurements of a plan. losses (networks, steps): see `loss_table`."""

    plan: Plan
    family: Family
    images: ImageSet
    losses: np.ndarray
    table_seconds: float
    distance: Callable | None  # uint8 samples -> quality; None: the proxy is the quality

    def proxy(self, indices):
        return np.log(self.losses[list(indices), range(self.plan.steps)]).sum()

    def cost(self, indices):
        return self.family.cost(self.plan.sampler, indices) * (2 if self.plan.guidance else 1)

    def strategy(self, indices):
        plan, family = self.plan, self.family
        clip = None if plan.quality == "proxy" else plan.clip  # for the proxy nothing was sampled
        found = {"data": plan.data, "guidance": plan.guidance, "clip": clip}
        return Strategy(family.name, family.names, plan.sampler, indices, fingerprints=family.fingerprints, **found)

    def draw(self, indices, count, seed):
        return _draw(self.family, self.strategy(indices), count, seed, self.plan.clip, self.plan.guidance)

    def evaluations(self, file, count, seed):
        """Evaluations of the quality over `count` images of this seed, stored in the folder."""

        def measured(indices):
            known = len(evaluations.known)
            self.plan.check_time(f"{known} strategies of the search in {self.plan.folder}, which are kept")
            return self.distance(self.draw(indices, count, seed)) if self.distance else self.proxy(indices)

        evaluations = Evaluations(measured, self.cost, self.plan.folder / file, self.plan.workers)
        steps, networks = self.plan.steps, len(self.family.names)
        for indices in evaluations.known:
            if len(indices) != steps or not all(0 <= index < networks for index in indices):
                rule = f"no strategy of {steps} steps and {networks} networks"
                raise InputError(f"{evaluations.file} is damaged: {list(indices)} is {rule}")
        return evaluations


def _prepare(plan):
    """The _Setting of a plan. Its folder is claimed only after all checks of the plan."""
    family = plan.family()
    images = load_images(plan.data, "train", family.shape[1], crop=plan.crop(family))
    first_generation(len(family.names), plan.steps, plan.search)
    plan.check(family.networks[0].config, images)
    run_folder.claim(plan.folder, plan.facts(family), started=run_folder.holds_work(plan.folder))
    family, losses, seconds = _table(plan, family)
    distance = None if plan.quality == "proxy" else _distance_to(images, plan)
    return _Setting(plan, family, images, losses, seconds, distance)


def _evolved(setting, tried):
    """(the front of the search, at most eight Evaluations evenly spread along it; with a weight, the best of all)."""
    plan, family = setting.plan, setting.family
    step_costs = np.outer(family.costs, samplers.evaluations(plan.sampler, plan.steps))
    room = max(0, plan.search.population - len(family.names)) // 2
    mixed = [found for found in proxy_optima(np.log(setting.losses), step_costs) if len(set(found)) > 1]
    start = _spread(mixed, room)
    every = search(tried, len(family.names), plan.steps, plan.search, start=start, progress=True)
    return _spread(front(every), 8), best_of(every, plan.search.weight)


def _compared(setting, found, best):
    """{group: {name: indices}} of all strategies in the table. best: an Evaluation or None."""
    plan, networks = setting.plan, len(setting.family.names)
    random = np.random.default_rng([plan.search.seed, 1])
    falling = tuple((np.arange(plan.steps) * networks // plan.steps).tolist())
    named = {f"found {i}": e.indices for i, e in enumerate(found, 1) if len(set(e.indices)) > 1}
    return {
        "uniform": {name: (index,) * plan.steps for index, name in enumerate(setting.family.names)},
        "random": {f"random {i}": tuple(random.integers(networks, size=plan.steps).tolist()) for i in range(1, 5)},
        # the whole family in turn, in equal shares: the costliest network at low noise, or at high noise
        "by hand": {"costly last": falling[::-1], "costly first": falling},
        "found": named | ({"best": best.indices} if best else {}),
    }


def _rows(compared, tried, final):
    """The rows of the table, costliest first: the quality of each strategy on fresh noise and on the search's noise."""
    named = [(group, name, indices) for group, items in compared.items() for name, indices in items.items()]
    every = [indices for _, _, indices in named]
    rows = [
        {"group": group, "strategy": name, **asdict(measured), "search_quality": searched.quality}
        for (group, name, _), measured, searched in zip(named, final.each(every), tried.each(every))
    ]
    return sorted(rows, key=lambda row: -row["cost"])


def _clocked(setting, rows):
    """The rows with "clock": seconds per image in whole sampling, measured once and stored in clock.json.

    Equal strategies have one time.
    """
    file, distinct = setting.plan.folder / "clock.json", sorted({row["indices"] for row in rows})
    asked = {"indices": [list(indices) for indices in distinct], "machine": setting.plan.machine()}
    rule = f"it must hold a time for each of {len(distinct)} strategies; remove it, and all are timed anew"
    try:
        known = read_json(file, indices=list, machine=str, seconds=list) if file.exists() else {}
    except InputError as error:
        raise InputError(f"{error}: {rule}") from None
    if {name: known.get(name) for name in asked} != asked:

        def drawn(strategy):
            setting.plan.check_time(f"all strategies of the search in {setting.plan.folder}, which are timed anew")
            setting.draw(strategy, CLOCKED, setting.plan.search.seed)

        calls = [functools.partial(drawn, indices) for indices in distinct]
        seconds = [total / CLOCKED for total in interleaved_seconds(calls, setting.plan.device, ROUNDS)]
        write_json(file, asked | {"seconds": seconds})
    seconds = read_json(file, seconds=list)["seconds"]
    if len(seconds) != len(distinct) or not all(type(each) in (int, float) and each > 0 for each in seconds):
        raise InputError(f"{file} is damaged: {rule}")
    clock = dict(zip(distinct, seconds, strict=True))
    return [row | {"clock": clock[row["indices"]]} for row in rows]


def _save_strategies(setting, found):
    """Write {name: indices}. An earlier search over fewer generations may have found more: its files go."""
    folder = setting.plan.folder / "strategies"
    files = {folder / f"{name.replace(' ', '-')}.json": indices for name, indices in found.items()}
    for file, indices in files.items():
        setting.strategy(indices).save(file)
    for file in {*folder.glob("found-*.json"), *folder.glob("best.json")} - set(files):
        file.unlink()


def _report(setting, tried, final, rows):
    plan, family, every = setting.plan, setting.family, tried.all()
    seconds = {"training": _training_seconds(family), "table": setting.table_seconds}
    dearest = next(row for row in rows if set(row["indices"]) == {0})
    return {
        **plan.facts(family),
        "weight": plan.search.weight,
        "family": family.name,
        "names": family.names,
        "costs": family.costs,
        "dearest": dearest["cost"],
        "dearest_clock": dearest.get("clock"),
        "times": (samplers.step_times(family.schedule, plan.sampler, plan.steps) / family.schedule.last).tolist(),
        "losses": setting.losses.tolist(),
        "rank_correlation": {
            "logarithms": _correlation(np.log(setting.losses), every),
            "losses": _correlation(setting.losses, every),
        },
        "tried": [asdict(e) | {"proxy": setting.proxy(e.indices)} for e in every],
        "seconds": seconds | {"search": tried.seconds, "comparison": final.seconds},
        "torch": torch.__version__,
        "device": plan.machine(),
        "rows": rows,
    }


def _training_seconds(family):
    """Training seconds of the family's networks and of what they started from, by their latest checkpoints.

    A stage starts from the stages before it; the last stage of a run in a folder of runs from the run `base`, too.
    """
    parts, number = set(), "[0-9][0-9]-*"
    for folder in filter(Path.is_dir, family.folders):
        if folder.match(number):
            parts |= {stage for stage in folder.parent.glob(number) if stage <= folder}
        else:
            parts |= {folder, *folder.glob(number), *folder.parent.glob(f"base/{number}")}
    saved = filter(None, map(run_folder.latest, parts))
    return sum(sorted(read_state(path, seconds=float)["seconds"] for path in saved))


def _table(plan, family):
    """(the family with the stored costs, in their order; losses (networks, steps); seconds), measured once."""
    file, shape = plan.folder / "table.json", (len(family.names), plan.steps)
    if not file.exists():
        new = {"names": family.names, "costs": family.costs, "losses": [], "seconds": 0.0, "machine": plan.machine()}
        write_json(file, new)
    known = read_json(file, names=list, costs=list, losses=list, seconds=float)
    there = known.get("machine", plan.machine())  # an older file has none
    if plan.unit == "seconds" and there != plan.machine():
        rule = "remove this file, and all networks are timed anew"
        raise InputError(
            f"{file}: its seconds are of another machine ({there}) than this one ({plan.machine()}): {rule}"
        )
    try:
        costs = tuple(map(float, known["costs"]))
        family = replace(family.only(known["names"]), costs=costs)  # costs in seconds may give another order now
        losses = np.array(known["losses"], dtype=float).reshape(len(known["losses"]), plan.steps)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}") from error
    losses = _filled(losses, plan, family, known, file)
    if losses.shape != shape or not (losses > 0).all() or not np.isfinite(losses).all():
        raise InputError(f"{file} is damaged: it must hold a loss for each network and step")
    return family, losses, known["seconds"]


def _filled(losses, plan, family, known, file):
    """The losses of all networks. A missing row is measured, and stored at once with what is `known`."""
    missing = family.names[len(losses) :]
    if not missing:
        return losses
    start, crop = time.perf_counter() - known["seconds"], plan.crop(family)
    held_out = load_images(plan.data, "test", family.shape[1], limit=plan.validation, crop=crop).to(plan.device)
    x, y = batch(held_out, torch.arange(len(held_out), device="cpu"))
    y = y if family.networks[0].config.num_classes else None
    for name in missing:
        plan.check_time(f"{len(losses)} networks of the table of losses in {plan.folder}, which are kept")
        with _autocast(family):
            one = family.only([name])
            row = loss_table(one, x, plan.sampler, plan.steps, y=y, seed=plan.search.seed, progress=True)
        losses = np.concatenate([losses, row.numpy(force=True)])
        known |= {"losses": losses.tolist(), "seconds": time.perf_counter() - start}
        write_json(file, known)
    return losses


def _distance_to(images, plan):
    """A function: uint8 samples -> their Fréchet distance to the images."""
    features = load_features(plan.features, plan.device)
    real = evaluate.summarize(images.images, features, images.source, cache=cache_folder(), progress=True)

    def distance(drawn):
        mine = evaluate.summarize(drawn, features, "the generated set")
        gaussians = (mine.mean, mine.covariance, real.mean, real.covariance)
        return evaluate.frechet_distance(*(tensor.to(features.device) for tensor in gaussians))

    return distance


def _draw(family, strategy, count, seed, clip, guidance=None):
    """uint8 samples; every strategy gets the same noise and labels."""
    labels = samplers.labels_in_turn(family.networks[0].config, count)
    execution = {"batch_size": samplers.batch_of(next(family.networks[0].parameters()).device)}
    with _autocast(family):
        images = sample(family, strategy, count, seed=seed, y=labels, clip=clip, guidance=guidance, **execution)
    return to_uint8(images).cpu()


def _autocast(family):
    """The precision of all comparisons, whatever the training had: bf16 on a GPU, the weights' own on a CPU."""
    device = next(family.networks[0].parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=amp_of(device) == "bf16")


def _correlation(table, evaluations):
    """Spearman's ρ between the sum of a strategy's entries of `table` and its quality; None if one is constant."""
    sums = [table[list(e.indices), range(len(e.indices))].sum() for e in evaluations]
    found = rank_correlation(sums, [e.quality for e in evaluations])
    return None if math.isnan(found) else found


def _spread(items, count):
    """At most `count` of `items`, evenly spread, with both ends."""
    places = np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)
    return [items[place] for place in places]


def _save_samples(setting, report):
    plan, images = setting.plan, setting.images
    by_group = {group: [row for row in report["rows"] if row["group"] == group] for group in ("uniform", "found")}
    shown = _spread(by_group["uniform"], 4) + _spread(by_group["found"], 4)
    drawn = [
        (
            f"{row['strategy']}, {row['cost'] / report['dearest']:.0%}",
            setting.draw(row["indices"], SHOWN, plan.search.seed + 1),
        )
        for row in sorted(shown, key=lambda row: -row["cost"])
    ]
    real = images.images[:: max(1, len(images) // SHOWN)][:SHOWN]
    save_grid(plan.folder / "samples.png", [("real", real), *drawn])
