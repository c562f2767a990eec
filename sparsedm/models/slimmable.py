"""A DDPM U-Net that runs at several widths with one set of weights (DDSM; slimmable networks, arXiv 1812.08928).

At width k/8 each layer uses the first k/8 of its channels, rounded to a multiple of 8, and the weights between them. So
a narrow network is an ordinary DDPM of that width, called with slices of the weights. `export` copies the slices into a
DDPM, which computes the same bits.

There are two exceptions. If a layer reads several tensors side by side (x and skip on the way up) or writes several
(q, k, v), the first channels of each are used, so that a channel keeps its meaning. The frequencies of the time
embedding depend on the width: each wave uses the weights of the nearest frequency.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.func import functional_call

from sparsedm.compressed import Compressed
from sparsedm.diffusion import evaluating
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import group_view, holds
from sparsedm.layers import invalid_because
from sparsedm.models.ddpm import DDPM, DDPMConfig
from sparsedm.sparsity import masked_layers


def _divisible(width):
    """The multiple of 8 nearest to a width (of two, the larger), at least 8 and at least 9/10 of the width."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


@dataclass(frozen=True)
class SlimmableConfig(DDPMConfig):
    """The options of a DDPM, and `eighths`: the widths at which it can run.

    passes: in training, a batch is divided among so many widths by the sandwich rule (arXiv 1903.05134): the widest,
    the narrowest, and random ones between them. 0 trains only the widest. In DDSM all widths see the same images, with
    different times and noise. Here each width sees different images: with a batch `passes` times as large, the mean
    gradient and the cost are the same, and no step sees an image twice. same_images: DDSM's rule as released
    (with passes=3): all widths see the whole batch, and their losses are added before the gradient is clipped.
    """

    kind: str = "slimmable"
    groups: int = 16
    eighths: tuple = (2, 4, 6, 8)
    passes: int = 4
    same_images: bool = False

    def __post_init__(self):
        super().__post_init__()
        increasing = list(self.eighths) == sorted(set(self.eighths))
        if not increasing or self.eighths[-1:] != (8,) or self.eighths[0] < 2:
            raise InputError(f"slimmable eighths={self.eighths}: must be increasing numbers from 2 to 8, 8 the last")
        if self.passes < 0 or self.passes == 1:
            raise InputError(f"slimmable passes={self.passes}: must be 0, or 2 and more: the widest and the narrowest")
        if self.same_images and not self.passes:
            raise InputError("slimmable same_images=True: needs passes, which show the images to several widths")
        for k in self.eighths:
            self.at(k)

    def at(self, k):
        """The configuration of the plain DDPM at width k/8."""
        shape = {field.name: getattr(self, field.name) for field in fields(DDPMConfig) if field.name != "kind"}
        return DDPMConfig(**shape | {"width": self.width if k == 8 else _divisible(self.width * k / 8)})


PRESETS = {
    "slimmable-tiny": SlimmableConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention=(8,), groups=8, dropout=0.0),
    "slimmable-cifar10": SlimmableConfig(),
}


