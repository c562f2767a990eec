"""How fast the tensor-core instructions themselves are: loops of mma, mma.sp, wgmma and wgmma.sp over operands at rest.

    mma, mma.sp      m16n8k16 and m16n8k32: eight products of 4 x 2 register fragments in turn, in every warp
    wgmma, wgmma.sp  m64n256k16 and m64n256k32: both operands in shared memory, two warpgroups in a block

The operands are random, finite and the same in every turn, so these are upper bounds of what a kernel can reach, not
predictions. y = iterations * (A B^T), which is what the tests check. Sources: PTX ISA 8.5, as in `sparse24/ptx.py`.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from sparsedm.kernels.launch import jit, tl
from sparsedm.kernels.sparse24.format import LEGAL_NIBBLES
from sparsedm.kernels.sparse24.ptx import (
    KIND,
    block_barrier,
    effect,
    metadata_to_accumulator,
    shared_base,
    warp_index,
    wgmma_wait,
)
from sparsedm.kernels.sparse24.wgmma_pipeline import Config, accumulator_layout, descriptors, metadata_layout, multiply

WARPS = 8
TILES_A, TILES_B = 4, 2  # fragments that the eight products of one turn combine
ROWS, COLUMNS, STEP = 128, 256, 128  # of wgmma.sp: A (ROWS, STEP) 2:4, B (COLUMNS, STEP); of wgmma half the STEP
ITERATIONS = {"mma": 4096, "mma.sp": 4096, "wgmma": 1024, "wgmma.sp": 1024}


def prepare(name, device, dtype):
    """-> (the call, its dense-equivalent operations: two for each multiply-add of the dense product)."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = multiprocessors * (1 if name.startswith("wgmma") else 2)
    kernel, tensors, constants = launch_arguments(name, dtype, device, blocks)
    iterations = ITERATIONS[name]

    def call():
        kernel[(blocks,)](*tensors.values(), iterations, **constants, num_warps=WARPS)

    return call, blocks * operations(name, iterations)


def operations(name, iterations):
    """Of one block."""
    if name.startswith("wgmma"):
        return 2 * iterations * ROWS * COLUMNS * depth(name)
    return 2 * iterations * WARPS * TILES_A * TILES_B * 16 * 8 * depth(name)


def depth(name):
    """Columns of K in one turn of the loop."""
    return {"mma": 16, "mma.sp": 32, "wgmma": STEP // 2, "wgmma.sp": STEP}[name]


def launch_arguments(name, dtype, device, blocks):
    """-> (kernel, {pointer: tensor}, {compile-time argument: value}); after the pointers comes `iterations`."""
    generator = torch.Generator(device).manual_seed(0)

    def words(*shape):
        """int32, each a pair of normal numbers."""
        return torch.randn(*shape, 2, generator=generator, device=device).to(dtype).view(torch.int32)[..., 0]

    def metadata(*shape):
        legal = torch.tensor(LEGAL_NIBBLES, device=device)
        nibbles = legal[torch.randint(6, (*shape, 8), generator=generator, device=device)]
        return (nibbles << torch.arange(0, 32, 4, device=device)).sum(-1).to(torch.int32)

    sparse = name.endswith(".sp")
    if name.startswith("mma"):
        registers = 4 * TILES_A + (4 if sparse else 2) * TILES_B
        x = words(registers, 32 * WARPS)
        if sparse:
            x = torch.cat((x, metadata(1, 32 * WARPS)))
        accumulators = 4 * TILES_A * TILES_B
        y = torch.empty(blocks, accumulators, 32 * WARPS, device=device)
        constants = {"ASM": mma_asm(KIND[dtype], sparse), "CONSTRAINTS": mma_constraints(sparse)}
        constants |= {"REGISTERS": len(x), "ACCUMULATORS": accumulators}
        return mma_kernel, {"x_ptr": x, "y_ptr": y}, constants | {"THREADS": 32 * WARPS}
    image = words((ROWS * STEP + 2 * COLUMNS * STEP) // 4)
    y = torch.empty(blocks, ROWS, COLUMNS, device=device)
    constants = {"KIND": KIND[dtype]}
    if sparse:
        e = metadata(STEP // 64, 32 * WARPS)
        return wgmma_sp_kernel, {"image_ptr": image, "e_ptr": e, "y_ptr": y}, constants
    return wgmma_kernel, {"image_ptr": image, "y_ptr": y}, constants


# ------------------------------------------------------------------------------------------------ mma, mma.sp
def mma_asm(kind, sparse):
    """Eight products; the operands are: accumulators (outputs, tied), A fragments, B fragments, metadata."""
    first_a = 4 * TILES_A * TILES_B
    first_b, width = first_a + 4 * TILES_A, 4 if sparse else 2
    instruction = "mma.sp::ordered_metadata.sync.aligned.m16n8k32" if sparse else "mma.sync.aligned.m16n8k16"
    metadata = f", ${first_b + width * TILES_B}, 0" if sparse else ""

    def registers(first, count):
        return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"

    lines = []
    for a in range(TILES_A):
        for b in range(TILES_B):
            acc = registers(4 * (a * TILES_B + b), 4)
            operands = f"{registers(first_a + 4 * a, 4)}, {registers(first_b + width * b, width)}, {acc}{metadata}"
            lines.append(f"{instruction}.row.col.f32.{kind}.{kind}.f32 {acc}, {operands};")
    return " ".join(lines)


def mma_constraints(sparse):
    accumulators = 4 * TILES_A * TILES_B
    inputs = 4 * TILES_A + (4 if sparse else 2) * TILES_B + sparse
    return ",".join(["=f"] * accumulators + ["r"] * inputs + [str(i) for i in range(accumulators)])


@jit
def mma_kernel(
    x_ptr, y_ptr, iterations,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, REGISTERS: tl.constexpr, ACCUMULATORS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    # one element of each tensor is one register of one thread
    thread = tl.arange(0, THREADS)
    x = ()
    for r in tl.static_range(REGISTERS):
        x = x + (tl.load(x_ptr + r * THREADS + thread),)
    acc = (tl.zeros([THREADS], tl.float32),) * ACCUMULATORS
    for _ in range(iterations):
        acc = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, x + acc, dtype=(tl.float32,) * ACCUMULATORS, is_pure=True, pack=1
        )
    for r in tl.static_range(ACCUMULATORS):
        tl.store(y_ptr + (tl.program_id(0) * ACCUMULATORS + r) * THREADS + thread, acc[r])


# ------------------------------------------------------------------------------------------------ wgmma, wgmma.sp
# image: int32 words of shared memory, as a slot of `wgmma_pipeline.py` holds them: two panels of x, 256 rows of 128
# bytes each, then W, 128 rows of 128 bytes. To wgmma.sp that is W (128, 128) compressed and x (256, 128); wgmma reads
# the same bytes as W (128, 64) dense and the first panel of x (256, 64).
# y (blocks, 128, 256) fp32 = iterations * (W x^T).

BLOCK_N = gl.constexpr(ROWS)
BLOCK_M = gl.constexpr(COLUMNS)
BLOCK_K = gl.constexpr(STEP)
CONFIG = gl.constexpr(Config(ROWS, COLUMNS, STEP, stages=1))


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
    w, x = descriptors(shared_base(), 0, CONFIG)
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
        acc = multiply(acc, metadata, w, x, 8, CONFIG, KIND)
        acc = wgmma_wait(acc, 1)
    acc = wgmma_wait(acc, 0)
    _store(y_ptr, acc[0])
    image._keep_alive()
