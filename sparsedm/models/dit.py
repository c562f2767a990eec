"""DiT: a transformer that predicts the noise; time and class modulate its blocks (arXiv 2212.09748).

    condition: c = t_embedder(t) + y_embedder(y); six vectors per block and two for the last layer, linear in silu(c)
    block:     x = x + gate_1 * attention((1 + scale_1) norm1(x) + shift_1)
               x = x + gate_2 * fc2(gelu(fc1((1 + scale_2) norm2(x) + shift_2)))
    output:    linear((1 + scale) norm_final(x) + shift) as pixels of their patch

Modules have the names of the official checkpoints (github.com/facebookresearch/DiT): these load with strict=True. The
official networks were trained on the "ddpm" schedule of `diffusion.py`. Their guidance of scale s is ours of s - 1. It
extrapolates only the first three of the four channels, "for exact reproducibility"; ours extrapolates all channels, as
in the paper's formula.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.attention import self_attention
from sparsedm.layers import Linear
from sparsedm.models.inputs import Labelled, check_config, check_shapes, embed_labels, example_inputs, labels_of
from sparsedm.models.uvit import PatchEmbed, timestep_embedding, unpatchify

_TIME_FREQUENCIES = 256


@dataclass(frozen=True)
class DiTConfig(Labelled):
    """The shape of a DiT; the defaults are the paper's XL/2 for 256x256 images as latents of 32x32x4.

    image_size and patch_size are in pixels of the input. num_classes counts the real classes, 0 = unconditional. With
    null_label the label table has one more row, index num_classes, for "no class" in guidance. learn_sigma: the network
    has twice the output channels; the second half is the variance, see `forward`. schedule: a name in
    `diffusion.SCHEDULES`.
    """

    kind: str = "dit"
    image_size: int = 32
    channels: int = 4
    patch_size: int = 2
    dim: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: int = 4
    num_classes: int = 1000
    null_label: bool = True
    learn_sigma: bool = True
    schedule: str = "ddpm"

    def __post_init__(self):
        sizes = ("image_size", "channels", "patch_size", "dim", "depth", "heads", "mlp_ratio")
        check_config("DiT", self, sizes, ("num_classes",))
        if self.image_size % self.patch_size:
            raise InputError(f"DiT image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        if self.dim % self.heads or self.dim % 4:
            raise InputError(f"DiT dim={self.dim}: must be a multiple of 4 and of heads={self.heads}")

    @property
    def out_channels(self):
        return self.channels * (2 if self.learn_sigma else 1)


PRESETS = {
    "dit-tiny": DiTConfig(channels=3, patch_size=4, dim=128, depth=4, heads=4, num_classes=0, learn_sigma=False),
}
_SIZES = {  # table 1
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "xlarge": {"dim": 1152, "depth": 28, "heads": 16},
}
for _side, _patch, _size in itertools.product((256, 512), (2, 4, 8), _SIZES):  # "dit-imagenet256-small": patch 2
    PRESETS[f"dit-imagenet{_side}-{_size}" + f"-patch{_patch}" * (_patch != 2)] = DiTConfig(
        image_size=_side // 8, patch_size=_patch, **_SIZES[_size]
    )


def position_embedding(dim, side):
    """(1, side², dim): sines and cosines of each patch's column, then of its row, at dim/4 frequencies each."""
    frequencies = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # (side, dim/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim/2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1)[None].float()


def modulate(x, shift, scale):
    """x (B, L, D); shift and scale (B, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TimeEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # the first layer has the activation; the activation's index in the official Sequential stays empty
        self.mlp = nn.Sequential(Linear(_TIME_FREQUENCIES, dim, activation="silu"), nn.Identity(), Linear(dim, dim))

    def forward(self, t, dtype):
        return self.mlp(timestep_embedding(t, _TIME_FREQUENCIES).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.label_rows, config.dim)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, gate, residual):
        return self.proj(self_attention(self.qkv(x), self.heads), residual, scale=gate)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden, activation="gelu_tanh")
        self.fc2 = Linear(hidden, dim)

    def forward(self, x, gate, residual):
        return self.fc2(self.fc1(x), residual, scale=gate)


def _norm(dim):
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = _norm(config.dim), _norm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.dim, 6 * config.dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = self.attn(modulate(self.norm1(x), shift1, scale1), gate1, residual=x)
        return self.mlp(modulate(self.norm2(x), shift2, scale2), gate2, residual=x)


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_final = _norm(config.dim)
        self.linear = Linear(config.dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.dim, 2 * config.dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Noise predictor; see `forward`.

    `sparse_layers` are the layers over all tokens. The modulations hold a third of the parameters; they are computed
    once per image, cost almost nothing, and stay dense.
    """

    sparse_layers = r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])$"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimeEmbedder(config.dim)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config)
        side = config.image_size // config.patch_size
        self.register_buffer("pos_embed", position_embedding(config.dim, side))  # constant, but in the checkpoints
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def _initialise(self):
        """Every block starts as the identity; the output starts as zero (adaLN-Zero, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
        small = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for module in small + ([self.y_embedder.embedding_table] if self.config.num_classes else []):
            nn.init.normal_(module.weight, std=0.02)
        zero = [block.adaLN_modulation[1] for block in self.blocks]
        for module in [*zero, self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(module.weight)

    def forward(self, x, t, y=None, variance=False):
        """The noise in x.

        x: images (B, channels, image_size, image_size), in the dtype of the weights (any float under autocast).
        t: timesteps (B,) in units 0..999, fractions allowed.
        y: class labels (B,) int64 in 0..num_classes; None means the null label. Only for class-conditional models.
        variance: return twice the channels; the second half is the variance, see `samplers.ddpm`.
        Returns: noise, shape of x.
        Raises: InputError if a shape differs from the above, a label is missing or not asked for, or the network has
        no variance.
        """
        config = self.config
        if variance and not config.learn_sigma:
            raise InputError("this DiT has learnt no variance (learn_sigma=False)")
        y = labels_of(config, x, y)
        check_shapes("DiT", config, x, t, y)
        c = self.t_embedder(t, self.pos_embed.dtype)
        if y is not None:
            c = c + embed_labels("DiT", config, self.y_embedder, y)
        x = self.x_embedder(x) + self.pos_embed  # (B, patches, dim)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)  # (B, patches, patch_size² * out_channels)
        x = unpatchify(x, config)
        return x if variance else x[:, : config.channels]

    def example_inputs(self, batch=1):
        """Deterministic (x, t, y) for `forward`, on the model's device and in its dtype."""
        return example_inputs(self.config, self.pos_embed, batch)
