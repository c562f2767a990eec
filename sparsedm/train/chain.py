"""A chain of students: train in stages of different sparsity, each stage in its own folder, each resumable.

    stage 0   trains a dense network; left out if the chain starts from a trained one
    stage k   trains a new, sparser student with a teacher; it starts from the (EMA) weights of the previous one

(SparseDM, arXiv 2404.10445.) A stage marked `inplace` makes no new student: the same network, optimizer and EMA weights
continue under the new pattern. All stages draw from one stream of batches and noise. So all chains with the same start
and the same number of steps see the same images.
"""

import contextlib
import copy
import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sparsedm.copying import copied
from sparsedm.diffusion import check_discrete
from sparsedm.errors import InputError, TooLittleMemory, check_memory
from sparsedm.files import checksum
from sparsedm.kernels.pattern import Pattern
from sparsedm.memory import kept_per_image, most_kept_per_image
from sparsedm.models.slimmable import WidestTeacher, check_supernet
from sparsedm.sparsity import masked_layers, set_masking, sparsify
from sparsedm.train import distributed, run_folder
from sparsedm.train.loop import MAY_CHANGE, TrainOptions, TrainResult, check_data, train
from sparsedm.train.metrics import Reference, read_metrics, usual_speed
from sparsedm.train.stages import Stage
from sparsedm.train.step import Loss, Student

