"""y (M, N) = act([x | skip] (M, K) @ W24^T + b) * s + r on `mma.sp.m16n8k32` (sm_80 and later). Shared by all mma.sp
kernels: one tile's products over a range of K (`products`) and its epilogue (`store`).

One program computes one tile of y^T: BLOCK_N features x BLOCK_M rows. The compressed W is the sparse operand A. W and
its metadata come straight from global memory in fragment order, one 16-byte load per lane and instruction. x goes
through a ring in shared memory (cp.async, ldmatrix). All operands live in "hardware coordinates" (warps along N, warps
along M, m16 tiles, n8 tiles, registers, lanes). There, ordinary broadcasting gives every mma.sp its operands and no
register moves: `assert_trivial` makes the compiler prove it. Each kernel passes in a function with the addresses of x:
rows, two tensors side by side, or the pixels under a convolution's kernel.

Source: PTX ISA 8.5, mma.sp with ordered metadata, figures of the m16n8k32 fragments.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sparsedm.kernels.launch import Launch
from sparsedm.kernels.sparse24.ptx import KIND, Epilogue, activate, block_barrier, mma_sp, words_in


@dataclass(frozen=True)
class Config:
    block_n: int  # features
    block_m: int  # rows of x
    warps_n: int
    warps_m: int
    stages: int
    group: int = 8  # tiles along M that are walked before the next along N, for L2


# The first is the default until these are timed. More than 64 accumulators per thread spill in the epilogues with a
# residual.
CONFIGS = (
    Config(block_n=128, block_m=128, warps_n=4, warps_m=2, stages=4),
    Config(block_n=128, block_m=128, warps_n=2, warps_m=4, stages=4),
    Config(block_n=128, block_m=64, warps_n=2, warps_m=2, stages=4),
    Config(block_n=64, block_m=64, warps_n=2, warps_m=2, stages=4),
)


# No value of these makes better code: one kernel serves all batch sizes. N and stride_r align what is stored
INTEGERS = ("stride_x", "stride_s", "chunks_x", "chunks_s", "split", "rows_per_scale", "M", "steps")


@gluon.constexpr_function
def fragment_layout(warps_n, warps_m, tiles_n, tiles_m):
    """Hardware coordinates: each lane holds the registers of all its warp's tiles."""
    return gl.BlockedLayout(
        [1, 1, tiles_n, tiles_m, 4, 1], [1, 1, 1, 1, 1, 32], [warps_n, warps_m, 1, 1, 1, 1], [4, 3, 2, 5, 1, 0]
    )


@gluon.constexpr_function
def _x_layout(warps_n, warps_m, tiles_m, block_m):
    """x as (BLOCK_M, 16) int32, 32 columns, read so that the registers are B fragments: this is what ldmatrix gives."""
    log2 = lambda n: n.bit_length() - 1  # noqa: E731
    register = [[0, 4], [0, 8]] + [[8 << i, 0] for i in range(log2(tiles_m))]
    lane = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warp = [[8 * tiles_m << i, 0] for i in range(log2(warps_m))] + [[0, 0]] * log2(warps_n)
    return gl.DistributedLinearLayout(register, lane, warp, [], [block_m, 16])


