"""A chain of students: train in stages of different sparsity, each stage in its own folder, each resumable.

    stage 0   dense training, or straight from a dense network and its average
    stage k   a separate student, started from the previous student's network and average, sparser, with a teacher

(SparseDM, arXiv 2404.10445.) A stage marked `inplace` is not a separate student: the same network, optimizer and
average go on under the new pattern. All stages draw from one stream of batches and noise, so every way to spend a
budget of steps from the same start sees the same images.
"""

import copy
import itertools
import logging
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.sparsity import masked_layers, set_masking, sparsify
from sparsedm.train import checkpoint, distributed
from sparsedm.train.loop import MAY_CHANGE, TrainResult, check_data, train
from sparsedm.train.metrics import read_metrics, usual_speed
from sparsedm.train.supernet import WidestTeacher, check_supernet

log = logging.getLogger(__name__)

TEACHERS = ("none", "dense", "previous", "widest")
INITS = ("previous", "random")


@dataclass(frozen=True)
class Stage:
    """One stretch of training under one pattern."""

    name: str  # of the folder, after its number
    steps: int  # 0: take the networks as they come
    pattern: str = "dense"  # or N:M
    lr: float | None = None  # None: that of the options
    # "dense": the average of the last dense stage, or what the chain began from; "previous": of the previous stage;
    # "widest": the student itself, if it is slimmable, at full width (supernet.py)
    teacher: str = "none"
    w_kd: float = 0.0  # weight of the transfer loss
    w_noise: float = 1.0  # weight of the noise-prediction loss; 0: learns from the teacher alone
    decay: float = 0.0  # of pruned weights, SR-STE
    dropped: float = 1.0  # multiplier of the gradient at pruned weights; 1: straight-through, 0: they stay as they are
    frozen_mask: bool = False  # chosen once, at the start of the stage
    inplace: bool = False  # go on with the previous stage's network, optimizer and average instead of a new student
    init: str = "previous"  # or "random": a new network; the average still comes from the previous stage

    def __post_init__(self):
        Pattern.parse(self.pattern)
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise InputError(f"stage name {self.name!r} must be letters, digits and . + - _ only")
        for name, allowed in (("teacher", TEACHERS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"stage {self.name}: {name}={getattr(self, name)!r} must be one of {', '.join(allowed)}"
                )
        for name in ("steps", "w_kd", "w_noise", "decay", "dropped"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"stage {self.name}: {name}={getattr(self, name)} must be 0 or more, and finite")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"stage {self.name}: lr={self.lr} must be more than 0, and finite")
        if self.w_kd and self.teacher == "none":
            raise InputError(f"stage {self.name}: w_kd={self.w_kd} needs a teacher")
        if self.inplace and self.init == "random":
            raise InputError(f"stage {self.name}: a stage in place cannot start at random")

    @property
    def learns_from(self):
        return self.teacher if self.w_kd else "none"


@dataclass(frozen=True)
class StageResult:
    """A finished stage. Consecutive stages in place share one network, which has then seen the last of them."""

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


def run_chain(
    model,
    stages,
    images,
    schedule,
    options,
    folder,
    *,
    ema=None,
    dense_speed=None,
    where=None,
    build=None,
    validation=None,
    record=None,
    deadline=math.inf,
    device="cpu",
    progress=True,
):
    """Train the stages one after another, or go on where `folder` stopped; finished stages are loaded, not repeated.

    model, ema: where the chain begins; neither is changed. ema None means that nothing was trained yet.
    options: TrainOptions; steps and lr come from the stages. where: which layers, see `sparsify`.
    dense_speed: images per second that the training of `ema` made, for the log; from the first dense stage on, its own.
    build: () -> a freshly initialised network, for stages with init="random". The rest: see `train`.
    Returns a list of StageResult. Raises: InputError, TrainingDiverged, Interrupted, OutOfTime.
    """
    folder = Path(folder)
    options = replace(options, steps=sum(stage.steps for stage in stages))
    check_stages(stages, ema, build)
    check_data(model, images, validation)
    if any(stage.learns_from == "widest" for stage in stages):
        check_supernet(model, options.batch_size)
    layers = where if where is None or isinstance(where, str | list) else "a predicate"
    facts = {"stages": [asdict(stage) for stage in stages], "where": layers, "options": asdict(options)}
    if distributed.first():
        checkpoint.claim(folder, {**facts, **(record or {})}, MAY_CHANGE)
    distributed.wait()

    dense = previous = ema
    results, first_step = [], 0
    for path, stage in zip(_folders(stages, folder), stages):
        continued = stage.inplace and results
        student = model if continued else copy.deepcopy(model)
        if stage.init == "random":
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(options.seed + 1)  # not what the dense network itself began from
                student = build()
        average = copy.deepcopy(student if previous is None else previous)
        teachers = {"none": None, "dense": dense, "previous": previous, "widest": WidestTeacher(student)}
        _set_pattern(student, average, stage, where)
        result = train(
            student,
            images,
            schedule,
            replace(options, steps=stage.steps, lr=stage.lr or options.lr),
            path,
            ema=average,
            teacher=teachers[stage.learns_from],
            w_kd=stage.w_kd,
            w_noise=stage.w_noise,
            dense=dense,
            dense_speed=dense_speed,
            validation=validation,
            first_step=first_step,
            continue_from=results[-1].result.checkpoint if continued else None,
            record={"stage": asdict(stage)},
            deadline=deadline,
            device=device,
            progress=progress,
        )
        results.append(StageResult(stage, path, result))
        model, previous, speed = result.model, result.ema, usual_speed(path)
        if speed and progress and distributed.first():
            share = f", {speed / dense_speed:.2f} times the dense network's" if dense_speed else ""
            log.info("%s: %s images/s in training%s", path.name, f"{speed:,.0f}", share)
        if Pattern.parse(stage.pattern) is None:
            dense, dense_speed = previous, speed or dense_speed
        first_step += stage.steps
    return results


