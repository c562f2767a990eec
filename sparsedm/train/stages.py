"""The stages of a chain: given one by one, as a chain of patterns, or as a method by name.

A method is a row of settings for the training loop. All methods start from the same dense checkpoint (weights and EMA
weights) and make the same number of steps on the same batches.
"""

import itertools
import math
import re
from dataclasses import dataclass, field, replace

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern

TEACHERS = ("none", "dense", "previous", "widest")
INITS = ("previous", "random")


@dataclass(frozen=True)
class Stage:
    """A part of training with one pattern."""

    name: str  # of the folder, after its number
    steps: int  # 0: no training
    pattern: str = "dense"  # or N:M
    lr: float | None = None  # None: TrainOptions.lr
    # "dense": the EMA weights of the last dense stage, or of the start; "previous": of the previous stage;
    # "widest": the student itself at full width, if it is slimmable
    teacher: str = "none"
    w_kd: float = 0.0  # weight of the transfer loss
    w_noise: float = 1.0  # weight of the noise-prediction loss; 0: learn only from the teacher
    decay: float = 0.0  # of pruned weights, SR-STE
    # factor of the gradient at pruned weights; 1: straight-through; 0: only weight decay and momentum change them
    dropped: float = 1.0
    frozen_mask: bool = False  # selected once, at the start of the stage
    inplace: bool = False  # continue the previous stage's network, optimizer and EMA weights: no new student
    init: str = "previous"  # or "random": new weights; the EMA weights still come from the previous stage

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


def named_stage(pattern, steps, **settings):
    """A Stage named after its pattern: 2of4 for 2:4."""
    return Stage(pattern.replace(":", "of"), steps, pattern, **settings)


def parse_chain(text, steps, split=None, **settings):
    """'dense,3:4,2:4' and a total of steps -> list of Stage.

    split: the stages' shares of the steps, as numbers or as text ('2,1,1'). None: a dense first stage gets half, the
    other stages equal shares. settings: fields of the sparse stages; default: w_kd=0.1, teacher="dense", decay=2e-4.
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
    settings = SR_STE | TRANSFER | settings
    return [
        named_stage(pattern, share, **(settings if Pattern.parse(pattern) else {}))
        for pattern, share in zip(patterns, divide(steps, split, len(patterns)))
    ]


def distilled(stages, weight):
    """The stages, changed if `weight` is not None: in dense stages a slimmable network learns from its full width.

    Raises: InputError if no stage is dense.
    """
    if weight is None:
        return stages
    if not any(stage.pattern == "dense" for stage in stages):
        raise InputError("--distill is for dense stages, but there is none: sparse stages learn from the dense network")
    return [replace(s, teacher="widest", w_kd=weight) if s.pattern == "dense" else s for s in stages]


def divide(steps, shares, stages):
    """Divide `steps` among `stages` stages in proportion to `shares`: whole numbers of at least 1, with sum `steps`.

    Raises: InputError if the shares are not positive and finite, one per stage, or the steps are too few.
    """
    if len(shares) != stages or not all(0 < share < math.inf for share in shares):
        raise InputError(f"split {shares} must be {stages} positive numbers, one per stage")
    total = sum(shares)
    if total == math.inf:
        raise InputError(f"split {shares} must be numbers whose sum is finite")
    ends = [0] + [round(steps * end / total) for end in itertools.accumulate(shares)]
    parts = [end - start for start, end in itertools.pairwise(ends)]
    if min(parts) < 1:
        raise InputError(f"{steps} steps are too few for {stages} stages split as {shares}: each needs at least one")
    return parts


# ---- methods ---------------------------------------------------------------------------------------------------------

LADDER = ("31:32", "15:16", "7:8", "3:4", "2:4", "1:4", "1:8", "1:16", "1:32")  # the chain of SparseDM's experiments
SR_STE = {"decay": 2e-4}  # arXiv 2102.04010
TRANSFER = {"teacher": "dense", "w_kd": 0.1}  # arXiv 2404.10445; the weight of its runs


@dataclass(frozen=True)
class Method:
    """settings: fields of every Stage. progressive: one stage for each pattern of the ladder, not only the last."""

    summary: str
    settings: dict = field(default_factory=dict)
    progressive: bool = False
    sparse: bool = True
    trains: bool = True


METHODS = {
    "dense": Method("keep training the dense network: the control", sparse=False),
    "oneshot": Method("prune by magnitude and do not train", trains=False),
    "asp": Method(
        "fix the mask once and train the kept weights only (NVIDIA ASP)", {"frozen_mask": True, "dropped": 0.0}
    ),
    "ste": Method("select masks anew as weights change, straight-through gradient"),
    "sr-ste": Method("ste, and pruned weights decay towards zero", SR_STE),
    "kd": Method("ste, and the dense network teaches", TRANSFER),
    "sr-ste+kd": Method("sr-ste, and the dense network teaches", SR_STE | TRANSFER),
    "chain": Method("a ladder of students, each sparser than the last", SR_STE | TRANSFER, progressive=True),
    "inplace": Method("one network that grows sparser", SR_STE | TRANSFER | {"inplace": True}, progressive=True),
    "random-init": Method("ste from random weights, as the paper's code ran its STE baseline", {"init": "random"}),
    "asp-random": Method(
        "asp from random weights, as the loaders of the paper's code start it",
        {"init": "random", "frozen_mask": True, "dropped": 0.0},
    ),
}


def method_stages(name, steps, pattern="2:4", ladder=None):
    """The stages of a method for a total number of steps.

    pattern: N:M of the last stage. The method "dense" ignores it; "oneshot" makes no steps.
    ladder: N:M of the stages before the last, for progressive methods; None: all patterns of LADDER that are denser.
    Raises: InputError for an unknown method or pattern, a dense pattern, or fewer steps than stages.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    method, target = METHODS[name], Pattern.parse(pattern)
    if target is None:
        raise InputError(f"method {name} needs an N:M pattern, not {pattern!r}")
    if not method.sparse:
        return [Stage(name, steps)]
    if not method.trains:
        return [Stage(name, 0, str(target), **method.settings)]
    if not method.progressive:
        return [Stage(name, steps, str(target), **method.settings)]
    if ladder is None:
        ladder = [rung for rung in LADDER if Pattern.parse(rung).density > target.density]
    rungs = [*ladder, str(target)]
    return [
        named_stage(rung, share, **method.settings)
        for rung, share in zip(rungs, divide(steps, [1] * len(rungs), len(rungs)))
    ]