@gluon.constexpr_function
def _only(axis, layout):
    """The layout of one axis of a six-dimensional layout."""
    for other in range(5, -1, -1):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _arange(N: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """0 .. N-1 along one axis of six."""
    x = gl.arange(0, N, layout=_only(AXIS, LAYOUT))
    for other in gl.static_range(6):
        if other != AXIS:
            x = gl.expand_dims(x, other)
    return x


@gluon.constexpr_function
def output_layout(config):
    """(BLOCK_M, BLOCK_N): eight neighbouring features in a thread, 16 bytes of a 16-bit type."""
    lanes = min(config.block_n // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [config.warps_n * config.warps_m, 1], [1, 0])


@gluon.jit
def tile(program, M, N, CONFIG: gl.constexpr):
    """Program -> its first feature and first row. Tiles along M are neighbours, so that W stays in L2."""
    tiles_n = gl.cdiv(N, CONFIG.block_n)
    first = program // (CONFIG.group * tiles_n) * CONFIG.group
    width = gl.minimum(gl.cdiv(M, CONFIG.block_m) - first, CONFIG.group)
    inside = program % (CONFIG.group * tiles_n)
    return inside // width * CONFIG.block_n, (first + inside % width) * CONFIG.block_m


@gluon.constexpr_function
def copy_layout(config):
    """(BLOCK_M, 32) int32, 64 columns of x on their way to shared memory: rows of 128 bytes, 16 bytes in a thread."""
    return gl.BlockedLayout([1, 4], [4, 8], [config.warps_n * config.warps_m, 1], [1, 0])


@gluon.jit
def rows_of(x_ptr, stride, chunks, m, M, CONFIG: gl.constexpr):
    """A source for `products`: block_m rows from m. x_ptr int32 (two columns each), stride in units of 16 bytes."""
    row = gl.arange(0, CONFIG.block_m, layout=gl.SliceLayout(1, copy_layout(CONFIG)))
    return x_ptr + m.to(gl.int64) * (stride * 4), row, M - m, stride, chunks


@gluon.jit
def row_addresses(source, word, step):
    """Where the words of 64-column step `step` lie, and which of them are there."""
    x, row, rows, stride, chunks = source
    chunk = step * 8 + word // 4  # of 16 bytes, which the mask must not seem to split
    return x + (row[:, None] * (stride * 4) + (step * 32 + word)[None, :]), (row < rows)[:, None] & (chunk < chunks)[
        None, :
    ]


@gluon.jit
def joined_addresses(source, word, step):
    """The same for [x | skip], whose second source begins with step `split`."""
    x, skip, split = source
    from_skip = step >= split
    joined = (
        gl.where(from_skip, skip[0], x[0]), x[1], x[2], gl.where(from_skip, skip[3], x[3]),
        gl.where(from_skip, skip[4], x[4]),
    )  # fmt: skip
    return row_addresses(joined, word, gl.where(from_skip, step - split, step))


@gluon.jit
def _copy_step(slot, source, word, step, last, ADDRESSES: gl.constexpr):
    """64 columns of x to one slot: zeros where there is none, and beyond the last step."""
    pointers, inside = ADDRESSES(source, word, step)
    words_in(slot, pointers, mask=inside & (step < last))
    async_copy.commit_group()


@gluon.jit
def products(
    w_ptr, e_ptr, source, n, first, last, steps, CONFIG: gl.constexpr, KIND: gl.constexpr, ADDRESSES: gl.constexpr
):
    """W x^T of one tile over the 64-column steps first .. last-1 of `steps`, fp32 in hardware coordinates.

    w_ptr int32 (N/16, 2 steps, 32, 4), e_ptr int32 (N/16, steps, 32). ADDRESSES(source, word, step) -> (pointers, mask)
    of the words of x in `copy_layout`.
    """
    BLOCK_M: gl.constexpr = CONFIG.block_m
    STAGES: gl.constexpr = CONFIG.stages
    WARPS_N: gl.constexpr = CONFIG.warps_n
    WARPS_M: gl.constexpr = CONFIG.warps_m
    TILES_N: gl.constexpr = CONFIG.block_n // (16 * WARPS_N)
    TILES_M: gl.constexpr = BLOCK_M // (8 * WARPS_M)
    LAYOUT: gl.constexpr = fragment_layout(WARPS_N, WARPS_M, TILES_N, TILES_M)
    X: gl.constexpr = _x_layout(WARPS_N, WARPS_M, TILES_M, BLOCK_M)
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, copy_layout(CONFIG)))
    for s in gl.static_range(STAGES - 1):
        _copy_step(ring.index(s), source, word, first + s, last, ADDRESSES)
    w_tile = n // 16 + _arange(WARPS_N, 0, LAYOUT) * TILES_N + _arange(TILES_N, 2, LAYOUT)
    lane = _arange(32, 5, LAYOUT)
    a_ptr = w_ptr + w_tile * (steps * 256) + lane * 4 + _arange(4, 4, LAYOUT)
    metadata_ptr = e_ptr + w_tile * (steps * 32) + lane
    acc = gl.zeros([WARPS_N, WARPS_M, TILES_N, TILES_M, 4, 32], gl.float32, layout=LAYOUT)
    even = gl.load(a_ptr + first * 256)
    metadata = gl.load(metadata_ptr + first * 32)
    slot = 0
    for step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        block_barrier()
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        _copy_step(ring.index(free), source, word, step + STAGES - 1, last, ADDRESSES)
        following = gl.minimum(step + 1, last - 1)
        odd = gl.load(a_ptr + step * 256 + 128)
        for s in gl.static_range(2):
            a = even if s == 0 else odd
            if s == 1:
                even = gl.load(a_ptr + following * 256)
            b = ring.index(slot).slice(16 * s, 16, dim=1).load(X)
            b = b.reshape([WARPS_M, TILES_M, 8, 4, 4]).permute((0, 1, 3, 2, 4))
            b = gl.convert_layout(b.reshape([1, WARPS_M, 1, TILES_M, 4, 32]), LAYOUT, assert_trivial=True)
            acc = mma_sp(a, b, acc, metadata, KIND, s)
        metadata = gl.load(metadata_ptr + following * 32)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)
    return acc


