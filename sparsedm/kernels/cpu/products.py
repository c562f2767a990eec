"""N:M sparse products in fp32 on a CPU, attention and masks: launches of the C library. Nothing here has a gradient.

    y = act([x | skip] W^T + b) s + r        x (M, K), W (N, K) N:M along K, y (M, N)
    dx = dy W                                dy (M, N), dx (M, K), W (N, K) with any zeros
    y = act(conv2d(x, W) + b) + r            x (B, C, H, W), NCHW or NHWC, without im2col
    y = softmax(q k^T / sqrt(D)) v           q, k, v (B, H, L, D), y (B, L, H D)

A weight is prepacked once into (values, offsets) in the order in which the loops read them. There are four orders:
"linear", "few" (a few rows of x), "conv" and "halo" (3 x 3, for one width of x). Masked training has a new weight in
every step: `masked_linear` and `masked_gradient` prepack and multiply in one call.

All tensors are fp32 on the CPU. Every function needs `library()`. `rules.py` says where they are worth calling.
"""

import ctypes
import functools

import torch

from sparsedm.errors import InputError
from sparsedm.kernels.cpu.library import library
from sparsedm.kernels.pattern import Pattern, group_view, memory_format

KEEPS_MORE = "the mask keeps more than {0.keep} of {0.group} weights"
ANY = Pattern(1, 2)  # where C does not look at it
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def _fields(names, kind):
    return [(name, kind) for name in names.split()]


POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _Out(ctypes.Structure):
    _fields_ = [
        *_fields("bias scale residual y", POINTER),
        *_fields("ld_residual ldy per N", LONG),
        *_fields("act", INT),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *_fields("x skip values offsets counts", POINTER),
        *_fields("ldx ld_skip M K1 K2", LONG),
        *_fields("keep group", INT),
        ("out", _Out),
    ]


