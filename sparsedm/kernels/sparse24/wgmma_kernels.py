"""The wgmma.sp kernels: y (M, N) = act([x | skip] (M, K) @ W24^T + b) * s + r for sm_90a.

One tile of y^T is BLOCK_N features x BLOCK_M rows: the compressed W is the sparse operand A of m64nNk32 and x is B,
both in shared memory, the accumulator is fp32 in registers. The grid is persistent; TMA fills a ring of STAGES slots.

Two main loops share everything else (`wgmma_pipeline.py`):
* specialized: two consumer warpgroups and a TMA warp. Metadata is a register input of wgmma, so each consumer waits for
  its own wgmma once per slot; the other warpgroup keeps the tensor core busy meanwhile.
* flat: eight warps, of which warp 0 also issues TMA; two slots in turn with their own metadata registers, so that the
  tensor core is never drained inside a tile. ptxas accepts this only without the `setmaxnreg` of warp specialisation
  (C7512). K must fill an even number of slots.

CONFIG.cluster = "x" or "w" runs pairs of blocks. The two tiles of a pair share their rows of x (of W and metadata):
each block loads half of them and multicasts it to both. "xw" runs four, each in a pair of both kinds: bit 0 of the rank
tells apart who shares x, bit 1 who shares W. That divides the traffic between L2 and multiprocessors, which by our
model limits this product. An odd last tile is computed twice, with equal results.

Sources: PTX ISA 8.5 (wgmma.mma_async.sp, matrix descriptors, sparsity metadata, mbarrier, multicast). Unlike CUTLASS's
sm90 sparse main loop, the flat one waits for the wgmma of the slot before, not for its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from sparsedm.kernels.sparse24.ptx import (
    barrier_arrive,
    barrier_wait,
    cluster_rank,
    cluster_sync,
    effect,
    shared_base,
    sleep,
    warp_index,
    wgmma_wait,
)
from sparsedm.kernels.sparse24.wgmma_pipeline import (
    FETCH_AT,
    accumulator_layout,
    accumulators,
    allocate,
    cluster_size,
    descriptors,
    drain,
    epilogue,
    fetch_residual,
    fill_slot,
    multiply,
    multiply_tile,
    next_slot,
    read_metadata,
    stage_bytes,
    tile,
    tile_count,
    warps,
)

INTEGERS = ("stride_r", "rows_per_scale", "split", "M", "N", "K")
HALF_A_SLOT = gl.constexpr(200)  # nanoseconds: 320 cycles at 1.6 GHz
POINTERS = ("y_ptr", "r_ptr", "bias_ptr", "scale_ptr")


# ------------------------------------------------------------------------------------------------ specialized
@gluon.jit
def _producer(M, N, K, split, CONFIG: gl.constexpr, SKIP: gl.constexpr, KERNEL: gl.constexpr):
    BLOCKS: gl.constexpr = cluster_size(CONFIG)
    cluster_sync(BLOCKS)
    base = shared_base()
    rank = cluster_rank()
    slot = 0
    phase = 0
    tiles = tile_count(M, N, CONFIG)
    for t in range(gl.program_id(0) // BLOCKS, tiles, gl.num_programs(0) // BLOCKS):
        n, m = tile(t, M, N, rank, CONFIG)
        for k in range(K // CONFIG.block_k):
            fill_slot(base, slot, phase, n, m, k, split, rank, CONFIG, SKIP, KERNEL)
            slot, phase = next_slot(slot, phase, CONFIG)
    if BLOCKS > 1:
        drain(base + CONFIG.stages * stage_bytes(CONFIG)[3], slot, phase, CONFIG)


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr, sink, panels, arrived, M, N, K,
    CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    FIRST: gl.constexpr = WARPGROUP * (CONFIG.block_n // 2)
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    BLOCKS: gl.constexpr = cluster_size(CONFIG)
    FETCHES: gl.constexpr = EPILOGUE.residual and not EPILOGUE.direct
    cluster_sync(BLOCKS)
    base = shared_base()
    bars = base + CONFIG.stages * SIZE[3]
    rank = cluster_rank()
    w0, x0 = descriptors(base, FIRST, CONFIG)
    words = base + (SIZE[0] + SIZE[1]) + 4 * gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    slot = 0
    phase = 0
    residual_phase = 0
    tiles = tile_count(M, N, CONFIG)
    for t in range(gl.program_id(0) // BLOCKS, tiles, gl.num_programs(0) // BLOCKS):
        n, m = tile(t, M, N, rank, CONFIG)
        residual = n + FIRST, (m,), sink[1], panels, arrived.index(WARPGROUP)
        acc, slot, phase = multiply_tile(
            bars, words, w0, x0, slot, phase, K // CONFIG.block_k, residual, FIRST, CONFIG, KIND, FETCHES, None
        )
        epilogue(
            acc, n + FIRST, (m,), sink, panels, arrived.index(WARPGROUP), residual_phase, M, N,
            FIRST // 64, 4, CONFIG, EPILOGUE, None,
        )  # fmt: skip
        residual_phase = residual_phase ^ 1
    if not EPILOGUE.direct:
        tma.store_wait(0)


@gluon.jit
def _idle(BLOCKS: gl.constexpr):
    """Fills the third warpgroup, whose warps too have to come to the cluster barrier."""
    cluster_sync(BLOCKS)


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def linear_specialized(
    w_desc, x_desc, e_desc, y_desc, r_desc, s_desc, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale, split,
    M, N, K, CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup per half of block_n, one TMA warp, three idle warps. K: padded to block_k."""
    BLOCKS: gl.constexpr = cluster_size(CONFIG)
    ring, panels, arrived = allocate(CONFIG, EPILOGUE.direct, y_desc.dtype)
    sink = (y_desc, r_desc, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale)
    gl.warp_specialize(
        [
            (_consumer, (0, sink, panels, arrived, M, N, K, CONFIG, EPILOGUE, KIND)),
            (_consumer, (1, sink, panels, arrived, M, N, K, CONFIG, EPILOGUE, KIND)),
            (_producer, (M, N, K, split, CONFIG, SKIP, "linear_specialized")),
            (_idle, (BLOCKS,)),
            (_idle, (BLOCKS,)),
        ],
        [4, 1, 1, 2],
        [232, 40, 40, 40],
    )
    ring._keep_alive()


