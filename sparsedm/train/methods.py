"""The ways to make a dense network sparse, by name, each a row of settings for the one loop.

Every method starts from the same dense checkpoint (network and average) and spends the same steps on the same batches.
"""

from dataclasses import dataclass, field

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.train.chain import Stage, divide

LADDER = ("31:32", "15:16", "7:8", "3:4", "2:4", "1:4", "1:8", "1:16", "1:32")  # the chain of SparseDM's experiments
SR_STE = {"decay": 2e-4}  # arXiv 2102.04010
TRANSFER = {"teacher": "dense", "w_kd": 0.1}  # arXiv 2404.10445, the weight its runs used


@dataclass(frozen=True)
class Method:
    """settings: fields of every Stage. progressive: climbs the ladder instead of going straight to the pattern."""

    summary: str
    settings: dict = field(default_factory=dict)
    progressive: bool = False
    sparse: bool = True
    trains: bool = True


METHODS = {
    "dense": Method("go on training the dense network: the control", sparse=False),
    "oneshot": Method("prune by magnitude and do not train", trains=False),
    "asp": Method(
        "fix the mask once and train the kept weights only (NVIDIA ASP)", {"frozen_mask": True, "dropped": 0.0}
    ),
    "ste": Method("choose masks anew as weights change, straight-through gradient"),
    "sr-ste": Method("ste, and pruned weights decay towards zero", SR_STE),
    "kd": Method("ste, and the dense network teaches", TRANSFER),
    "sr-ste+kd": Method("sr-ste, and the dense network teaches", SR_STE | TRANSFER),
    "chain": Method("separate students, each sparser than the one before", SR_STE | TRANSFER, progressive=True),
    "inplace": Method("one network that grows sparser", SR_STE | TRANSFER | {"inplace": True}, progressive=True),
    "random-init": Method("ste from random weights, as the paper's code ran its STE baseline", {"init": "random"}),
}


def method_stages(name, steps, pattern="2:4", ladder=None):
    """The stages of a method for a budget of steps in all.

    pattern: N:M to arrive at. "dense" has none all the same, and "oneshot" spends no steps.
    ladder: N:M of the stages before it, for the progressive methods; None: all of LADDER that are denser.
    Raises: InputError for an unknown method or pattern, a pattern that is dense, or fewer steps than stages.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    method, target = METHODS[name], Pattern.parse(pattern)
    if target is None:
        raise InputError(f"method {name} needs an N:M pattern to arrive at, not {pattern!r}")
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
        Stage(rung.replace(":", "of"), share, rung, **method.settings)
        for rung, share in zip(rungs, divide(steps, [1] * len(rungs), len(rungs)))
    ]