class _Conv(ctypes.Structure):
    _fields_ = [
        *_fields("x values offsets", POINTER),
        *_fields("B C H W OH OW", LONG),
        *_fields("kh kw stride top left keep group nhwc", INT),
        ("out", _Out),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [*_fields("q k v y", POINTER), *_fields("B H L D stride_b stride_h stride_l", LONG)]


class _Choice(ctypes.Structure):
    _fields_ = [
        *_fields("w masked mask", POINTER),
        *_fields("outer inner", LONG),
        *_fields("group keep", INT),
        *_fields("checksum", LONG),
        *_fields("nan", INT),
    ]


def _empty(*shape, dtype=torch.float32, **options):  # tests put guarded memory here
    return torch.empty(*shape, dtype=dtype, device="cpu", **options)


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _call(name, *arguments):
    """Call a C function, which returns 1 if it gets no memory. Returns whether it returned 0."""
    failed = getattr(library(), name)(*arguments)
    if failed == 1:
        raise MemoryError(f"{name}: no memory for its tiles")
    return not failed


# ---- prepacking ------------------------------------------------------------------------------------------------------

ORDERS = ("linear", "few", "conv", "halo")


def prepack(order, weight, mask, pattern, width=0):
    """values fp32 and offsets (int16; of "few" uint8) of a weight, in the order in which a kernel reads them.

    order: one of ORDERS. weight: (N, K) or (N, C, kh, kw) fp32, masked or not. mask: bool, of its shape. width: of x,
    for "halo". Where fewer weights are kept than the pattern allows, zeros are added. Raises: InputError if more are
    kept among columns that the kernel reads together, 64 at most. A single group may keep more.
    """
    weight, mask = weight.detach(), mask.detach()
    if weight.dim() == 4:
        weight, mask = (group_view(t).reshape(t.shape[0], -1, t.shape[1]) for t in (weight, mask))
    (N, C), taps = (weight.shape[0], weight.shape[-1]), weight.shape[1] if weight.dim() == 3 else 1
    weight, mask = weight.contiguous(), mask.contiguous()
    shape, dtype = prepacked_shape(order, N, taps * C, pattern)
    values, offsets = _empty(*shape), _empty(*shape, dtype=dtype)
    pointers = [POINTER(t.data_ptr()) for t in (weight, mask, values, offsets)]
    sizes = [LONG(N), LONG(taps), LONG(C), pattern.keep, pattern.group, LONG(width)]
    if library().nm_prepack(ORDERS.index(order), *pointers[:2], *sizes, *pointers[2:]):
        raise InputError(KEEPS_MORE.format(pattern))
    return values, offsets


def prepacked_shape(order, N, columns, pattern):
    """(shape of values and offsets, dtype of offsets) of `prepack`, for N rows of so many columns."""
    rows = -(-N // lanes()) * lanes() if order == "few" else N
    return (rows, columns * pattern.keep // pattern.group), torch.uint8 if order == "few" else torch.int16


def lanes():
    """Floats in a vector: 16, 8 or 4."""
    return library().nm_lanes()


# ---- products --------------------------------------------------------------------------------------------------------


def _rows(tensor):
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()


def _out(y, N, bias, activation, residual, scale=None):
    per = 1 if scale is None else y.numel() // max(scale.numel(), 1)
    leading = N if residual is None or residual.dim() != 2 else residual.stride(0)
    pointers = _address(bias), _address(scale), _address(residual), y.data_ptr()
    return _Out(*pointers, leading, N, per, N, ACTIVATIONS[activation])


def linear(
    x, prepacked, pattern, N, *, bias=None, activation=None, residual=None, skip=None, scale=None, few=False, out=None
):
    """y (M, N) from x (M, K) and skip (M, K2) or None; bias (N,), residual (M, N), scale (G, N), G a divisor of M.

    prepacked: for "linear", or for "few" if `few`. out: y, contiguous, if the caller has it.
    """
    y = _empty(x.shape[0], N) if out is None else out
    if not y.numel():
        return y
    x, skip, residual = _rows(x), _rows(skip), _rows(residual)
    bias = bias if bias is None else bias.contiguous()
    scale = scale if scale is None else scale.contiguous()
    call = _linear_call(x, prepacked, pattern, y, bias, activation, residual, skip, scale)
    _call(LINEAR[few], ctypes.byref(call))
    return y


LINEAR = ("nm_linear", "nm_linear_few")


def _linear_call(x, prepacked, pattern, y, bias=None, activation=None, residual=None, skip=None, scale=None):
    values, offsets = (None, None) if prepacked is None else map(_address, prepacked)
    ld_skip, K2 = (0, 0) if skip is None else (skip.stride(0), skip.shape[1])
    sizes = x.stride(0), ld_skip, x.shape[0], x.shape[1], K2, pattern.keep, pattern.group
    out = _out(y, y.shape[1], bias, activation, residual, scale)
    return _Linear(x.data_ptr(), _address(skip), values, offsets, None, *sizes, out)


def linear_again(x, prepacked, pattern, y, activation, residual, skip, scale, few):
    """run(x, bias, residual, skip, scale) -> y, for tensors of the sizes of these, which are contiguous.

    `linear` without the arithmetic on sizes. run returns None where a tensor is not contiguous, or C gets no memory.
    """
    shape, rows = y.shape, [t if t is None else t.reshape(-1, t.shape[-1]) for t in (x, y, residual, skip, scale)]
    call = _linear_call(rows[0], prepacked, pattern, rows[1], None, activation, *rows[2:])
    template, function = bytes(call), getattr(library(), LINEAR[few])

    def run(x, bias, residual, skip, scale):
        call = _Linear.from_buffer_copy(template)  # a new one: other threads may be in the kernel with theirs
        call.x, out, y = x.data_ptr(), call.out, x.new_empty(shape)
        whole, out.y = x.is_contiguous(), y.data_ptr()
        if bias is not None:
            whole, out.bias = whole and bias.is_contiguous(), bias.data_ptr()
        if residual is not None:
            whole, out.residual = whole and residual.is_contiguous(), residual.data_ptr()
        if skip is not None:
            whole, call.skip = whole and skip.is_contiguous(), skip.data_ptr()
        if scale is not None:
            whole, out.scale = whole and scale.is_contiguous(), scale.data_ptr()
        return None if not whole or function(ctypes.byref(call)) else y

    run.prepacked = prepacked  # whose addresses the template holds
    return run


def masked_linear(x, masked, mask, pattern, bias=None):
    """`linear` of a weight (N, K), masked, that is prepacked for this call; x (M, K) -> y (M, N).

    Raises: InputError as `prepack`.
    """
    x, y, masked, mask = _rows(x), _empty(x.shape[0], masked.shape[0]), masked.contiguous(), mask.contiguous()
    bias = bias if bias is None else bias.contiguous()
    call = _linear_call(x, None, pattern, y, bias)
    if not _call("nm_linear_masked", ctypes.byref(call), POINTER(masked.data_ptr()), POINTER(mask.data_ptr())):
        raise InputError(KEEPS_MORE.format(pattern))
    return y


def masked_gradient(dy, masked):
    """dx (M, K) = dy (M, N) @ masked (N, K); of the weight only what is not zero is multiplied, wherever it is."""
    dy, dx, masked = _rows(dy), _empty(dy.shape[0], masked.shape[1]), masked.contiguous()
    call = _linear_call(dy, None, ANY, dx)
    _call("nm_linear_transposed", ctypes.byref(call), POINTER(masked.data_ptr()))
    return dx


def output_size(size, kernel_size, stride, padding):
    """(OH, OW) of a convolution of an (H, W) image."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding))


def conv2d(x, prepacked, pattern, N, geometry, *, bias=None, activation=None, residual=None, halo=False, out=None):
    """y (B, N, OH, OW) in the memory format of x (B, C, H, W), or `out`, which then decides it; residual as y.

    geometry: (kernel_size, stride, padding), pairs; both strides are the same. prepacked: of "conv", or of "halo" where
    `halo`.
    """
    layout = memory_format(x if out is None else out)
    x = x.contiguous(memory_format=layout)
    size = output_size(x.shape[2:], *geometry)
    y = _empty(x.shape[0], N, *size, memory_format=layout) if out is None else out
    if not y.numel():
        return y
    residual = residual if residual is None else residual.contiguous(memory_format=layout)
    bias = bias if bias is None else bias.contiguous()
    call = _conv_call(x, prepacked, pattern, y, geometry, layout, bias, activation, residual)
    _call(CONV[halo], ctypes.byref(call))
    return y


CONV = ("nm_conv", "nm_conv_halo")


def _conv_call(x, prepacked, pattern, y, geometry, layout, bias, activation, residual):
    kernel_size, stride, padding = geometry
    sizes = *x.shape, *y.shape[2:], *kernel_size, stride[0], *padding
    pattern_and_layout = pattern.keep, pattern.group, int(layout == torch.channels_last)
    out = _out(y, y.shape[1], bias, activation, residual)
    return _Conv(x.data_ptr(), *map(_address, prepacked), *sizes, *pattern_and_layout, out)


def conv_again(x, prepacked, pattern, y, geometry, activation, residual, halo):
    """run(x, bias, residual) -> y in channels_last, for tensors of the sizes of these, as `linear_again`."""
    layout = torch.channels_last
    call = _conv_call(x, prepacked, pattern, y, geometry, layout, None, activation, residual)
    template, function, shape = bytes(call), getattr(library(), CONV[halo]), y.shape

    def run(x, bias, residual):
        x, y = x.contiguous(memory_format=layout), _empty(shape, memory_format=layout)
        call = _Conv.from_buffer_copy(template)
        call.x, call.out.y = x.data_ptr(), y.data_ptr()
        if bias is not None:
            bias = bias.contiguous()
            call.out.bias = bias.data_ptr()
        if residual is not None:
            residual = residual.contiguous(memory_format=layout)
            call.out.residual = residual.data_ptr()
        return None if function(ctypes.byref(call)) else y

    run.prepacked = prepacked  # whose addresses the template holds
    return run


def attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v: q, k, v (B, H, L, D) of the same strides, D contiguous and a multiple of `lanes()`.

    Returns (B, L, H * D).
    """
    B, H, L, D = q.shape
    y = _empty(B, L, H * D)
    if y.numel():
        pointers = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
        _call("nm_attention", ctypes.byref(_Attention(*pointers, B, H, L, D, *q.stride()[:3])))
    return y


# ---- masks -----------------------------------------------------------------------------------------------------------


def select_mask(weight, pattern):
    """weight (out, in) or (out, in, kh, kw) fp32 -> (masked weight, bool mask, whether a weight is NaN).

    The mask is that of `pattern.py`; both results have the weight's memory format.
    """
    return select_masks([weight], [pattern], sum_up=False)[0][:3]


def select_masks(weights, patterns, sum_up=True):
    """A list of `select_mask`'s results, each with the weight's `checksum` behind (0 if not sum_up), in one call."""
    calls, found = (_Choice * len(weights))(), []
    for call, weight, pattern in zip(calls, weights, patterns):
        layout = memory_format(weight)
        weight = weight.detach().contiguous(memory_format=layout)
        masked = _empty(weight.shape, memory_format=layout)
        mask = _empty(weight.shape, dtype=torch.bool, memory_format=layout)
        inner = weight.shape[2:].numel() if weight.dim() == 4 and layout == torch.contiguous_format else 1
        call.w, call.masked, call.mask = weight.data_ptr(), masked.data_ptr(), mask.data_ptr()
        call.outer, call.inner = weight.numel() // (pattern.group * inner), inner
        call.group, call.keep = pattern.group, pattern.keep
        found.append((weight, masked, mask))
    library().nm_choose(calls, LONG(len(calls)), sum_up)
    return [(masked, mask, bool(call.nan), call.checksum) for call, (_, masked, mask) in zip(calls, found)]


def checksum(*tensors):
    """A number of 64 bits per tensor, of any dtype on the CPU: another one, in all likelihood, if any bit changes.

    It reads the bytes in the order of the tensor's memory format, as `select_masks` does.
    """
    whole = [
        t if t.is_contiguous() and not t.is_neg() else t.resolve_neg().contiguous(memory_format=memory_format(t))
        for t in tensors
    ]
    return [_function("nm_checksum", LONG, POINTER, LONG)(t.data_ptr(), t.nbytes) for t in whole]


def decay(gradient, weight, mask, rate):
    """gradient + rate * (1 - mask) * weight, as torch rounds it. mask: bool. Three tensors of one shape and strides,
    without gaps."""
    out = _empty(gradient.shape, memory_format=memory_format(gradient))
    pointers = [t.data_ptr() for t in (gradient, weight, mask)]
    run = _function("nm_decay", None, *[POINTER] * 3, ctypes.c_float, LONG, POINTER)
    run(*pointers, rate, out.numel(), out.data_ptr())
    return out


@functools.cache
def _function(name, result, *arguments):
    function = getattr(library(), name)
    function.restype, function.argtypes = result, arguments
    return function
