"""y = act(conv2d(x, W24) + b) + r in NHWC as an implicit product on `wgmma.mma_async.sp` (sm_90a).

    y[b, h, w, n] = act(sum_{i, j, c} x[b, S h + i - P, S w + j - P, c] W[n, i, j, c] + b[n]) + r[b, h, w, n]

K runs over (i, j, c); a slot of the ring is 64 channels at one kernel position, so the 2:4 groups lie along channels
and CIN must be a multiple of 64. One tile is BLOCK_N features x a patch of TB images, TH rows and TW columns of the
output. Its part of x is one TMA box of the five-dimensional view (B, H/S, S, W/S, S C) of x: with stride 2 a kernel
position reads every other row and column, which in this view is an index of the third axis and an offset in the last;
images of odd sides are copied for it, with a row or column of zeros behind.
Outside the image TMA fills with zeros, and that is the padding. Everything else is as in `wgmma_kernels.py`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from sparsedm.kernels.launch import Launch, multiprocessors
from sparsedm.kernels.sparse24.ptx import KIND, Epilogue, shared_base, tma_load_5d
from sparsedm.kernels.sparse24.wgmma import start
from sparsedm.kernels.sparse24.wgmma_pipeline import (
    Config,
    allocate,
    boxes,
    descriptors,
    empty_slot,
    epilogue,
    load_weight,
    multiply_tile,
    next_slot,
    stage_bytes,
)

# The default for more than 128 features, the default for up to 128, and one with more tiles.
# block_k is the number of channels that TMA loads at one kernel position.
CONFIGS = (
    Config(block_n=256, block_m=128, block_k=64, stages=4),
    Config(block_n=128, block_m=256, block_k=64, stages=3),
    Config(block_n=128, block_m=128, block_k=64, stages=5),
)


@dataclass(frozen=True)
class Window:
    """The kernel, and the patch of the output that is one tile: compile-time arguments of the convolution."""

    height: int
    width: int
    stride: int
    patch: tuple  # (images, rows, columns), block_m pixels


@gluon.constexpr_function
def box_of(window):
    """The TMA box of a tile's output, of 64 features."""
    return [*window.patch, 64]


@gluon.jit
def _patch(t, N, HO, WO, CONFIG: gl.constexpr, WINDOW: gl.constexpr):
    """Tile number t -> its first feature, image, row and column. Tiles of one patch are neighbours: x stays in L2."""
    tiles_n = gl.cdiv(N, CONFIG.block_n)
    columns = gl.cdiv(WO, WINDOW.patch[2])
    rows = gl.cdiv(HO, WINDOW.patch[1])
    patch = t // tiles_n
    n = t % tiles_n * CONFIG.block_n
    image = patch // (columns * rows) * WINDOW.patch[0]
    row = patch // columns % rows * WINDOW.patch[1]
    return n, image, row, patch % columns * WINDOW.patch[2]


