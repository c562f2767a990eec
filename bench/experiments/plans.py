"""What the experiments are: lists of runs, and how much each scale spends on one. Nothing is computed here.

arms                        every method of `train/stages.py`, and a small dense network of the 2:4 one's MACs
ratio                       31:32 ... 1:32 (SparseDM, arXiv 2404.10445, fig. 3a)
fixed-vs-inplace-vs-chain   2:4 from the first step, growing in one network, or over students (fig. 3b)
ablate                      transfer weight, decay, teacher, length of the chain, which layers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.recipes import EXPERIMENTS as SCALES
from sparsedm.train.stages import Stage, method_stages


@dataclass(frozen=True)
class Run:
    """One row of an experiment. where: which layers, as in `sparsify`.

    x: its place on the axis of the experiment, if it has one. small: not from the dense network, but a smaller one of
    its own, trained on as many images in all.
    """

    name: str
    stages: tuple
    group: str = ""
    x: float | None = None
    where: str | None = None
    small: bool = False


@dataclass(frozen=True)
class Experiment:
    summary: str
    runs: Callable  # recipes.Scale -> [Run]
    axis: str = ""  # what x is, where the runs have one
    control: str = "dense"  # the run that the others are shown against


# what answers the question first, for the case that there is no time for all
ARMS = ("dense", "chain", "oneshot", "sr-ste+kd", "inplace", "asp", "kd", "sr-ste", "ste", "random-init")
DENSITIES = ("2:4", "1:4", "3:4", "1:8", "7:8", "1:16", "15:16", "1:32", "31:32")

DEFAULT = "default"  # of `ablate`: 2:4 at once, w_kd 0.1, decay 2e-4, teacher dense, the model's own layers


def _stages(method, scale, pattern="2:4", ladder=None, **changes):
    ladder = scale.ladder if ladder is None else ladder
    return tuple(replace(stage, **changes) for stage in method_stages(method, scale.steps, pattern, ladder))


def _arms(scale):
    runs = [Run(name, _stages(name, scale)) for name in ARMS]
    teacher = Stage("small-dense", scale.base_steps + scale.steps, teacher="dense", w_kd=0.1)
    return [*runs, Run("small-dense", (teacher,), small=True)]


def _ratio(scale):
    runs = [Run("dense", _stages("dense", scale), x=1.0)]
    return runs + [Run(p, _stages("sr-ste+kd", scale, p), x=Pattern.parse(p).density) for p in DENSITIES]


def _progress(scale):
    named = {"dense": "dense", "chain": "chain", "fixed": "sr-ste+kd", "inplace": "inplace"}
    return [Run(name, _stages(method, scale)) for name, method in named.items()]


def _ablate(scale):
    """One setting at a time changed from those of `DEFAULT`, which stands for the middle of every group."""
    rungs = [stage.pattern for stage in method_stages("chain", scale.steps, "2:4", scale.ladder)[:-1]]
    lengths = sorted({len(rungs) // 2, len(rungs)} - {0})
    chains = {n: _stages("chain", scale, ladder=tuple(rungs[len(rungs) - n :])) for n in lengths}
    return [
        Run(DEFAULT, _stages("sr-ste+kd", scale)),
        *(Run(f"w_kd={w:g}", _stages("sr-ste+kd", scale, w_kd=w), "transfer weight") for w in (0, 0.03, 0.3, 1)),
        Run("teacher alone", _stages("sr-ste+kd", scale, w_kd=1.0, w_noise=0.0), "transfer weight"),
        *(Run(f"decay={d:g}", _stages("sr-ste+kd", scale, decay=d), "decay") for d in (0, 2e-5, 2e-3)),
        *(Run(f"{n + 1} students", stages, "chain length") for n, stages in chains.items()),
        Run(f"{len(rungs) + 1} students, teacher previous", _stages("chain", scale, teacher="previous"), "teacher"),
        Run(f"{len(rungs) + 1} students, no teacher", _stages("chain", scale, teacher="none", w_kd=0.0), "teacher"),
        *(
            Run(f"masked: {name}", _stages("sr-ste+kd", scale), "masked layers", where=where)
            for name, where in (("all", "all"), ("MLPs", r"mlp"), ("attention", r"attn"))
        ),
    ]


EXPERIMENTS = {
    "arms": Experiment("every method from one dense network, at equal steps", _arms),
    "ratio": Experiment("quality against density", _ratio, "density"),
    "fixed-vs-inplace-vs-chain": Experiment("three ways to 2:4, over training", _progress),
    "ablate": Experiment("one setting at a time changed", _ablate, control=DEFAULT),
}


def planned(name, scale):
    """(Experiment, recipes.Scale, [Run]). Raises: InputError for a name or scale that is none."""
    for kind, given, known in (("experiment", name, EXPERIMENTS), ("scale", scale, SCALES)):
        if given not in known:
            raise InputError(f"unknown {kind} {given!r}: one of {', '.join(known)}")
    experiment, scale = EXPERIMENTS[name], SCALES[scale]
    return experiment, scale, experiment.runs(scale)
