"""The experiments: lists of runs, and the cost of each scale. Nothing is computed here.

arms                        every method of `train/stages.py`, the first block dense, and dense networks of equal MACs
claims                      the paper's claims, at 2:4 and 1:8, with the controls that can refute them (`claims.py`)
ratio                       31:32 ... 1:32 (SparseDM, arXiv 2404.10445, fig. 3a)
fixed-vs-inplace-vs-chain   2:4 from the first step, growing in one network, or over students (fig. 3b)
ablate                      transfer weight, decay, teacher, length of the chain, which layers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.models import model_config
from sparsedm.recipes import EXPERIMENTS as SCALES
from sparsedm.train.stages import TRANSFER, Stage, method_stages

# ---- what a run is, beside its stages: what it starts from in place of the dense network
SMALL = "small"  # a narrower dense network of the same MACs, trained from random weights on as many images in all
PRUNED = "pruned"  # the dense network without its least important channels, of the same MACs (`channels.py`)
ACTIVATIONS = "activations"  # the dense network, but layers read only their largest inputs (`activations.py`)
CALIBRATED = "calibrated"  # the dense network with masks by |w| ||x|| instead of |w| (Wanda, arXiv 2306.11695)
KINDS = ("", SMALL, PRUNED, ACTIVATIONS, CALIBRATED)


@dataclass(frozen=True)
class Run:
    """One row of an experiment. where: which layers, as in `sparsify`. first_dense: the first block stays dense.

    x: its place on the axis of the experiment, if it has one. kind: one of KINDS. pattern: of an ACTIVATIONS or a
    CALIBRATED run.
    """

    name: str
    stages: tuple
    group: str = ""
    x: float | None = None
    where: str | None = None
    first_dense: bool = False
    kind: str = ""
    pattern: str = "2:4"


@dataclass(frozen=True)
class Experiment:
    summary: str
    runs: Callable  # recipes.Scale -> [Run]
    axis: str = ""  # the meaning of x, if the runs have one
    control: str = "dense"  # the run to compare the others with


# what answers the question first, for the case that there is no time for all
ARMS = ("dense", "chain", "oneshot", "sr-ste+kd", "inplace", "asp", "kd", "sr-ste", "ste", "random-init", "asp-random")
EIGHTS = ("7:8", "6:8", "5:8", "4:8")  # the other ladder of the paper's scripts

DEFAULT = "default"  # of `ablate`: 2:4 at once, w_kd 0.1, decay 2e-4, teacher dense, the model's own layers


def _stages(method, scale, pattern="2:4", ladder=None, steps=None, **changes):
    ladder = scale.ladder if ladder is None else ladder
    stages = method_stages(method, scale.steps if steps is None else steps, pattern, ladder)
    return tuple(replace(stage, lr=scale.lr, **changes) for stage in stages)


def _taught(scale, name):
    """One dense stage under the dense teacher, for networks that are narrower."""
    return (Stage(name, scale.steps, lr=scale.lr, **TRANSFER),)


def _activations(scale, steps=None):
    """Stages of an ACTIVATIONS run: without masks and without a teacher."""
    return (Stage("activations", scale.steps if steps is None else steps, lr=scale.lr),)


def _arms(scale):
    straight = _stages("sr-ste+kd", scale)
    runs = [Run(name, _stages(name, scale)) for name in ARMS]
    runs.append(Run("chain of eighths", _stages("chain", scale, ladder=EIGHTS)))
    runs.append(Run("first block dense", straight, first_dense=True))
    runs.append(Run("oneshot, calibrated", _stages("oneshot", scale), kind=CALIBRATED))
    runs.append(Run("activations", _activations(scale), kind=ACTIVATIONS, first_dense=True))
    if model_config(scale.model, **scale.overrides).kind in ("ddpm", "slimmable"):
        runs.append(Run("pruned channels", _taught(scale, "pruned"), kind=PRUNED))
    teacher = Stage("small-dense", scale.base_steps + scale.steps, **TRANSFER)
    return [*runs, Run("small-dense", (teacher,), kind=SMALL)]


def _claims(scale):
    """The runs, the most important first: the last may be cut for lack of time."""

    def one_eighth(method, **settings):
        return _stages(method, scale, "1:8", **settings)

    few, ladder, same = scale.steps // 3, ("2:4", "1:4"), ("1:8", "1:8")
    taught, alone = "sr-ste+kd", "sr-ste"
    return [
        Run("dense", _stages("dense", scale)),
        Run("1:8 straight", one_eighth(taught)),
        Run("1:8 chain", one_eighth("chain", ladder=ladder)),
        Run("2:4 straight", _stages(taught, scale)),
        Run("2:4 chain", _stages("chain", scale, ladder=("3:4",))),
        Run("1:8 straight, no teacher", one_eighth(alone)),
        Run("2:4 straight, no teacher", _stages(alone, scale)),
        Run("1:8 straight, a third of the images", one_eighth(taught, steps=few)),
        Run("1:8 chain, a third of the images", one_eighth("chain", ladder=ladder, steps=few)),
        Run("2:4 one-shot", _stages("oneshot", scale)),
        Run("1:8 one-shot", one_eighth("oneshot")),
        Run("2:4 one-shot, calibrated", _stages("oneshot", scale), kind=CALIBRATED),
        Run("activations 2:4, one-shot", _activations(scale, 0), kind=ACTIVATIONS),
        Run("1:8 in place", one_eighth("inplace", ladder=ladder)),
        Run("1:8 straight in 3 stages", one_eighth("chain", ladder=same)),
        Run("1:8 chain, no teacher", one_eighth("chain", ladder=ladder, teacher="none", w_kd=0.0)),
        Run("2:4 straight, first block dense", _stages(taught, scale), first_dense=True),
        Run("2:4 asp", _stages("asp", scale)),
        Run("activations 2:4, first block dense", _activations(scale), kind=ACTIVATIONS, first_dense=True),
    ]


def _ratio(scale):
    runs = [Run("dense", _stages("dense", scale), x=1.0)]
    return runs + [Run(p, _stages("sr-ste+kd", scale, p), x=Pattern.parse(p).density) for p in scale.densities]


def _progress(scale):
    named = {"dense": "dense", "chain": "chain", "fixed": "sr-ste+kd", "inplace": "inplace"}
    return [Run(name, _stages(method, scale)) for name, method in named.items()]


def _ablate(scale):
    """Each run changes one setting of `DEFAULT`, which is the middle of every group."""
    rungs = [stage.pattern for stage in method_stages("chain", scale.steps, "2:4", scale.ladder)[:-1]]
    lengths = sorted({len(rungs) // 2, len(rungs)} - {0})
    chains = {n: _stages("chain", scale, ladder=tuple(rungs[len(rungs) - n :])) for n in lengths}
    layers = {"all": "all", "MLPs": r"mlp\.fc", "attention": r"attn"}
    if model_config(scale.model, **scale.overrides).kind in ("ddpm", "slimmable"):
        del layers["MLPs"]
    return [
        Run(DEFAULT, _stages("sr-ste+kd", scale)),
        *(Run(f"w_kd={w:g}", _stages("sr-ste+kd", scale, w_kd=w), "transfer weight") for w in (0, 0.01, 1)),
        Run("teacher alone", _stages("sr-ste+kd", scale, w_kd=1.0, w_noise=0.0), "transfer weight"),
        *(Run(f"decay={d:g}", _stages("sr-ste+kd", scale, decay=d), "decay") for d in (0, 2e-5, 2e-3)),
        *(Run(f"{n + 1} students", stages, "chain length") for n, stages in chains.items()),
        Run(f"{len(rungs) + 1} students, teacher previous", _stages("chain", scale, teacher="previous"), "teacher"),
        Run(f"{len(rungs) + 1} students, no teacher", _stages("chain", scale, teacher="none", w_kd=0.0), "teacher"),
        *(
            Run(f"masked: {name}", _stages("sr-ste+kd", scale), "masked layers", where=where)
            for name, where in layers.items()
        ),
    ]


EXPERIMENTS = {
    "arms": Experiment("every method from one dense network, at equal steps", _arms),
    "claims": Experiment("what the paper claims, at 2:4 and 1:8, with controls", _claims),
    "ratio": Experiment("quality against density", _ratio, "density"),
    "fixed-vs-inplace-vs-chain": Experiment("three ways to 2:4, over training", _progress),
    "ablate": Experiment("one setting at a time changed", _ablate, control=DEFAULT),
}


def known(kind, name):
    """The Experiment or the Scale of that name. Raises: InputError for an unknown name."""
    rows = {"experiment": EXPERIMENTS, "scale": SCALES}[kind]
    if name not in rows:
        raise InputError(f"unknown {kind} {name!r}: one of {', '.join(rows)}")
    return rows[name]
