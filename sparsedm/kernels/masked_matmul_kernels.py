"""The Triton kernels of masked_matmul.py: y = act(x @ (w*m)^T + b), dx = dz @ (w*m), dw = dz^T @ x by the STE rule.

x (M, K), w (N, K), y and dz (M, N). The mask reaches a kernel by one of two algorithms:
    masked   w is already the masked weight, in the dtype of x: a plain matmul, and bits_ptr is None
    bits     w is the dense weight in its own dtype, with the packed bits of `pattern.pack_bits`
fp32 accumulation, and the epilogue works on the accumulator. Sizes need not be multiples of the blocks. Tensor cores of
sm_80 and later (mma.sync, on sm_90 wgmma). Neither transposes its tile product: with the weight as the left operand
ptxas serialises the wgmmas (C7515).
"""

import torch

from sparsedm.kernels.launch import FUSED, jit, tl, triton


def _config(algorithm, m, n, k, warps, stages, **more):
    return {
        "algorithm": algorithm,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "num_warps": warps,
        "num_stages": stages,
        **more,
    }


# _config(algorithm, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages). Not tuned on a GPU yet.
# `library`, the first and the default, is torch's matmul on the masked weight.
FORWARD = [
    {"algorithm": "library"},
    _config("masked", 128, 128, 64, 8, 3),
    _config("masked", 128, 64, 64, 4, 4),
    _config("masked", 64, 128, 64, 4, 4),
    _config("bits", 128, 128, 64, 8, 3),
    _config("bits", 64, 128, 64, 4, 3),
]
INPUT_GRAD = [
    {"algorithm": "library"},
    _config("masked", 128, 64, 128, 8, 3),
    _config("masked", 128, 64, 256, 8, 3),
    _config("masked", 64, 64, 128, 4, 4),
    _config("bits", 128, 64, 128, 8, 3),
]
WEIGHT_GRAD = [
    {"algorithm": "library"},
    _config("fused", 64, 128, 128, 8, 3, SPLIT=1),
    _config("fused", 64, 128, 128, 8, 3, SPLIT=4),
    _config("fused", 64, 128, 128, 8, 3, SPLIT=16),
    _config("fused", 64, 64, 64, 4, 4, SPLIT=8),
]


