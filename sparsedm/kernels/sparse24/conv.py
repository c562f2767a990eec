"""y = act(conv2d(x, W) + b) + r with a 2:4 compressed W: reference, dispatch and the operator `sparse24_conv2d`.

W (N, C, kh, kw) is kept as rows (N, kh kw C), groups of four along C: values (N, kh kw C / 2) and metadata
(N, kh kw C / 16) of `format.pack(group_view(W).reshape(N, -1))`. Images are (B, C, H, W) as in torch; the
kernels read and write them in channels_last. Inference only: nothing here has a gradient.

Back ends (`choose_conv_backend` says which will run, and why):
    wgmma   implicit product on `wgmma.mma_async.sp` (sm_90a)       wgmma_conv.py
    mma     implicit product on `mma.sp` (sm_80, 86, 89)            mma_conv.py
    linear  1 x 1 kernels are `sparse24_linear` on the pixels
    dense   the decompressed weight, kept, and torch's conv2d
    torch   decompressed at every call (`sparse24_conv2d_ref`): any device, any geometry
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.launch import capability, forced_backend
from sparsedm.kernels.sparse24.dispatch import (
    CONV,
    NO_GPU,
    Choice,
    configs,
    every,
    module,
    pick,
    smallness,
    without_kernels,
)
from sparsedm.kernels.sparse24.format import check_shapes, unpack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack_once
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, sparse24_linear


def sparse24_conv2d_ref(
    x, values, metadata, kernel_size, bias=None, activation=None, residual=None, *, stride=1, padding=0, dilation=1
):
    """The specification: decompress, then torch. Arguments as `sparse24_conv2d`."""
    weight = _weight(values, metadata, x.shape[1], kernel_size)
    y = ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation))
    return y if residual is None else y + residual


def _weight(values, metadata, channels, kernel_size):
    """The dense weight (N, C, kh, kw), in channels_last."""
    rows = unpack(values, metadata, channels * kernel_size[0] * kernel_size[1])
    return rows.view(-1, *kernel_size, channels).permute(0, 3, 1, 2)


def choose_conv_backend(capability, channels, kernel_size, stride, padding, dilation, pixels, features, dtype):
    """Which back end serves a convolution to `features` channels of so many pixels in all, and why: (name, reason).

    Rules, not measurement: where there is a kernel, `dispatch.pick` times dense beside it.
    SPARSEDM_BACKEND=torch | dense | mma | wgmma overrules them wherever the named one can run; 1 x 1 kernels obey it as
    products.
    """
    if kernel_size == (1, 1) and stride == (1, 1) and padding in ((0, 0), "valid", "same"):
        return "linear", "a 1 x 1 kernel is a product over the pixels"
    kernel, reason = conv_kernel(capability, channels, stride, dilation, features, dtype)
    forced = forced_backend()
    if kernel is None:
        return forced if forced in ("torch", "dense") else "dense" if capability else without_kernels(), reason
    too_small = None if kernel == forced else smallness(pixels, features)
    return ("dense", too_small) if too_small else (kernel, reason)


def conv_kernel(capability, channels, stride, dilation, features, dtype):
    """The kernel that is worth timing beside dense, mma or wgmma, or None; and why."""
    forced = forced_backend()
    if forced in ("torch", "dense"):
        return None, f"SPARSEDM_BACKEND={forced}"
    if capability is None:
        return None, NO_GPU
    name = f"sm_{capability[0]}{capability[1]}"
    kernel = forced if forced in ("mma", "wgmma") else "wgmma" if capability == (9, 0) else "mma"
    obstacle = _obstacle(kernel, capability, channels, stride, dilation, features, dtype)
    if obstacle:
        return None, obstacle
    if kernel == forced:
        return kernel, f"SPARSEDM_BACKEND={forced}"
    if kernel == "mma" and capability >= (9, 0):
        return None, f"mma.sp is no quicker than {name}'s dense tensor cores, and wgmma.sp needs sm_90a"
    return kernel, f"{name + 'a' if kernel == 'wgmma' else name}, implicit product"


def _obstacle(kernel, capability, channels, stride, dilation, features, dtype):
    """Why the kernel, mma or wgmma, cannot run, or None."""
    if capability < (8, 0):
        return f"sm_{capability[0]}{capability[1]} has no sparse tensor cores (sm_80 and later have)"
    if kernel == "wgmma" and capability != (9, 0):
        return f"sm_{capability[0]}{capability[1]} has no wgmma (sm_90a has)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype)[6:]}: the kernels take bfloat16 and float16"
    multiple = 8 if kernel == "mma" else 64  # a TMA box has 64 channels at one kernel position
    if channels % multiple:
        return f"{channels} input channels: the {kernel} kernel needs a multiple of {multiple}"
    if stride[0] != stride[1] or dilation != (1, 1):
        return f"stride {stride}, dilation {dilation}: the kernels have one stride for both axes and no dilation"
    if kernel == "mma":
        return None
    if features % 8:
        return f"{features} output channels: the wgmma kernel needs a multiple of 8"
    if stride[0] > 2:
        return f"stride {stride[0]}: the wgmma kernel has strides 1 and 2"
    return None


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
    cache=None,
):
    """y (B, N, H', W') = act(conv2d(x, W) + bias) + residual, W the 2:4 weight that values and metadata hold.

    x: (B, C, H, W). kernel_size, stride, padding, dilation: an integer or a pair; padding also "same" or "valid".
    bias: (N,). activation: None, "gelu" (erf), "gelu_tanh" or "silu". residual: as y. cache: a dict that the caller
    keeps with the weight (start with {}), as in `sparse24_linear`. y has the dtype of x, in channels_last.

    Accumulates in fp32. No gradient. Works under torch.compile and torch.export. Raises: InputError for shapes or
    dtypes that do not belong together.
    """
    kernel_size, stride, dilation = map(_pair, (kernel_size, stride, dilation))
    padding = _padding(padding, kernel_size, dilation)
    size = _check(x, values, metadata, kernel_size, bias, activation, residual, stride, padding, dilation)
    features, channels = values.shape[0], x.shape[1]
    device, pixels = capability(x.device), x.shape[0] * size[0] * size[1]
    backend, _ = choose_conv_backend(
        device, channels, kernel_size, stride, padding, dilation, pixels, features, x.dtype
    )
    if backend == "linear":
        pixels = lambda image: None if image is None else image.permute(0, 2, 3, 1)  # noqa: E731
        y = sparse24_linear(pixels(x), values, metadata, bias, activation, pixels(residual), cache=cache)
        return y.permute(0, 3, 1, 2)
    kept = {} if cache is None else cache

    def run(choice, kept):
        columns = channels * kernel_size[0] * kernel_size[1]
        tensors = prepack_once(values, metadata, choice.backend, columns, kept)
        return _conv(
            x, values, metadata, tensors, kernel_size, bias, activation, residual, stride, padding, dilation, size,
            *choice,
        )  # fmt: skip

    choice = Choice(backend, int(backend == "wgmma" and features <= 128))
    kernel, _ = conv_kernel(device, channels, stride, dilation, features, x.dtype)
    if kernel and pixels and type(x) is torch.Tensor:
        for_timing = {}  # what the losers read is not kept
        choice = pick(
            CONV,
            lambda: every(CONV, kernel) if kernel == forced_backend() else (Choice("dense"), *every(CONV, kernel)),
            choice, lambda other: run(other, for_timing), x.device, pixels, kept.setdefault("choices", {}),
            dtype=x.dtype, activation=activation, bias=bias is not None,
            residual=residual is not None, kernel=kernel_size, stride=stride[0], image=tuple(size), n=features,
            c=channels,
        )  # fmt: skip
    return run(choice, kept)


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
) -> torch.Tensor:
    y = _conv_fake(
        x, values, metadata, prepacked, kernel_size, bias, activation, residual, stride, padding, dilation, size,
        backend, config,
    )  # fmt: skip
    if not y.numel():
        return y
    if backend in ("mma", "wgmma"):
        with torch.cuda.device(x.device):
            module(CONV, backend).launch(
                _pixels(x), *kernel_tensors(values, prepacked), y.permute(0, 2, 3, 1), kernel_size=kernel_size,
                stride=stride[0], padding=padding, bias=bias, activation=activation,
                residual=None if residual is None else _pixels(residual).to(y.dtype),
                config=configs(CONV, backend)[config],
            )  # fmt: skip
        return y
    if backend == "dense":
        weight = prepacked[0].view(-1, *kernel_size, x.shape[1]).permute(0, 3, 1, 2)
    else:
        weight = _weight(values, metadata, x.shape[1], kernel_size)
    result = ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation))
    return y.copy_(result if residual is None else result + residual)


@_conv.register_fake
def _conv_fake(
    x, values, metadata, prepacked, kernel_size, bias, activation, residual, stride, padding, dilation, size, backend,
    config,
):  # fmt: skip
    shape = (x.shape[0], values.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _pixels(image):
    """(B, C, H, W) -> (B, H, W, C), contiguous and with the strides of it also where an axis has one entry, and from an
    address on that TMA can read."""
    image = image.permute(0, 2, 3, 1)
    flat = image.reshape(-1)
    return (flat if flat.data_ptr() % 16 == 0 else flat.clone()).view(image.shape)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(padding, kernel_size, dilation):
    """Torch's words for it as a pair."""
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


