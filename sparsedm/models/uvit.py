"""U-ViT: a vision transformer with long skip connections that predicts the noise in an image (arXiv 2209.12152).

    tokens:  x = [label, time, context, patches] + pos_embed; label and context only if the model has them
    block:   x = x + proj(attention(qkv(norm1(x))));  x = x + fc2(gelu(fc1(norm2(x))))
    skips:   each out block starts with x = skip_linear([x, skip]); skip is the output of the opposite in block
    output:  the patch tokens, decoder_pred(norm(x)) as pixels of their patch, then a 3x3 convolution

Modules have the names of the official checkpoints (github.com/baofff/U-ViT): these load with strict=True.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

from sparsedm.diffusion import schedule_of
from sparsedm.errors import InputError
from sparsedm.kernels.attention import self_attention
from sparsedm.layers import Conv2d, Linear
from sparsedm.models.inputs import Labelled, check_config, check_shapes, embed_labels, example_inputs, labels_of, ramp


@dataclass(frozen=True)
class UViTConfig(Labelled):
    """The shape of a U-ViT; the defaults are the paper's S/2.

    image_size and patch_size are in pixels of the input, an image or a latent. depth counts the in and out blocks
    without the middle block. num_classes counts the real classes, 0 = unconditional. With null_label the label table
    has one more row, index num_classes, for "no class" in guidance: the official ImageNet 256 configuration says 1001
    classes, ours 1000. context_tokens > 0: the number of condition vectors, of context_dim numbers each.
    mlp_time_embed: two layers on the time token. qkv_bias: SparseDM's sparse networks have one, no published U-ViT has.
    schedule: a name in `diffusion.SCHEDULES`. velocity: the layers compute v; the predicted noise is σ(t) x + α(t) v
    with the schedule's α and σ (arXiv 2202.00512, appendix D). This keeps errors at high noise small in short training
    runs. The published networks compute the noise directly.
    """

    kind: str = "uvit"
    image_size: int = 32
    channels: int = 3
    patch_size: int = 2
    dim: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: int = 4
    num_classes: int = 0
    null_label: bool = True
    context_tokens: int = 0
    context_dim: int = 768
    final_conv: bool = True
    velocity: bool = False
    mlp_time_embed: bool = False
    qkv_bias: bool = False
    schedule: str = "vp-sde"

    def __post_init__(self):
        sizes = ("image_size", "channels", "patch_size", "dim", "heads", "mlp_ratio", "context_dim")
        check_config("U-ViT", self, sizes, ("depth", "num_classes", "context_tokens"))
        if self.image_size % self.patch_size:
            raise InputError(f"U-ViT image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}")
        if self.dim % self.heads or self.dim % 2:
            raise InputError(f"U-ViT dim={self.dim}: must be even and a multiple of heads={self.heads}")
        if self.depth % 2:
            raise InputError(f"U-ViT depth={self.depth}: must be even, as every in block has its out block")

    @property
    def extra_tokens(self):
        return bool(self.num_classes) + 1 + self.context_tokens


_MID = {"dim": 768, "depth": 16, "heads": 12}
_LARGE = {"dim": 1024, "depth": 20, "heads": 16}
_HUGE = {"dim": 1152, "depth": 28, "heads": 16, "final_conv": False, "schedule": "scaled-linear"}
# latents of 256x256 and 512x512 images: 8 times smaller, 4 channels deep, as many tokens of both
_LATENT = {"image_size": 32, "channels": 4}
_LATENT512 = {"image_size": 64, "channels": 4, "patch_size": 4}
_IMAGENET64 = {"image_size": 64, "patch_size": 4, "num_classes": 1000, "null_label": False}

PRESETS = {
    "uvit-tiny": UViTConfig(patch_size=4, dim=128, depth=4, heads=4),
    "uvit-cifar10-small": UViTConfig(),
    "uvit-celeba64-small": UViTConfig(image_size=64, patch_size=4),
    "uvit-imagenet64-mid": UViTConfig(**_IMAGENET64, **_MID),
    "uvit-imagenet64-large": UViTConfig(**_IMAGENET64, **_LARGE),
    "uvit-imagenet256-large": UViTConfig(**_LATENT, **_LARGE, num_classes=1000),
    "uvit-imagenet256-huge": UViTConfig(**_LATENT, **_HUGE, num_classes=1000),
    "uvit-imagenet512-large": UViTConfig(**_LATENT512, **_LARGE, num_classes=1000),
    "uvit-imagenet512-huge": UViTConfig(**_LATENT512, **_HUGE, num_classes=1000),
    "uvit-coco-small": UViTConfig(**_LATENT, context_tokens=77, schedule="scaled-linear"),
    "uvit-coco-small-deep": UViTConfig(**_LATENT, depth=16, context_tokens=77, schedule="scaled-linear"),
}


def timestep_embedding(t, dim):
    """t (B,) -> (B, dim): [cos | sin] of t times dim/2 frequencies from 1 down to nearly 1e-4, in at least fp32."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = dim // 2
    # the official order of operations: another order differs by 6e-5 at widths 768 and 1152
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angles = t[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, x):
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


