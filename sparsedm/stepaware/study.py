"""One search from a run folder to a report: family, loss table, evolution, and a comparison on fresh noise.

Everything that takes time is kept in the folder as it is made, and not made again: table.json, evaluations.jsonl,
final.jsonl.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sparsedm import evaluate, samplers
from sparsedm import plots as pictures
from sparsedm.errors import InputError
from sparsedm.features import load_features, to_uint8
from sparsedm.files import cache_folder, write_json
from sparsedm.stepaware import family as stepaware
from sparsedm.stepaware.family import Strategy, family_of
from sparsedm.stepaware.report import write_report
from sparsedm.stepaware.search import Evaluations, SearchOptions, front, proxy_optima, rank_correlation, search
from sparsedm.train import checkpoint
from sparsedm.train.data import batch, load_images
from sparsedm.train.loop import OutOfTime, amp_of

QUALITIES = ("frechet", "proxy")
SHOWN = 16  # images of each strategy in the picture


@dataclass(frozen=True)
class Plan:
    """What a search is about. Its noise comes from search.seed, that of the comparison afterwards from the next one."""

    run: Path  # whose networks are the family
    folder: Path
    data: str
    sampler: str
    steps: int
    count: int  # images per evaluation
    final_count: int  # images per row of the table
    validation: int  # images for the loss table
    search: SearchOptions
    quality: str = "frechet"  # of QUALITIES
    features: str = "random-conv"
    unit: str = "MACs"
    clip: str = "every"  # of samplers.CLIPS
    device: torch.device | str = "cpu"
    workers: int = 1  # strategies measured at the same time, on one thread each
    deadline: float = math.inf  # of time.monotonic(): no strategy is begun after it

    def __post_init__(self):
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}: at least 1 is needed")
        if self.workers > 1 and torch.device(self.device).type != "cpu":
            raise InputError(f"workers is {self.workers}: a GPU measures one strategy at a time")
        for name in ("count", "final_count", "validation"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} is {getattr(self, name)}: at least 2 images are needed")
        samplers.evaluations(self.sampler, self.steps)

    def facts(self, family):
        """What the folder's measurements depend on; the size of the search is none of it."""
        names = ("data", "sampler", "steps", "count", "final_count", "validation", "quality", "features", "unit")
        networks = dict(zip(family.names, family.fingerprints))
        facts = {"networks": networks, "seed": self.search.seed, **{name: getattr(self, name) for name in names}}
        return facts if self.clip == "every" else facts | {"clip": self.clip}  # which older folders do not know


def study(plan):
    """Carry out a Plan, or go on where it stopped. Returns the report, a dict, which it also leaves in the folder.

    Raises InputError: the folder was made by another plan; latents, of which only the proxy can be measured; a search
    that cannot be. OutOfTime: what was measured until then is kept.
    """
    family = family_of(plan.run, plan.unit, plan.device)
    size = family.shape[1]
    images = load_images(plan.data, "train", size)
    if images.is_latent and plan.quality != "proxy":
        raise InputError(f"data {plan.data} holds latents, which have no Fréchet distance here: use --quality proxy")
    checkpoint.claim(plan.folder, plan.facts(family))
    family, losses, table_seconds = _table(plan, family)
    logarithms = np.log(losses)

    def proxy(indices):
        return logarithms[list(indices), range(plan.steps)].sum()

    def cost(indices):
        return family.cost(plan.sampler, indices)

    def draw(indices, count, seed):
        strategy = Strategy(family.name, family.names, plan.sampler, indices, plan.data)
        return _draw(family, strategy, count, seed, plan.clip)

    def measure(count, seed):
        def measured(indices):
            if time.monotonic() >= plan.deadline:
                known = len(tried.known)
                raise OutOfTime(f"after {known} strategies of the search in {plan.folder}, which are kept")
            return distance(draw(indices, count, seed))

        return proxy if plan.quality == "proxy" else measured

    distance = None if plan.quality == "proxy" else _distance_to(images, plan)
    tried = Evaluations(measure(plan.count, plan.search.seed), cost, plan.folder / "evaluations.jsonl", plan.workers)
    step_costs = np.outer(family.costs, samplers.evaluations(plan.sampler, plan.steps))
    room = max(0, plan.search.population - len(family.names)) // 2
    start = _spread(proxy_optima(logarithms, step_costs)[1:-1], room)
    found = _spread(front(search(tried, len(family.names), plan.steps, plan.search, start=start, progress=True)), 8)

    groups = {"uniform": {name: (index,) * plan.steps for index, name in enumerate(family.names)}}
    groups |= {"random": _random(family, plan), "by hand": _by_hand(family, plan.steps)}
    groups["found"] = {f"found {i + 1}": e.indices for i, e in enumerate(found) if len(set(e.indices)) > 1}
    final = Evaluations(
        measure(plan.final_count, plan.search.seed + 1), cost, plan.folder / "final.jsonl", plan.workers
    )
    named = [(group, name, indices) for group, items in groups.items() for name, indices in items.items()]
    compared = [indices for _, _, indices in named]
    rows = [
        {"group": group, "strategy": name, **asdict(measured), "search_quality": searched.quality}
        for (group, name, _), measured, searched in zip(named, final.each(compared), tried.each(compared))
    ]
    for name, indices in groups["found"].items():
        strategy = Strategy(family.name, family.names, plan.sampler, indices, plan.data, family.fingerprints)
        strategy.save(plan.folder / "strategies" / f"{name.replace(' ', '-')}.json")
    every = tried.all()
    proxies = {"logarithms": logarithms, "losses": losses}
    seconds = {"training": _training_seconds(plan.run), "table": table_seconds}
    report = {
        **plan.facts(family),
        "family": family.name,
        "names": family.names,
        "costs": family.costs,
        "dearest": cost((0,) * plan.steps),
        "times": (_times(plan, family) / family.schedule.last).tolist(),
        "losses": losses.tolist(),
        "rank_correlation": {name: _correlation(table, every) for name, table in proxies.items()},
        "tried": [asdict(e) | {"proxy": proxy(e.indices)} for e in every],
        "seconds": seconds | {"search": tried.seconds, "comparison": final.seconds},
        "torch": torch.__version__,
        "device": str(plan.device),
        "rows": sorted(rows, key=lambda row: -row["cost"]),
    }
    write_report(plan.folder, report)
    if not images.is_latent:
        _save_samples(plan, images, report, draw)
    return report