def _check(x, values, metadata, kernel_size, bias, activation, residual, stride, padding, dilation):
    """-> (H', W')."""
    check_shapes(values, metadata)
    features, words = metadata.shape
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, ACTIVATIONS))}")
    if x.dim() != 4:
        raise InputError(f"x of shape {tuple(x.shape)}: images are (B, C, H, W)")
    columns = x.shape[1] * kernel_size[0] * kernel_size[1]
    if words != -(-columns // 16):
        raise InputError(
            f"{x.shape[1]} channels and a {kernel_size[0]} x {kernel_size[1]} kernel make {columns} columns, and the "
            f"weight has {16 * words} (rounded up to a multiple of 16)"
        )
    if values.dtype != x.dtype:
        raise InputError(f"x is {str(x.dtype)[6:]} and the weight {str(values.dtype)[6:]}: they must have one dtype")
    if bias is not None and (bias.shape != (features,) or bias.dtype != x.dtype):
        raise InputError(
            f"bias of shape {tuple(bias.shape)} and type {str(bias.dtype)[6:]} must have the shape ({features},) and "
            f"the type of x, {str(x.dtype)[6:]}"
        )
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    if min(size) < 1:
        raise InputError(f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than the kernel")
    if residual is not None and tuple(residual.shape) != (x.shape[0], features, *size):
        raise InputError(
            f"residual of shape {tuple(residual.shape)} must have the shape of y, {(x.shape[0], features, *size)}"
        )
    return size