@gluon.jit
def _producer(N, HO, WO, CIN, PAD_H, PAD_W, tiles, CONFIG: gl.constexpr, WINDOW: gl.constexpr, KERNEL: gl.constexpr):
    SHIFT: gl.constexpr = WINDOW.stride - 1  # log2 of 1 and 2
    base = shared_base()
    slot = 0
    phase = 0
    steps = CIN // 64
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, b, h, w = _patch(t, N, HO, WO, CONFIG, WINDOW)
        for k in range(WINDOW.height * WINDOW.width * steps):
            row = k // steps // WINDOW.width - PAD_H
            column = k // steps % WINDOW.width - PAD_W
            channel = k % steps * 64 + (column & SHIFT) * CIN
            full, x, weight, metadata = empty_slot(base, slot, phase, CONFIG)
            tma_load_5d(x, channel, w + (column >> SHIFT), row & SHIFT, h + (row >> SHIFT), b, full, KERNEL, 10)
            load_weight(weight, metadata, full, n, k, 0, CONFIG, KERNEL, 0, 5)
            slot, phase = next_slot(slot, phase, CONFIG)


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr, image, CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    y_desc, r_desc, bias_ptr, panels, arrived, N, HO, WO, CIN, tiles = image
    FIRST: gl.constexpr = WARPGROUP * (CONFIG.block_n // 2)
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    BOX: gl.constexpr = box_of(WINDOW)
    sink = (y_desc, r_desc, bias_ptr, bias_ptr, 0, bias_ptr, bias_ptr, 1)
    base = shared_base()
    bars = base + CONFIG.stages * SIZE[3]
    w0, x0 = descriptors(base, FIRST, CONFIG)
    words = base + (SIZE[0] + SIZE[1]) + 4 * gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    slot = 0
    phase = 0
    residual_phase = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, b, h, w = _patch(t, N, HO, WO, CONFIG, WINDOW)
        n += FIRST
        steps = WINDOW.height * WINDOW.width * (CIN // 64)
        residual = n, (b, h, w), r_desc, panels, arrived.index(WARPGROUP)
        acc, slot, phase = multiply_tile(
            bars, words, w0, x0, slot, phase, steps, residual, FIRST, CONFIG, KIND, EPILOGUE.residual, BOX
        )
        epilogue(
            acc, n, (b, h, w), sink, panels, arrived.index(WARPGROUP), residual_phase, 0, N,
            FIRST // 64, 4, CONFIG, EPILOGUE, BOX,
        )  # fmt: skip
        residual_phase = residual_phase ^ 1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=("N", "HO", "WO", "CIN", "PAD_H", "PAD_W", "tiles"), do_not_specialize_on_alignment=("bias_ptr",)
)
def conv_specialized(
    w_desc, e_desc, x_desc, y_desc, r_desc, bias_ptr, N, HO, WO, CIN, PAD_H, PAD_W, tiles,
    CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup per half of block_n and one TMA warp, as linear_specialized."""
    ring, panels, arrived = allocate(CONFIG, False, y_desc.dtype)
    image = (y_desc, r_desc, bias_ptr, panels, arrived, N, HO, WO, CIN, tiles)
    gl.warp_specialize(
        [
            (_consumer, (0, image, CONFIG, EPILOGUE, KIND, WINDOW)),
            (_consumer, (1, image, CONFIG, EPILOGUE, KIND, WINDOW)),
            (_producer, (N, HO, WO, CIN, PAD_H, PAD_W, tiles, CONFIG, WINDOW, "conv_specialized")),
        ],
        [4, 1],
        [232, 40],
    )
    ring._keep_alive()


def launch(*tensors, **options):
    """Computes y; arguments as `plan`."""
    for step in plan(*tensors, **options):
        start(step)


def plan(
    x, values, metadata, y, *, kernel_size, stride, padding, bias, activation, residual, config=CONFIGS[0], blocks=None
):
    """[Launch] that computes y (B, HO, WO, N) of x (B, H, W, CIN), both contiguous; the weight in the layout "tma"."""
    images, height, width, channels = x.shape
    _, rows, columns, features = y.shape
    if height % stride or width % stride:
        x = F.pad(x, (0, 0, 0, width % stride, 0, height % stride))
        _, height, width, _ = x.shape
    patch = choose_patch(config.block_m, rows, columns)
    split = x.view(images, height // stride, stride, width // stride, stride * channels)
    words = boxes(config)[2]
    pixels = (*patch, 64)
    maps = {
        "w_desc": (values, (config.block_n, 32), 64),
        "e_desc": (metadata, (1, words), 0),
        "x_desc": (split, (patch[0], patch[1], 1, patch[2], 64), 128),
        "y_desc": (y, pixels, 128),
        "r_desc": (y if residual is None else residual, pixels, 128),
    }
    patches = -(-images // patch[0]) * -(-rows // patch[1]) * -(-columns // patch[2])
    arguments = {
        "bias_ptr": y if bias is None else bias.contiguous(),
        "N": features,
        "HO": rows,
        "WO": columns,
        "CIN": channels,
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "tiles": patches * -(-features // config.block_n),
    }
    finish = Epilogue(activation, bias=bias is not None, residual=residual is not None)
    window = Window(*kernel_size, stride, patch)
    constants = {"CONFIG": config, "EPILOGUE": finish, "KIND": KIND[x.dtype], "WINDOW": window}
    grid = min(blocks or multiprocessors(x.device), arguments["tiles"])
    return [Launch(conv_specialized, (grid,), arguments, constants, 4, maps)]


def choose_patch(pixels, rows, columns):
    """(images, rows, columns), powers of two that make `pixels`: as square as the output allows."""
    width = min(16, 1 << (columns - 1).bit_length())
    height = min(pixels // width, 1 << (rows - 1).bit_length())
    return pixels // width // height, height, width
