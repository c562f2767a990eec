"""The U-Net of DDPM: it predicts the noise in an image (arXiv 2006.11239, appendix B).

temb:       silu(fc2(silu(fc1(timestep embedding))) + label embedding)
block:      h = conv1(silu(norm1(x))) + time_proj(temb);  y = conv2(dropout(silu(norm2(h)))) + shortcut(x)
attention:  y = x + proj(attention(qkv(norm(x)))), one head, over the pixels
levels:     each halves the resolution going down and doubles it going up, where every block also sees the matching
            output of the way down, last in first out

The public checkpoint google/ddpm-cifar10-32 is this network; `diffusers.py` converts its weights.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.attention import self_attention
from sparsedm.layers import Conv2d, Linear
from sparsedm.models.inputs import Labelled, check_config, check_shapes, embed_labels, example_inputs, labels_of


@dataclass(frozen=True)
class DDPMConfig(Labelled):
    """The shape of a DDPM U-Net; the defaults are the paper's CIFAR-10 model.

    Level i has resolution image_size / 2**i, width * multipliers[i] channels, `blocks` residual blocks on the way down
    and one more on the way up. attention: the resolutions with attention after each block; the middle always has it.
    groups: of every GroupNorm. num_classes, null_label, schedule: see UViTConfig. ddsm: 0, or compute as DDSM's code
    with so many waves in the time embedding: other frequencies, symmetric padding, a larger epsilon in norms.
    """

    kind: str = "ddpm"
    image_size: int = 32
    channels: int = 3
    width: int = 128
    multipliers: tuple = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple = (16,)
    groups: int = 32
    dropout: float = 0.1
    num_classes: int = 0
    null_label: bool = True
    schedule: str = "ddpm"
    ddsm: int = 0

    def __post_init__(self):
        check_config("DDPM", self, ("image_size", "channels", "width", "blocks", "groups"), ("num_classes",))
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"DDPM multipliers={self.multipliers}: must be one or more numbers, each at least 1")
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            raise InputError(f"DDPM image_size={self.image_size}: cannot be halved {len(self.multipliers) - 1} times")
        if not set(self.attention) <= set(self.resolutions):
            raise InputError(f"DDPM attention={self.attention}: must be among the resolutions {self.resolutions}")
        if self.width % self.groups or self.width % 2 or self.width < 4:
            raise InputError(f"DDPM width={self.width}: must be even, over 2 and a multiple of groups={self.groups}")
        if self.ddsm < 0 or self.ddsm % 2:
            raise InputError(f"DDPM ddsm={self.ddsm}: must be 0, or an even number of waves")
        if not 0 <= self.dropout < 1:
            raise InputError(f"DDPM dropout={self.dropout}: must be at least 0 and less than 1")

    @property
    def resolutions(self):
        return tuple(self.image_size >> i for i in range(len(self.multipliers)))


PRESETS = {
    "ddpm-tiny": DDPMConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention=(8,), groups=8, dropout=0.0),
    "ddpm-cifar10": DDPMConfig(),
    "ddpm-celeba64": DDPMConfig(image_size=64, multipliers=(1, 2, 2, 2, 4)),
}


def timestep_embedding(t, dim, ddsm=False):
    """t (B,) -> (B, dim): [sin | cos] of t times dim/2 frequencies from 1 down to exactly 1e-4, in at least fp32.

    ddsm: down to nearly 1e-4, in DDSM's code.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = dim // 2
    frequencies = torch.exp(-math.log(1e4) / (half - (not ddsm)) * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


# DDPM starts every residual branch at (nearly) zero; its q, k and v are three square layers, ours are one
_INIT_GAIN = {"conv2": 1e-5, "proj": 1e-5, "conv_out": 1e-5, "qkv": math.sqrt(2)}


class TimeEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.waves, self.ddsm = config.ddsm or config.width, bool(config.ddsm)
        self.fc1 = Linear(self.waves, 4 * config.width, activation="silu")
        self.fc2 = Linear(4 * config.width, 4 * config.width)

    def forward(self, t):
        return self.fc2(self.fc1(timestep_embedding(t, self.waves, self.ddsm).to(self.fc1.bias.dtype)))


def _norm(channels, config):
    return nn.GroupNorm(config.groups, channels, eps=1e-5 if config.ddsm else 1e-6)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, config):
        super().__init__()
        self.norm1 = _norm(cin, config)
        self.conv1 = Conv2d(cin, cout, 3, padding=1)
        self.time_proj = Linear(4 * config.width, cout)
        self.norm2 = _norm(cout, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Identity() if cin == cout else Conv2d(cin, cout, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_proj(temb)[:, :, None, None]
        return self.conv2(self.dropout(F.silu(self.norm2(h))), residual=self.shortcut(x))


class Attention(nn.Module):
    def __init__(self, channels, config):
        super().__init__()
        self.norm = _norm(channels, config)
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    def forward(self, x):
        tokens = rearrange(x, "b c h w -> b (h w) c")
        qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        out = self_attention(qkv, heads=1)  # (B, HW, C)
        return rearrange(self.proj(out, residual=tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Level(nn.Module):
    """Residual blocks of one resolution, from cins[j] to cout channels. If attend[j], attention follows block j.

    downsample, upsample: the layer after the blocks on the way down or up; None at the lowest or highest resolution.
    """

    def __init__(self, cins, cout, attend, config, downsample=None, upsample=None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(cin, cout, config) for cin in cins)
        self.attns = nn.ModuleList(Attention(cout, config) if a else nn.Identity() for a in attend)
        self.downsample, self.upsample = downsample, upsample


def _downsample(channels, config):
    # zeros at the far sides only, as in DDPM's TensorFlow code
    conv = Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d(1 if config.ddsm else (0, 1, 0, 1)), conv=conv))


def _upsample(channels):
    conv = Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=conv))


