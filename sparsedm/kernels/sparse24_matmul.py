"""y = act([x | skip] @ W^T + b) * s + r with a 2:4 compressed W: reference, dispatch, operator.

Shapes: x (..., K), W (N, K) as values (N, 8c) and metadata (N, c) int16 of `sparse24_format`, y (..., N). M below is
the number of rows of x. `[x | skip]` is the concatenation along K that U-ViT's `skip_linear` multiplies; the kernels
read the two tensors in turn and never make it. Inference only: nothing here has a gradient.

Back ends (`choose_backend` says which will run, and why):
    wgmma   `wgmma.mma_async.sp` on sm_90a                       sparse24_wgmma.py
    mma     `mma.sp` on sm_80 and later                          sparse24_mma.py
    few     `mma.sp` with K split over the grid, M up to 64      sparse24_few.py
    dense   the decompressed weight, kept, and torch's matmul: for shapes at which the sparse kernels lose
    torch   decompressed at every call (`sparse24_linear_ref`): any device, any dtype, any size
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.launch import BACKENDS, forced_backend
from sparsedm.kernels.sparse24_format import (
    check_metadata,
    check_shapes,
    fragment_metadata,
    fragment_values,
    pad,
    tma_metadata,
    unpack,
)

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


FEW_TOKENS = 64
SMALLEST_GRID = 32


def choose_backend(capability, M, N, K, dtype):
    """Which back end serves y (M, N) = x (M, K) @ W^T, and why.

    capability: the device's compute capability as (major, minor), None for anything that is not a CUDA device.
    Returns (name, reason). The rules are arithmetic, not measurement: none of the kernels has been timed yet.
    SPARSEDM_BACKEND = torch | dense | mma | few | wgmma overrules them wherever the named kernel can run.
    """
    forced = forced_backend()
    able, obstacle = _able(capability, K, dtype)
    if forced:
        if forced in able:
            return forced, f"SPARSEDM_BACKEND={forced}"
        return "torch", f"SPARSEDM_BACKEND={forced} cannot run: {obstacle}"
    if "mma" not in able:
        return "torch", obstacle
    if M <= FEW_TOKENS:
        return "few", f"{M} rows: bound by reading the weight, 1.125 bytes instead of 2"
    tiles = -(-M // 128) * -(-N // 128)
    if tiles < SMALLEST_GRID:
        return "dense", f"{tiles} tiles of 128 x 128 leave most of the GPU idle: the launch decides, not the arithmetic"
    if "wgmma" in able:
        return "wgmma", f"sm_90a, {tiles} tiles of 128 x 128"
    if capability >= (9, 0):
        return "dense", "mma.sp reaches about 0.9 of dense wgmma here, and wgmma.sp needs sm_90a"
    return "mma", f"sm_{capability[0]}{capability[1]}, {tiles} tiles of 128 x 128"


def _able(capability, K, dtype):
    """The back ends that can run at all, and the sentence about those that cannot."""
    if capability is None:
        return ("torch", "dense"), "not a CUDA device"
    name = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        return ("torch", "dense"), f"{name} has no sparse tensor cores (sm_80 and later have)"
    if dtype not in (torch.bfloat16, torch.float16):
        return ("torch", "dense"), f"{str(dtype)[6:]}: the sparse tensor-core kernels take bfloat16 and float16"
    if K % 8:
        return ("torch", "dense"), f"K = {K}: rows must be multiples of 16 bytes, K a multiple of 8"
    if capability != (9, 0):
        return ("torch", "dense", "mma", "few"), f"{name} has no wgmma (sm_90a has)"
    return BACKENDS, ""


@torch.library.custom_op("sparsedm::sparse24_arrange", mutates_args=())
def arrange(values: torch.Tensor, metadata: torch.Tensor, backend: str, columns: int) -> list[torch.Tensor]:
    """The tensors that `backend` reads instead of values and metadata; for wgmma, where no padding is needed, instead
    of the metadata alone. columns: K.

    An operator, because it looks at the metadata and refuses illegal pairs, which torch.compile could not follow.
    """
    check_shapes(values, metadata)
    check_metadata(metadata)
    if backend == "torch":
        return []
    if backend == "dense":
        return [unpack(values, metadata, columns).contiguous()]
    if backend == "wgmma":
        padded, metadata = pad(values, metadata, *PADDING[backend])
        return ([] if padded is values and values.is_contiguous() else [padded.contiguous()]) + [tma_metadata(metadata)]
    values, metadata = pad(values, metadata, *PADDING[backend])
    return [fragment_values(values), fragment_metadata(metadata)]


PADDING = {"wgmma": (256, 128), "mma": (128, 64), "few": (128, 64)}  # multiples of rows and columns: the largest tiles


@arrange.register_fake
def _(values, metadata, backend, columns):
    if backend == "torch":
        return []
    if backend == "dense":
        return [values.new_empty(values.shape[0], columns)]
    multiple_n, multiple_k = PADDING[backend]
    N, K = values.shape[0], 2 * values.shape[1]
    n, k = N + -N % multiple_n, K + -K % multiple_k
    words = lambda *shape: values.new_empty(shape, dtype=torch.int32)  # noqa: E731
    if backend == "wgmma":
        same = (n, k) == (N, K) and values.is_contiguous()
        return ([] if same else [values.new_empty(n, k // 2)]) + [words(k // 64, 2 * n)]
    return [words(n // 16, k // 32, 32, 4), words(n // 16, k // 64, 32)]


def kernel_tensors(values, arranged):
    """What the launchers take: the values, those of `arrange` if it made any, and the metadata."""
    return arranged if len(arranged) == 2 else [values, *arranged]


def arrange_once(values, metadata, backend, columns, kept):
    """`arrange`, unless `kept`, the caller's dict or None, still holds what it gave for these very values."""
    if kept is None:
        return arrange(values, metadata, backend, columns)
    family = "fragments" if backend in ("mma", "few") else backend
    # while tracing there are no addresses, and then the weight cannot change either
    stamp = None if torch.compiler.is_compiling() else [_stamp(values), _stamp(metadata)]
    if family not in kept or (stamp is not None and kept[family][0] != stamp):
        kept[family] = stamp, arrange(values, metadata, backend, columns)
    return kept[family][1]


