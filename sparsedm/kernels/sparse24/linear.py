"""y = act([x | skip] @ W^T + b) * s + r with a 2:4 compressed W: reference, dispatch, operator.

Shapes: x (..., K), W (N, K) as values (N, 8c) and metadata (N, c) int16 of `format.py`, y (..., N). M below is
the number of rows of x. `[x | skip]` is the concatenation along K that U-ViT's `skip_linear` multiplies; the kernels
read the two tensors in turn and never make it. Inference only: nothing here has a gradient.

Back ends (dispatch.py: which will run, and why):
    wgmma   `wgmma.mma_async.sp` on sm_90a                       wgmma.py
    mma     `mma.sp` on sm_80 and later                          mma.py
    splitk  `mma.sp` with K split over the grid, M up to 64      mma_splitk.py
    dense   the decompressed weight, kept, and torch's matmul: any device, any dtype, and where the kernels would lose
    torch   decompressed at every call (`sparse24_linear_ref`): in exported programs, which hold the weight once
"""

import math

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.launch import capability, forced_backend
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.dispatch import LINEAR, SPLITK_ROWS, choose_backend
from sparsedm.kernels.sparse24.format import check_shapes, unpack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack_once

ACTIVATIONS = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def sparse24_linear_ref(
    x, values, metadata, bias=None, activation=None, residual=None, *, skip=None, scale=None, out_dtype=None
):
    """The specification: decompress, then torch. Arguments as `sparse24_linear`."""
    columns = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    weight = unpack(values, metadata, columns)
    return _linear_dense(x, weight, bias, activation, residual, skip, scale, out_dtype or x.dtype)


def _linear_dense(x, weight, bias, activation, residual, skip, scale, out_dtype):
    source = x if skip is None else torch.cat((x, skip), -1)
    y = ACTIVATIONS[activation](F.linear(source, weight, bias))
    if scale is not None:
        groups = scale.reshape(-1, 1, y.shape[-1])
        y = (y.reshape(groups.shape[0], -1, y.shape[-1]) * groups).view(y.shape)
    if residual is not None:
        y = y + residual
    return y.to(out_dtype)


def sparse24_linear(
    x,
    values,
    metadata,
    bias=None,
    activation=None,
    residual=None,
    *,
    skip=None,
    scale=None,
    out_dtype=None,
    cache=None,
):
    """y = act([x | skip] @ W^T + bias) * scale + residual, W the 2:4 weight that values and metadata hold.

    x: (..., K) bf16 or fp16 for the kernels, any floating dtype for torch. skip: (..., K2) with the leading dimensions
    of x, or None; then W is (N, K + K2). bias: (N,). activation: None, "gelu" (erf), "gelu_tanh" or "silu".
    scale: (N,), or (G, N) whose row g scales rows g M/G .. (g+1) M/G of y: the gate of each image in an adaLN block.
    residual: (..., N) as y. out_dtype: dtype of y, that of x by default; fp32 keeps a kernel's accumulator.
    cache: a dict that the caller keeps with the weight (start with {}); what `prepack` makes is kept in it until the
    weight changes. Without it, it is made at every call.

    The back end is what `dispatch.py` knows to be quickest, on a GPU by timing each new size once. Accumulates in
    fp32. No gradient. Works under torch.compile and torch.export. Raises: InputError for shapes or dtypes that do not
    belong together.
    """
    _check(x, values, metadata, bias, activation, residual, skip, scale)
    M, N, K = math.prod(x.shape[:-1]), values.shape[0], x.shape[-1] + (0 if skip is None else skip.shape[-1])
    out_dtype = out_dtype or x.dtype
    kept = {} if cache is None else cache

    def run(choice, kept):
        tensors = prepack_once(values, metadata, choice.backend, K, kept)
        return _linear(x, values, metadata, tensors, bias, activation, residual, skip, scale, out_dtype, *choice)

    directly = dispatch.stores_directly(N, out_dtype, residual)
    choice = dispatch.rule_of_thumb(choose_backend(capability(x.device), M, N, K, x.dtype)[0], directly)
    if choice.backend != "torch" and M and type(x) is torch.Tensor:  # not a fake one, which has nothing to time
        for_timing = {}  # what the losers read is not kept
        choice = dispatch.pick(
            LINEAR,
            lambda: dispatch.choices(capability(x.device), M <= SPLITK_ROWS, directly, K, x.dtype, forced_backend()),
            choice, lambda other: run(other, for_timing), x.device, M, kept.setdefault("choices", {}),
            dtype=x.dtype, out=out_dtype, activation=activation, bias=bias is not None, scale=scale is not None,
            residual=residual is not None, skip=0 if skip is None else skip.shape[-1], n=N, k=K,
        )  # fmt: skip
    return run(choice, kept)


