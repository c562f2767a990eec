"""The runs of one experiment in one folder: each is trained, measured, and written into results.csv at once.

All runs of a seed start from one dense network and see the same images in the same order.
"""

import bisect
import copy
import logging
import math
import re
import resource
import time
from dataclasses import asdict, fields, replace
from typing import NamedTuple

import torch
from torch import nn

from bench.experiments import activations, channels, measures
from bench.experiments.plans import ACTIVATIONS, CALIBRATED, PRUNED, SMALL
from bench.experiments.report import DISTANCE, FLIPS
from bench.results import STAMPED, read_experiment, stamp, write_experiment
from sparsedm import diffusion, evaluate
from sparsedm.commands.options import dense_start
from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import cache_folder
from sparsedm.inspection import inspect
from sparsedm.models import build_model, model_config
from sparsedm.models.ddpm import DDPMConfig
from sparsedm.plots import save_grid
from sparsedm.sparsity import masked_layers, sparsify
from sparsedm.train import run_folder
from sparsedm.train.chain import StageResult, Start, run_chain
from sparsedm.train.data import batch, batch_indices, load_images
from sparsedm.train.image_files import CROPS
from sparsedm.train.loop import amp_of, check_data, train
from sparsedm.train.metrics import read_metrics, usual_speed
from sparsedm.train.published import original_crop, unrecorded_crop
from sparsedm.train.stages import Stage
from sparsedm.train.step import Loss, Student

log = logging.getLogger(__name__)

POINTS = 12  # least number of validation losses over a run
WATCHED = 1024  # images of the validation loss while a run trains; at its end all are used
CALIBRATION = 16  # batches whose inputs choose a calibrated mask
SHOWN = 64  # images in a run's picture
ROUNDING = 1e-4  # relative, of the loss of a given network: on another CPU it has other last digits
BASE = "validation loss of the start"  # of the dense network that the runs of a seed begin with
FREE = ("seeds", "threads", "summary")  # names of options that may differ among the runs of a study
LOGGED = {  # a key of a log record: its name in the results
    "validation_loss": "validation over training",
    "flip_rate": "flip rate",
    "density": "density",
    "distance": "distance over training",
}


def images_for(scale, crop, resize):
    """(training images, test images, configuration of the network for them).

    Raises: InputError for images of another size, unless the scale or the command line allows resizing.
    """
    config = model_config(scale.model, **scale.overrides)
    crop = crop or original_crop(config)
    parts = []
    for split, limit in (("train", None), ("test", scale.validation)):
        found = load_images(scale.data, split, config.image_size, limit=limit, crop=crop)
        held = next(iter(found.sizes), None)
        may = {None, *(f"{side}x{side}" for side in (config.image_size, scale.native))}
        may |= {"{}x{}".format(*CROPS[crop][0])} if CROPS[crop] else set()
        if held not in may and not resize:
            raise InputError(
                f"{scale.data} holds images of {held} pixels and the network takes "
                f"{config.image_size}x{config.image_size}: choose another --model, or say --resize"
            )
        parts.append(found)
    shape = parts[0].images.shape[1:]
    evaluate.check_sets(shape, scale.samples, shape, len(parts[0]))
    if scale.conditional is not None:
        classes = len(parts[0].class_names) if scale.conditional else 0
        config = replace(config, channels=parts[0].images.shape[1], num_classes=classes)
    check_data(build_model(config, device="meta"), *parts)
    return *parts, config


def folder_of(folder, seed, name):
    return folder / f"seed-{seed}" / re.sub(r"[^\w.=+-]+", "-", name)


class Base(NamedTuple):
    """The dense network that all runs of a seed start from. speed: images per second of its training, if known."""

    model: nn.Module
    ema: nn.Module
    loss: float
    speed: float | None = None