log = logging.getLogger(__name__)
MOST_STAGES = 100  # their folders are numbered with two digits


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Consecutive stages with inplace=True share one network object. Their earlier results therefore hold the weights
    after the last of them.
    """

    stage: Stage
    folder: Path
    result: TrainResult

    @property
    def model(self):
        return self.result.model

    @property
    def ema(self):
        return self.result.ema

    @property
    def metrics(self):
        return read_metrics(self.folder)


@dataclass(frozen=True)
class Start:
    """Where a chain begins. Its networks are not changed. ema None: nothing was trained yet.

    speed: training speed (images per second) of the dense network that the chain starts from. It is only logged. After
    a dense stage, that stage's speed replaces it.
    build: () -> a freshly initialised network, for stages with init="random".
    """

    model: nn.Module
    ema: nn.Module | None = None
    speed: float | None = None
    build: Callable | None = None


def run_chain(
    start,
    stages,
    images,
    schedule,
    options,
    folder,
    *,
    where=None,
    validation=None,
    record=None,
    deadline=math.inf,
    device="cpu",
    progress=True,
):
    """Train the stages one after another, or continue the run in `folder`. Finished stages are loaded, not repeated.

    start: a Start. options: TrainOptions; steps and lr come from the stages. where: which layers, see `sparsify`.
    Other arguments: see `train`.
    Returns a list of StageResult. Raises: InputError, TrainingDiverged, Interrupted, OutOfTime.
    """
    folder = Path(os.path.expanduser(folder))
    options = replace(options, steps=sum(stage.steps for stage in stages))
    check_chain(start, stages, images, schedule, options, where, validation, device)
    layers = where if where is None or isinstance(where, str | list) else "a predicate"
    facts = {"stages": [asdict(stage) for stage in stages], "where": layers, "options": asdict(options)}
    settings = {"validation": validation, "deadline": deadline, "device": device, "progress": progress}
    with contextlib.ExitStack() as stack:

        def claim():
            stack.enter_context(run_folder.folder_lock(folder))
            return _claim(folder, stages, facts | _weights_of(start) | (record or {}), options)

        settings["record"] = distributed.first(claim) or {}
        return _train(start, stages, images, schedule, options, folder, where, settings)


def _claim(folder, stages, facts, options):
    """Claim the folder of a chain. Returns what every stage records of its run.

    While no stage has a checkpoint, other options may replace the stored ones. Nothing is removed.
    """
    inside = sorted(path for path in folder.glob("[0-9][0-9]-*") if (path / "options.json").exists() or _saved(path))
    runs = [path for path in inside if run_folder.has_started(path) and not _saved(path)]  # chains of their own
    others = [path.name for path in inside if path in runs or path not in _folders(stages, folder)]
    lost = not (folder / "options.json").exists()
    if others and (lost or not any(map(_saved, inside))):
        raise InputError(f"{folder} holds {others[0]}, which is no stage of this run: choose another folder")
    number = run_folder.number(inside[0] if inside and lost else folder)
    record = {"run": number} if number else {}  # an older run has none
    *earlier, last = (f"stages.{place}.steps" for place in range(len(stages)))
    may_grow = dict.fromkeys(("options.steps", last), options.fixed_length)
    may_grow |= dict.fromkeys(earlier, "only the last stage may become longer: --split says how the steps divide")
    started = run_folder.has_started(folder)
    same = False  # the network, wherever it lies now
    if started and not lost:
        stored = run_folder.stored_options(folder)
        changed = stored.get("start", facts.get("start")) != facts.get("start")  # older ones do not say
        same = "start" in stored and not changed
        if changed and stored.get("init") == facts.get("init"):
            advice = "start from the network as it was, or choose another folder"
            raise InputError(f"the dense network that {folder} starts and learns from was changed since: {advice}")
    free = (*MAY_CHANGE, "start", *(["init"] if same else []))
    run_folder.claim(folder, record | facts, free, [TrainOptions, Stage], may_grow, started)
    return record


def _weights_of(start):
    """{"start": checksum} of the EMA weights that a run starts with, its first teacher; {} if it has none."""
    if start.ema is None:
        return {}
    sums = [f"{name} {checksum(value.detach().cpu())}" for name, value in start.ema.state_dict().items()]
    return {"start": hashlib.sha256("\n".join(sums).encode()).hexdigest()}


def _saved(folder):
    return run_folder.latest(folder) is not None


def _train(start, stages, images, schedule, options, folder, where, settings):
    """Train or load the stages one after another. settings: of `train`."""
    record = settings.pop("record", {})
    ema = None if start.ema is None else copied(start.ema)  # teachers are frozen, and moved to the device
    results, dense, first_step = [], Reference(ema, start.speed), 0
    for path, stage in zip(_folders(stages, folder), stages):
        student = _student(start, stage, results, options.seed)
        previous = results[-1].ema if results else ema
        teachers = {"dense": dense.model, "previous": previous, "widest": WidestTeacher(student.model)}
        _set_pattern(student, stage, where)
        result = train(
            student,
            images,
            Loss(schedule, teachers.get(stage.learns_from), stage.w_kd, stage.w_noise),
            replace(options, steps=stage.steps, lr=stage.lr or options.lr),
            path,
            reference=dense,
            first_step=first_step,
            record={"stage": asdict(stage), **record},
            **settings,
        )
        results.append(StageResult(stage, path, result))
        speed = usual_speed(path)
        if speed and settings["progress"] and distributed.is_main_process():
            share = f", {speed / dense.speed:.2f} times the dense network's" if dense.speed else ""
            log.info("%s: %s images/s in training%s", path.name, f"{speed:,.0f}", share)
        if Pattern.parse(stage.pattern) is None:
            dense = Reference(result.ema, speed or dense.speed)
        first_step += stage.steps
    return results


def _student(start, stage, results, seed):
    """The Student of a stage, from the results of the stages before it."""
    model, average = (results[-1].model, results[-1].ema) if results else (start.model, start.ema)
    continued = stage.inplace and results
    network = model if continued else copied(model)
    if stage.init == "random":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed + 1)  # not the dense network's initial weights
            network = start.build()
    average = copied(network if average is None else average)
    return Student(network, average, results[-1].result.checkpoint if continued else None)


def check_chain(start, stages, images, schedule, options, where=None, validation=None, device="cpu"):
    """Raises InputError if a later stage would fail; TooLittleMemory only if nothing else is wrong.

    images None: the check of the images is skipped.
    """
    check_stages(stages, start.ema, start.build)
    if getattr(getattr(start.model, "config", None), "learn_sigma", False):
        check_discrete(schedule)
    if images is not None:
        check_data(start.model, images, validation)
    shares = distributed.shares(options.batch_size, options.accumulate)
    if any(stage.learns_from == "widest" for stage in stages) or getattr(
        getattr(start.model, "config", None), "passes", 0
    ):
        check_supernet(start.model, options.batch_size)
    network = copied(start.model)
    for pattern in dict.fromkeys(stage.pattern for stage in stages):
        sparsify(network, pattern, where)
    check_batch(start.model, options, len(shares) * distributed.world(), device)


def check_batch(model, options, parts, device="cpu"):
    """Raise TooLittleMemory if a batch, of which a part is computed at a time, cannot fit in the device's memory.

    Counts the images and their noise, and what autograd keeps of a part.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    device, numbers = torch.device(device), options.batch_size * config.channels * config.image_size**2
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None

    def check(kept_per_image):
        kept = kept_per_image * options.batch_size // parts // (2 if options.amp else 1)
        check_memory(8 * (numbers + numbers // parts) + kept, f"--batch-size {options.batch_size}", there)

    try:
        check(most_kept_per_image(model))  # measuring may take seconds
    except TooLittleMemory:
        check(kept_per_image(model))


def plan(stages, options, model, folder, where=None):
    """What `run_chain` would do: one dict per stage. Trains and writes nothing; reads only the folder's step numbers.

    memory_bytes counts weights, gradients, the optimizer's moments, EMA weights and teacher, but no activations.
    """
    rows = []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for path, stage in zip(_folders(stages, folder), stages):
        student = sparsify(copy.deepcopy(model), stage.pattern, where)
        dropped = sum(layer.weight.numel() * (1 - layer.pattern.density) for _, layer in masked_layers(student))
        reached = run_folder.latest(path)
        rows.append(
            {
                **asdict(stage),
                "lr": stage.lr or options.lr,
                "images": stage.steps * options.batch_size,
                "parameters": parameters,
                "parameters_kept": parameters - round(dropped),
                "memory_bytes": weights * (5 + (stage.learns_from in ("dense", "previous"))),
                "checkpoint_bytes": weights * 4,
                "folder": str(path),
                "steps_done": int(reached.name.removeprefix("step-")) if reached else 0,
            }
        )
    return rows


def _folders(stages, folder):
    return [Path(folder) / f"{index:02d}-{stage.name}" for index, stage in enumerate(stages)]


def check_stages(stages, ema, build):
    """Raise InputError, before anything is trained, if a stage lacks its teacher or its start."""
    if not stages:
        raise InputError("a chain needs at least one stage")
    if len(stages) > MOST_STAGES:
        raise InputError(f"a chain of {len(stages)} stages is too long: at most {MOST_STAGES} are numbered")
    dense = ema is not None and not masked_layers(ema)
    for index, stage in enumerate(stages):
        teacher = stage.learns_from
        if (teacher == "dense" and not dense) or (teacher == "previous" and not index and ema is None):
            raise InputError(
                f"stage {stage.name} needs a {teacher} teacher, but no network was trained before it: "
                "begin with a dense stage or from a dense checkpoint"
            )
        if stage.init == "random" and build is None:
            raise InputError(f"stage {stage.name} starts at random: Start needs build=")
        dense = dense or Pattern.parse(stage.pattern) is None


def _set_pattern(student, stage, where):
    for network in (student.model, student.ema):
        sparsify(network, stage.pattern, where)
    if masked_layers(student.model):
        set_masking(student.model, decay=stage.decay, dropped=stage.dropped, frozen=stage.frozen_mask)
        # a frozen EMA mask is the EMA weights' own until the first step, then a copy of the student's
        set_masking(student.ema, frozen=stage.frozen_mask)
