"""The wgmma loops of `instruction_rates`, in Gluon: one block of eight warps on each multiprocessor.

image: int32 words of shared memory, as a slot of `wgmma_pipeline.py` holds them: two panels of x, 256 rows of 128 bytes
each, then W, 128 rows of 128 bytes. To wgmma.sp that is W (128, 128) compressed and x (256, 128); wgmma reads the same
bytes as W (128, 64) dense and the first panel of x (256, 64). y (blocks, 128, 256) fp32 = iterations * (W x^T).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from bench.instruction_rates import COLUMNS, ROWS, STEP
from sparsedm.kernels.sparse24.ptx import (
    block_barrier,
    effect,
    metadata_to_accumulator,
    shared_base,
    warp_index,
    wgmma_wait,
)
from sparsedm.kernels.sparse24.wgmma_pipeline import accumulator_layout, descriptors, metadata_layout, multiply

BLOCK_N = gl.constexpr(ROWS)
BLOCK_M = gl.constexpr(COLUMNS)
BLOCK_K = gl.constexpr(STEP)


@gluon.jit
def _image(image_ptr):
    """-> (the shared memory, filled; the descriptors of this warpgroup's rows of W, and of x)."""
    CHUNK: gl.constexpr = 4096
    CHUNKS: gl.constexpr = (BLOCK_N * BLOCK_K + 2 * BLOCK_M * BLOCK_K) // 4 // CHUNK
    image = gl.allocate_shared_memory(gl.int32, [CHUNKS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    word = gl.arange(0, CHUNK, layout=gl.BlockedLayout([4], [32], [8], [0]))
    for i in gl.static_range(CHUNKS):
        image.index(i).store(gl.load(image_ptr + i * CHUNK + word))
    fence_async_shared()
    block_barrier()
    w, x = descriptors(shared_base(), 0, BLOCK_N, BLOCK_M, BLOCK_K)
    return image, w + warp_index() // 4 * (64 * BLOCK_K >> 4), x


@gluon.jit
def _store(y_ptr, acc):
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, acc.type.layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, acc.type.layout))
    gl.store(y_ptr + gl.program_id(0) * (BLOCK_N * BLOCK_M) + n[:, None] * BLOCK_M + m[None, :], acc)


@gluon.constexpr_function
def _wgmma_asm(n, kind):
    r = n // 2
    registers = ", ".join(f"${i}" for i in range(r))
    shape = f"m64n{n}k16.f32.{kind}.{kind}"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, ${2 * r}, ${3 * r}, 1, 1, 1, 0, 0;"


@gluon.constexpr_function
def _wgmma_constraints(n):
    r = n // 2
    return ",".join(["=f"] * r + [str(i) for i in range(r)] + ["l"] * (2 * r))


@gluon.jit
def _wgmma(acc, a, b, KIND: gl.constexpr):
    """acc (128, n) fp32 += A . B^T over 16 columns of K; asynchronous. Gluon's own would bring a block barrier."""
    N: gl.constexpr = acc.shape[1]
    operands = [
        acc,
        gl.full(acc.shape, a, gl.int64, layout=acc.type.layout),
        gl.full(acc.shape, b, gl.int64, layout=acc.type.layout),
    ]
    return gl.inline_asm_elementwise(
        _wgmma_asm(N, KIND), _wgmma_constraints(N), operands, dtype=gl.float32, is_pure=False, pack=N // 2
    )


@gluon.jit
def wgmma_kernel(image_ptr, y_ptr, iterations, KIND: gl.constexpr):
    image, w, x = _image(image_ptr)
    acc = (gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=accumulator_layout(8, BLOCK_M)),)
    gl.assume(iterations > 0)  # a loop that might not run would leave the wgmma registers undefined (C7515)
    for _ in range(iterations):
        effect("wgmma.fence.sync.aligned;")
        for s in gl.static_range(4):
            acc = (_wgmma(acc[0], w + 2 * s, x + 2 * s, KIND),)
        effect("wgmma.commit_group.sync.aligned;")
        acc = wgmma_wait(acc, 1)
    acc = wgmma_wait(acc, 0)
    _store(y_ptr, acc[0])
    image._keep_alive()


@gluon.jit
def wgmma_sp_kernel(image_ptr, e_ptr, y_ptr, iterations, KIND: gl.constexpr):
    """e (2, 256) int32: a metadata word of each thread for each 64 columns."""
    ACC: gl.constexpr = accumulator_layout(8, BLOCK_M)
    B6: gl.constexpr = metadata_layout(8, BLOCK_M)
    image, w, x = _image(image_ptr)
    thread = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0]))
    metadata = ()
    for j in gl.static_range(BLOCK_K // 64):
        metadata = metadata + (metadata_to_accumulator(gl.load(e_ptr + j * 256 + thread), ACC, B6, 8, BLOCK_M),)
    acc = (gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=ACC),)
    gl.assume(iterations > 0)
    for _ in range(iterations):
        acc = multiply(acc, metadata, w, x, 8, BLOCK_M, BLOCK_K, KIND)
        acc = wgmma_wait(acc, 1)
    acc = wgmma_wait(acc, 0)
    _store(y_ptr, acc[0])
    image._keep_alive()
