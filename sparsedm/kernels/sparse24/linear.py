"""y = act([x | skip] @ W^T + b) * s + r with a compressed W, 2:4 or any N:M: reference, dispatch, operator.

Shapes: x (..., K), W (N, K) as values and metadata of `format.py`, for 2:4 (N, 8c) and int16 (N, c), y (..., N). M
below is the number of rows of x. `[x | skip]` is the concatenation along K in U-ViT's `skip_linear`; the kernels read
the two tensors in turn and never concatenate them. They have no gradients: where one is asked for, the reference runs.

`dispatch.py` chooses the back end. "dense" and "torch" are computed here, on any device and in any dtype, by torch's
product with the decompressed weight: "dense" stores it, "torch" decompresses at every call.
"""

import math

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import calls, dense, products
from sparsedm.kernels.cpu import linear as cpu
from sparsedm.kernels.launch import broken
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.dispatch import LINEAR, request_on
from sparsedm.kernels.sparse24.format import TWO_FOUR, check_shapes, columns_of, decompress, unpack
from sparsedm.kernels.sparse24.layouts import aligned, dense_weight, kernel_tensors, prepack_once
from sparsedm.kernels.tracing import direct, left_to_torch, refuse_export

ACTIVATIONS = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def sparse24_linear_ref(
    x, values, metadata, bias=None, activation=None, residual=None, *, skip=None, scale=None, out_dtype=None,
    pattern="2:4",
):  # fmt: skip
    """The specification: decompress, then torch. Arguments as in `sparse24_linear`."""
    columns = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    weight = unpack(values, metadata, columns, Pattern.parse(pattern))
    return _linear_dense(x, weight, bias, activation, residual, skip, scale, out_dtype or x.dtype)


def _linear_dense(x, weight, bias, activation, residual, skip, scale, out_dtype):
    source = x if skip is None else torch.cat((x, skip), -1)
    y = ACTIVATIONS[activation](dense.linear(source, weight, bias))
    if scale is not None:
        groups, N = scale.shape[:-1].numel(), scale.shape[-1]  # -1 would not do for an empty batch
        y = (y.reshape(groups, y.shape[:-1].numel() // max(groups, 1), N) * scale.reshape(groups, 1, N)).view(y.shape)
    if residual is not None:
        y = y + residual
    return y if y.dtype == out_dtype else y.to(out_dtype)


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
    backend=None,
    pattern="2:4",
):
    """y = act([x | skip] @ W^T + bias) * scale + residual. values and metadata hold the weight W.

    x: (..., K) bf16 or fp16 for the kernels of a GPU, fp32 for those of a CPU, any floating dtype for torch. skip:
    (..., K2) with the leading dimensions of x, or None; then W is (N, K + K2). bias: (N,). activation: None, "gelu"
    (erf), "gelu_tanh" or "silu".
    scale: (N,), or (G, N) whose row g scales rows g M/G .. (g+1) M/G of y: the gate of each image in an adaLN block; in
    the dtype of x.
    residual: (..., N) like y. out_dtype: dtype of y; default: of x; fp32 keeps a kernel's accumulator.
    cache: a dict that the caller stores with the weight (start with {}). It holds the prepacked weight, until the
    weight changes, and the measurements. Without it both are made at every call. backend: a name in `launch.BACKENDS`
    to use if it can run here, with its fastest configuration; default: SPARSEDM_BACKEND, else the fastest back end (on
    a GPU each new size is timed once). pattern: as text; if it is not 2:4, metadata are the bits of `format.py`.

    Accumulates in fp32. Works under torch.compile and torch.export. Where x or another operand is differentiated, or
    torch.func maps over any, torch multiplies by the decompressed weight.
    Raises: InputError for shapes or dtypes that do not fit together.
    """
    options, operands = (activation, pattern), (x, bias, residual, skip, scale)
    again = cache is not None and backend is None and out_dtype in (None, x.dtype)
    if again and (y := calls.repeated(cache, values, metadata, options, *operands)) is not None:
        return y
    _check(x, values, metadata, bias, activation, residual, skip, scale, pattern)
    if skip is not None and 0 in (x.shape[-1], skip.shape[-1]):  # rows of no columns have no shape of their own
        x, skip = skip if skip.shape[-1] else x, None
        operands = (x, bias, residual, skip, scale)
    K2 = 0 if skip is None else skip.shape[-1]
    out_dtype = out_dtype or x.dtype
    if left_to_torch(x, bias, residual, skip, scale):
        named = {"skip": skip, "scale": scale, "out_dtype": out_dtype, "pattern": pattern}
        return sparse24_linear_ref(x, values, metadata, bias, activation, residual, **named)
    request = request_on(
        x.device, LINEAR, x.dtype, math.prod(x.shape[:-1]), values.shape[0], x.shape[-1] + K2, backend,
        device=x.device if type(x) is torch.Tensor else None,  # a fake tensor cannot be timed
        pattern=pattern, out_dtype=out_dtype, activation=activation, bias=bias is not None, scale=scale is not None,
        residual=None if residual is None else residual.dtype, skip=K2,
    )  # fmt: skip

    def run(choice, cache, strict, neutral=False):
        layout = dispatch.row_of(LINEAR, choice.backend).layout_for(request)
        tensors = prepack_once(values, metadata, layout, request.K, cache, pattern)
        added = torch.zeros_like(residual) if neutral and residual is not None else residual
        gate = torch.ones_like(scale) if neutral and scale is not None else scale
        y = direct(_linear, x, bias, residual, skip, scale)(
            x, values, metadata, tensors, bias, activation, added, skip, gate, out_dtype, *choice, strict, pattern
        )
        if again and request.capability is None and not torch.compiler.is_compiling():
            once_more = _once_more(choice, tensors, pattern, y, activation, *operands)
            calls.remember(cache, values, layout, tensors, options, once_more, *operands)
        return y

    return dispatch.serve(request, run, cache)


def _once_more(choice, tensors, pattern, y, activation, x, bias, residual, skip, scale):
    """A function of the tensors (x, bias, residual, skip, scale) that computes y by this choice on a CPU, or None."""
    if choice.backend == "dense":
        return lambda x, bias, *rest: _linear_dense(x, tensors[0], bias, activation, *rest, x.dtype)
    if choice.backend != "cpu" or (LINEAR, "cpu", x.device) in broken:
        return None
    if not all(t is None or t.is_contiguous() for t in (x, residual, skip, scale)):
        return None
    few = cpu.CONFIGS[choice.config] == "few"
    return products.linear_again(x, tensors, Pattern.parse(pattern), y, activation, residual, skip, scale, few)


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
    strict: bool,
    pattern: str = "2:4",
) -> torch.Tensor:
    row = dispatch.row_of(LINEAR, backend)
    if row.module:
        rows = _rows(x)
        y = x.new_empty(rows.shape[0], values.shape[0], dtype=out_dtype)
        options = {
            "bias": bias,
            "activation": activation,
            "residual": None if residual is None else _rows(residual),
            "skip": None if skip is None else _rows(skip),
            "scale": None if scale is None else scale.reshape(-1, values.shape[0]),
        }
        if row.on == "cpu":
            options["pattern"] = pattern
        tensors = kernel_tensors(values, prepacked)
        if not len(rows) or dispatch.launch(LINEAR, backend, config, strict, rows, *tensors, y, **options):
            return y.view(*x.shape[:-1], values.shape[0])
    columns = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if row.layout == "dense":
        weight = dense_weight(prepacked, values, metadata, columns, Pattern.parse(pattern))
    else:
        weight = decompress(values, metadata, columns, Pattern.parse(pattern))  # `prepack` has checked them
    return _linear_dense(x, weight, bias, activation, residual, skip, scale, out_dtype)


