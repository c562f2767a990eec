"""y = act(conv2d(x, W) + b) + r with a compressed W, 2:4 or any N:M: reference and operator `sparse24_conv2d`.

W (N, C, kh, kw) is kept as rows (N, kh kw C), groups along C: values and metadata of
`format.pack(group_view(W).reshape(N, -1))`, for 2:4 (N, kh kw C / 2) and (N, kh kw C / 16). Images are
(B, C, H, W) as in torch; the kernels read and write them in channels_last. They have no gradients: where one is asked
for, the reference runs.

A 1 x 1 kernel is `sparse24_linear` over the pixels. For the others `dispatch.py` chooses the back end. "dense" and
"torch" are computed here, for any geometry, by torch's conv2d with the decompressed weight: "dense" stores it, "torch"
decompresses at every call.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import calls, products
from sparsedm.kernels.cpu import conv as cpu
from sparsedm.kernels.launch import broken
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.dispatch import CONV, LINEAR, request_on
from sparsedm.kernels.sparse24.format import TWO_FOUR, check_shapes, columns_of, decompress, unpack
from sparsedm.kernels.sparse24.layouts import aligned, dense_weight, kernel_tensors, prepack_once
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, check_operands, sparse24_linear
from sparsedm.kernels.tracing import direct, left_to_torch, refuse_export


def sparse24_conv2d_ref(
    x, values, metadata, kernel_size, bias=None, activation=None, residual=None, *, stride=1, padding=0, dilation=1,
    pattern="2:4",
):  # fmt: skip
    """The specification: decompress, then torch. Arguments as in `sparse24_conv2d`."""
    weight = _weight(unpack, values, metadata, x.shape[1], kernel_size, pattern)
    y = ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation))
    return (y if residual is None else y + residual).to(x.dtype)


def _weight(form, values, metadata, channels, kernel_size, pattern):
    """The dense weight (N, C, kh, kw), in channels_last. form: `unpack` or `decompress`."""
    rows = form(values, metadata, channels * kernel_size[0] * kernel_size[1], Pattern.parse(pattern))
    return rows.view(-1, *kernel_size, channels).permute(0, 3, 1, 2)


def conv_request(where, dtype, pixels, features, channels, kernel_size, stride, padding, dilation, **others):
    """The `Request` of a convolution to `features` channels with `pixels` output pixels. For a 1 x 1 kernel it is
    a product over the pixels. where, others: as in `request_on`. kernel_size, stride, dilation: pairs."""
    padding = _padding(padding, kernel_size, dilation)
    M, N, K = pixels, features, channels * kernel_size[0] * kernel_size[1]
    if (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0):
        shared = {name: others[name] for name in ("device", "backend", "pattern") if name in others}
        return request_on(where, LINEAR, dtype, M, N, K, **shared)
    return request_on(
        where, CONV, dtype, M, N, K, channels=channels, kernel_size=kernel_size, stride=stride, padding=padding,
        dilation=dilation, **others,
    )  # fmt: skip


def sparse24_conv2d(
    x,
    values,
    metadata,
    kernel_size,
    bias=None,
    activation=None,
    residual=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    **options,
):
    """y (B, N, H', W') = act(conv2d(x, W) + bias) + residual. values and metadata hold the weight W.

    x: (B, C, H, W). kernel_size, stride, padding, dilation: an integer or a pair; padding also "same" or "valid".
    bias: (N,). activation: None, "gelu" (erf), "gelu_tanh" or "silu". residual: like y. options: cache, backend and
    pattern, as in `sparse24_linear`. y has the dtype of x. It is in channels_last, except in 16 bits on a CPU where the
    kernel is larger than 1 x 1 (contiguous), and where torch differentiates (torch's choice).

    Accumulates in fp32. Works under torch.compile and torch.export. Derivatives: as of `sparse24_linear`. Raises:
    InputError for shapes or dtypes that do not fit together.
    """
    cache, backend, pattern = _options(**options)
    kernel_size, stride, dilation = map(_pair, (kernel_size, stride, dilation))
    padding = _padding(padding, kernel_size, dilation)
    geometry = kernel_size, stride, padding, dilation
    key, again = (activation, *geometry, pattern), cache is not None and backend is None
    if again and (y := calls.repeated(cache, values, metadata, key, x, bias, residual)) is not None:
        return y
    size = _check(x, values, metadata, kernel_size, bias, activation, residual, stride, padding, dilation, pattern)
    if left_to_torch(x, bias, residual):
        named = {"stride": stride, "padding": padding, "dilation": dilation, "pattern": pattern}
        return sparse24_conv2d_ref(x, values, metadata, kernel_size, bias, activation, residual, **named)
    request = conv_request(
        x.device, x.dtype, x.shape[0] * size[0] * size[1], values.shape[0], x.shape[1], kernel_size,
        stride, padding, dilation, device=x.device if type(x) is torch.Tensor else None, out_dtype=x.dtype,
        activation=activation, bias=bias is not None, residual=None if residual is None else residual.dtype,
        image=tuple(size), backend=backend, pattern=pattern,
    )  # fmt: skip
    if request.operation == LINEAR:
        # contiguous, as every back end reads them: a repeated call on a CPU asks for it
        rows, added = (None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (x, residual))
        y = sparse24_linear(rows, values, metadata, bias, activation, added, **options)
        return y.permute(0, 3, 1, 2)

    def run(choice, cache, strict, neutral=False):
        layout = dispatch.row_of(CONV, choice.backend).layout_for(request)
        tensors = prepack_once(values, metadata, layout, request.K, cache, pattern)
        added = torch.zeros_like(residual) if neutral and residual is not None else residual
        y = direct(_conv, x, bias, residual)(
            x, values, metadata, tensors, kernel_size, bias, activation, added, stride, padding, dilation, size,
            *choice, strict, pattern,
        )  # fmt: skip
        if again and request.capability is None and not torch.compiler.is_compiling() and y.numel():
            once_more = _once_more(choice, tensors, pattern, y, geometry, activation, x, residual)
            calls.remember(cache, values, layout, tensors, key, once_more, x, bias, residual)
        return y

    return dispatch.serve(request, run, cache)


def _once_more(choice, tensors, pattern, y, geometry, activation, x, residual):
    """A function of the tensors (x, bias, residual) that computes y by this choice on a CPU, or None."""
    if choice.backend == "dense":
        weight = tensors[0].view(-1, *geometry[0], x.shape[1]).permute(0, 3, 1, 2)
        layout = _memory_format(x)

        def run(x, bias, residual):
            ordered = weight.contiguous(memory_format=layout)  # a copy in 16 bits: not one to keep for each size
            y = ACTIVATIONS[activation](F.conv2d(x, ordered, bias, *geometry[1:]))
            return (y if residual is None else y + residual).contiguous(memory_format=layout)

        return run
    if choice.backend != "cpu" or (CONV, "cpu", x.device) in broken:
        return None
    halo = cpu.CONFIGS[choice.config] == "halo"
    return products.conv_again(x, tensors, Pattern.parse(pattern), y, geometry[:3], activation, residual, halo)


@torch.library.custom_op("sparsedm::sparse24_conv2d", mutates_args=())
def _conv(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    prepacked: list[torch.Tensor],
    kernel_size: list[int],
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    backend: str,
    config: int,
    strict: bool,
    pattern: str = "2:4",
) -> torch.Tensor:
    y = _conv_fake(
        x, values, metadata, prepacked, kernel_size, bias, activation, residual, stride, padding, dilation, size,
        backend, config, strict, pattern,
    )  # fmt: skip
    row = dispatch.row_of(CONV, backend)
    if row.module:
        options = {
            "kernel_size": kernel_size,
            "stride": stride[0],
            "padding": padding,
            "bias": bias,
            "activation": activation,
            "residual": None if residual is None else _pixels(residual).to(y.dtype),
        }
        if row.on == "cpu":
            options["pattern"] = pattern
        tensors = (_pixels(x), *kernel_tensors(values, prepacked), y.permute(0, 2, 3, 1))
        if not y.numel() or dispatch.launch(CONV, backend, config, strict, *tensors, **options):
            return y
    if row.layout == "dense":
        columns = x.shape[1] * kernel_size[0] * kernel_size[1]
        weight = dense_weight(prepacked, values, metadata, columns, Pattern.parse(pattern))
        weight = weight.view(-1, *kernel_size, x.shape[1]).permute(0, 3, 1, 2)
    else:
        weight = _weight(decompress, values, metadata, x.shape[1], kernel_size, pattern)  # `prepack` has checked them
    weight = weight.contiguous(memory_format=_memory_format(x))
    result = ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation))
    return y.copy_(result if residual is None else result + residual)


@_conv.register_fake
def _conv_fake(
    x, values, metadata, prepacked, kernel_size, bias, activation, residual, stride, padding, dilation, size, backend,
    config, strict, pattern="2:4",
):  # fmt: skip
    refuse_export(traced=True)
    shape = (x.shape[0], values.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _memory_format(x):
    """channels_last, except in 16 bits on a CPU: there oneDNN crashed (3 x 1 kernel, stride and dilation 2)."""
    return torch.contiguous_format if x.device.type == "cpu" and x.element_size() == 2 else torch.channels_last


def _pixels(image):
    """(B, C, H, W) -> (B, H, W, C) in an order and at an address that TMA can read."""
    return aligned(image.permute(0, 2, 3, 1))


def _options(cache=None, backend=None, pattern="2:4"):
    return cache, backend, pattern


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(padding, kernel_size, dilation):
    """Torch's padding, a number, pair or word, as a pair."""
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
    if any(r % 2 for r in reach):
        raise InputError(
            f"padding 'same' of a {kernel_size[0]} x {kernel_size[1]} kernel differs between the two sides"
        )
    return reach[0] // 2, reach[1] // 2


def _check(x, values, metadata, kernel_size, bias, activation, residual, stride, padding, dilation, pattern):
    """-> (H', W')."""
    parsed = Pattern.parse(pattern)
    check_shapes(values, metadata, parsed)
    features, held = values.shape[0], columns_of(values, parsed)
    if x.dim() != 4:
        raise InputError(f"x of shape {tuple(x.shape)}: images are (B, C, H, W)")
    columns = x.shape[1] * kernel_size[0] * kernel_size[1]
    if held != (-(-columns // 16) * 16 if parsed == TWO_FOUR else columns):
        raise InputError(
            f"{x.shape[1]} channels and a {kernel_size[0]} x {kernel_size[1]} kernel make {columns} columns, and the "
            f"weight has {held} (of 2:4, rounded up to a multiple of 16)"
        )
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    if min(size) < 1:
        raise InputError(f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than the kernel")
    check_operands(x, values, metadata, bias, activation, residual, (x.shape[0], features, *size))
    return size