@jit
def _corner(index, ROWS, COLUMNS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row and column at which tile `index` begins: eight rows of tiles at a time, so that L2 serves the neighbours."""
    across = tl.cdiv(COLUMNS, BLOCK_C)
    first = index // (8 * across) * 8
    height = min(tl.cdiv(ROWS, BLOCK_R) - first, 8)
    inner = index % (8 * across)
    return (first + inner % height).to(tl.int64) * BLOCK_R, (inner // height).to(tl.int64) * BLOCK_C


@jit
def _load(ptr, row, column, ROWS, COLUMNS, stride):
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@jit
def _load_mask(w, bits_ptr, row, first_k, N, K):
    """The mask of a tile w of some rows and the columns from first_k, whole words of bits."""
    WORDS: tl.constexpr = w.shape[1] // 32
    word = first_k // 32 + tl.arange(0, WORDS)
    bits = _load(bits_ptr, row, word, N, tl.cdiv(K, 32), tl.cdiv(K, 32)).to(tl.int32)
    mask = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1 != 0
    return mask.reshape(w.shape)


@jit
def _load_masked(w_ptr, bits_ptr, row, first_k, N, K, stride_wn, BLOCK_K: tl.constexpr, dtype: tl.constexpr):
    w = _load(w_ptr, row, first_k + tl.arange(0, BLOCK_K), N, K, stride_wn)
    if bits_ptr is not None:
        w = tl.where(_load_mask(w, bits_ptr, row, first_k, N, K), w, 0.0)
    return w.to(dtype)


@jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    return z


@jit
def _masked_matmul_fwd_kernel(
    x_ptr, w_ptr, bits_ptr, bias_ptr, y_ptr, z_ptr, M, N, K, stride_xm, stride_wn,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M x BLOCK_N of y and, where it is wanted, of z = x @ (w*m)^T + b."""
    first_m, first_n = _corner(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _load(x_ptr, m, start + tl.arange(0, BLOCK_K), M, K, stride_xm)
        w = _load_masked(w_ptr, bits_ptr, n, start, N, K, stride_wn, BLOCK_K, x.dtype)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    offs = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + offs, _activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _masked_matmul_dx_kernel(
    dz_ptr, w_ptr, bits_ptr, dx_ptr, M, N, K, stride_zm, stride_wn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M x BLOCK_K of dx."""
    first_m, first_k = _corner(tl.program_id(0), M, K, BLOCK_M, BLOCK_K)
    m, k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_K)
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        dz = _load(dz_ptr, m, n, M, N, stride_zm)
        w = _load_masked(w_ptr, bits_ptr, n, first_k, N, K, stride_wn, BLOCK_K, dz.dtype)
        dx = tl.dot(dz, w, dx, input_precision=PRECISION)
    inside = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx_ptr + m[:, None] * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def _masked_matmul_dw_kernel(
    dz_ptr, x_ptr, w_ptr, bits_ptr, dw_ptr, M, N, K, stride_zm, stride_xm, stride_wn, decay, kept, dropped,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N x BLOCK_K of dw, or of one of the SPLIT partial sums of dz^T @ x (SPLIT, N, K).

    Without bits the sum is stored as it is (STE, and partial sums); with them the rule is applied first.
    """
    first_n, first_k = _corner(tl.program_id(0), N, K, BLOCK_N, BLOCK_K)
    n, k = first_n + tl.arange(0, BLOCK_N), first_k + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    g = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(split * BLOCK_M, M, SPLIT * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        dz = _load(dz_ptr, m, n, M, N, stride_zm)
        x = _load(x_ptr, m, k, M, K, stride_xm)
        g = tl.dot(tl.trans(dz), x, g, input_precision=PRECISION)
    if bits_ptr is not None:
        w = _load(w_ptr, n, k, N, K, stride_wn)
        mask = _load_mask(w, bits_ptr, n, first_k, N, K)
        g = tl.where(mask, kept * g, dropped * g + decay * w.to(tl.float32))
    inside = (n < N)[:, None] & (k < K)[None, :]
    offs = (split.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(dw_ptr + offs, g.to(dw_ptr.dtype.element_ty), mask=inside)


KERNELS = [_masked_matmul_fwd_kernel, _masked_matmul_dx_kernel, _masked_matmul_dw_kernel]
KERNELS += [_corner, _load, _load_mask, _load_masked, _activate]


def launch_forward(x, weight, bits, bias, activation, y, z, config):
    """Fill y, and z if it is not None. weight: the dense one, or with bits=None the masked one in the dtype of x."""
    (M, K), N = x.shape, weight.shape[0]
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
    _masked_matmul_fwd_kernel[grid](
        x, weight, bits, bias, y, z, M, N, K, x.stride(0), weight.stride(0),
        ACTIVATION=activation, **_constants(x.dtype, config),
    )  # fmt: skip


def launch_input_grad(dz, weight, bits, dx, config):
    """Fill dx. weight: the dense one, or with bits=None the masked one in the dtype of dz."""
    (M, N), K = dz.shape, weight.shape[1]
    grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_K"]),)
    _masked_matmul_dx_kernel[grid](
        dz, weight, bits, dx, M, N, K, dz.stride(0), weight.stride(0), **_constants(dz.dtype, config)
    )


def launch_weight_grad(dz, x, weight, bits, rule, dw, config):
    """Fill dw (N, K) by the rule; or, with bits=None, with the bare sums dz^T @ x, in SPLIT parts (SPLIT, N, K)."""
    (M, N), K = dz.shape, x.shape[1]
    grid = (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(K, config["BLOCK_K"]), config["SPLIT"])
    _masked_matmul_dw_kernel[grid](
        dz, x, weight, bits, dw, M, N, K, dz.stride(0), x.stride(0), weight.stride(0), *rule,
        **_constants(x.dtype, config),
    )  # fmt: skip


def _constants(dtype, config):
    constants = {k: v for k, v in config.items() if k != "algorithm"}
    return FUSED | {"PRECISION": "tf32" if takes_tf32(dtype) else "ieee"} | constants


def takes_tf32(dtype):
    """Whether torch rounds the operands of such products to TF32. `allow_tf32` raises where the newer name was set."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