def unpatchify(x, config):
    """Patches (B, patches, patch_size**2 * C) as images (B, C, image_size, image_size)."""
    side, patch = config.image_size // config.patch_size, config.patch_size
    return rearrange(x, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=side, p1=patch, p2=patch)


class Attention(nn.Module):
    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=bias)
        self.proj = Linear(dim, dim)

    def forward(self, x, residual):
        return self.proj(self_attention(self.qkv(x), self.heads), residual)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden, activation="gelu")
        self.fc2 = Linear(hidden, dim)

    def forward(self, x, residual):
        return self.fc2(self.fc1(x), residual)


class Block(nn.Module):
    def __init__(self, config, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim)
        self.skip_linear = Linear(2 * config.dim, config.dim) if skip else None

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(x, skip=skip)
        x = self.attn(self.norm1(x), residual=x)
        return self.mlp(self.norm2(x), residual=x)


class UViT(nn.Module):
    """Noise predictor; see `forward`. `sparse_layers` are the same layers that SparseDM (arXiv 2404.10445) masks."""

    sparse_layers = r"\.(attn\.(qkv|proj)|mlp\.fc[12])$"

    def __init__(self, config):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.extra_tokens + patches, config.dim))
        self.time_embed = nn.Identity()
        if config.mlp_time_embed:
            # the first layer has the activation; the activation's index in the official Sequential stays empty
            wide = Linear(config.dim, 4 * config.dim, activation="silu")
            self.time_embed = nn.Sequential(wide, nn.Identity(), Linear(4 * config.dim, config.dim))
        if config.num_classes:
            self.label_emb = nn.Embedding(config.label_rows, config.dim)
        if config.context_tokens:
            self.context_embed = Linear(config.context_dim, config.dim)
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(config.depth // 2))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(config.depth // 2))
        self.norm = nn.LayerNorm(config.dim)
        self.decoder_pred = Linear(config.dim, config.patch_size**2 * config.channels)
        self.final_layer = (
            Conv2d(config.channels, config.channels, 3, padding=1) if config.final_conv else nn.Identity()
        )

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, t, y=None, context=None):
        """The noise in x.

        x: images (B, channels, image_size, image_size), in the dtype of the weights (any float under autocast).
        t: timesteps (B,) in units 0..999 (scaled-linear: 1..1000), whole or floating-point numbers.
        y: class labels (B,) int64 in 0..num_classes; None means the null label. Only for class-conditional models.
        context: (B, context_tokens, context_dim); only, and always, for models with context tokens. A model without
        classes also takes it as y, so that training and samplers pass one condition.
        Returns: noise, shape of x.
        Raises: InputError if a shape differs from the above or a condition is missing or not asked for.
        """
        config = self.config
        y = labels_of(config, x, y)
        if config.context_tokens and not config.num_classes and context is None:
            y, context = None, y
        context_shape = (x.shape[0], config.context_tokens, config.context_dim) if config.context_tokens else None
        check_shapes("U-ViT", config, x, t, y, context=(context, context_shape))
        time = self.time_embed(timestep_embedding(t, config.dim).to(self.pos_embed.dtype))
        tokens = [time[:, None], self.patch_embed(x)]
        if y is not None:
            tokens.insert(0, embed_labels("U-ViT", config, self.label_emb, y)[:, None])
        if context is not None:
            tokens.insert(-1, self.context_embed(context.to(self.pos_embed.dtype)))
        noisy, x = x, torch.cat(tokens, dim=1) + self.pos_embed  # (B, extra_tokens + patches, dim)

        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())

        x = self.decoder_pred(self.norm(x[:, config.extra_tokens :]))  # (B, patches, patch_size**2 * channels)
        x = unpatchify(x, config)
        x = self.final_layer(x)
        if not config.velocity:
            return x
        schedule = schedule_of(self)
        t = t.to(torch.promote_types(t.dtype, torch.float32))  # of whole numbers, the schedule would be whole numbers
        time = schedule.time_of(t).view(-1, 1, 1, 1)
        return (schedule.sigma(time) * noisy + schedule.alpha(time) * x).to(noisy.dtype)  # under autocast x is rougher

    def example_inputs(self, batch=1):
        """Deterministic (x, t, y) or (x, t, y, context) for `forward`, on the model's device and in its dtype."""
        config = self.config
        context = (ramp(self.pos_embed, batch, config.context_tokens, config.context_dim),)
        return *example_inputs(config, self.pos_embed, batch), *(context if config.context_tokens else ())