@torch.library.custom_op("sparsedm::sparse24_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    prepacked: list[torch.Tensor],
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    config: int,
) -> torch.Tensor:
    if backend == "torch":
        return sparse24_linear_ref(
            x, values, metadata, bias, activation, residual, skip=skip, scale=scale, out_dtype=out_dtype
        )
    if backend == "dense":
        return _linear_dense(x, prepacked[0], bias, activation, residual, skip, scale, out_dtype)
    rows = _rows(x)
    M, N = rows.shape[0], values.shape[0]
    y = x.new_empty(M, N, dtype=out_dtype)
    if M:
        with torch.cuda.device(x.device):
            dispatch.module(LINEAR, backend).launch(
                rows,
                *kernel_tensors(values, prepacked),
                y,
                bias=bias,
                activation=activation,
                residual=None if residual is None else _rows(residual),
                skip=None if skip is None else _rows(skip),
                scale=None if scale is None else scale.reshape(-1, N),
                config=dispatch.configs(LINEAR, backend)[config],
            )
    return y.view(*x.shape[:-1], N)


@_linear.register_fake
def _(x, values, metadata, prepacked, bias, activation, residual, skip, scale, out_dtype, backend, config):
    return x.new_empty(*x.shape[:-1], values.shape[0], dtype=out_dtype)


def _check(x, values, metadata, bias, activation, residual, skip, scale):
    check_shapes(values, metadata)
    devices = {t.device for t in (x, values, metadata, bias, residual, skip, scale) if t is not None}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device, not on {' and '.join(sorted(map(str, devices)))}")
    N, words = metadata.shape
    K = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, ACTIVATIONS))}")
    if words != -(-K // 16):
        raise InputError(f"x has {K} columns and the weight {16 * words} (K rounded up to a multiple of 16)")
    if skip is not None and (skip.shape[:-1] != x.shape[:-1] or skip.dtype != x.dtype):
        raise InputError(f"skip {_describe(skip)} must have the leading dimensions and the dtype of x {_describe(x)}")
    if values.dtype != x.dtype:
        raise InputError(f"x is {str(x.dtype)[6:]} and the weight {str(values.dtype)[6:]}: they must have one dtype")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise InputError(f"bias {_describe(bias)} must have the shape ({N},) and the dtype of x {_describe(x)}")
    if residual is not None and residual.shape != (*x.shape[:-1], N):
        raise InputError(f"residual {_describe(residual)} must have the shape of y, {(*x.shape[:-1], N)}")
    if scale is not None:
        M, groups = math.prod(x.shape[:-1]), math.prod(scale.shape[:-1])
        if scale.shape[-1] != N or scale.dim() > 2 or M % max(groups, 1):
            raise InputError(f"scale {_describe(scale)} must be ({N},) or (G, {N}) with G a divisor of the {M} rows")


def _describe(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"


def _rows(tensor):
    """(..., K) as rows (M, K): a view where torch can, and 16-byte aligned, as TMA and cp.async need it."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    per_16_bytes = 16 // rows.element_size()
    aligned = rows.stride(1) == 1 and rows.stride(0) % per_16_bytes == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.contiguous()