@_linear.register_fake
def _(
    x, values, metadata, prepacked, bias, activation, residual, skip, scale, out_dtype, backend, config, strict,
    pattern="2:4",
):  # fmt: skip
    refuse_export(traced=True)
    return x.new_empty(*x.shape[:-1], values.shape[0], dtype=out_dtype)


def _check(x, values, metadata, bias, activation, residual, skip, scale, pattern):
    parsed = Pattern.parse(pattern)
    check_shapes(values, metadata, parsed)
    N, columns = values.shape[0], columns_of(values, parsed)
    K = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    if columns != (-(-K // 16) * 16 if parsed == TWO_FOUR else K):
        raise InputError(f"x has {K} columns and the weight {columns} (of 2:4, K rounded up to a multiple of 16)")
    if skip is not None and (skip.shape[:-1] != x.shape[:-1] or skip.dtype != x.dtype):
        raise InputError(f"skip {_describe(skip)} must have the leading dimensions and the dtype of x {_describe(x)}")
    if scale is not None:
        M, groups = math.prod(x.shape[:-1]), math.prod(scale.shape[:-1])
        if scale.dtype != x.dtype:  # the kernel of a CPU would read other bytes
            raise InputError(f"scale {_describe(scale)} must have the dtype of x {_describe(x)}")
        if scale.shape[-1] != N or scale.dim() > 2 or (M % groups if groups else M):
            raise InputError(f"scale {_describe(scale)} must be ({N},) or (G, {N}) with G a divisor of the {M} rows")
    check_operands(x, values, metadata, bias, activation, residual, (*x.shape[:-1], N), skip, scale)


def check_operands(x, values, metadata, bias, activation, residual, shape, *others):
    """Checks shared by products and convolutions. shape: of y. others: more tensors, whose devices are checked."""
    devices = {t.device for t in (x, values, metadata, bias, residual, *others) if t is not None}
    if len(devices) > 1:
        raise InputError(f"all tensors must be on one device, not on {' and '.join(sorted(map(str, devices)))}")
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, ACTIVATIONS))}")
    if values.dtype != x.dtype:
        why = " (autocast leaves float64 alone)" if torch.float64 in (x.dtype, values.dtype) else ""
        text = f"x is {str(x.dtype)[6:]} and the weight {str(values.dtype)[6:]}: they must have one dtype{why}"
        raise InputError(text)
    N = values.shape[0]
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise InputError(f"bias {_describe(bias)} must have the shape ({N},) and the dtype of x {_describe(x)}")
    if residual is not None and residual.shape != shape:
        raise InputError(f"residual {_describe(residual)} must have the shape of y, {shape}")


def _describe(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"


def _rows(tensor):
    """(..., K) as rows (M, K), a view if TMA and cp.async can read it: 16-byte aligned, without rows that overlap."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = rows.stride(0)
    apart = step >= rows.shape[1] and step * rows.element_size() % 16 == 0
    return rows if apart and rows.stride(1) == 1 and rows.data_ptr() % 16 == 0 else aligned(rows)
