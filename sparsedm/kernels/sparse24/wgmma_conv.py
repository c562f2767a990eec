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

import torch
import torch.nn.functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparsedm.kernels.sparse24.ptx import (
    activate,
    barrier_arrive,
    barrier_expect,
    barrier_wait,
    block_barrier,
    box_in,
    box_out,
    shared_base,
    tma_load,
    tma_load_5d,
    wgmma_wait,
)
from sparsedm.kernels.sparse24.wgmma import descriptor, start
from sparsedm.kernels.sparse24.wgmma_pipeline import (
    accumulator_layout,
    allocate,
    boxes,
    descriptors,
    multiply,
    next_slot,
    read_metadata,
    stage_bytes,
)


@dataclass(frozen=True)
class Config:
    block_n: int  # features
    block_m: int  # pixels
    stages: int


# The default for more than 128 features, that for up to 128, and one with more tiles.
CONFIGS = (Config(256, 128, 4), Config(128, 256, 3), Config(128, 128, 5))


PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _patch(t, N, HO, WO, BLOCK_N: gl.constexpr, TB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr):
    """Tile number t -> its first feature, image, row and column. Tiles of one patch are neighbours: x stays in L2."""
    tiles_n = gl.cdiv(N, BLOCK_N)
    columns = gl.cdiv(WO, TW)
    rows = gl.cdiv(HO, TH)
    patch = t // tiles_n
    return t % tiles_n * BLOCK_N, patch // (columns * rows) * TB, patch // columns % rows * TH, patch % columns * TW


