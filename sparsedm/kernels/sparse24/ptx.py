"""The PTX instructions that the sparse tensor-core kernels need and Gluon does not have, as Gluon functions.

Triton has no sparse dot. `inline_asm_elementwise` makes it possible without changing the compiler: if `pack` is the
number of a thread's registers of a tensor, one assembly text receives *all* of them, for wgmma in the order of the
accumulator fragment. Other operands are broadcast to the accumulator's layout, so they arrive as equal registers. The
text names the first; ptxas removes the copies.

Rules for the callers, which the compiler does not check:
* Shared memory is addressed as `global_smem` + a constant, which holds for the largest allocation of a kernel (Triton
  places allocations by size). Each kernel asserts that its ring is the largest.
* Metadata registers are inputs of an asynchronous instruction: they may not be rewritten before a wait (else ptxas
  serialises every wgmma and says C7513).
* Assembly with side effects is `is_pure=False`; it keeps its order, but Triton inserts no barrier for it.

Gluon names that differ between Triton 3.6.0 and 3.9.0 (all supported) are resolved only here.
Source: PTX ISA 8.5, sections on wgmma.mma_async.sp, mma.sp, mbarrier, cp.async.bulk.tensor, barrier.cluster.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

KIND = {torch.bfloat16: "bf16", torch.float16: "f16"}  # dtype -> its name in the instructions

block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # 3.6.0; 3.7.1
box_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # 3.8; before
box_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
words_in = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
ALL_NAN = gl.constexpr(tl.PropagateNan.ALL)
PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # 3.9; `_reinterpret` before


@gluon.jit
def effect(ASM: gl.constexpr):
    """An instruction without operands. The unused output register is what the builder insists on."""
    gl.inline_asm_elementwise(ASM + " // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# ------------------------------------------------------------------------------------------------ where am I
@gluon.jit
def shared_base():
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def cluster_rank():
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def warp_index():
    """In a form that ptxas knows to be equal over the warp."""
    asm: gl.constexpr = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 5; shfl.sync.idx.b32 $0, t, 0, 0x1f, -1; }"
    return gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=True, pack=1)


# ------------------------------------------------------------------------------------------------ barriers
@gluon.jit
def barrier_init(barrier, COUNT: gl.constexpr):
    asm: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p mbarrier.init.shared::cta.b64 [$1], $2; mov.b32 $0, 0; }"
    )
    gl.inline_asm_elementwise(asm, "=r,r,r", [barrier, gl.to_tensor(COUNT)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_wait(barrier, parity):
    """Until the phase of this parity is complete."""
    asm: gl.constexpr = (
        "{ .reg .pred p; LW: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra.uni LW; mov.b32 $0, 0; }"
    )
    gl.inline_asm_elementwise(asm, "=r,r,r", [barrier, parity], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def barrier_expect(barrier, BYTES: gl.constexpr):
    """Arrives once (one lane of the warp) and announces BYTES that TMA will bring."""
    asm: gl.constexpr = (
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.b32 $0, 0; }"
    )
    gl.inline_asm_elementwise(asm, "=r,r,r", [barrier, gl.to_tensor(BYTES)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _arrive_asm(blocks):
    if blocks == 1:
        return (
            "{ .reg .pred p; .reg .b32 l; mov.u32 l, %laneid; setp.eq.u32 p, l, 0; "
            "@p mbarrier.arrive.shared::cta.b64 _, [$1]; mov.b32 $0, 0; }"
        )
    # lane 0 arrives at this block's barrier, lanes 1 and 2 at the barriers of the blocks whose rank differs in one bit
    return (
        f"{{ .reg .pred p; .reg .b32 l, a, r; mov.u32 l, %laneid; setp.lt.u32 p, l, {1 + blocks // 2}; "
        f"mov.u32 r, %cluster_ctarank; and.b32 l, l, {blocks - 1}; xor.b32 r, r, l; mapa.shared::cluster.u32 a, $1, r; "
        "@p mbarrier.arrive.shared::cluster.b64 _, [a]; mov.b32 $0, 0; }"
    )


@gluon.jit
def barrier_arrive(barrier, BLOCKS: gl.constexpr):
    """One arrival of this warp, in a cluster of BLOCKS also at the barriers of the blocks that share a tile with it.

    Without `.release.cluster`, which would put a MEMBAR.ALL.GPU into the main loop: the arrival only says that this
    warp no longer reads the slot, it publishes no data.
    """
    gl.inline_asm_elementwise(_arrive_asm(BLOCKS), "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def cluster_sync(BLOCKS: gl.constexpr):
    """Every warp of all blocks has to come here, also the warps of the idle partitions."""
    if BLOCKS > 1:
        effect("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;")


@gluon.jit
def sleep(nanoseconds):
    asm: gl.constexpr = "nanosleep.u32 $1; mov.b32 $0, 0;"
    gl.inline_asm_elementwise(asm, "=r,r", [nanoseconds], dtype=gl.int32, is_pure=False, pack=1)


# ------------------------------------------------------------------------------------------------ TMA
@gluon.constexpr_function
def _tma_asm(kernel, first, second, multicast):
    shared = (".multicast::cluster", ", m") if multicast else ("", "")
    choose = f"setp.ne.u32 q, $5, 0; mov.b64 e, {kernel}_param_{second}; selp.b64 d, e, d, q; " if second >= 0 else ""
    return (
        "{ .reg .pred p, q; .reg .b64 d, e; .reg .b16 m; elect.sync _|p, 0xffffffff; cvt.u16.u32 m, $6; "
        f"mov.b64 d, {kernel}_param_{first}; {choose}cvta.param.u64 d, d; "
        "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        f"{shared[0]} [$1], [d, {{$2, $3}}], [$4]{shared[1]}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def tma_load(
    target, column, row, barrier, other, to, KERNEL: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr,
    MULTICAST: gl.constexpr,
):  # fmt: skip
    """One box of a tensor to shared memory; `barrier` counts its bytes there.

    MULTICAST: to the same place in all blocks of the cluster whose bit in `to` is set.
    The tensor map is the kernel parameter number FIRST of the kernel called KERNEL, or number SECOND (if not negative)
    where `other` is not zero. Only Gluon's own TMA functions know map objects, and those cannot multicast in 3.6.
    """
    gl.inline_asm_elementwise(
        _tma_asm(KERNEL, FIRST, SECOND, MULTICAST), "=r,r,r,r,r,r,r", [target, column, row, barrier, other, to],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _tma_5d_asm(kernel, parameter):
    return (
        "{ .reg .pred p; .reg .b64 d; elect.sync _|p, 0xffffffff; "
        f"mov.b64 d, {kernel}_param_{parameter}; cvta.param.u64 d, d; "
        "@p cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[$1], [d, {$2, $3, $4, $5, $6}], [$7]; mov.b32 $0, 0; }"
    )


@gluon.jit
def tma_load_5d(target, c0, c1, c2, c3, c4, barrier, KERNEL: gl.constexpr, PARAMETER: gl.constexpr):
    """One box of a five-dimensional tensor; c0 is the innermost coordinate."""
    gl.inline_asm_elementwise(
        _tma_5d_asm(KERNEL, PARAMETER), "=r,r,r,r,r,r,r,r", [target, c0, c1, c2, c3, c4, barrier],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ wgmma.sp
@gluon.constexpr_function
def _wgmma_asm(n, kind, selector):
    r = n // 2
    registers = ", ".join(f"${i}" for i in range(r))
    return (
        f"wgmma.mma_async.sp.sync.aligned.m64n{n}k32.f32.{kind}.{kind} {{{registers}}}, "
        f"${2 * r}, ${3 * r}, ${4 * r}, {selector}, 1, 1, 1, 0, 0;"
    )


@gluon.constexpr_function
def _wgmma_constraints(n):
    r = n // 2
    return ",".join(["=f"] * r + [str(i) for i in range(r)] + ["l"] * (2 * r) + ["r"] * r)


@gluon.jit
def wgmma_sp(acc, a, b, metadata, KIND: gl.constexpr, SELECTOR: gl.constexpr):
    """acc (64 w, n) fp32 += A . B^T over 32 columns of K, w warpgroups; asynchronous.

    a, b: int64 shared-memory descriptors of the compressed A (64, 16) and of B (n, 32), the same over a warpgroup.
    metadata: int32 in acc's layout; of each 64-column step SELECTOR 0 and 1 take the first and second half.
    """
    N: gl.constexpr = acc.shape[1]
    L: gl.constexpr = acc.type.layout
    a_all = gl.full(acc.shape, a, gl.int64, layout=L)
    b_all = gl.full(acc.shape, b, gl.int64, layout=L)
    return gl.inline_asm_elementwise(
        _wgmma_asm(N, KIND, SELECTOR), _wgmma_constraints(N), [acc, a_all, b_all, metadata],
        dtype=gl.float32, is_pure=False, pack=N // 2,
    )  # fmt: skip


@gluon.constexpr_function
def _wait_asm(pending):
    return f"wgmma.wait_group.sync.aligned {pending};"


@gluon.constexpr_function
def _wait_constraints(n):
    return ",".join(["=f"] * (n // 2) + [str(i) for i in range(n // 2)])


@gluon.jit
def wgmma_wait(acc, PENDING: gl.constexpr):
    """A tuple of equal accumulators, whose registers may be read only after this."""
    N: gl.constexpr = acc[0].shape[1]
    waited = ()
    for i in gl.static_range(len(acc)):
        done = gl.inline_asm_elementwise(
            _wait_asm(PENDING), _wait_constraints(N), [acc[i]], dtype=gl.float32, is_pure=False, pack=N // 2
        )
        waited = waited + (done,)
    return waited


@gluon.jit
def metadata_to_accumulator(words, ACC: gl.constexpr, B6: gl.constexpr, WARPS: gl.constexpr, N: gl.constexpr):
    """One int32 of each thread -> that int32 in every register of its accumulator (16 WARPS, N). Moves no data.

    `assert_trivial` is the proof: compilation fails where the layouts would need an exchange between threads.
    """
    words6 = gl.convert_layout(words.reshape([WARPS, 1, 8, 1, 4, 1]), B6)
    words6 = gl.broadcast(words6, gl.full([WARPS, 2, 8, N // 8, 4, 2], 0, gl.int32, layout=B6))[0]
    return gl.convert_layout(words6.reshape([16 * WARPS, N]), ACC, assert_trivial=True)


@gluon.jit
def load_shared(address):
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


# ------------------------------------------------------------------------------------------------ mma.sp
@gluon.constexpr_function
def _mma_asm(kind, selector):
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, {selector};"
    )


@gluon.jit
def mma_sp(a, b, acc, metadata, KIND: gl.constexpr, SELECTOR: gl.constexpr):
    """acc + A . B over 32 columns of K; all operands broadcast to (..., 4 registers, 32 lanes) of the fragments."""
    constraints: gl.constexpr = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3,r,r,r,r"
    return gl.inline_asm_elementwise(
        _mma_asm(KIND, SELECTOR), constraints, [a, b, acc, metadata], dtype=gl.float32, is_pure=True, pack=4
    )


# ------------------------------------------------------------------------------------------------ epilogue
@dataclass(frozen=True)
class Epilogue:
    """y = act(acc + b) * s + r: what of it there is. One compile-time argument of every kernel."""

    activation: str | None = None
    bias: bool = False
    scale: bool = False
    residual: bool = False
    direct: bool = False  # wgmma: y is stored from registers, because TMA cannot store it


@gluon.jit
def _tanh(x):
    """Relative error 2^-11: for results that are rounded to bf16."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    """2^x to 2^-22. `ftz` makes these two single instructions: without it they carry a scaling for denormal numbers."""
    asm: gl.constexpr = "ex2.approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    asm: gl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu_erf(y, BF16: gl.constexpr):
    """y Phi(y) = max(y, 0) - a Phi(-a), a = |y|, where log2 Phi(-a) is a polynomial fitted on [0, 5].

    For results that are rounded to bf16 its error is at most 2.7e-5 and 1.8e-4 of a Phi(-a); else 1.5e-7 up to |y| = 4
    (torch's fp32 GELU: 3.7e-7). Beyond 5 both polynomials fall like the logarithm.
    NaN stays NaN. Not libdevice's erf: it branches, and a divergent branch costs thousands of bytes of spills.
    """
    a = gl.minimum(gl.abs(y), 1e30)  # infinity times 0 would be NaN
    if BF16:
        q = a * (-0.0468508706 + a * (0.00540531116 + a * -0.000277861702))
        q = -1 + a * (-1.14876992 + a * (-0.465769883 + q))
    else:
        q = a * (-0.000131473208 + a * (2.80569375e-05 + a * -1.90206538e-06))
        q = a * (-0.0526276109 + a * (0.00724542129 + a * (-0.000272075774 + q)))
        q = -1 + a * (-1.15111105 + a * (-0.459162143 + q))
    return gl.maximum(y, 0.0, propagate_nan=ALL_NAN) - a * _exp2(q)


@gluon.jit
def activate(y, EPILOGUE: gl.constexpr, BF16: gl.constexpr):
    """y fp32 -> act(y) fp32. BF16: the result will be rounded to bf16, so the hardware's tanh and a short polynomial
    are exact enough."""
    if EPILOGUE.activation == "gelu":
        y = _gelu_erf(y, BF16)
    elif EPILOGUE.activation == "gelu_tanh":
        u = y * (0.7978845608028654 + 0.035677408136300125 * (y * y))
        y = 0.5 * y + 0.5 * y * _tanh(u) if BF16 else y * _reciprocal(1 + _exp2(-2.885390081777927 * u))
    elif EPILOGUE.activation == "silu":
        y = 0.5 * y + 0.5 * y * _tanh(0.5 * y) if BF16 else y * _reciprocal(1 + _exp2(-1.4426950408889634 * y))
    else:
        gl.static_assert(EPILOGUE.activation is None, "unknown activation")
    return y