def _training_seconds(run):
    files = sorted(Path(run).glob("**/checkpoints/step-*/state.json"))
    latest = {file.parents[2]: json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files}
    return sum(latest.values())


def _times(plan, family):
    return samplers.time_grid(family.schedule, plan.steps, samplers.SAMPLERS[plan.sampler][1])


def _table(plan, family):
    """(the family with the costs that the folder remembers, losses (networks, steps), seconds), measured once."""
    file = plan.folder / "table.json"
    if not file.exists():
        start = time.perf_counter()
        held_out = load_images(plan.data, "test", family.shape[1], limit=plan.validation).to(plan.device)
        x, y = batch(held_out, torch.arange(len(held_out)))
        y = y if family.networks[0].config.num_classes else None
        with _autocast(family):
            losses = stepaware.loss_table(
                family, x, plan.sampler, plan.steps, y=y, seed=plan.search.seed, progress=True
            )
        seconds = time.perf_counter() - start
        write_json(file, {"names": family.names, "costs": family.costs, "losses": losses.tolist(), "seconds": seconds})
    known = json.loads(file.read_text(encoding="utf-8"))
    return replace(family, costs=tuple(known["costs"])), np.array(known["losses"]), known["seconds"]


def _distance_to(images, plan):
    """uint8 samples -> their Fréchet distance to the images."""
    features = load_features(plan.features, plan.device)
    real = evaluate.summarize(images.images, features, images.source, cache=cache_folder(), progress=True)

    def distance(drawn):
        mine = evaluate.summarize(drawn, features, "the generated set")
        gaussians = (mine.mean, mine.covariance, real.mean, real.covariance)
        return evaluate.frechet_distance(*(tensor.to(features.device) for tensor in gaussians))

    return distance


def _draw(family, strategy, count, seed, clip):
    """uint8 samples; every strategy gets the same noise and labels."""
    classes = family.networks[0].config.num_classes
    labels = torch.arange(count) % classes if classes else None
    with _autocast(family):
        images = stepaware.sample(family, strategy, count, seed=seed, y=labels, clip=clip, batch_size=256)
    return to_uint8(images).cpu()


def _autocast(family):
    """Networks run in the precision that they were trained in."""
    device = next(family.networks[0].parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=amp_of(device) == "bf16")


def _correlation(table, evaluations):
    """Spearman's ρ between the sum of a strategy's entries of `table` and its quality."""
    sums = [table[list(e.indices), range(len(e.indices))].sum() for e in evaluations]
    return rank_correlation(sums, [e.quality for e in evaluations])


def _spread(items, count):
    """At most `count` of `items`, evenly spread, with both ends."""
    places = np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)
    return [items[place] for place in places]


def _random(family, plan):
    random = np.random.default_rng([plan.search.seed, 1])
    return {f"random {i + 1}": tuple(random.integers(len(family.names), size=plan.steps).tolist()) for i in range(4)}


def _by_hand(family, steps):
    """The whole family in turn, in equal shares: the costliest network at low noise, or at high noise."""
    falling = tuple((np.arange(steps) * len(family.names) // steps).tolist())
    return {"costly last": falling[::-1], "costly first": falling}


def _save_samples(plan, images, report, draw):
    by_group = {group: [row for row in report["rows"] if row["group"] == group] for group in ("uniform", "found")}
    shown = _spread(by_group["uniform"], 4) + _spread(by_group["found"], 4)
    drawn = [
        (f"{row['strategy']}, {row['cost'] / report['dearest']:.0%}", draw(row["indices"], SHOWN, plan.search.seed + 1))
        for row in sorted(shown, key=lambda row: -row["cost"])
    ]
    real = images.images[:: max(1, len(images) // SHOWN)][:SHOWN]
    pictures.save_grid(plan.folder / "samples.png", [("real", real), *drawn])
