"""What tests share: networks and a data set small enough to train in milliseconds."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsedm.layers import Linear
from sparsedm.train.data import ImageSet
from sparsedm.train.loop import TrainOptions

OPTIONS = TrainOptions(
    steps=12, batch_size=8, lr=1e-2, warmup=4, ema=0.9, log_every=3, save_every=5, validate_every=6, seed=3
)


class Small(nn.Module):
    """A convolution with 3 input channels (never 2:4), one with 32, and two linears, one of them narrow."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.head, self.narrow = nn.Linear(32, 30), nn.Linear(30, 5)

    def forward(self, x):
        return self.narrow(F.gelu(self.head(self.conv(F.silu(self.stem(x))).mean((2, 3)))))


@dataclass(frozen=True)
class TinyConfig:
    kind: str = "tiny"
    image_size: int = 4
    channels: int = 2
    num_classes: int = 3
    null_label: bool = True
    width: int = 64


class Tiny(nn.Module):
    """Everything that resuming could forget: masks, dropout, labels, and buffers of both kinds (in the batch norm)."""

    sparse_layers = r"^(first|second)$"

    def __init__(self, config):
        super().__init__()
        self.config = config
        pixels = config.channels * config.image_size**2
        self.first, self.second = Linear(pixels, config.width, activation="silu"), Linear(config.width, config.width)
        self.time, self.norm, self.dropout = Linear(1, config.width), nn.BatchNorm1d(config.width), nn.Dropout(0.1)
        self.label = nn.Embedding(config.num_classes + 1, config.width) if config.num_classes else None
        self.last = Linear(config.width, pixels)

    def forward(self, x, t, y=None):
        hidden = self.first(x.flatten(1)) + self.time(t[:, None] / 999)
        hidden = self.dropout(self.norm(hidden if y is None else hidden + self.label(y)))
        return self.last(torch.relu(self.second(hidden))).view_as(x)


def tiny(seed=0, **config):
    torch.default_generator.manual_seed(seed)
    return Tiny(TinyConfig(**config))


def tiny_from(config):
    """What `build_model` is to the real networks."""
    return Tiny(TinyConfig(**config))


def tiny_images(count=40, seed=0, labels=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 2, 4, 4), generator=generator, dtype=torch.uint8)
    classes = torch.randint(3, (count,), generator=generator) if labels else None
    return ImageSet(images, classes, ("a", "b", "c"), "random")


def same_state(a, b):
    """True if two state dicts hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
