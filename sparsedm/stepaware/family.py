"""Use a different network at each step: not every noise level needs the whole network (DDSM, arXiv 2310.03337).

family     networks that predict the same noise at different cost: the widths of a slimmable network, the N:M students
           of a chain, or both
strategy   one index into the family per step of a sampler, first the noisiest
cost       Σ over steps of (evaluations of that step) * (cost of its network), per image
"""

import copy
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch

from sparsedm import samplers
from sparsedm.compression import compress
from sparsedm.diffusion import evaluating, schedule_of, validation_loss
from sparsedm.errors import InputError
from sparsedm.files import parse_json, read_json, read_text, write_json
from sparsedm.inspection import inspect
from sparsedm.model_files import Incomplete, describe, load_model
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers
from sparsedm.timing import interleaved_seconds

UNITS = ("MACs", "seconds")
# options newer than some strategies: left out of a fingerprint if default
_YOUNG = ("mlp_time_embed", "qkv_bias", "schedule", "same_images", "ddsm")


@dataclass(frozen=True)
class Family:
    """networks: `model(x, t, y)` with equal inputs and schedule. names, costs (of an image, in `unit`): one each.

    MACs count linear and convolution layers, kept weights only. Raises InputError if the networks are no family.
    """

    name: str
    networks: tuple
    names: tuple
    costs: tuple
    unit: str = "MACs"
    fingerprints: tuple = ()  # of each network's weights; () where that does not matter
    folders: tuple = ()  # what each network was read from; () for networks that were not read

    def __post_init__(self):
        if not self.networks:
            raise InputError(f"the family {self.name} is empty: a strategy needs at least one network")
        if not len(self.networks) == len(self.names) == len(self.costs) == len(set(self.names)):
            raise InputError(f"the family {self.name} needs one cost and one unique name per network")
        if not all(0 < cost < math.inf for cost in self.costs):
            raise InputError(f"the family {self.name} has costs {self.costs}: each must be more than 0, and finite")
        kinds = {(schedule_of(n), n.config.image_size, n.config.channels, n.config.num_classes) for n in self.networks}
        if len(kinds) > 1:
            raise InputError(
                f"the networks of {self.name} differ in schedule, images or classes: one sampler needs one"
            )

    @property
    def schedule(self):
        return schedule_of(self.networks[0])

    @property
    def shape(self):
        config = self.networks[0].config
        return config.channels, config.image_size, config.image_size

    def only(self, names):
        """The Family of the networks `names`, in this order. Raises InputError for a name that it does not hold."""
        if absent := [name for name in names if name not in self.names]:
            raise InputError(f"{self.name} holds no network {', '.join(absent)}: they are {', '.join(self.names)}")
        places = [self.names.index(name) for name in names]
        fields = {field: getattr(self, field) for field in ("networks", "names", "costs", "fingerprints", "folders")}
        return replace(self, **{field: tuple(each[i] for i in places) for field, each in fields.items() if each})

    def cost(self, sampler, indices):
        """The cost of one image drawn with the strategy `indices`, in the family's unit."""
        counts = samplers.evaluations(sampler, len(indices))
        return sum(count * self.costs[index] for count, index in zip(counts, indices))


def family(name, networks, *, unit="MACs", batch=64):
    """The Family of {name: network}. unit: "MACs", or "seconds", measured here for `batch` images at a time.

    For seconds, networks with a pattern are compressed. On a GPU all are timed in bf16, like `sparsedm sample
    --compress`: the 2:4 kernels have no fp32. Raises: InputError for another unit, or as `Family`.
    """
    if unit not in UNITS:
        raise InputError(f"unknown unit {unit!r}: one of {', '.join(UNITS)}")
    models, marks = tuple(networks.values()), tuple(fingerprint(m) for m in networks.values())
    if unit == "seconds":
        models = tuple(compress(m) if masked_layers(m) else m for m in models)
    if unit == "MACs":
        costs = [inspect(m).totals()["macs_after"] for m in models]
    else:
        costs = seconds_per_image([_as_run(m, m.example_inputs(1)[0].device) for m in models], batch)
    return Family(name, models, tuple(networks), tuple(costs), unit, marks)


