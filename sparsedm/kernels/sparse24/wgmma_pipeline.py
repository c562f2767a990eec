"""What the wgmma.sp kernels share: the tile order, the ring of TMA slots, one slot's products, the epilogue.

A slot holds BLOCK_K columns of a tile: x as panels of 64 columns (BLOCK_M rows of 128 bytes), the compressed W (BLOCK_N
rows of BLOCK_K bytes) and the metadata words; its `full` and `empty` mbarriers stand behind the ring. `full` counts the
bytes that TMA brings, `empty` one arrival of each consumer warp that is done reading (of both blocks of a cluster).
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparsedm.kernels.sparse24.ptx import (
    PUBLIC,
    activate,
    barrier_arrive,
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
    wgmma_wait,
)


@dataclass(frozen=True)
class Config:
    """The CONFIG of the kernels, one compile-time argument. What `static_range` or a shape takes needs a constexpr of
    its own: an attribute of CONFIG is a plain number."""

    block_n: int  # features
    block_m: int  # rows of x, or pixels
    block_k: int
    stages: int
    cluster: str = "none"  # "x", "w": what the two blocks of a cluster share; "xw": four, in pairs of each kind
    specialized: bool = True
    resident: int = 1  # blocks on a multiprocessor; 2: flat, with half the warps, one multiplies while the other stores
    group: int = 8  # tiles along M that are walked before the next along N, for L2


@gluon.constexpr_function
def stage_bytes(config):
    """(x, W, metadata, slot): bytes of the three tiles of a slot of the ring, and of the slot in units of 1 KiB."""
    x, w = config.block_m * config.block_k * 2, config.block_n * config.block_k
    e = config.block_n * 8 * (config.block_k // 64)
    return x, w, e, -(-(x + w + e) // 1024) * 1024


@gluon.constexpr_function
def shares_x(config):
    return "x" in config.cluster


@gluon.constexpr_function
def shares_w(config):
    return "w" in config.cluster


@gluon.constexpr_function
def cluster_size(config):
    return (1 + shares_x(config)) * (1 + shares_w(config))


@gluon.constexpr_function
def warps(config):
    """That hold one accumulator: a warpgroup's, or in a flat loop all of a block."""
    return 4 if config.specialized else 8 // config.resident


@gluon.constexpr_function
def accumulators(config):
    """Of each thread: tiles of 16 warps(config) features."""
    return config.block_n * config.resident // 128


@gluon.constexpr_function
def boxes(config):
    """TMA boxes: (rows of x, rows of W, words of metadata)."""
    rows_x = config.block_m // (1 + shares_x(config))
    rows_w = config.block_n // (1 + shares_w(config))
    return rows_x, rows_w, min(256, 2 * rows_w)


@gluon.constexpr_function
def metadata_offset(config, step, block64):
    """Bytes to the words of (64-column step, 64-row block): boxes of [steps, width] words stand one after another."""
    steps, width, column = config.block_k // 64, boxes(config)[2], 128 * block64
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
def tile(t, M, N, rank, CONFIG: gl.constexpr):
    """Tile number t -> its first feature and first row. Tiles along M are neighbours, so that W stays in L2."""
    tiles_n = gl.cdiv(N, CONFIG.block_n)
    tiles_m = gl.cdiv(M, CONFIG.block_m)
    pairs_n = gl.cdiv(tiles_n, 2) if shares_x(CONFIG) else tiles_n
    pairs_m = gl.cdiv(tiles_m, 2) if shares_w(CONFIG) else tiles_m
    first = t // (CONFIG.group * pairs_n) * CONFIG.group
    width = gl.minimum(pairs_m - first, CONFIG.group)
    inside = t % (CONFIG.group * pairs_n)
    n = inside // width
    m = first + inside % width
    of_x, of_w = halves(rank, CONFIG)
    if shares_x(CONFIG):
        n = gl.minimum(2 * n + of_x, tiles_n - 1)
    if shares_w(CONFIG):
        m = gl.minimum(2 * m + of_w, tiles_m - 1)
    return n * CONFIG.block_n, m * CONFIG.block_m


@gluon.jit
def tile_count(M, N, CONFIG: gl.constexpr):
    tiles_n = gl.cdiv(N, CONFIG.block_n)
    tiles_m = gl.cdiv(M, CONFIG.block_m)
    pairs_n = gl.cdiv(tiles_n, 2) if shares_x(CONFIG) else tiles_n
    return pairs_n * (gl.cdiv(tiles_m, 2) if shares_w(CONFIG) else tiles_m)


@gluon.jit
def halves(rank, CONFIG: gl.constexpr):
    """Which half of x and which of W this block loads for those that share it: bits of its rank."""
    if shares_x(CONFIG):
        return rank & 1, rank >> 1
    return 0, rank


