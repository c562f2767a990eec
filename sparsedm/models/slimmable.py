"""A DDPM U-Net that runs at several widths with one set of weights (DDSM; slimmable networks, arXiv 1812.08928).

At width k/8 each layer uses the first k/8 of its channels, rounded to a multiple of 8, and the weights between them. So
a narrow network is an ordinary DDPM of that width whose weights are slices of these: it is called with the slices, and
`export` copies them into a DDPM of its own, which computes the same bits.

Two things are not simply first channels. Where a layer reads several tensors laid side by side (x and skip on the way
up) or writes several (q, k, v), the first channels of each are taken, so that a channel keeps its meaning. And the
waves of the time embedding, whose frequencies depend on the width, meet the weights of the nearest frequency.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.func import functional_call

from sparsedm.diffusion import evaluating
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import group_view, holds
from sparsedm.layers import invalid_because
from sparsedm.models.ddpm import DDPM, DDPMConfig
from sparsedm.sparsity import masked_layers


def _divisible(width):
    """The multiple of 8 nearest to a width, the larger one of two; at least 8, and at least 9/10 of the width."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


@dataclass(frozen=True)
class SlimmableConfig(DDPMConfig):
    """The shape of the whole network, as of a DDPM, and `eighths`: the widths at which it can run.

    passes: while it trains, a batch is divided among so many widths by the sandwich rule (arXiv 1903.05134): the
    widest, the narrowest, and random ones between them; 0 trains the widest alone. DDSM gives every width the same
    images, with times and noise of its own. Here each has images of its own: with a batch `passes` times as large as
    DDSM's the gradient is the same in the mean at the same cost, and no step sees an image twice. same_images: as DDSM
    released it (with passes=3): every width sees the whole batch, with times and noise of its own, and the losses are
    added up before the gradient is clipped.
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
    """A DDPM whose `width`, in eighths, can be set at any time; parameters and state dict are those of the whole.

    A call in training mode at width 8 divides its batch among widths, see SlimmableConfig; which ones is drawn from
    torch's global CPU generator. Patterns set by `sparsify` belong to the whole network, narrow ones use slices of the
    masked weights. Everything raises InputError for a width that the configuration does not name.
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
        middle = torch.randint(len(widths), (self.config.passes - 2,)).tolist()
        return [widths[-1], widths[0], *(widths[i] for i in middle)]

    def _run(self, k, x, t, y=None):
        if k == 8:
            return super().forward(x, t, y)
        return functional_call(self._narrow[k].train(self.training), self.weights(k), (x, t, y))

    def weights(self, k):
        """{name: tensor} of the plain DDPM at width k/8: slices of ours, masked as ours, with gradients."""
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
        """The network at width k/8 as a plain DDPM with weights of its own, which computes the same bits.

        A layer keeps the pattern of ours where its slice holds it, else it is dense with the zeros in place.
        """
        self._check_width(k)
        with torch.device("meta"):
            network = DDPM(self.config.at(k))
        weights = {name: weight.detach().clone() for name, weight in self.weights(k).items()}
        network.load_state_dict(weights, assign=True)
        for name, layer in masked_layers(self):
            narrow = network.get_submodule(name)
            if not invalid_because(narrow.weight, layer.pattern) and holds(group_view(narrow.weight), layer.pattern):
                narrow.set_pattern(layer.pattern)
        return network.train(self.training)

    def _check_width(self, k):
        if k not in self.config.eighths:
            raise InputError(f"width {k}/8: this network runs at {', '.join(f'{e}/8' for e in self.config.eighths)}")


def _runs(network):
    """{parameter name: the sizes of the tensors that lie side by side along each of its first two axes}, mostly one."""
    runs = {name: [[size] for size in parameter.shape[:2]] for name, parameter in network.named_parameters()}
    waves = network.time_embed.width // 2
    runs["time_embed.fc1.weight"][1] = [waves, waves]
    for name, parameter in network.named_parameters():
        if ".qkv." in name:
            runs[name][0] = [len(parameter) // 3] * 3
    x = network.mid.blocks[-1].conv2.out_channels
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
    """Of n frequencies 1e-4^(i / (n - 1)) those nearest to the `kept` ones that the narrow network has."""
    nearest = torch.linspace(0, run.shape[axis] - 1, kept, device=run.device).round().long()
    return run.index_select(axis, nearest)


class WidestTeacher(nn.Module):
    """A slimmable network at its full width, as it is now, for the transfer loss (arXiv 1903.05134, section 3.3).

    For the images that the widest one itself was shown, the target is its own prediction and the loss is 0.
    """

    def __init__(self, model):
        super().__init__()
        self.others = (model,)  # in a tuple, so that it is no sub-module: a loop freezes the parameters of its teacher

    def forward(self, x, t, y=None):
        (model,) = self.others
        with evaluating(model), model.at_width(8):
            return model(x, t, y)


def check_supernet(model, batch_size):
    """Raise InputError for a network that trains one width only, or a batch that cannot be divided among its widths."""
    passes = getattr(getattr(model, "config", None), "passes", 0)
    if not passes:
        raise InputError("a supernet is a slimmable network with passes of at least 2, and this one trains one width")
    if batch_size < passes and not model.config.same_images:
        raise InputError(f"batch_size={batch_size} cannot be divided among {passes} widths")