@gluon.jit
def _producer(
    N, HO, WO, CIN, PAD_H, PAD_W, tiles,
    BLOCK_N: gl.constexpr, TB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STRIDE: gl.constexpr, STAGES: gl.constexpr, KERNEL: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = TB * TH * TW
    SIZE: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, 64)
    BOX: gl.constexpr = boxes(BLOCK_N, BLOCK_M, 64, "none")
    SHIFT: gl.constexpr = STRIDE - 1  # log2 of 1 and 2
    base = shared_base()
    slot = 0
    phase = 0
    steps = CIN // 64
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, b, h, w = _patch(t, N, HO, WO, BLOCK_N, TB, TH, TW)
        for k in range(KH * KW * steps):
            row = k // steps // KW - PAD_H
            column = k // steps % KW - PAD_W
            channel = k % steps * 64 + (column & SHIFT) * CIN
            full = base + STAGES * SIZE[3] + 16 * slot
            barrier_wait(full + 8, phase ^ 1)
            barrier_expect(full, SIZE[0] + SIZE[1] + SIZE[2])
            x = base + slot * SIZE[3]
            tma_load_5d(x, channel, w + (column >> SHIFT), row & SHIFT, h + (row >> SHIFT), b, full, KERNEL, 10)
            tma_load(x + SIZE[0], 32 * k, n, full, 0, KERNEL, 0, -1, False)
            for q in gl.static_range(2 * BLOCK_N // BOX[2]):
                part = x + (SIZE[0] + SIZE[1]) + q * (BOX[2] * 4)
                tma_load(part, 2 * n + q * BOX[2], k, full, 0, KERNEL, 5, -1, False)
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr, y_desc, r_desc, bias_ptr, panels, arrived, N, HO, WO, CIN, tiles,
    BLOCK_N: gl.constexpr, TB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STAGES: gl.constexpr, KIND: gl.constexpr, ACTIVATION: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = TB * TH * TW
    TILES: gl.constexpr = BLOCK_N // 128
    FIRST: gl.constexpr = WARPGROUP * TILES
    SIZE: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, 64)
    ACC: gl.constexpr = accumulator_layout(4, BLOCK_M)
    PIXELS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    DTYPE: gl.constexpr = y_desc.dtype
    base = shared_base()
    bars = base + STAGES * SIZE[3]
    w0, x0 = descriptors(base, 64 * FIRST, BLOCK_N, BLOCK_M, 64)
    words = base + (SIZE[0] + SIZE[1]) + 4 * gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    slot = 0
    phase = 0
    residual_phase = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, b, h, w = _patch(t, N, HO, WO, BLOCK_N, TB, TH, TW)
        n += 64 * FIRST
        acc = (gl.zeros([64, BLOCK_M], gl.float32, layout=ACC),) * TILES
        for _ in range(KH * KW * (CIN // 64)):
            barrier_wait(bars + 16 * slot, phase)
            metadata = read_metadata(words, slot, 64 * FIRST, TILES, 4, BLOCK_N, BLOCK_M, 64, "none")
            step = slot * (SIZE[3] >> 4)
            acc = multiply(acc, metadata, w0 + step, x0 + step, 4, BLOCK_M, 64, KIND)
            acc = wgmma_wait(acc, 0)
            barrier_arrive(bars + 16 * slot + 8, False)
            slot, phase = next_slot(slot, phase, STAGES)
        tma.store_wait(0)  # the panels are free again
        if RESIDUAL:
            mbarrier.expect(arrived.index(WARPGROUP), TILES * BLOCK_M * 128)
            for i in gl.static_range(TILES):
                if PUBLIC:
                    panel = panels.index(FIRST + i).reinterpret(DTYPE, [TB, TH, TW, 64], PIXELS)
                else:
                    panel = panels.index(FIRST + i)._reinterpret(DTYPE, [TB, TH, TW, 64], PIXELS)
                box_in(r_desc, [b, h, w, n + 64 * i], arrived.index(WARPGROUP), panel)
            mbarrier.wait(arrived.index(WARPGROUP), residual_phase)
            residual_phase = residual_phase ^ 1
        for i in gl.static_range(TILES):
            feature = n + 64 * i + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
            panel = panels.index(FIRST + i).permute((1, 0))
            y = acc[i]
            if BIAS:
                y = y + gl.load(bias_ptr + feature, mask=feature < N, other=0).to(gl.float32)[:, None]
            y = activate(y, ACTIVATION, gl.bfloat16 == DTYPE)
            if RESIDUAL:
                y = y + panel.load(ACC).to(gl.float32)
            panel.store(y.to(DTYPE))
        fence_async_shared()
        block_barrier()  # one warp stores for all; Triton 3.9 puts no barrier before it
        for i in gl.static_range(TILES):
            if PUBLIC:
                panel = panels.index(FIRST + i).reinterpret(DTYPE, [TB, TH, TW, 64], PIXELS)
            else:
                panel = panels.index(FIRST + i)._reinterpret(DTYPE, [TB, TH, TW, 64], PIXELS)
            box_out(y_desc, [b, h, w, n + 64 * i], panel)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=("N", "HO", "WO", "CIN", "PAD_H", "PAD_W", "tiles"), do_not_specialize_on_alignment=("bias_ptr",)
)
def conv_specialized(
    w_desc, e_desc, x_desc, y_desc, r_desc, bias_ptr, N, HO, WO, CIN, PAD_H, PAD_W, tiles,
    BLOCK_N: gl.constexpr, TB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STRIDE: gl.constexpr, STAGES: gl.constexpr, KIND: gl.constexpr, ACTIVATION: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup per half of BLOCK_N and one TMA warp, as linear_specialized."""
    ring, panels, arrived = allocate(BLOCK_N, TB * TH * TW, 64, False, STAGES, 64, y_desc.dtype, False)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0,
                    y_desc,
                    r_desc,
                    bias_ptr,
                    panels,
                    arrived,
                    N,
                    HO,
                    WO,
                    CIN,
                    tiles,
                    BLOCK_N,
                    TB,
                    TH,
                    TW,
                    KH,
                    KW,
                    STAGES,
                    KIND,
                    ACTIVATION,
                    BIAS,
                    RESIDUAL,
                ),
            ),
            (
                _consumer,
                (
                    1,
                    y_desc,
                    r_desc,
                    bias_ptr,
                    panels,
                    arrived,
                    N,
                    HO,
                    WO,
                    CIN,
                    tiles,
                    BLOCK_N,
                    TB,
                    TH,
                    TW,
                    KH,
                    KW,
                    STAGES,
                    KIND,
                    ACTIVATION,
                    BIAS,
                    RESIDUAL,
                ),
            ),
            (
                _producer,
                (N, HO, WO, CIN, PAD_H, PAD_W, tiles, BLOCK_N, TB, TH, TW, KH, KW, STRIDE, STAGES, "conv_specialized"),
            ),
        ],
        [4, 1],
        [232, 40],
    )
    ring._keep_alive()


def launch(x, values, metadata, y, *, kernel_size, stride, padding, bias, activation, residual, config=CONFIGS[0]):
    """y (B, HO, WO, N) of x (B, H, W, CIN), both contiguous; values and metadata as `prepack` made them for wgmma."""
    tensors, arguments, constants = operands(
        config, x, values, metadata, y, kernel_size, stride, padding, bias, activation, residual
    )
    blocks = torch.cuda.get_device_properties(x.device).multi_processor_count
    grid = min(blocks, arguments["tiles"])
    arguments |= {name: descriptor(*map_) for name, map_ in tensors.items()}
    start(conv_specialized, grid, arguments, constants, num_warps=4)


def operands(config, x, values, metadata, y, kernel_size, stride, padding, bias, activation, residual):
    """-> ({tensor map: (tensor, box, swizzle)}, run-time arguments, compile-time arguments)."""
    images, height, width, channels = x.shape
    _, rows, columns, features = y.shape
    block_n, block_m = config.block_n, config.block_m
    if height % stride or width % stride:
        x = F.pad(x, (0, 0, 0, width % stride, 0, height % stride))
        _, height, width, _ = x.shape
    patch = choose_patch(block_m, rows, columns)
    split = x.view(images, height // stride, stride, width // stride, stride * channels)
    words = boxes(block_n, block_m, 64, "none")[2]
    pixels = (*patch, 64)
    tensors = {
        "w_desc": (values, (block_n, 32), 64),
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
        "tiles": patches * -(-features // block_n),
    }
    constants = {"BLOCK_N": block_n, "TB": patch[0], "TH": patch[1], "TW": patch[2]}
    constants |= {"KH": kernel_size[0], "KW": kernel_size[1], "STRIDE": stride, "STAGES": config.stages}
    constants |= {"KIND": {torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype], "ACTIVATION": activation}
    return tensors, arguments, constants | {"BIAS": bias is not None, "RESIDUAL": residual is not None}


def choose_patch(pixels, rows, columns):
    """(images, rows, columns), powers of two that make `pixels`: as square as the output allows."""
    width = min(16, 1 << (columns - 1).bit_length())
    height = min(pixels // width, 1 << (rows - 1).bit_length())
    return pixels // width // height, height, width
