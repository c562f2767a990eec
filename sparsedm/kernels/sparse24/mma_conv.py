"""y = act(conv2d(x, W24) + b) + r in NHWC as an implicit product on `mma.sp.m16n8k32` (sm_80 and later).

    y[b, h, w, n] = act(sum_{i, j, c} x[b, S h + i - P, S w + j - P, c] W[n, i, j, c] + b[n]) + r[b, h, w, n]

The rows of the product are the pixels of y, and K runs over (i, j, c); a step of the ring is 64 channels at one kernel
position (i, j), or of several where CIN is no multiple of 64; of 8 it must be one, for copies of 16 bytes. Pixels
outside the image are not copied: cp.async fills with zeros, and that is the padding. The rest is as in `mma.py`.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsedm.kernels.launch import Launch
from sparsedm.kernels.sparse24.mma import Config, copy_layout, products, store, tile, tile_count, warps
from sparsedm.kernels.sparse24.ptx import KIND, Epilogue

# The first is the default until these are timed.
CONFIGS = (
    Config(block_n=128, block_m=128, warps_n=4, warps_m=2, stages=4),
    Config(block_n=128, block_m=64, warps_n=2, warps_m=2, stages=4),
    Config(block_n=64, block_m=64, warps_n=2, warps_m=2, stages=4),
)


@dataclass(frozen=True)
class Window:
    """The kernel: a compile-time argument of the convolution."""

    height: int
    width: int
    stride: int
    narrow: bool  # channels no multiple of 64: this general way costs the others 31 of 213 instructions in the loop


@gluon.jit
def pixels_of(x_ptr, H, W, HO, WO, chunks, pad_h, pad_w, m, M, CONFIG: gl.constexpr, WINDOW: gl.constexpr):
    """A source for `products`: what lies under the kernel at the output pixels m .. m + block_m - 1."""
    KH: gl.constexpr = WINDOW.height
    KW: gl.constexpr = WINDOW.width
    row = m + gl.arange(0, CONFIG.block_m, layout=gl.SliceLayout(1, copy_layout(CONFIG)))
    image = m // (HO * WO)
    h = row % (HO * WO) // WO * WINDOW.stride - pad_h
    w = row % WO * WINDOW.stride - pad_w
    pixel = ((row // (HO * WO) - image) * H + h) * W + w
    return x_ptr + image.to(gl.int64) * (H * W * chunks * 4), pixel, h, w, row < M, H, W, chunks, KH, KW


@gluon.jit
def pixel_addresses(source, word, step):
    """Where the words of 64-channel step `step` lie, and which of them are inside the image: CIN a multiple of 64."""
    x, pixel, h, w, exists, H, W, chunks, _, KW = source
    position = step // (chunks // 8)
    i = position // KW
    j = position % KW
    inside = exists & (h >= -i) & (h < H - i) & (w >= -j) & (w < W - j)
    channel = step % (chunks // 8) * 32 + word
    return x + ((pixel + i * W + j)[:, None] * (chunks * 4) + channel[None, :]), inside[:, None]


@gluon.jit
def narrow_addresses(source, word, step):
    """The same for any CIN: every 16 bytes of the 64 columns have a kernel position of their own."""
    x, pixel, h, w, exists, H, W, chunks, KH, KW = source
    chunk = step * 8 + word // 4
    position = chunk // chunks
    i = (position // KW)[None, :]
    j = (position % KW)[None, :]
    h = h[:, None] + i
    w = w[:, None] + j
    inside = exists[:, None] & (position < KH * KW)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    channel = chunk % chunks * 4 + word % 4
    return x + ((pixel[:, None] + (i * W + j)) * (chunks * 4) + channel[None, :]), inside


@gluon.jit(do_not_specialize=("H", "W", "HO", "WO", "chunks", "pad_h", "pad_w", "M", "steps"))
def conv_mma(
    w_ptr, e_ptr, x_ptr, y_ptr, bias_ptr, r_ptr, H, W, HO, WO, chunks, pad_h, pad_w, M, N, steps,
    CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One program per tile of y (M = B HO WO, N). x int32 (two channels each), chunks = CIN / 8 of 16 bytes."""
    n, m = tile(gl.program_id(0), M, N, CONFIG)
    source = pixels_of(x_ptr, H, W, HO, WO, chunks, pad_h, pad_w, m, M, CONFIG, WINDOW)
    addresses: gl.constexpr = narrow_addresses if WINDOW.narrow else pixel_addresses
    acc = products(w_ptr, e_ptr, source, n, 0, steps, steps, CONFIG, KIND, addresses)
    store(acc, n, m, M, N, y_ptr, (bias_ptr, bias_ptr, 1, r_ptr, N), CONFIG, EPILOGUE)


def launch(*tensors, **options):
    """Computes y; arguments as `plan`."""
    for step in plan(*tensors, **options):
        step.start()


def plan(x, values, metadata, y, *, kernel_size, stride, padding, bias, activation, residual, config=CONFIGS[0]):
    """[Launch] that computes y (B, HO, WO, N) of x (B, H, W, CIN), both contiguous; the weight as "fragments"."""
    _, height, width, channels = x.shape
    images, rows, columns, features = y.shape
    pixels = images * rows * columns
    arguments = {
        "w_ptr": values,
        "e_ptr": metadata,
        "x_ptr": x.view(torch.int32),
        "y_ptr": y,
        "bias_ptr": y if bias is None else bias.contiguous(),
        "r_ptr": y if residual is None else residual,
        "H": height,
        "W": width,
        "HO": rows,
        "WO": columns,
        "chunks": channels // 8,
        "pad_h": padding[0],
        "pad_w": padding[1],
        "M": pixels,
        "N": features,
        "steps": metadata.shape[1],
    }
    constants = {
        "CONFIG": config,
        "EPILOGUE": Epilogue(activation, bias=bias is not None, residual=residual is not None),
        "KIND": KIND[x.dtype],
        "WINDOW": Window(*kernel_size, stride, channels % 64 != 0),
    }
    return [Launch(conv_mma, (tile_count(pixels, features, config),), arguments, constants, warps(config))]
