"""y (M, N) = act([x | skip] (M, K) @ W24^T + b) * s + r for M up to 64 rows: `mma.sp` with K split over the grid.

With so few rows, reading the weight takes all the time: 1.125 bytes per weight instead of 2. One program per tile of 64
features would keep too few bytes in flight. So `splits` programs share the K of every tile and write fp32 partial sums
(splits, M, N). A second kernel adds them in a fixed order and applies the epilogue: the sums do not depend on the order
in which programs run.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsedm.kernels.launch import Launch, multiprocessors
from sparsedm.kernels.sparse24 import mma
from sparsedm.kernels.sparse24.mma import (
    finish,
    joined_addresses,
    operands,
    output_layout,
    products,
    row_addresses,
    rows_of,
    tile,
    tile_count,
    to_rows,
    warps,
)


@dataclass(frozen=True)
class Config:
    programs: int  # wanted on every multiprocessor: more keep more bytes in flight, and write more partial sums


CONFIGS = (Config(programs=4), Config(programs=2), Config(programs=8))  # the first: the default until these are timed
TILES = tuple(mma.Config(block_n=64, block_m=m, warps_n=4, warps_m=1, stages=4, group=1) for m in (16, 32, 64))
REDUCE_ROWS, REDUCE_COLUMNS = 4, 256
INTEGERS = (*mma.INTEGERS, "share", "splits")


@gluon.jit(do_not_specialize=INTEGERS)
def linear_splitk(
    w_ptr, e_ptr, x_ptr, s_ptr, part_ptr, stride_x, stride_s, chunks_x, chunks_s, split, M, N, steps, share,
    CONFIG: gl.constexpr, KIND: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Program (tile, i) multiplies the 64-column steps i share .. (i+1) share - 1; part_ptr fp32 (splits, M, N)."""
    BLOCK_N: gl.constexpr = CONFIG.block_n
    BLOCK_M: gl.constexpr = CONFIG.block_m
    LAYOUT: gl.constexpr = output_layout(CONFIG)
    n, m = tile(gl.program_id(0), M, N, CONFIG)
    first = gl.program_id(1) * share
    source = rows_of(x_ptr, stride_x, chunks_x, m, M, CONFIG)
    if SKIP:
        source = (source, rows_of(s_ptr, stride_s, chunks_s, m, M, CONFIG), split)
    addresses: gl.constexpr = joined_addresses if SKIP else row_addresses
    last = gl.minimum(first + share, steps)
    acc = products(w_ptr, e_ptr, source, n, first, last, steps, CONFIG, KIND, addresses)
    row = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    feature = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    part = part_ptr + gl.program_id(1).to(gl.int64) * M * N + (row.to(gl.int64)[:, None] * N + feature[None, :])
    inside = (row < M)[:, None] & (feature < N)[None, :]
    gl.store(part, to_rows(acc, CONFIG), mask=inside)


@gluon.jit(do_not_specialize=INTEGERS)
def reduce_splitk(
    part_ptr, y_ptr, bias_ptr, scale_ptr, r_ptr, stride_r, rows_per_scale, M, N, splits,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Program (i, j) adds up the partial sums of ROWS x COLUMNS results and finishes them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    m = gl.program_id(0) * ROWS
    row = m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    feature = gl.program_id(1) * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    inside = (row < M)[:, None] & (feature < N)[None, :]
    offset = row.to(gl.int64)[:, None] * N + feature[None, :]
    y = gl.zeros([ROWS, COLUMNS], gl.float32, layout=LAYOUT)
    for i in range(splits):
        y += gl.load(part_ptr + i.to(gl.int64) * M * N + offset, mask=inside, other=0)
    sink = (bias_ptr, scale_ptr, rows_per_scale, r_ptr, stride_r)
    y = finish(y, row, feature, m, M, N, sink, ROWS, gl.bfloat16 == DTYPE, EPILOGUE)
    gl.store(y_ptr + offset, y.to(DTYPE), mask=inside)


def choose(M, N, steps, programs):
    """-> (tile, share): the mma.sp tile and how many 64-column steps of K one of `programs` multiplies, at least 4."""
    config = next(tile for tile in TILES if tile.block_m >= M or tile is TILES[-1])
    tiles = -(-N // config.block_n) * -(-M // config.block_m)
    return config, min(max(4, steps // -(-programs // tiles)), steps)


def launch(*tensors, **options):
    """Computes y; arguments as `plan`."""
    for step in plan(*tensors, **options):
        step.start()


def plan(x, values, metadata, y, *, bias, activation, residual, skip, scale, config=CONFIGS[0], share=None):
    """[Launch, Launch] as `mma.plan`, meant for M up to 64. share: by default as `choose` says."""
    M, N = y.shape
    programs = config.programs * multiprocessors(x.device) if share is None else 1
    tiles, chosen = choose(M, N, metadata.shape[1], programs)
    share = share or chosen
    parts = y.new_empty(-(-metadata.shape[1] // share), M, N, dtype=torch.float32)
    arguments, constants = operands(tiles, x, values, metadata, y, bias, activation, residual, skip, scale)
    arguments |= {"part_ptr": parts, "share": share, "splits": len(parts)}
    finishing = {"ROWS": REDUCE_ROWS, "COLUMNS": REDUCE_COLUMNS, "EPILOGUE": constants.pop("EPILOGUE")}
    product, reduction = (
        {name: arguments[name] for name in kernel.arg_names if name in arguments}
        for kernel in (linear_splitk, reduce_splitk)
    )
    blocks = -(-M // REDUCE_ROWS), -(-N // REDUCE_COLUMNS)
    return [
        Launch(linear_splitk, (tile_count(M, N, tiles), len(parts)), product, constants, warps(tiles)),
        Launch(reduce_splitk, blocks, reduction, finishing, 4),
    ]
