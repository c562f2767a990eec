"""What the wgmma.sp kernels share: the tile order, the ring of TMA slots, one slot's products, the epilogue.

A slot holds BLOCK_K columns of a tile: x as panels of 64 columns (BLOCK_M rows of 128 bytes), the compressed W (BLOCK_N
rows of BLOCK_K bytes) and the metadata words; its `full` and `empty` mbarriers stand behind the ring. `full` counts the
bytes that TMA brings, `empty` one arrival of each consumer warp that is done reading (of both blocks of a cluster).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparsedm.kernels.sparse24.ptx import (
    activate,
    barrier_expect,
    barrier_init,
    barrier_wait,
    block_barrier,
    box_in,
    box_out,
    effect,
    load_shared,
    metadata_to_accumulator,
    shared_base,
    tma_load,
    wgmma_sp,
)


@gluon.constexpr_function
def stage_bytes(block_n, block_m, block_k):
    """(x, W, metadata, slot): bytes of the three tiles of a slot of the ring, and of the slot in units of 1 KiB."""
    x, w, e = block_m * block_k * 2, block_n * block_k, block_n * 8 * (block_k // 64)
    return x, w, e, -(-(x + w + e) // 1024) * 1024


@gluon.constexpr_function
def boxes(block_n, block_m, block_k, cluster):
    """TMA boxes: (rows of x, rows of W, words of metadata)."""
    return (
        block_m // 2 if cluster == "x" else block_m,
        block_n // 2 if cluster == "w" else block_n,
        min(256, block_n if cluster == "w" else 2 * block_n),
    )


@gluon.constexpr_function
def metadata_offset(block_n, block_k, cluster, step, block64):
    """Bytes to the words of (64-column step, 64-row block): boxes of [steps, width] words stand one after another."""
    steps, width, column = block_k // 64, boxes(block_n, 0, block_k, cluster)[2], 128 * block64
    return (column // width * steps * width + step * width + column % width) * 4


@gluon.constexpr_function
def descriptor(swizzle):
    """The constant half of a wgmma descriptor: K-major, rows of `swizzle` bytes in groups of eight."""
    mode, stride = {128: (1, 1024), 64: (2, 512)}[swizzle]
    bits = mode << 62 | stride >> 4 << 32 | 1 << 16
    return bits - (1 << 64) if bits >> 63 else bits


@gluon.constexpr_function
def accumulator_layout(warps, block_m):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_m, 16])


@gluon.constexpr_function
def metadata_layout(warps, block_m):
    order = [5, 1, 3, 4, 2, 0]
    return gl.BlockedLayout([1, 2, 1, block_m // 8, 1, 2], [1, 1, 8, 1, 4, 1], [warps, 1, 1, 1, 1, 1], order)


# ------------------------------------------------------------------------------------------------ which tile
@gluon.jit
def tile(t, M, N, rank, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, CLUSTER: gl.constexpr, GROUP: gl.constexpr):
    """Tile number t -> its first feature and first row. GROUP tiles along M are neighbours, so that W stays in L2."""
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles_m = gl.cdiv(M, BLOCK_M)
    pairs_n = gl.cdiv(tiles_n, 2) if CLUSTER == "x" else tiles_n
    pairs_m = gl.cdiv(tiles_m, 2) if CLUSTER == "w" else tiles_m
    first = t // (GROUP * pairs_n) * GROUP
    width = gl.minimum(pairs_m - first, GROUP)
    inside = t % (GROUP * pairs_n)
    n = inside // width
    m = first + inside % width
    if CLUSTER == "x":
        n = gl.minimum(2 * n + rank, tiles_n - 1)
    if CLUSTER == "w":
        m = gl.minimum(2 * m + rank, tiles_m - 1)
    return n * BLOCK_N, m * BLOCK_M


@gluon.jit
def tile_count(M, N, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, CLUSTER: gl.constexpr):
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles_m = gl.cdiv(M, BLOCK_M)
    return (gl.cdiv(tiles_n, 2) if CLUSTER == "x" else tiles_n) * (gl.cdiv(tiles_m, 2) if CLUSTER == "w" else tiles_m)


# ------------------------------------------------------------------------------------------------ ring
@gluon.jit
def allocate(
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr,
    PANEL: gl.constexpr, DTYPE: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """-> (ring with its barriers behind it, output panels (BLOCK_N / PANEL, BLOCK_M, PANEL), residual barriers)."""
    SLOT: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, BLOCK_K)[3]
    PANELS: gl.constexpr = 1 if DIRECT else BLOCK_N // PANEL
    gl.static_assert(
        STAGES * SLOT >= BLOCK_N * BLOCK_M * 2, "the ring must be the largest allocation: only then is it at offset 0"
    )
    ring = gl.allocate_shared_memory(
        gl.int8, [STAGES * (SLOT // 1024) + 1, 1024], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    panels = gl.allocate_shared_memory(DTYPE, [PANELS, BLOCK_M, PANEL], gl.NVMMASharedLayout(128, 16, rank=2))
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bars = shared_base() + STAGES * SLOT
    for s in gl.static_range(STAGES):
        barrier_init(bars + 16 * s, 1)
        barrier_init(bars + 16 * s + 8, 16 if PAIR else 8)  # eight consumer warps, of both blocks if a pair
    if PAIR:
        effect("fence.mbarrier_init.release.cluster;")
    for s in gl.static_range(2):
        mbarrier.init(arrived.index(s), 1)
    fence_async_shared()
    return ring, panels, arrived


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def fill_slot(
    base, slot, phase, n, m, k, split, rank,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, CLUSTER: gl.constexpr, STAGES: gl.constexpr,
    SKIP: gl.constexpr, KERNEL: gl.constexpr,
):  # fmt: skip
    """Waits until the slot is empty and orders the tiles of step k: from `split` on, those of x are the skip's.

    Every tensor map is five kernel parameters, so those of W, x, metadata and skip are number 0, 5, 10 and 25.
    """
    SIZE: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, BLOCK_K)
    BOX: gl.constexpr = boxes(BLOCK_N, BLOCK_M, BLOCK_K, CLUSTER)
    STEPS: gl.constexpr = BLOCK_K // 64
    SECOND: gl.constexpr = 25 if SKIP else -1
    full = base + STAGES * SIZE[3] + 16 * slot
    barrier_wait(full + 8, phase ^ 1)
    barrier_expect(full, SIZE[0] + SIZE[1] + SIZE[2])
    x = base + slot * SIZE[3]
    w = x + SIZE[0]
    e = w + SIZE[1]
    from_skip = (k >= split).to(gl.int32)
    column = (k - split * from_skip) * BLOCK_K
    for j in gl.static_range(STEPS):
        panel = x + j * (BLOCK_M * 128)
        if CLUSTER == "x":
            panel += rank * (BLOCK_M * 64)
            tma_load(panel, column + 64 * j, m + rank * BOX[0], full, from_skip, KERNEL, 5, SECOND, True)
        else:
            tma_load(panel, column + 64 * j, m, full, from_skip, KERNEL, 5, SECOND, False)
    if CLUSTER == "w":
        tma_load(w + rank * (SIZE[1] // 2), k * (BLOCK_K // 2), n + rank * BOX[1], full, 0, KERNEL, 0, -1, True)
        tma_load(e + rank * (SIZE[2] // 2), 2 * n + rank * BOX[2], k * STEPS, full, 0, KERNEL, 10, -1, True)
    else:
        tma_load(w, k * (BLOCK_K // 2), n, full, 0, KERNEL, 0, -1, False)
        for q in gl.static_range(2 * BLOCK_N // BOX[2]):
            part = e + q * (STEPS * BOX[2] * 4)
            tma_load(part, 2 * n + q * BOX[2], k * STEPS, full, 0, KERNEL, 10, -1, False)


@gluon.jit
def drain(bars, slot, phase, STAGES: gl.constexpr):
    """The last arrivals of the other block must have landed here before this block may exit."""
    for _ in range(STAGES):
        barrier_wait(bars + 16 * slot + 8, phase ^ 1)
        slot, phase = next_slot(slot, phase, STAGES)


# ------------------------------------------------------------------------------------------------ one slot's products
@gluon.jit
def read_metadata(
    words, slot, FIRST: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """The metadata of each step and accumulator tile (16 WARPS features, from FIRST) in the accumulator's layout."""
    SLOT: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, BLOCK_K)[3]
    ACC: gl.constexpr = accumulator_layout(WARPS, BLOCK_M)
    B6: gl.constexpr = metadata_layout(WARPS, BLOCK_M)
    read = ()
    for j in gl.static_range(BLOCK_K // 64):
        for b in gl.static_range(TILES):
            offset = metadata_offset(BLOCK_N, BLOCK_K, CLUSTER, j, FIRST // 64 + b * (WARPS // 4))
            read = read + (
                metadata_to_accumulator(load_shared(words + (slot * SLOT + offset)), ACC, B6, WARPS, BLOCK_M),
            )
    return read


@gluon.jit
def multiply(
    acc, metadata, w, x, WARPS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, KIND: gl.constexpr
):
    """acc += W x^T of one slot, committed as one group. w, x: descriptors; 32 columns of x are 64 bytes, of W 32."""
    TILES: gl.constexpr = len(acc)
    effect("wgmma.fence.sync.aligned;")
    for j in gl.static_range(BLOCK_K // 64):
        for s in gl.static_range(2):
            issued = ()
            for b in gl.static_range(TILES):
                a = w + (4 * j + 2 * s + b * (16 * WARPS * BLOCK_K >> 4))
                columns = x + (j * (BLOCK_M * 128 >> 4) + 4 * s)
                issued = issued + (wgmma_sp(acc[b], a, columns, metadata[j * TILES + b], KIND, s),)
            acc = issued
    effect("wgmma.commit_group.sync.aligned;")
    return acc


@gluon.jit
def descriptors(base, FIRST: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr):
    """wgmma descriptors of W (from feature FIRST) and x in slot 0."""
    SIZE: gl.constexpr = stage_bytes(BLOCK_N, BLOCK_M, BLOCK_K)
    w = (((base + SIZE[0] + FIRST * BLOCK_K) & 0x3FFFF) >> 4).to(gl.int64) | descriptor(BLOCK_K)
    x = ((base & 0x3FFFF) >> 4).to(gl.int64) | descriptor(128)
    return w, x


# ------------------------------------------------------------------------------------------------ epilogue
@gluon.jit
def epilogue(
    acc, n, m, y_desc, r_desc, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale, panels, arrived, phase,
    M, N,
    FIRST: gl.constexpr, WARPS: gl.constexpr, BLOCK_M: gl.constexpr, ACTIVATION: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr, SCALE: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """Tiles of 16 WARPS features from n, stored through the shared panels FIRST ... and TMA, or DIRECT from registers.

    DIRECT serves fp32 results, whose panels would not fit, and N that TMA cannot store (rows not of 16 bytes): eight
    lanes write eight neighbouring features.
    """
    ROWS: gl.constexpr = 16 * WARPS
    ACC: gl.constexpr = accumulator_layout(WARPS, BLOCK_M)
    TILES: gl.constexpr = len(acc)
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    if not DIRECT:
        tma.store_wait(0)  # the panels are free again
        if RESIDUAL:
            if WARPS == 8:
                effect("bar.sync 0;")  # ... for every warp, not only for the one that stored
            mbarrier.expect(arrived, TILES * BLOCK_M * ROWS * 2)
            for b in gl.static_range(TILES):
                box_in(r_desc, [m, n + b * ROWS], arrived, panels.index(FIRST + b))
            mbarrier.wait(arrived, phase)
    row = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    for b in gl.static_range(TILES):
        feature = n + b * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        y = acc[b]
        if BIAS:
            y = y + gl.load(bias_ptr + feature, mask=feature < N, other=0).to(gl.float32)[:, None]
        y = activate(y, ACTIVATION, gl.bfloat16 == DTYPE)
        if SCALE:
            for g in range(m // rows_per_scale, (gl.minimum(m + BLOCK_M, M) - 1) // rows_per_scale + 1):
                gate = gl.load(scale_ptr + g.to(gl.int64) * N + feature, mask=feature < N, other=0).to(gl.float32)
                mine = (row >= g * rows_per_scale) & (row < (g + 1) * rows_per_scale)
                y = gl.where(mine[None, :], y * gate[:, None], y)
        if DIRECT:
            inside = (feature < N)[:, None] & (row < M)[None, :]
            if RESIDUAL:
                r_tile = r_ptr + m.to(gl.int64) * stride_r
                offset = (row - m)[None, :] * stride_r + feature[:, None]
                y = y + gl.load(r_tile + offset, mask=inside, other=0).to(gl.float32)
            offset = (row - m)[None, :] * N + feature[:, None]
            gl.store(y_ptr + m.to(gl.int64) * N + offset, y.to(DTYPE), mask=inside)
        else:
            panel = panels.index(FIRST + b).permute((1, 0))
            if RESIDUAL:
                y = y + panel.load(ACC).to(gl.float32)
            panel.store(y.to(DTYPE))
    if not DIRECT:
        fence_async_shared()
        block_barrier()  # one warp stores for all; Triton 3.9 puts no barrier before it
        for b in gl.static_range(TILES):
            box_out(y_desc, [m, n + b * ROWS], panels.index(FIRST + b))