class Work:
    """The runs of one experiment in one folder."""

    def __init__(self, options, scale, folder, deadline=math.inf):
        self.scale, self.folder, self.device, self.deadline = scale, folder, options.device, deadline
        self.init, self.options = options.init, options
        self.amp = amp_of(self.device, scale.options.amp or "auto")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp == "bf16")
        self.labels = {"experiment": options.name, "scale": options.scale, "data": scale.data}
        self.labels["features"] = scale.features[0]
        self.images, self.validation, config = images_for(scale, options.crop, options.resize)
        self.watched = self.validation.every(WATCHED)
        self.config = asdict(config)
        crop = options.crop or original_crop(config)
        cropped = {} if crop == unrecorded_crop(config) else {"crop": crop}
        self.training = {"validation": self.watched, "record": {"data": scale.data} | cropped}
        self.training |= {"deadline": deadline, "device": self.device}
        self.rows = []
        if (folder / "results.csv").exists():
            self.rows = read_experiment(folder / "results.csv", options.name, options.scale)
        if self.rows and not (folder / "options.json").exists():
            rule = "they can be reported (--report-only), and not continued: choose another --out"
            raise InputError(f"{folder} holds joined or copied rows, without the options of their runs: {rule}")
        self.judges = []
        for name in scale.features:
            features, source = load_features(name, self.device), f"{self.images.source} train"
            summary = evaluate.summarize(self.images.images, features, source, cache=cache_folder(), progress=True)
            self.judges.append((features, summary))
        facts = {**self.labels, "settings": asdict(scale), "amp": self.amp, "init": self.init} | cropped
        started = run_folder.holds_work(folder)
        known = started and (folder / "options.json").exists()
        if known and cropped and "crop" not in run_folder.stored_options(folder):
            raise InputError(f"{folder} began before crops were recorded, or with another crop: choose another --out")
        run_folder.claim(folder, facts, free=FREE, started=started)
        self.bases = {}

    def do(self, seed, run):
        """Train and measure one run, unless its rows exist."""
        if any(row["run"] == run.name and row["seed"] == seed for row in self.rows):
            return
        base = self.base(seed)
        before = [row["value"] for row in self.rows if (row["seed"], row["measure"]) == (seed, BASE)]
        if not all(math.isclose(value, base.loss, rel_tol=ROUNDING if self.init else 0) for value in before):
            began = f"another network than --init {self.init}" if self.init else "another dense network, now lost"
            raise InputError(
                f"{self.folder} holds runs of seed {seed} that began from {began}: use another --seed or another --out"
            )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        network, results = self.train(seed, run, base)
        seconds, trained = sum(result.result.seconds for result in results), time.perf_counter()
        images = measures.draw(network, self.scale, seed, self.autocast, self.deadline)
        measured = measures.measure(network, images, self.validation, self.judges, base.ema, self.autocast)
        shown = images[:SHOWN].split(16)
        save_grid(folder_of(self.folder, seed, run.name) / "samples.png", [("", row) for row in shown])
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
        """The Base of a seed: trained here, or from --init."""
        if seed not in self.bases:
            if self.init:
                self.bases = {seed: self._given_base()}
            else:
                torch.manual_seed(seed)
                dense = [Stage("dense", self.scale.base_steps)]
                found = self._chain(seed, "base", Start(self.build()), dense)[-1]
                quick = usual_speed(found.folder)
                self.bases = {seed: Base(found.model, found.ema, found.result.validation_loss, quick)}
        return self.bases[seed]

    def _given_base(self):
        model, ema = (network.to(self.device) for network in dense_start(self.options))
        x, y = batch(self.watched.to(self.device), torch.arange(len(self.watched)))
        with self.autocast:
            y = y if self.config["num_classes"] else None
            loss = diffusion.validation_loss(ema, x, diffusion.schedule_of(ema), y=y)
        return Base(model, ema, loss.item())

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
            folder_of(self.folder, seed, run.name),
            **self.training,
        )
        return StageResult(stage, folder_of(self.folder, seed, run.name), result)

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
            folder_of(self.folder, seed, name),
            **self.training,
            **settings,
        )

    def _options(self, seed, steps):
        options = replace(self.scale.options, steps=steps, seed=seed, amp=self.amp)
        return replace(options, validate_every=max(1, min(options.validate_every, steps // POINTS)))

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
    """`config` narrowed until its dense MACs are nearest to the MACs of `config` at 2:4.

    The number of heads of a transformer and of groups of a U-Net does not change.
    """
    axis, least = ("dim", (config["heads"], 4)) if "dim" in config else ("width", (config["groups"], 2))
    step = math.lcm(*least)
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