# ------------------------------------------------------------------------------------------------ flat
@gluon.jit
def _fill_next(
    cursor, base, split, rank, M, N, KT, blocks, warp, CONFIG: gl.constexpr, SKIP: gl.constexpr, KERNEL: gl.constexpr
):
    """Warp 0 fills the next slot, if any tile is left. cursor: (tile, k, slot, phase, n, m) of the next load."""
    t, k, slot, phase, n, m = cursor
    if (warp == 0) & (t < tile_count(M, N, CONFIG)):
        fill_slot(base, slot, phase, n, m, k, split, rank, CONFIG, SKIP, KERNEL)
    slot, phase = next_slot(slot, phase, CONFIG)
    k += 1
    if k == KT:
        k = 0
        t += blocks
        n, m = tile(t, M, N, rank, CONFIG)
    return t, k, slot, phase, n, m


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def linear_flat(
    w_desc, x_desc, e_desc, y_desc, r_desc, s_desc, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale, split,
    M, N, K, CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, KIND: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Eight warps; both warpgroups multiply, their 64 features of each 128 side by side. K: padded to 2 block_k.

    Two resident blocks have four warps each. Half of all blocks begin half a tile later than the others, so that one
    block of a multiprocessor multiplies while the other is in its epilogue.
    """
    TILES: gl.constexpr = accumulators(CONFIG)
    WARPS: gl.constexpr = warps(CONFIG)
    BLOCK_M: gl.constexpr = CONFIG.block_m
    KERNEL: gl.constexpr = "linear_flat"
    FETCHES: gl.constexpr = EPILOGUE.residual and not EPILOGUE.direct
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    BLOCKS: gl.constexpr = cluster_size(CONFIG)
    ring, panels, arrived = allocate(CONFIG, EPILOGUE.direct, y_desc.dtype)
    sink = (y_desc, r_desc, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale)
    effect("bar.sync 0;")
    cluster_sync(BLOCKS)
    base = shared_base()
    bars = base + CONFIG.stages * SIZE[3]
    rank = cluster_rank()
    warp = warp_index()
    KT = K // CONFIG.block_k
    gl.assume(KT // 2 > 0)  # a loop that might not run would leave the wgmma registers undefined (C7515)
    w0, x0 = descriptors(base, 0, CONFIG)
    if WARPS == 8:
        w0 += warp // 4 * (64 * CONFIG.block_k >> 4)
    words = base + (SIZE[0] + SIZE[1]) + 4 * gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    tiles = tile_count(M, N, CONFIG)
    blocks = gl.num_programs(0) // BLOCKS
    first = gl.program_id(0) // BLOCKS
    if CONFIG.resident == 2:
        later = (first >= blocks // 2) & (tiles > blocks)  # each block's only tile is not worth it
        sleep(later.to(gl.int32) * (KT * HALF_A_SLOT))
    n, m = tile(first, M, N, rank, CONFIG)
    cursor = (first, 0, 0, 0, n, m)
    for _ in range(CONFIG.stages - 1):
        cursor = _fill_next(cursor, base, split, rank, M, N, KT, blocks, warp, CONFIG, SKIP, KERNEL)
    slot = 0
    phase = 0
    residual_phase = 0
    for t in range(first, tiles, blocks):
        n, m = tile(t, M, N, rank, CONFIG)
        acc = (gl.zeros([16 * WARPS, BLOCK_M], gl.float32, layout=accumulator_layout(WARPS, BLOCK_M)),) * TILES
        before = slot
        for k in range(0, KT, 2):
            if FETCHES:
                now = k == gl.minimum(FETCH_AT, KT - 2)
                if now:
                    fetch_residual(n, (m,), r_desc, panels, arrived.index(0), 0, WARPS, CONFIG, None)
            barrier_wait(bars + 16 * slot, phase)
            even = read_metadata(words, slot, 0, TILES, WARPS, CONFIG)
            step = slot * (SIZE[3] >> 4)
            acc = multiply(acc, even, w0 + step, x0 + step, WARPS, CONFIG, KIND)
            acc = wgmma_wait(acc, 1)  # the slot before this one is read
            if k > 0:
                barrier_arrive(bars + 16 * before + 8, BLOCKS)
            cursor = _fill_next(cursor, base, split, rank, M, N, KT, blocks, warp, CONFIG, SKIP, KERNEL)
            even_slot = slot
            slot, phase = next_slot(slot, phase, CONFIG)
            barrier_wait(bars + 16 * slot, phase)
            odd = read_metadata(words, slot, 0, TILES, WARPS, CONFIG)
            step = slot * (SIZE[3] >> 4)
            acc = multiply(acc, odd, w0 + step, x0 + step, WARPS, CONFIG, KIND)
            acc = wgmma_wait(acc, 1)
            barrier_arrive(bars + 16 * even_slot + 8, BLOCKS)
            cursor = _fill_next(cursor, base, split, rank, M, N, KT, blocks, warp, CONFIG, SKIP, KERNEL)
            before = slot
            slot, phase = next_slot(slot, phase, CONFIG)
        acc = wgmma_wait(acc, 0)
        barrier_arrive(bars + 16 * before + 8, BLOCKS)
        epilogue(
            acc, n, (m,), sink, panels, arrived.index(0), residual_phase, M, N, 0, WARPS, CONFIG, EPILOGUE, None
        )  # fmt: skip
        residual_phase = residual_phase ^ 1
    if not EPILOGUE.direct:
        tma.store_wait(0)
    if BLOCKS > 1 and warp == 0:
        drain(bars, slot, phase, CONFIG)
    ring._keep_alive()