def _stamp(tensor):
    """Changes when the tensor is moved, replaced or written to."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version


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
    arranged=None,
):
    """y = act([x | skip] @ W^T + bias) * scale + residual, W the 2:4 weight that values and metadata hold.

    x: (..., K) bf16 or fp16 for the kernels, any floating dtype for torch. skip: (..., K2) with the leading dimensions
    of x, or None; then W is (N, K + K2). bias: (N,). activation: None, "gelu" (erf), "gelu_tanh" or "silu".
    scale: (N,), or (G, N) whose row g scales rows g M/G .. (g+1) M/G of y: the gate of each image in an adaLN block.
    residual: (..., N) as y. out_dtype: dtype of y, that of x by default; fp32 keeps the accumulator.
    arranged: a dict that the caller keeps with the weight (start with {}); what `arrange` makes is kept in it until the
    weight changes. Without it, it is made at every call.

    The back end is the choice of `choose_backend`. Accumulates in fp32. No gradient. Works under torch.compile and
    torch.export. Raises: InputError for shapes or dtypes that do not belong together.
    """
    _check(x, values, metadata, bias, activation, residual, skip, scale)
    M, K = x.shape[:-1].numel(), x.shape[-1] + (0 if skip is None else skip.shape[-1])
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    backend, _ = choose_backend(capability, M, values.shape[0], K, x.dtype)
    tensors = arrange_once(values, metadata, backend, K, arranged)
    return _linear(x, values, metadata, tensors, bias, activation, residual, skip, scale, out_dtype or x.dtype, backend)


@torch.library.custom_op("sparsedm::sparse24_linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    arranged: list[torch.Tensor],
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    if backend == "torch":
        return sparse24_linear_ref(
            x, values, metadata, bias, activation, residual, skip=skip, scale=scale, out_dtype=out_dtype
        )
    if backend == "dense":
        return _linear_dense(x, arranged[0], bias, activation, residual, skip, scale, out_dtype)
    # Here and not above: the package must import where Triton is missing.
    if backend == "wgmma":
        from sparsedm.kernels.sparse24_wgmma import launch
    elif backend == "mma":
        from sparsedm.kernels.sparse24_mma import launch
    else:
        from sparsedm.kernels.sparse24_few import launch
    rows = _rows(x)
    M, N = rows.shape[0], values.shape[0]
    y = x.new_empty(M, N, dtype=out_dtype)
    if M:
        with torch.cuda.device(x.device):
            launch(
                rows,
                *kernel_tensors(values, arranged),
                y,
                bias=bias,
                activation=activation,
                residual=None if residual is None else _rows(residual),
                skip=None if skip is None else _rows(skip),
                scale=None if scale is None else scale.reshape(-1, N),
            )
    return y.view(*x.shape[:-1], N)


@_linear.register_fake
def _(x, values, metadata, arranged, bias, activation, residual, skip, scale, out_dtype, backend):
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
    if bias is not None and bias.shape != (N,):
        raise InputError(f"bias {_describe(bias)} must have the shape ({N},)")
    if residual is not None and residual.shape != (*x.shape[:-1], N):
        raise InputError(f"residual {_describe(residual)} must have the shape of y, {(*x.shape[:-1], N)}")
    if scale is not None:
        M, groups = x.shape[:-1].numel(), scale.shape[:-1].numel()
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