def family_of(run, unit="MACs", device="cpu"):
    """The Family of a run folder: its stages, costliest first. A slimmable stage gives one network per width.

    run: also the model file of a slimmable network, the folder of a search that trained its family, or a folder of run
    folders, such as a seed of an experiment: then the last stage of each, named by its folder, without those that no
    file holds whole. Raises InputError for a run with only one network.
    """
    run = Path(run)
    run = run / "family" if (run / "family").is_dir() else run
    networks, stages, folders = {}, {}, []
    several = sorted({found.parents[1] for found in run.glob("*/[0-9][0-9]-*/checkpoints")})
    for stage in sorted(run.glob("[0-9][0-9]-*")) or several or [run]:
        try:
            loaded = load_model(stage, build_model)
        except Incomplete:
            if several:
                continue
            raise
        name = " + ".join(sorted(set(describe(loaded.model)["patterns"].values()))) or "dense"
        name = stage.name if several else f"{name} ({stage.name})" if name in stages else name
        stages[name] = stage
        slimmable = loaded.model.config.kind == "slimmable"
        found = widths(loaded.model) if slimmable else {"": loaded.model}
        networks |= {f"{name} {width}".strip(): network.to(device) for width, network in found.items()}
        folders += [stage] * len(found)
    if len(networks) < 2:
        raise InputError(f"{run} holds one network only: there is nothing to choose from")
    found = family(run.parent.name if run.name == "family" else run.name, networks, unit=unit)
    order = sorted(range(len(networks)), key=lambda i: -found.costs[i])
    return replace(found, folders=tuple(folders)).only([found.names[i] for i in order])


def _as_run(network, device):
    return copy.deepcopy(network).bfloat16() if device.type == "cuda" else network