@gluon.jit
def to_rows(acc, CONFIG: gl.constexpr):
    """Hardware coordinates -> (BLOCK_M, BLOCK_N) in `output_layout`."""
    BLOCK_N: gl.constexpr = CONFIG.block_n
    BLOCK_M: gl.constexpr = CONFIG.block_m
    WARPS_N: gl.constexpr = acc.shape[0]
    WARPS_M: gl.constexpr = acc.shape[1]
    tiles = acc.reshape([WARPS_N, WARPS_M, acc.shape[2], acc.shape[3], 2, 2, 8, 4])
    y = tiles.permute((0, 2, 4, 6, 1, 3, 7, 5)).reshape([BLOCK_N, BLOCK_M])
    return gl.convert_layout(y.permute((1, 0)), output_layout(CONFIG))


@gluon.jit
def finish(y, row, feature, m, M, N, sink, BLOCK_M: gl.constexpr, BF16: gl.constexpr, EPILOGUE: gl.constexpr):
    """act(y + b) * s + r of the rows, from m, and features of one tile, fp32."""
    bias_ptr, scale_ptr, rows_per_scale, r_ptr, stride_r = sink
    if EPILOGUE.bias:
        y = y + gl.load(bias_ptr + feature, mask=feature < N, other=0).to(gl.float32)[None, :]
    y = activate(y, EPILOGUE, BF16)
    if EPILOGUE.scale:
        for g in range(m // rows_per_scale, (gl.minimum(m + BLOCK_M, M) - 1) // rows_per_scale + 1):
            gate = gl.load(scale_ptr + g.to(gl.int64) * N + feature, mask=feature < N, other=0).to(gl.float32)
            mine = (row >= g * rows_per_scale) & (row < (g + 1) * rows_per_scale)
            y = gl.where(mine[:, None], y * gate[None, :], y)
    if EPILOGUE.residual:
        inside = (row < M)[:, None] & (feature < N)[None, :]
        offset = row.to(gl.int64)[:, None] * stride_r + feature[None, :]
        y = y + gl.load(r_ptr + offset, mask=inside, other=0).to(gl.float32)
    return y


@gluon.jit
def store(acc, n, m, M, N, y_ptr, sink, CONFIG: gl.constexpr, EPILOGUE: gl.constexpr):
    """Finishes a tile and writes it to y (M, N)."""
    BLOCK_N: gl.constexpr = CONFIG.block_n
    BLOCK_M: gl.constexpr = CONFIG.block_m
    LAYOUT: gl.constexpr = output_layout(CONFIG)
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    y = to_rows(acc, CONFIG)
    row = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    feature = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    y = finish(y, row, feature, m, M, N, sink, BLOCK_M, gl.bfloat16 == DTYPE, EPILOGUE)
    inside = (row < M)[:, None] & (feature < N)[None, :]
    gl.store(y_ptr + (row.to(gl.int64)[:, None] * N + feature[None, :]), y.to(DTYPE), mask=inside)


@gluon.jit(do_not_specialize=INTEGERS)
def linear_mma(
    w_ptr, e_ptr, x_ptr, s_ptr, y_ptr, bias_ptr, scale_ptr, r_ptr,
    stride_x, stride_s, stride_r, chunks_x, chunks_s, split, rows_per_scale, M, N, steps,
    CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """One program per tile. See `products` and `rows_of` for the operands; y (M, N) contiguous, 16-bit or fp32."""
    n, m = tile(gl.program_id(0), M, N, CONFIG)
    source = rows_of(x_ptr, stride_x, chunks_x, m, M, CONFIG)
    if SKIP:
        source = (source, rows_of(s_ptr, stride_s, chunks_s, m, M, CONFIG), split)
    addresses: gl.constexpr = joined_addresses if SKIP else row_addresses
    acc = products(w_ptr, e_ptr, source, n, 0, steps, steps, CONFIG, KIND, addresses)
    store(acc, n, m, M, N, y_ptr, (bias_ptr, scale_ptr, rows_per_scale, r_ptr, stride_r), CONFIG, EPILOGUE)


def launch(*tensors, **options):
    """Computes y; arguments as `plan`."""
    for step in plan(*tensors, **options):
        step.start()


def plan(x, values, metadata, y, *, bias, activation, residual, skip, scale, config=CONFIGS[0]):
    """[Launch] that computes y (M, N) of rows x (M, K); the weight in the layout "fragments".

    bias (N,), residual (M, N), skip (M, K2), scale (G, N) or None; rows of x, skip and residual 16-byte aligned.
    """
    arguments, constants = operands(config, x, values, metadata, y, bias, activation, residual, skip, scale)
    return [Launch(linear_mma, (tile_count(*y.shape, config),), arguments, constants, warps(config))]


def tile_count(M, N, config):
    return -(-N // config.block_n) * -(-M // config.block_m)


def warps(config):
    return config.warps_n * config.warps_m


def operands(config, x, values, metadata, y, bias, activation, residual, skip, scale):
    """-> (run-time, compile-time) arguments that the mma.sp kernels of a product share."""
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
        "CONFIG": config,
        "EPILOGUE": Epilogue(activation, bias is not None, scale is not None, residual is not None),
        "KIND": KIND[x.dtype],
        "SKIP": skip is not None,
    }
