"""The measured shapes: layers of our models and of published models, and sweeps over sizes.

    y (M, N) = act(x (M, K) W^T + b) + r          M: rows of x, that is images times tokens
    y (B, N, H', W') = conv(x (B, C, H, W))       as a product: M = B H' W', N = output channels, K = C kh kw

`select` takes a comma-separated list of: a model of `sparsedm.models` or of PUBLISHED as name@batch; `models` for all
of them; the sweeps `square`, `m-sweep`, `grid`, or only their shapes with a number of rows, such as square@8192. Layers
of equal shape are one entry, with their number in `layers`.
"""

import argparse
import collections
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from sparsedm.commands import options as types
from sparsedm.errors import InputError
from sparsedm.models import MODELS, build_model

BATCHES = (1, 16, 64)
SQUARES = (8192, 4096, 2048, 1024, 16384, 512, 256, 12288, 6144, 3072, 1536)  # the most important first
ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
GRID = (1024, 2048, 4096, 8192, 16384)
MEASURED_MODELS = [n for n in MODELS if not n.endswith("-tiny") and not n.startswith("slimmable-")]  # distinct, real
SWEEPS = ("square", "m-sweep", "grid")


@dataclass(frozen=True)
class LinearShape:
    model: str  # or the sweep's name
    layer: str
    M: int
    N: int
    K: int
    activation: str | None = None
    residual: bool = False
    layers: int = 1

    @property
    def name(self):
        return f"{self.model} {self.layer}"


@dataclass(frozen=True)
class ConvShape:
    model: str
    layer: str
    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    layers: int = 1

    @property
    def name(self):
        return f"{self.model} {self.layer}"

    @property
    def M(self):
        out = [(size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.height, self.width)]
        return self.batch * out[0] * out[1]

    @property
    def N(self):
        return self.filters

    @property
    def K(self):
        return self.channels * self.kernel**2


def select(spec, kind, batches=BATCHES, quick=False):
    """The shapes that `spec` names, of `kind` LinearShape or ConvShape. quick: sweeps small enough for a CPU.

    Raises: InputError for a name that is none of the above, or if nothing is left.
    """
    found = []
    for name, number in listed(spec):
        chosen = [number] if number else batches
        if name in SWEEPS:
            shapes = sweep(name, quick) if kind is LinearShape else []
            found += [shape for shape in shapes if number in (None, shape.M)]
        elif name == "models":
            found += [shape for n in (*MEASURED_MODELS, *PUBLISHED) for b in chosen for shape in of_model(n, b)]
        else:
            found += [shape for b in chosen for shape in of_model(name, b)]
    found = [shape for shape in dict.fromkeys(found) if isinstance(shape, kind)]
    if not found:
        raise InputError(f"shapes {spec!r} hold no {'linear' if kind is LinearShape else 'convolution'} layer")
    return found


def listed(spec):
    """[(name, the number after its @ or None)] of a comma-separated list.

    Raises: InputError if what follows an @ is no number from 1.
    """
    found = []
    for item in [part.strip() for part in spec.split(",") if part.strip()]:
        name, at, number = item.partition("@")
        try:
            found.append((name, types.count(number) if at else None))
        except argparse.ArgumentTypeError as error:
            advice = "write model@batch, for example uvit-cifar10-small@64"
            raise InputError(f"shapes {item!r}: {error}; {advice}") from None
    return found


def sweep(name, quick=False):
    """[LinearShape] of the sweep over sizes of that name."""
    squares, rows, side, grid = (SQUARES, ROWS, 4096, GRID)
    if quick:
        squares, rows, side, grid = (128, 256, 512, 1024), (16, 64, 256, 1024), 512, (128, 256, 512)
    gelu = {"activation": "gelu_tanh", "residual": True}
    if name == "square":
        return [LinearShape(name, f"{n}", n, n, n, **gelu) for n in squares]
    if name == "m-sweep":
        return [LinearShape(name, f"{m}x{side}x{side}", m, side, side, **gelu) for m in rows]
    return [LinearShape(name, f"{m}x{n}x{side}", m, n, side, **gelu) for m in grid for n in grid]


def of_model(name, batch):
    """The distinct linear and convolution shapes of a model at this batch size, in order of execution.

    Raises: InputError for an unknown model.
    """
    if name in PUBLISHED:
        return _grouped(PUBLISHED[name](f"{name}@{batch}", batch))
    if name not in MODELS:
        known = ", ".join([*MODELS, *PUBLISHED, *SWEEPS, "models"])
        raise InputError(f"unknown shapes {name!r}: one of {known}")
    return _grouped(shape for _, shape in trace(build_model(name, device="meta"), f"{name}@{batch}", batch))


