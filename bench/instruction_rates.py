"""How fast the tensor-core instructions themselves are: loops of mma, mma.sp, wgmma and wgmma.sp over operands at rest.

    mma, mma.sp      m16n8k16 and m16n8k32: eight products of 4 x 2 register fragments in turn, in every warp
    wgmma, wgmma.sp  m64n256k16 and m64n256k32: both operands in shared memory, two warpgroups in a block

The operands are random, finite and the same in every turn, so these are upper bounds of what a kernel can reach, not
predictions. y = iterations * (A B^T), which is what the tests check. Sources: PTX ISA 8.5, as in `sparse24/ptx.py`.
NOT YET RUN ON A GPU: the sparse ones are executed by the emulator of the tests, all are compiled and their SASS read.
"""

import torch

from sparsedm.kernels.launch import capability, jit, tl
from sparsedm.kernels.sparse24.format import LEGAL_NIBBLES

NAMES = ("mma", "mma.sp", "wgmma", "wgmma.sp")
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}
WARPS = 8
TILES_A, TILES_B = 4, 2  # fragments that the eight products of one turn combine
ROWS, COLUMNS, STEP = 128, 256, 128  # of wgmma.sp: A (ROWS, STEP) 2:4, B (COLUMNS, STEP); of wgmma half the STEP
ITERATIONS = {"mma": 4096, "mma.sp": 4096, "wgmma": 1024, "wgmma.sp": 1024}


def unsupported(name, device, dtype):
    """None, or why the loop `name` cannot run on `device`."""
    if capability(device) is None:
        return "needs an NVIDIA GPU"
    if dtype not in KINDS:
        return f"takes bfloat16 and float16, not {str(dtype)[6:]}"
    if capability(device) < (8, 0):
        return "needs sm_80 or later"
    if name.startswith("wgmma") and capability(device) != (9, 0):
        return "needs sm_90a"
    return None


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


def launch_arguments(name, dtype, device, blocks, seed=0):
    """-> (kernel, {pointer: tensor}, {compile-time argument: value}); after the pointers comes `iterations`."""
    generator = torch.Generator(device).manual_seed(seed)

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
        constants = {"ASM": mma_asm(KINDS[dtype], sparse), "CONSTRAINTS": mma_constraints(sparse)}
        constants |= {"REGISTERS": len(x), "ACCUMULATORS": accumulators}
        return mma_kernel, {"x_ptr": x, "y_ptr": y}, constants | {"THREADS": 32 * WARPS}
    from bench.instruction_rates_wgmma import wgmma_kernel, wgmma_sp_kernel  # Gluon: needs Triton

    image = words((ROWS * STEP + 2 * COLUMNS * STEP) // 4)
    y = torch.empty(blocks, ROWS, COLUMNS, device=device)
    constants = {"KIND": KINDS[dtype]}
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