class SlimmableDDPM(DDPM):
    """A DDPM whose `width`, in eighths, can be set at any time. Parameters and state dict are the full network's.

    A call in training mode at width 8 divides its batch among widths, see SlimmableConfig; torch's global CPU generator
    draws the widths. `sparsify` sets patterns of the full network; narrow networks use slices of the masked weights. A
    width that is not in the configuration raises InputError.
    """

    def __init__(self, config):
        super().__init__(config)
        self.width = 8
        with torch.device("meta"):  # shapes only: a dict, so that these are no sub-modules
            self._narrow = {k: DDPM(config.at(k)) for k in config.eighths if k < 8}
        self._runs = {k: _runs(network) for k, network in {**self._narrow, 8: self}.items()}

    def set_width(self, k):
        self._check_width(k)
        self.width = k

    @contextmanager
    def at_width(self, k):
        """`with model.at_width(4):` runs at half width inside."""
        before = self.width
        self.set_width(k)
        try:
            yield self
        finally:
            self.width = before

    def forward(self, x, t, y=None):
        """As DDPM.forward, at the current width. Raises InputError for a training batch of fewer images than passes."""
        if not (self.training and self.width == 8 and self.config.passes):
            return self._run(self.width, x, t, y)
        passes = self.config.passes
        if len(x) < passes:
            raise InputError(f"a training batch of {len(x)} images cannot be divided among {passes} widths")
        parts = zip(*(value.tensor_split(passes) for value in (x, t, y) if value is not None))
        return torch.cat([self._run(k, *part) for k, part in zip(self._sandwich(), parts)])

    def _sandwich(self):
        widths = self.config.eighths
        between = widths[1:-1] or widths
        drawn = torch.randint(len(between), (self.config.passes - 2,), device="cpu").tolist()
        return [widths[-1], widths[0], *(between[i] for i in drawn)]

    def _run(self, k, x, t, y=None):
        if k == 8:
            return super().forward(x, t, y)
        return functional_call(self._narrow[k].train(self.training), self.weights(k), (x, t, y))

    def weights(self, k):
        """{name: tensor} of the plain DDPM at width k/8: slices of our masked weights, with gradients.

        Raises: InputError for a compressed network, whose weights have no slices.
        """
        if any(isinstance(layer, Compressed) for layer in self.modules()):
            raise InputError("a compressed slimmable network runs at full width only: decompress it first")
        ours = dict(self.named_parameters())
        ours |= {f"{name}.weight": layer.effective_weight() for name, layer in masked_layers(self)}
        narrow = {}
        for name, weight in ours.items():
            for axis, (sizes, kept) in enumerate(zip(self._runs[8][name], self._runs[k][name])):
                if sizes != kept:
                    choose = _nearest_waves if (name, axis) == ("time_embed.fc1.weight", 1) else _first
                    runs = zip(weight.split(sizes, axis), kept)
                    weight = torch.cat([choose(run, axis, size) for run, size in runs], axis)
            narrow[name] = weight
        return narrow

    def export(self, k):
        """The network at width k/8 as a plain DDPM with its own weights. It computes the same bits.

        A layer keeps its pattern if its slice fits the pattern; else it is dense, with zeros for pruned weights.
        """
        self._check_width(k)
        with torch.device("meta"):
            network = DDPM(self.config.at(k))
        weights = {name: weight.detach().clone() for name, weight in self.weights(k).items()}
        network.load_state_dict(weights, assign=True)
        for name, layer in masked_layers(self):
            narrow = network.get_submodule(name)
            fits = not invalid_because(narrow.weight, layer.pattern)
            if fits and (narrow.weight.is_meta or holds(group_view(narrow.weight), layer.pattern)):
                narrow.set_pattern(layer.pattern)
        return network.train(self.training)

    def _check_width(self, k):
        if k not in self.config.eighths:
            raise InputError(f"width {k}/8: this network runs at {', '.join(f'{e}/8' for e in self.config.eighths)}")


def _runs(network):
    """{parameter name: the sizes of the tensors that lie side by side along each of its first two axes}, mostly one."""
    runs = {name: [[size] for size in parameter.shape[:2]] for name, parameter in network.named_parameters()}
    waves = network.time_embed.waves // 2
    runs["time_embed.fc1.weight"][1] = [waves, waves]
    for name, parameter in network.named_parameters():
        if ".qkv." in name:
            runs[name][0] = [len(parameter) // 3] * 3
    x = network.mid.blocks[-1].conv2.out_channels
    if network.config.ddsm:  # there x and skip are one tensor, whose first channels a narrow layer reads
        return runs
    for i, level in enumerate(network.up):
        for j, block in enumerate(level.blocks):
            sources = [x, block.conv1.in_channels - x]  # and the skip
            for name, axis in (("norm1.weight", 0), ("norm1.bias", 0), ("conv1.weight", 1), ("shortcut.weight", 1)):
                if f"up.{i}.blocks.{j}.{name}" in runs:
                    runs[f"up.{i}.blocks.{j}.{name}"][axis] = sources
            x = block.conv2.out_channels
    return runs


def _first(run, axis, kept):
    return run.narrow(axis, 0, kept)


def _nearest_waves(run, axis, kept):
    """The indices of n frequencies 1e-4^(i / (n - 1)) nearest to the `kept` frequencies of the narrow network."""
    nearest = torch.linspace(0, run.shape[axis] - 1, kept, device=run.device).round().long()
    return run.index_select(axis, nearest)


class WidestTeacher(nn.Module):
    """A slimmable network at full width, with its current weights, as a teacher (arXiv 1903.05134, section 3.3).

    For images that the student also computes at full width, the target is its own prediction without dropout.
    """

    def __init__(self, model):
        super().__init__()
        self.others = (model,)  # a tuple, so that it is no sub-module: the loop freezes its teacher's parameters

    def forward(self, x, t, y=None):
        (model,) = self.others
        with evaluating(model), model.at_width(8):
            return model(x, t, y)


def check_supernet(model, batch_size):
    """Raise InputError if a network trains only one width, or if the batch cannot be divided among its widths."""
    passes = getattr(getattr(model, "config", None), "passes", 0)
    if not passes:
        raise InputError("a supernet is a slimmable network with passes of at least 2, and this one trains one width")
    if batch_size < passes and not model.config.same_images:
        raise InputError(f"batch_size={batch_size} cannot be divided among {passes} widths")