class DDPM(nn.Module):
    """Noise predictor; see `forward`. `sparse_layers` are all convolutions and linear layers except the first, whose 3
    input channels hold no group of 4. SparseDM (arXiv 2404.10445) masks the same layers."""

    sparse_layers = r"^(?!conv_in$)"

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        attend = [resolution in config.attention for resolution in config.resolutions]
        lowest = len(widths) - 1
        self.time_embed = TimeEmbed(config)
        if config.num_classes:
            self.label_embed = nn.Embedding(config.label_rows, 4 * config.width)
        self.conv_in = Conv2d(config.channels, config.width, 3, padding=1)

        self.down, skips, cin = nn.ModuleList(), [config.width], config.width
        for i, cout in enumerate(widths):
            cins = [cin] + [cout] * (config.blocks - 1)
            downsample = _downsample(cout, config) if i < lowest else None
            self.down.append(Level(cins, cout, [attend[i]] * config.blocks, config, downsample=downsample))
            skips += [cout] * (config.blocks + (i < lowest))
            cin = cout
        self.mid = Level([cin, cin], cin, [True, False], config)
        self.up = nn.ModuleList()
        for i, cout in reversed(list(enumerate(widths))):
            cins = [width + skips.pop() for width in [cin] + [cout] * config.blocks]
            upsample = _upsample(cout) if i else None
            self.up.append(Level(cins, cout, [attend[i]] * len(cins), config, upsample=upsample))
            cin = cout

        self.norm_out = _norm(cin, config)
        self.conv_out = Conv2d(cin, config.channels, 3, padding=1)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, _INIT_GAIN.get(name.rpartition(".")[-1], 1.0))
                nn.init.zeros_(module.bias)

    def forward(self, x, t, y=None):
        """The noise in x.

        x: images (B, channels, image_size, image_size), in the dtype of the weights (any float under autocast).
        t: timesteps (B,) in units 0..999, fractions allowed.
        y: class labels (B,) int64 in 0..num_classes; None means the null label. Only for class-conditional models.
        Returns: noise, shape of x.
        Raises: InputError if a shape differs from the above, or labels are missing or not asked for.
        """
        y = labels_of(self.config, x, y)
        check_shapes("DDPM", self.config, x, t, y)
        temb = self.time_embed(t)  # (B, 4 * width)
        if y is not None:
            temb = temb + embed_labels("DDPM", self.config, self.label_embed, y)
        temb = F.silu(temb)

        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for block, attn in zip(level.blocks, level.attns):
                x = attn(block(x, temb))
                skips.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
                skips.append(x)
        for block, attn in zip(self.mid.blocks, self.mid.attns):
            x = attn(block(x, temb))
        for level in self.up:
            for block, attn in zip(level.blocks, level.attns):
                x = attn(block(torch.cat([x, skips.pop()], dim=1), temb))
            if level.upsample is not None:
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def example_inputs(self, batch=1):
        """Deterministic (x, t, y) for `forward`, on the model's device and in its dtype."""
        return example_inputs(self.config, self.conv_in.bias, batch)