def parse_chain(text, steps, split=None, **settings):
    """'dense,3:4,2:4' and a total of steps -> list of Stage.

    split: the stages' shares of the steps, as numbers or as text ('2,1,1'). None: a dense first stage gets half, the
    others the same each. settings: of the sparse stages, by default w_kd=0.1 with teacher="dense" and decay=2e-4.
    Raises: InputError for an unknown pattern, a split that does not fit, or fewer steps than stages.
    """
    patterns = [part.strip() for part in text.split(",")]
    if split is None:
        sparse = len(patterns) - 1
        split = [max(sparse, 1)] + [1] * sparse if patterns[0] == "dense" else [1] * len(patterns)
    try:
        split = [float(share) for share in (split.split(",") if isinstance(split, str) else split)]
    except ValueError:
        raise InputError(f"split {split!r} must be numbers, for example 2,1,1") from None
    settings = {"teacher": "dense", "w_kd": 0.1, "decay": 2e-4, **settings}
    return [
        Stage(pattern.replace(":", "of"), share, pattern, **(settings if Pattern.parse(pattern) else {}))
        for pattern, share in zip(patterns, divide(steps, split, len(patterns)))
    ]


def distilled(stages, weight):
    """The stages; with a weight, a slimmable network learns from its widest self in the dense ones."""
    if weight is None:
        return stages
    if not any(stage.pattern == "dense" for stage in stages):
        raise InputError("--distill is for dense stages, and there is none: sparse ones learn from the dense network")
    return [replace(s, teacher="widest", w_kd=weight) if s.pattern == "dense" else s for s in stages]


def divide(steps, shares, stages):
    """Divide steps among so many stages in proportion to shares: whole numbers, each at least 1, with the same sum."""
    if len(shares) != stages or not all(0 < share < float("inf") for share in shares):
        raise InputError(f"split {shares} must be {stages} positive numbers, one per stage")
    total = sum(shares)
    ends = [0] + [round(steps * end / total) for end in itertools.accumulate(shares)]
    parts = [end - start for start, end in itertools.pairwise(ends)]
    if min(parts) < 1:
        raise InputError(f"{steps} steps are too few for {stages} stages split as {shares}: each needs at least one")
    return parts


def plan(stages, options, model, folder, where=None):
    """What `run_chain` would do, as one dict per stage; trains, writes and reads nothing but the folder's step numbers.

    memory_bytes counts weights, gradients, the optimizer's moments, the average and the teacher, not the activations.
    """
    rows = []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for path, stage in zip(_folders(stages, folder), stages):
        student = sparsify(copy.deepcopy(model), stage.pattern, where)
        dropped = sum(layer.weight.numel() * (1 - layer.pattern.density) for _, layer in masked_layers(student))
        reached = checkpoint.latest(path)
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
    """Refuse before anything is trained what could not be trained to the end."""
    if not stages:
        raise InputError("a chain needs at least one stage")
    dense = ema is not None and not masked_layers(ema)
    for index, stage in enumerate(stages):
        teacher = stage.learns_from
        if (teacher == "dense" and not dense) or (teacher == "previous" and not index and ema is None):
            raise InputError(
                f"stage {stage.name} needs a {teacher} teacher, and nothing that could be one was trained: "
                "begin with a dense stage or from a dense checkpoint"
            )
        if stage.init == "random" and build is None:
            raise InputError(f"stage {stage.name} starts at random, which needs a way to build a network")
        dense = dense or Pattern.parse(stage.pattern) is None


def _set_pattern(student, average, stage, where):
    for network in (student, average):
        sparsify(network, stage.pattern, where)
    set_masking(student, decay=stage.decay, dropped=stage.dropped, frozen=stage.frozen_mask)
    set_masking(average, frozen=stage.frozen_mask)  # its own mask until the first step, then it follows the student's