@gluon.jit
def recipients(rank, CONFIG: gl.constexpr):
    """Bits of the ranks that get this block's half of x, of W."""
    if cluster_size(CONFIG) == 4:
        return 3 << (rank & 2), 5 << (rank & 1)
    return 3, 3


# ------------------------------------------------------------------------------------------------ ring
@gluon.jit
def allocate(CONFIG: gl.constexpr, DIRECT: gl.constexpr, DTYPE: gl.constexpr):
    """-> (ring with its barriers behind it, output panels of one warpgroup's features each, residual barriers)."""
    STAGES: gl.constexpr = CONFIG.stages
    BLOCK_M: gl.constexpr = CONFIG.block_m
    BLOCKS: gl.constexpr = cluster_size(CONFIG)
    SLOT: gl.constexpr = stage_bytes(CONFIG)[3]
    PANEL: gl.constexpr = 16 * warps(CONFIG)
    PANELS: gl.constexpr = 1 if DIRECT else CONFIG.block_n // PANEL
    gl.static_assert(
        CONFIG.block_n * BLOCK_M * 2 <= STAGES * SLOT,
        "the ring must be the largest allocation: only then is it at offset 0",
    )
    ring = gl.allocate_shared_memory(
        gl.int8, [STAGES * (SLOT // 1024) + 1, 1024], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    panels = gl.allocate_shared_memory(DTYPE, [PANELS, BLOCK_M, PANEL], gl.NVMMASharedLayout(128, 16, rank=2))
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bars = shared_base() + STAGES * SLOT
    for s in gl.static_range(STAGES):
        barrier_init(bars + 16 * s, 1)
        # the consumer warps of this block and of each that shares a tile with it
        barrier_init(bars + 16 * s + 8, 8 // CONFIG.resident * (1 + BLOCKS // 2))
    if BLOCKS > 1:
        effect("fence.mbarrier_init.release.cluster;")
    for s in gl.static_range(2):
        mbarrier.init(arrived.index(s), 1)
    fence_async_shared()
    return ring, panels, arrived


@gluon.jit
def next_slot(slot, phase, CONFIG: gl.constexpr):
    wraps = slot == CONFIG.stages - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def empty_slot(base, slot, phase, CONFIG: gl.constexpr):
    """Waits until the slot is empty and announces its bytes -> (its `full` barrier, addresses of x, W and metadata)."""
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    full = base + CONFIG.stages * SIZE[3] + 16 * slot
    barrier_wait(full + 8, phase ^ 1)
    barrier_expect(full, SIZE[0] + SIZE[1] + SIZE[2])
    x = base + slot * SIZE[3]
    return full, x, x + SIZE[0], x + (SIZE[0] + SIZE[1])


@gluon.jit
def load_weight(
    w, e, full, n, k, rank, CONFIG: gl.constexpr, KERNEL: gl.constexpr, W_DESC: gl.constexpr, E_DESC: gl.constexpr
):
    """Orders W and the metadata of step k and the features from n. W_DESC, E_DESC: numbers of the parameters."""
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    BOX: gl.constexpr = boxes(CONFIG)
    STEPS: gl.constexpr = CONFIG.block_k // 64
    HALF: gl.constexpr = CONFIG.block_k // 2
    if shares_w(CONFIG):
        _, half = halves(rank, CONFIG)
        _, to = recipients(rank, CONFIG)
        tma_load(w + half * (SIZE[1] // 2), k * HALF, n + half * BOX[1], full, 0, to, KERNEL, W_DESC, -1, True)
        tma_load(e + half * (SIZE[2] // 2), 2 * n + half * BOX[2], k * STEPS, full, 0, to, KERNEL, E_DESC, -1, True)
    else:
        tma_load(w, k * HALF, n, full, 0, 0, KERNEL, W_DESC, -1, False)
        for q in gl.static_range(2 * CONFIG.block_n // BOX[2]):
            part = e + q * (STEPS * BOX[2] * 4)
            tma_load(part, 2 * n + q * BOX[2], k * STEPS, full, 0, 0, KERNEL, E_DESC, -1, False)


@gluon.jit
def fill_slot(base, slot, phase, n, m, k, split, rank, CONFIG: gl.constexpr, SKIP: gl.constexpr, KERNEL: gl.constexpr):
    """Waits until the slot is empty and orders the tiles of step k: from `split` on, x is the skip.

    Every tensor map is five kernel parameters, so W, x, metadata and skip are number 0, 5, 10 and 25.
    """
    BOX: gl.constexpr = boxes(CONFIG)
    SECOND: gl.constexpr = 25 if SKIP else -1
    full, x, w, e = empty_slot(base, slot, phase, CONFIG)
    from_skip = (k >= split).to(gl.int32)
    column = (k - split * from_skip) * CONFIG.block_k
    for j in gl.static_range(CONFIG.block_k // 64):
        panel = x + j * (CONFIG.block_m * 128)
        if shares_x(CONFIG):
            half, _ = halves(rank, CONFIG)
            to, _ = recipients(rank, CONFIG)
            panel += half * (CONFIG.block_m * 64)
            tma_load(panel, column + 64 * j, m + half * BOX[0], full, from_skip, to, KERNEL, 5, SECOND, True)
        else:
            tma_load(panel, column + 64 * j, m, full, from_skip, 0, KERNEL, 5, SECOND, False)
    load_weight(w, e, full, n, k, rank, CONFIG, KERNEL, 0, 10)


@gluon.jit
def drain(bars, slot, phase, CONFIG: gl.constexpr):
    """The last arrivals of the other blocks must have landed here before this block may exit."""
    for _ in range(CONFIG.stages):
        barrier_wait(bars + 16 * slot + 8, phase ^ 1)
        slot, phase = next_slot(slot, phase, CONFIG)


# ------------------------------------------------------------------------------------------------ one slot's products
FETCH_AT = gl.constexpr(2)  # the step at which the residual is ordered: at once, the last tile's store may still read


@gluon.jit
def read_metadata(words, slot, FIRST: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, CONFIG: gl.constexpr):
    """The metadata of each step and accumulator tile (16 WARPS features, from FIRST) in the accumulator's layout."""
    SLOT: gl.constexpr = stage_bytes(CONFIG)[3]
    ACC: gl.constexpr = accumulator_layout(WARPS, CONFIG.block_m)
    B6: gl.constexpr = metadata_layout(WARPS, CONFIG.block_m)
    read = ()
    for j in gl.static_range(CONFIG.block_k // 64):
        for b in gl.static_range(TILES):
            offset = metadata_offset(CONFIG, j, FIRST // 64 + b * (WARPS // 4))
            word = load_shared(words + (slot * SLOT + offset))
            read = read + (metadata_to_accumulator(word, ACC, B6, WARPS, CONFIG.block_m),)
    return read


@gluon.jit
def multiply(acc, metadata, w, x, WARPS: gl.constexpr, CONFIG: gl.constexpr, KIND: gl.constexpr):
    """acc += W x^T of one slot, committed as one group. w, x: descriptors; 32 columns of x are 64 bytes, of W 32."""
    TILES: gl.constexpr = len(acc)
    effect("wgmma.fence.sync.aligned;")
    for j in gl.static_range(CONFIG.block_k // 64):
        for s in gl.static_range(2):
            issued = ()
            for b in gl.static_range(TILES):
                a = w + (4 * j + 2 * s + b * (16 * WARPS * CONFIG.block_k >> 4))
                columns = x + (j * (CONFIG.block_m * 128 >> 4) + 4 * s)
                issued = issued + (wgmma_sp(acc[b], a, columns, metadata[j * TILES + b], KIND, s),)
            acc = issued
    effect("wgmma.commit_group.sync.aligned;")
    return acc


@gluon.jit
def descriptors(base, FIRST: gl.constexpr, CONFIG: gl.constexpr):
    """wgmma descriptors of W (from feature FIRST) and x in slot 0."""
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    w = (((base + SIZE[0] + FIRST * CONFIG.block_k) & 0x3FFFF) >> 4).to(gl.int64) | descriptor(CONFIG.block_k)
    x = ((base & 0x3FFFF) >> 4).to(gl.int64) | descriptor(128)
    return w, x


@gluon.jit
def multiply_tile(
    bars, words, w0, x0, slot, phase, steps, residual, FIRST: gl.constexpr, CONFIG: gl.constexpr, KIND: gl.constexpr,
    FETCHES: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup's products over the next `steps` slots -> (accumulators, the slot after, its phase).

    residual: the first arguments of `fetch_residual`, which is called meanwhile if FETCHES.
    """
    TILES: gl.constexpr = accumulators(CONFIG)
    BLOCK_M: gl.constexpr = CONFIG.block_m
    SIZE: gl.constexpr = stage_bytes(CONFIG)
    acc = (gl.zeros([64, BLOCK_M], gl.float32, layout=accumulator_layout(4, BLOCK_M)),) * TILES
    for k in range(steps):
        if FETCHES:
            n, where, r_desc, panels, arrived = residual
            if k == gl.minimum(FETCH_AT, steps - 1):
                fetch_residual(n, where, r_desc, panels, arrived, FIRST // 64, 4, CONFIG, BOX)
        barrier_wait(bars + 16 * slot, phase)
        metadata = read_metadata(words, slot, FIRST, TILES, 4, CONFIG)
        step = slot * (SIZE[3] >> 4)
        acc = multiply(acc, metadata, w0 + step, x0 + step, 4, CONFIG, KIND)
        acc = wgmma_wait(acc, 0)
        barrier_arrive(bars + 16 * slot + 8, cluster_size(CONFIG))
        slot, phase = next_slot(slot, phase, CONFIG)
    return acc, slot, phase


# ------------------------------------------------------------------------------------------------ epilogue
@gluon.jit
def panel_as(panels, i, BOX: gl.constexpr):
    """Panel i in the shape of the output's TMA box: (rows, features) as it is, or a BOX of an image."""
    panel = panels.index(i)
    if BOX is not None:
        IMAGE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=len(BOX))
        if PUBLIC:
            panel = panel.reinterpret(panels.dtype, BOX, IMAGE)
        else:
            panel = panel._reinterpret(panels.dtype, BOX, IMAGE)
    return panel


@gluon.jit
def fetch_residual(
    n, where, r_desc, panels, arrived,
    FIRST: gl.constexpr, WARPS: gl.constexpr, CONFIG: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Orders the residual of a tile into its output panels, which are idle during its products. As in `epilogue`."""
    ROWS: gl.constexpr = 16 * WARPS
    TILES: gl.constexpr = accumulators(CONFIG)
    tma.store_wait(0)  # the panels are free again; who waits here also orders
    mbarrier.expect(arrived, TILES * CONFIG.block_m * ROWS * 2)
    for b in gl.static_range(TILES):
        box_in(r_desc, where + (n + b * ROWS,), arrived, panel_as(panels, FIRST + b, BOX))


@gluon.jit
def epilogue(
    acc, n, where, sink, panels, arrived, phase, M, N,
    FIRST: gl.constexpr, WARPS: gl.constexpr, CONFIG: gl.constexpr, EPILOGUE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Tiles of 16 WARPS features from n, stored through the panels FIRST ... and TMA, or `direct` from registers.

    where: the tile's other coordinates, (row,) or (image, row, column) of a BOX. `direct` serves fp32 results, whose
    panels would not fit, and N that TMA cannot store (rows not of 16 bytes): eight lanes write eight features.
    """
    y_desc, _, y_ptr, r_ptr, stride_r, bias_ptr, scale_ptr, rows_per_scale = sink
    ROWS: gl.constexpr = 16 * WARPS
    BLOCK_M: gl.constexpr = CONFIG.block_m
    ACC: gl.constexpr = accumulator_layout(WARPS, BLOCK_M)
    TILES: gl.constexpr = len(acc)
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty if EPILOGUE.direct else panels.dtype
    m = where[0]
    if not EPILOGUE.direct:
        if EPILOGUE.residual:
            mbarrier.wait(arrived, phase)  # `fetch_residual` has ordered it
        else:
            tma.store_wait(0)  # the panels are free again
    row = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, ACC))
    for b in gl.static_range(TILES):
        feature = n + b * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        y = acc[b]
        if EPILOGUE.bias:
            y = y + gl.load(bias_ptr + feature, mask=feature < N, other=0).to(gl.float32)[:, None]
        y = activate(y, EPILOGUE, gl.bfloat16 == DTYPE)
        if EPILOGUE.scale:
            for g in range(m // rows_per_scale, (gl.minimum(m + BLOCK_M, M) - 1) // rows_per_scale + 1):
                gate = gl.load(scale_ptr + g.to(gl.int64) * N + feature, mask=feature < N, other=0).to(gl.float32)
                mine = (row >= g * rows_per_scale) & (row < (g + 1) * rows_per_scale)
                y = gl.where(mine[None, :], y * gate[:, None], y)
        if EPILOGUE.direct:
            inside = (feature < N)[:, None] & (row < M)[None, :]
            if EPILOGUE.residual:
                r_tile = r_ptr + m.to(gl.int64) * stride_r
                offset = (row - m)[None, :] * stride_r + feature[:, None]
                y = y + gl.load(r_tile + offset, mask=inside, other=0).to(gl.float32)
            offset = (row - m)[None, :] * N + feature[:, None]
            gl.store(y_ptr + m.to(gl.int64) * N + offset, y.to(DTYPE), mask=inside)
        else:
            panel = panels.index(FIRST + b).permute((1, 0))
            if EPILOGUE.residual:
                y = y + panel.load(ACC).to(gl.float32)
            panel.store(y.to(DTYPE))
    if not EPILOGUE.direct:
        fence_async_shared()
        block_barrier()  # one warp stores for all; Triton 3.9 puts no barrier before it
        for b in gl.static_range(TILES):
            box_out(y_desc, where + (n + b * ROWS,), panel_as(panels, FIRST + b, BOX))