def fingerprint(network):
    """16 hexadecimal digits that depend on configuration, patterns and weights, but not on the device."""
    patterns = {name: str(layer.pattern) for name, layer in masked_layers(network)}
    config = getattr(network, "config", None)
    if is_dataclass(config):
        values = [(f.name, getattr(config, f.name), f.default) for f in fields(config)]
        config = {name: value for name, value, default in values if name not in _YOUNG or value != default}
    digest = hashlib.sha256(json.dumps([config, patterns]).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def widths(model):
    """{name: network} of a SlimmableDDPM, the widest first."""
    return {f"{k}/8": model.export(k) for k in reversed(model.config.eighths)}


def seconds_per_image(networks, batch):
    """The median time of one call of each network on `batch` images, divided by `batch`. The networks take turns."""

    def call(network, inputs):
        with evaluating(network):
            network(*inputs)

    inputs = [network.example_inputs(batch) for network in networks]
    calls = [functools.partial(call, *pair) for pair in zip(networks, inputs)]
    return [seconds / batch for seconds in interleaved_seconds(calls, inputs[0][0].device, rounds=7)]


# ---- strategies


@dataclass(frozen=True)
class Strategy:
    """indices[i]: the network of step i. The other fields say what it was found for.

    Another family, sampler or number of steps is refused. clip, guidance: see `samplers.sample`; other values may be
    asked for. clip None: nothing was sampled to find it.
    """

    family: str
    networks: tuple  # names
    sampler: str
    indices: tuple
    data: str = ""
    fingerprints: tuple = ()  # of the networks' weights
    clip: str | None = None
    guidance: float | None = None

    def __post_init__(self):
        for name in ("networks", "indices", "fingerprints"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        names, indices = self.networks, self.indices
        if not all(isinstance(name, str) for name in (*names, *self.fingerprints)):
            raise InputError("the names and fingerprints of a strategy's networks must be texts")
        if len(self.fingerprints) not in (0, len(names)):
            raise InputError(f"{len(self.fingerprints)} fingerprints were given for {len(names)} networks")
        if self.sampler not in samplers.SAMPLERS:
            raise InputError(f"unknown sampler {self.sampler!r}, expected one of {', '.join(samplers.SAMPLERS)}")
        if self.clip not in (None, *samplers.CLIPS):
            raise InputError(f"unknown clip {self.clip!r}, expected one of {', '.join(samplers.CLIPS)}")
        if self.guidance is not None and not (type(self.guidance) in (int, float) and math.isfinite(self.guidance)):
            raise InputError(f"guidance {self.guidance!r}: must be a finite number")
        if not indices:
            raise InputError("a strategy needs at least one step")
        for step, index in enumerate(indices):
            if type(index) is not int or not 0 <= index < len(names):
                raise InputError(f"step {step} asks for network {index!r}: the family has 0 to {len(names) - 1}")

    @property
    def steps(self):
        return len(self.indices)

    def models(self, family, *, sampler=None, steps=None, other_weights=False):
        """[network] per step, for `samplers.sample`. Raises InputError if the strategy was found for another case.

        The family may hold more networks than the strategy names, in any order. sampler, steps: what the caller uses;
        None if it takes the strategy's. other_weights: accept networks of the same names with any weights.
        """
        if set(self.networks) <= set(family.names):
            family = family.only(self.networks)
        # with fingerprints the folder may have another name
        marked = other_weights or not self.family or (self.fingerprints and family.fingerprints)
        name = None if marked else family.name
        asked = {"family": name, "networks": family.names, "sampler": sampler, "steps": steps}
        for what, value in asked.items():
            if value is not None and value != getattr(self, what):
                raise InputError(f"the strategy is for {what} {_text(getattr(self, what))}, not {_text(value)}")
        if self.fingerprints and family.fingerprints and not other_weights:
            changed = [n for n, a, b in zip(self.networks, self.fingerprints, family.fingerprints) if a != b]
            if changed:
                names = ", ".join(changed)
                raise InputError(
                    f"the weights of {names} changed after the search: search again, or use --other-weights"
                )
        return [family.networks[index] for index in self.indices]

    def save(self, file):
        write_json(file, {**asdict(self), "steps": self.steps})


def _text(value):
    return ", ".join(value) if isinstance(value, tuple) else value


def load_strategy(file):
    """A Strategy from its JSON file, or from a list of widths as DDSM released. Raises InputError for a damaged one."""
    if isinstance(widths := parse_json(read_text(file), file), list):
        return _from_ddsm(widths, file)
    young = dict.fromkeys(("clip", "guidance"))  # older files have none
    kinds = {f.name: list if f.type is tuple else f.type for f in fields(Strategy) if f.name not in young}
    values = young | read_json(file, **kinds, steps=int)
    if unknown := values.keys() - {*kinds, *young, "steps"}:
        raise InputError(f"{file} holds no strategy: {', '.join(unknown)} is no part of one")
    try:
        strategy = Strategy(**{field.name: values[field.name] for field in fields(Strategy)})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if values["steps"] != strategy.steps:
        raise InputError(f"{file} says {values['steps']} steps and has {strategy.steps} indices")
    return strategy


def _from_ddsm(widths, file):
    """The Strategy in DDSM's file of widths, one for each time of DDPM's schedule from the least noisy on."""
    eighths = [8 * width if type(width) in (int, float) else 0 for width in widths]
    if not eighths or not all(k in range(1, 9) for k in eighths):
        raise InputError(f"{file} holds no strategy: a list must name a width for each step, in eighths such as 0.25")
    found = sorted({int(k) for k in eighths}, reverse=True)
    indices = tuple(found.index(k) for k in reversed(eighths))
    return Strategy("", tuple(f"dense {k}/8" for k in found), "ddpm-large", indices, clip="final")


def sample(family, strategy, count, *, other_weights=False, **settings):
    """(count, C, H, W): `samplers.sample` with the strategy's network at each step. settings: arguments of `sample`."""
    found = {name: getattr(strategy, name) for name in ("clip", "guidance") if getattr(strategy, name) is not None}
    return samplers.sample(
        strategy.models(family, other_weights=other_weights),
        family.schedule,
        count,
        family.shape,
        sampler=strategy.sampler,
        steps=strategy.steps,
        **found | settings,
    )


# ---- a cheap proxy for quality


def loss_table(family, x0, sampler, steps, *, y=None, seed=0, progress=False):
    """(networks, steps) float64: the validation loss of each network at the noise level of each step, measured once.

    x0 (n, C, H, W) held-out images in [-1, 1]; y (n,) or None. All networks see the same noise. A strategy's proxy is
    the sum of its entries (or of their logarithms). It needs no sampling, but ignores how errors of steps combine.
    """
    times = samplers.step_times(family.schedule, sampler, steps)
    rows = [
        validation_loss(network, x0, family.schedule, y=y, times=times, seed=seed, progress=progress)
        for network in family.networks
    ]
    return torch.stack(rows)
