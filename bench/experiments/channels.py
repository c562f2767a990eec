"""Structured pruning of a DDPM U-Net, the baseline of Diff-Pruning (arXiv 2305.10924): remove unimportant channels.

importance of a channel:   Σ |w · ∂L/∂w| over the weights that write or read it (first-order Taylor, as there and in
                           arXiv 1906.10771), L being the training loss at random noise levels

The result is a plain, narrower DDPM with a part of the weights. Channels that are added (residual branches, attention)
form one `space`: they are kept or removed together. If a GroupNorm reads a space, each group keeps the same number of
channels, so that a channel stays in its group (almost, if x and skip are concatenated). Queries are scaled by
√(kept / all), because attention divides by the root of fewer channels. The frequencies of the time embedding depend on
the width: each wave uses the weights of the nearest frequency.

Diff-Pruning also leaves out the noise levels with the least loss; this code does not.
"""

import copy
import math

import torch

from sparsedm import diffusion
from sparsedm.models import build_model
from sparsedm.models.ddpm import DDPMConfig
from sparsedm.train.data import batch, batch_indices

KEPT = ("image", "labels", "fixed waves")  # spaces that lose nothing
WAVES = "waves"  # the space whose channels are frequencies
BATCHES = 16


def prune(network, width, importance):
    """The DDPM of `width` made of the most important channels of a DDPM (or of a slimmable one at full width).

    importance: {parameter name: tensor of its shape}, see `taylor`. The network is not changed.
    """
    fields = {name: getattr(network.config, name) for name in DDPMConfig.__dataclass_fields__ if name != "kind"}
    narrow = build_model(DDPMConfig(**fields | {"width": width}), device="meta")
    runs, share = spaces(network), width / network.config.width
    sizes, grouped = {}, set()
    for name, axes in runs.items():
        for axis, spans in enumerate(axes):
            sizes |= dict(spans)
            grouped |= {space for space, _ in spans if axis == 0 and ".norm" in f".{name}"}
    scores = _scores(runs, importance)
    kept = {}
    for space, size in sizes.items():
        groups = network.config.groups if space in grouped else 1
        kept[space] = _kept(space, size, share, scores[space], groups)
    state = {}
    for name, weight in network.named_parameters():
        weight = weight.detach()
        for axis, spans in enumerate(runs[name]):
            parts = weight.split([size for _, size in spans], axis)
            weight = torch.cat([part.index_select(axis, kept[space]) for part, (space, _) in zip(parts, spans)], axis)
        if ".qkv." in name:
            weight[: len(weight) // 3] *= math.sqrt(share)
        state[name] = weight.clone()
    narrow.load_state_dict(state, assign=True)
    return narrow.requires_grad_(True)


def taylor(network, images, batch_size, seed=0):
    """{parameter name: |w · ∂L/∂w|}. The gradient of the loss is summed over BATCHES batches."""
    schedule, device = diffusion.schedule_of(network), next(network.parameters()).device
    network = copy.deepcopy(network).eval().requires_grad_(True)  # eval: no dropout, and a slimmable one at full width
    generator = torch.Generator().manual_seed(seed)
    for number in range(BATCHES):
        x, y = batch(images.to(device), batch_indices(len(images), batch_size, number, seed))
        y = y if network.config.num_classes else None
        diffusion.loss(network, x, schedule, y=y, generator=generator).total.backward()
    return {name: (p * p.grad).detach().abs() for name, p in network.named_parameters() if p.grad is not None}


def spaces(network):
    """{parameter name: for each of its first two axes [(space, size)] of the tensors side by side}."""
    config, runs = network.config, {}

    def layer(name, out, *sources):
        module = network.get_submodule(name)
        runs[f"{name}.weight"] = [out, [s for source in sources for s in source]] if sources else [out]
        runs[f"{name}.bias"] = [out]
        return module

    def block(name, sources, temb):
        conv1 = network.get_submodule(f"{name}.conv1")
        inner, joined = [(f"{name}.inner", conv1.out_channels)], [s for source in sources for s in source]
        layer(f"{name}.norm1", joined)
        layer(f"{name}.conv1", inner, *sources)
        layer(f"{name}.time_proj", inner, temb)
        layer(f"{name}.norm2", inner)
        residual = isinstance(network.get_submodule(f"{name}.shortcut"), torch.nn.Identity)
        out = joined if residual else [(f"{name}.out", conv1.out_channels)]
        if not residual:
            layer(f"{name}.shortcut", out, *sources)
        layer(f"{name}.conv2", out, inner)
        return out

    def attention(name, x):
        if isinstance(network.get_submodule(name), torch.nn.Identity):
            return
        size = sum(size for _, size in x)
        queries, values = (f"{name}.qk", size), (f"{name}.v", size)
        layer(f"{name}.norm", x)
        layer(f"{name}.qkv", [queries, queries, values], x)
        layer(f"{name}.proj", x, [values])

    def level(name, x, skips, push):
        for j in range(len(network.get_submodule(f"{name}.blocks"))):
            x = block(f"{name}.blocks.{j}", [x] if push else [x, skips.pop()], temb)
            attention(f"{name}.attns.{j}", x)
            if push:
                skips.append(x)
        return x

    def resampled(name, x):
        out = [(f"{name}.out", sum(size for _, size in x))]
        layer(f"{name}.conv", out, x)
        return out

    hidden, temb = [("time", 4 * config.width)], [("temb", 4 * config.width)]
    layer("time_embed.fc1", hidden, [("fixed waves" if config.ddsm else WAVES, network.time_embed.waves // 2)] * 2)
    layer("time_embed.fc2", temb, hidden)
    if config.num_classes:
        runs["label_embed.weight"] = [[("labels", config.label_rows)], temb]
    x = [("stem", config.width)]
    layer("conv_in", x, [("image", config.channels)])
    skips = [x]
    for i, stage in enumerate(network.down):
        x = level(f"down.{i}", x, skips, push=True)
        if stage.downsample is not None:
            x = resampled(f"down.{i}.downsample", x)
            skips.append(x)
    for j in range(len(network.mid.blocks)):
        x = block(f"mid.blocks.{j}", [x], temb)
        attention(f"mid.attns.{j}", x)
    for i, stage in enumerate(network.up):
        x = level(f"up.{i}", x, skips, push=False)
        if stage.upsample is not None:
            x = resampled(f"up.{i}.upsample", x)
    layer("norm_out", x)
    layer("conv_out", [("image", config.channels)], x)
    return runs


def _scores(runs, importance):
    """{space: (size,) importance of each channel, summed over the weights that write or read it}."""
    scores = {}
    for name, axes in runs.items():
        if name not in importance:
            continue
        value = importance[name]
        for axis, spans in enumerate(axes):
            others = [other for other in range(value.dim()) if other != axis]
            along = value.sum(others) if others else value
            for (space, _), part in zip(spans, along.split([size for _, size in spans])):
                scores[space] = scores[space] + part if space in scores else part
    return scores


def _kept(space, size, share, scores, groups):
    """int64 indices of the kept channels of a space, increasing."""
    if space in KEPT:
        return torch.arange(size)
    if space == WAVES:
        return torch.linspace(0, size - 1, round(size * share)).round().long()
    best = scores.view(groups, -1).topk(round(size * share) // groups, dim=1).indices.sort(1).values
    return (best + torch.arange(groups)[:, None] * (size // groups)).flatten()
