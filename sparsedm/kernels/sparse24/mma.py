"""y (M, N) = act([x | skip] (M, K) @ W24^T + b) * s + r on `mma.sp.m16n8k32` (sm_80 and later).

One program per tile; how it multiplies stands in sparse24_fragments. NOT YET RUN ON A GPU: the compiled PTX is executed
by the emulator of the tests.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsedm.kernels.sparse24.fragments import joined_addresses, products, row_addresses, rows_of, store, tile


@dataclass(frozen=True)
class Config:
    block_n: int  # features
    block_m: int  # rows of x
    warps_n: int
    warps_m: int
    stages: int
    group: int = 8  # tiles along M that are walked before the next along N, for L2


# The first is the default until these are timed: tuned on no GPU yet. More than 64 accumulators per thread spill in the
# epilogues with a residual.
CONFIGS = (
    Config(128, 128, 4, 2, 4),
    Config(128, 128, 2, 4, 4),
    Config(128, 64, 2, 2, 4),
    Config(64, 64, 2, 2, 4),
)


@gluon.jit
def linear_mma(
    w_ptr, e_ptr, x_ptr, s_ptr, y_ptr, bias_ptr, scale_ptr, r_ptr,
    stride_x, stride_s, stride_r, chunks_x, chunks_s, split, rows_per_scale, M, N, steps,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, WARPS_N: gl.constexpr, WARPS_M: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, KIND: gl.constexpr, ACTIVATION: gl.constexpr, BIAS: gl.constexpr, SCALE: gl.constexpr,
    RESIDUAL: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """One program per tile. See `products` and `rows_of` for the operands; y (M, N) contiguous, 16-bit or fp32."""
    WARPS: gl.constexpr = WARPS_N * WARPS_M
    n, m = tile(gl.program_id(0), M, N, BLOCK_N, BLOCK_M, GROUP)
    source = rows_of(x_ptr, stride_x, chunks_x, m, M, BLOCK_M, WARPS)
    if SKIP:
        source = (source, rows_of(s_ptr, stride_s, chunks_s, m, M, BLOCK_M, WARPS), split)
    acc = products(
        w_ptr, e_ptr, source, n, 0, steps, steps, BLOCK_N, BLOCK_M, WARPS_N, WARPS_M, STAGES, KIND,
        joined_addresses if SKIP else row_addresses,
    )  # fmt: skip
    store(
        acc, n, m, M, N, y_ptr, bias_ptr, scale_ptr, rows_per_scale, r_ptr, stride_r, BLOCK_N, BLOCK_M, WARPS,
        ACTIVATION, BIAS, SCALE, RESIDUAL,
    )  # fmt: skip


def launch(x, values, metadata, y, *, bias, activation, residual, skip, scale, config=CONFIGS[0]):
    """y (M, N) of rows x (M, K). values and metadata in fragment order, as `arrange` made them, N padded to 128.

    bias (N,), residual (M, N), skip (M, K2), scale (G, N) or None; rows of x, skip and residual 16-byte aligned.
    """
    M, N = y.shape
    arguments, constants = operands(x, values, metadata, y, bias, residual, skip, scale)
    constants |= tile_constants(config)
    grid = -(-N // config.block_n) * -(-M // config.block_m)
    linear_mma[(grid,)](**arguments, **constants, ACTIVATION=activation, num_warps=config.warps_n * config.warps_m)


def tile_constants(config):
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "WARPS_N": config.warps_n,
        "WARPS_M": config.warps_m,
        "STAGES": config.stages,
        "GROUP": config.group,
    }


def operands(x, values, metadata, y, bias, residual, skip, scale):
    """-> (run-time, compile-time) arguments that the mma.sp kernels share."""
    if skip is not None and x.shape[1] % 64:
        x, skip = torch.cat((x, skip), 1), None  # a 64-column step may not straddle the two
    M, N = y.shape
    other = x if skip is None else skip
    return {
        "w_ptr": values,
        "e_ptr": metadata,
        "x_ptr": x.view(torch.int32),
        "s_ptr": other.view(torch.int32),
        "y_ptr": y,
        "bias_ptr": y if bias is None else bias.contiguous(),
        "scale_ptr": y if scale is None else scale.contiguous(),
        "r_ptr": y if residual is None else residual,
        "stride_x": x.stride(0) // 8,
        "stride_s": other.stride(0) // 8,
        "stride_r": N if residual is None else residual.stride(0),
        "chunks_x": x.shape[1] // 8,
        "chunks_s": other.shape[1] // 8,
        "split": x.shape[1] // 64,
        "rows_per_scale": M if scale is None else M // scale.shape[0],
        "M": M,
        "N": N,
        "steps": metadata.shape[1],
    }, {
        "KIND": {torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype],
        "BIAS": bias is not None,
        "SCALE": scale is not None,
        "RESIDUAL": residual is not None,
        "SKIP": skip is not None,
    }