def trace(model, name, batch):
    """[(layer's dotted name, its shape)] of one forward of `model` at this batch size; nothing is computed."""
    found = []

    def see(layer_name, layer):
        def hook(module, inputs, options, output):
            x = inputs[0]
            if isinstance(layer, nn.Linear):
                residual = options.get("residual") is not None or len(inputs) > 1
                sizes = (x.shape[:-1].numel(), layer.out_features, layer.in_features)
                shape = LinearShape(name, layer_name, *sizes, getattr(layer, "activation", None), residual)
            else:
                geometry = (layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])
                shape = ConvShape(name, layer_name, *x.shape, *geometry)
            found.append((layer_name, shape))

        return layer.register_forward_hook(hook, with_kwargs=True)

    state = {n: t.detach().to("meta") for n, t in [*model.named_parameters(), *model.named_buffers()]}
    inputs = tuple(x if x is None else x.to("meta") for x in model.example_inputs(batch))
    hooks = [see(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        with torch.no_grad():
            functional_call(model, state, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grouped(shapes):
    """One entry for all layers that differ only in their name: the first name, and their number."""
    count, first = collections.Counter(), {}
    for shape in shapes:
        key = replace(shape, layer="", layers=1)
        count[key] += shape.layers
        first.setdefault(key, shape)
    return [replace(shape, layers=count[key]) for key, shape in first.items()]


# ---- published networks that are not in this package: sizes from their papers and public configurations --------------


def _sd3_medium(name, batch):
    """Stable Diffusion 3 medium at 1024x1024 (arXiv 2403.03206): 24 joint blocks, width 1536, 4096 + 333 text tokens.

    The last block has no text half after its attention.
    """
    image, text = 4096 * batch, 333 * batch

    def block(part, tokens, count):
        return [
            LinearShape(name, f"{part}.qkv", tokens, 4608, 1536, layers=24),
            LinearShape(name, f"{part}.proj", tokens, 1536, 1536, residual=True, layers=count),
            LinearShape(name, f"{part}.fc1", tokens, 6144, 1536, "gelu_tanh", layers=count),
            LinearShape(name, f"{part}.fc2", tokens, 1536, 6144, residual=True, layers=count),
        ]

    return block("image", image, 24) + block("text", text, 23)


def _sd15(name, batch):
    """The U-Net of Stable Diffusion 1.5 at 512x512 (arXiv 2112.10752): widths 320, 640, 1280, 1280.

    Transformer blocks: 2 down and 3 up at each of the first three levels, 1 in the middle; text is 77 x 768.
    """
    found = []
    for side, width, blocks in ((64, 320, 5), (32, 640, 5), (16, 1280, 5), (8, 1280, 1)):
        rows, at = side * side * batch, f"{side}x{side}"
        found += [
            LinearShape(name, f"{at} self.qkv", rows, 3 * width, width, layers=blocks),
            LinearShape(name, f"{at} attention.out", rows, width, width, residual=True, layers=2 * blocks),
            LinearShape(name, f"{at} cross.q", rows, width, width, layers=blocks),
            LinearShape(name, f"{at} cross.kv", 77 * batch, 2 * width, 768, layers=blocks),
            LinearShape(name, f"{at} ff.geglu", rows, 8 * width, width, layers=blocks),
            LinearShape(name, f"{at} ff.out", rows, width, 4 * width, residual=True, layers=blocks),
        ]
    # (side, input channels, output channels, 3x3 convolutions with them in residual blocks, down and up)
    convolutions = (
        *((64, 320, 320, 7), (64, 960, 320, 1), (64, 640, 320, 2)),
        *((32, 320, 640, 1), (32, 640, 640, 6), (32, 1920, 640, 1), (32, 1280, 640, 1), (32, 960, 640, 1)),
        *((16, 640, 1280, 1), (16, 1280, 1280, 6), (16, 2560, 1280, 2), (16, 1920, 1280, 1)),
        *((8, 1280, 1280, 11), (8, 2560, 1280, 3)),
    )
    for side, channels, filters, count in convolutions:
        shape = f"{side}x{side} {channels}->{filters}"
        found.append(ConvShape(name, shape, batch, channels, side, side, filters, layers=count))
    return found


PUBLISHED = {"sd3-medium": _sd3_medium, "sd-1.5": _sd15}
