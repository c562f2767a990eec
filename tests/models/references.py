"""U-ViT, DiT and DDPM a second time, in plain torch on a dictionary of weights, from the papers; what papers count."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def conv(w, name, x, **geometry):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **geometry)


def silu(x):
    return x * torch.sigmoid(x)


def attention(w, name, x, heads):
    """Per head, as in the formula; q, k and v stand one after the other in the rows of qkv."""
    width, parts = x.shape[-1] // heads, []
    every = linear(w, f"{name}.qkv", x).split(width, dim=-1)  # the heads of q, then of k, then of v
    for h in range(heads):
        q, k, v = every[h], every[heads + h], every[2 * heads + h]
        parts.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ v)
    return linear(w, f"{name}.proj", torch.cat(parts, -1))


def standardised(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def waves(t, count, last):
    """Angles of `count` frequencies from 1 down to 1e4 ** -last."""
    return t[:, None] * torch.tensor([1e4 ** (-last * i / max(count - 1, 1)) for i in range(count)], dtype=t.dtype)


def patches_of(x, patch):
    """(B, number of patches, pixels): patch by patch, row by row."""
    side = range(0, x.shape[-1], patch)
    return torch.stack([x[:, :, i : i + patch, j : j + patch].flatten(1) for i in side for j in side], 1)


def image_of(tokens, patch, channels):
    """The inverse of `patches_of`, but that the channel comes last in the pixels of a token."""
    side = math.isqrt(tokens.shape[1])
    out = torch.empty(len(tokens), channels, side * patch, side * patch, dtype=tokens.dtype)
    for n in range(side * side):
        i, j = n // side * patch, n % side * patch
        out[:, :, i : i + patch, j : j + patch] = tokens[:, n].view(-1, patch, patch, channels).permute(0, 3, 1, 2)
    return out


def layer_norm(w, name, x):
    return standardised(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def uvit_block(w, name, x, heads, skip=None):
    if skip is not None:
        x = linear(w, f"{name}.skip_linear", torch.cat([x, skip], -1))
    x = x + attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x), heads)
    h = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
    return x + linear(w, f"{name}.mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)


def uvit(w, config, x, t, y=None, context=None):
    half = config.dim // 2
    angles = waves(t, half, (half - 1) / half)
    time = torch.cat([angles.cos(), angles.sin()], -1)
    if config.mlp_time_embed:
        time = linear(w, "time_embed.2", silu(linear(w, "time_embed.0", time)))
    tokens = [time[:, None]]
    if config.num_classes:
        tokens = [w["label_emb.weight"][y][:, None], *tokens]
    if context is not None:
        tokens.append(linear(w, "context_embed", context))
    kernel = w["patch_embed.proj.weight"].flatten(1)
    tokens.append(patches_of(x, config.patch_size) @ kernel.T + w["patch_embed.proj.bias"])
    h, skips = torch.cat(tokens, 1) + w["pos_embed"], []
    for i in range(config.depth // 2):
        h = uvit_block(w, f"in_blocks.{i}", h, config.heads)
        skips.append(h)
    h = uvit_block(w, "mid_block", h, config.heads)
    for i in range(config.depth // 2):
        h = uvit_block(w, f"out_blocks.{i}", h, config.heads, skip=skips[config.depth // 2 - 1 - i])
    h = linear(w, "decoder_pred", layer_norm(w, "norm", h))
    patches = (config.image_size // config.patch_size) ** 2
    image = image_of(h[:, h.shape[1] - patches :], config.patch_size, config.channels)
    return conv(w, "final_layer", image, padding=1) if config.final_conv else image


def dit_positions(dim, side):
    """Official numbering: the first half of the vector is of the column, the second of the row; sines, then cosines."""

    def wave(position):
        angles = [position / 1e4 ** (i / (dim // 4)) for i in range(dim // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return torch.tensor([[wave(column) + wave(row) for row in range(side) for column in range(side)]]).flatten(2)


def dit(w, config, x, t, y=None):
    """All channels, the learned variance included."""
    angles = waves(t, 128, 127 / 128)
    c = linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    c = linear(w, "t_embedder.mlp.2", silu(c))
    if y is not None:
        c = c + w["y_embedder.embedding_table.weight"][y]
    c = silu(c)
    h = patches_of(x, config.patch_size) @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
    h = h + dit_positions(config.dim, config.image_size // config.patch_size).float().to(x.dtype)

    def modulated(x, shift, scale):
        return standardised(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]

    for b in range(config.depth):
        name = f"blocks.{b}"
        s1, k1, g1, s2, k2, g2 = linear(w, f"{name}.adaLN_modulation.1", c).split(config.dim, -1)
        h = h + g1[:, None] * attention(w, f"{name}.attn", modulated(h, s1, k1), config.heads)
        m = linear(w, f"{name}.mlp.fc1", modulated(h, s2, k2))
        m = m * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3))) / 2
        h = h + g2[:, None] * linear(w, f"{name}.mlp.fc2", m)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).split(config.dim, -1)
    h = linear(w, "final_layer.linear", modulated(h, shift, scale))
    return image_of(h, config.patch_size, config.out_channels)


def group_norm(w, name, x, groups):
    x = standardised(x.unflatten(1, (groups, -1)).flatten(2), 1e-6).view_as(x)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def ddpm(w, config, x, t, y=None):
    angles = waves(t, config.width // 2, 1)
    temb = linear(w, "time_embed.fc1", torch.cat([angles.sin(), angles.cos()], -1))
    temb = linear(w, "time_embed.fc2", silu(temb))
    temb = silu(temb if y is None else temb + w["label_embed.weight"][y])

    def block(level, j, x):
        name, attn = f"{level}.blocks.{j}", f"{level}.attns.{j}"
        h = conv(w, f"{name}.conv1", silu(group_norm(w, f"{name}.norm1", x, config.groups)), padding=1)
        h = h + linear(w, f"{name}.time_proj", temb)[:, :, None, None]
        h = conv(w, f"{name}.conv2", silu(group_norm(w, f"{name}.norm2", h, config.groups)), padding=1)
        h = h + (conv(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)
        if f"{attn}.qkv.weight" not in w:
            return h
        tokens = group_norm(w, f"{attn}.norm", h, config.groups).flatten(2).transpose(1, 2)
        return h + attention(w, attn, tokens, 1).transpose(1, 2).reshape(h.shape)

    levels, h = len(config.multipliers), conv(w, "conv_in", x, padding=1)
    outputs = [h]
    for i in range(levels):
        for j in range(config.blocks):
            h = block(f"down.{i}", j, h)
            outputs.append(h)
        if i < levels - 1:  # a zero row below and a zero column to the right, none above or to the left
            padded = torch.cat([h, torch.zeros_like(h[:, :, :1])], 2)
            padded = torch.cat([padded, torch.zeros_like(padded[..., :1])], 3)
            h = conv(w, f"down.{i}.downsample.conv", padded, stride=2)
            outputs.append(h)
    h = block("mid", 1, block("mid", 0, h))
    for i in range(levels):
        for j in range(config.blocks + 1):
            h = block(f"up.{i}", j, torch.cat([h, outputs.pop()], 1))
        if i < levels - 1:
            h = conv(w, f"up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv(w, "conv_out", silu(group_norm(w, "norm_out", h, config.groups)), padding=1)


def biases_and_normalised_values(network):
    """What papers count in one forward besides products: each bias as one, each normalised value as two."""
    counts = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            each = 2 if isinstance(module, nn.GroupNorm) else 1
            module.register_forward_hook(lambda _m, _i, output, each=each: counts.append(each * output.numel()))
    network(*network.example_inputs())
    return sum(counts)
