"""N:M sparse products in fp32 on a CPU, attention and masks: launches of the C library. Nothing here has a gradient.

    y = act([x | skip] W^T + b) s + r        x (M, K), W (N, K) N:M along K, y (M, N)
    y = act(conv2d(x, W) + b) + r            x (B, C, H, W), NCHW or NHWC, without im2col
    y = softmax(q k^T / sqrt(D)) v           q, k, v (B, H, L, D), y (B, L, H D)

A weight is prepacked once into (values, offsets) in the order in which the loops read them. There are four orders:
`prepack_linear`, `prepack_few` (a few rows of x), `prepack_conv` and `prepack_halo` (3 x 3, for one width of x).

All tensors are fp32 on the CPU. Every function needs `library()`. `rules.py` says where they are worth calling.
"""

import ctypes
import functools

import torch

from sparsedm.errors import InputError
from sparsedm.kernels.cpu.library import library
from sparsedm.kernels.pattern import group_view, memory_format

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


def _empty(*shape, dtype=torch.float32, **options):  # tests put guarded memory here
    return torch.empty(*shape, dtype=dtype, device="cpu", **options)


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _call(name, *arguments):
    """Call a C function, which returns 1 if it gets no memory."""
    if getattr(library(), name)(*arguments):
        raise MemoryError(f"{name}: no memory for its tiles")


# ---- prepacking ------------------------------------------------------------------------------------------------------

ORDERS = ("linear", "few", "conv", "halo")


def prepack(order, weight, mask, pattern, width=0):
    """values fp32 and offsets (int16; of "few" uint8) of a weight, in the order in which a kernel reads them.

    order: one of ORDERS. weight: (N, K) or (N, C, kh, kw) fp32, masked or not. mask: bool, of its shape. width: of x,
    for "halo". If a group keeps fewer weights than the pattern, zeros are added. Raises: InputError if a group keeps
    more.
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
        raise InputError(f"the mask keeps more than {pattern.keep} of {pattern.group} weights of a group")
    return values, offsets


def prepack_transposed(masked, pattern):
    """The transpose of a masked weight (N, K) fp32, contiguous: (values, offsets, counts) for `linear`, from (M, N) to
    (M, K). pattern: the mask's, an upper bound of what the weight holds."""
    N, K = masked.shape
    blocks = K * -(-N // 64)
    room = N * K * pattern.keep // pattern.group + 3 * blocks + 4
    values, offsets, counts = _empty(room), _empty(room, dtype=torch.int16), _empty(blocks, dtype=torch.uint8)
    pointers = [POINTER(t.data_ptr()) for t in (masked, values, offsets, counts)]
    library().nm_prepack_transposed(pointers[0], LONG(N), LONG(K), *pointers[1:])
    return values, offsets, counts


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


def _out(y, N, bias, activation, residual):
    out = _Out(_address(bias), None, _address(residual), y.data_ptr())
    out.N = out.ldy = out.ld_residual = N
    out.per, out.act = 1, ACTIVATIONS[activation]
    return out


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


def _linear_call(x, prepacked, pattern, y, bias, activation, residual, skip, scale):
    (M, N), weight = y.shape, [t.data_ptr() for t in prepacked]
    call = _Linear(x.data_ptr(), _address(skip), *weight, *[None] * (3 - len(weight)), x.stride(0))
    call.M, call.K1, call.keep, call.group = M, x.shape[1], pattern.keep, pattern.group
    call.out = _out(y, N, bias, activation, residual)
    if skip is not None:
        call.ld_skip, call.K2 = skip.stride(0), skip.shape[1]
    if residual is not None:
        call.out.ld_residual = residual.stride(0)
    if scale is not None:
        call.out.scale, call.out.per = scale.data_ptr(), M * N // scale.numel()
    return call


def linear_again(x, prepacked, pattern, y, activation, residual, skip, scale, few):
    """run(x, bias, activation, residual, skip, scale) -> y, for tensors of the sizes of these, which are contiguous.

    `linear` without the arithmetic on sizes. run returns None where a tensor is not contiguous.
    """
    shape, rows = y.shape, [t if t is None else t.reshape(-1, t.shape[-1]) for t in (x, y, residual, skip, scale)]
    call = _linear_call(rows[0], prepacked, pattern, rows[1], None, activation, *rows[2:])
    template, function = bytes(call), getattr(library(), LINEAR[few])

    def run(x, bias, activation, residual, skip, scale):
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
        if not whole:
            return None
        if function(ctypes.byref(call)):
            raise MemoryError(f"{LINEAR[few]}: no memory for its tiles")
        return y

    run.prepacked = prepacked  # whose addresses the template holds
    return run


def output_size(size, kernel_size, stride, padding):
    """(OH, OW) of a convolution of an (H, W) image."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding))


def conv2d(x, prepacked, pattern, N, geometry, *, bias=None, activation=None, residual=None, halo=False, out=None):
    """y (B, N, OH, OW) in the memory format of x (B, C, H, W), or `out`, which then decides it; residual as y.

    geometry: (kernel_size, stride, padding), pairs; both strides are the same. prepacked: of "conv", or of "halo" where
    `halo`.
    """
    kernel_size, stride, padding = geometry
    (B, C, H, W), (OH, OW) = x.shape, output_size(x.shape[2:], *geometry)
    layout = memory_format(x if out is None else out)
    x = x.contiguous(memory_format=layout)
    y = _empty(B, N, OH, OW, memory_format=layout) if out is None else out
    if not y.numel():
        return y
    residual = residual if residual is None else residual.contiguous(memory_format=layout)
    bias = bias if bias is None else bias.contiguous()
    values, offsets = prepacked
    sizes = B, C, H, W, OH, OW, *kernel_size, stride[0], *padding
    pattern_and_layout = pattern.keep, pattern.group, int(layout == torch.channels_last)
    out = _out(y, N, bias, activation, residual)
    call = _Conv(x.data_ptr(), values.data_ptr(), offsets.data_ptr(), *sizes, *pattern_and_layout, out)
    _call("nm_conv_halo" if halo else "nm_conv", ctypes.byref(call))
    return y


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
    layout = memory_format(weight)
    weight = weight.detach().contiguous(memory_format=layout)
    masked = _empty(weight.shape, memory_format=layout)
    mask = _empty(weight.shape, dtype=torch.bool, memory_format=layout)
    inner = weight.shape[2:].numel() if weight.dim() == 4 and layout == torch.contiguous_format else 1
    outer = weight.numel() // (pattern.group * inner)
    sizes = LONG(outer), pattern.group, LONG(inner), pattern.keep
    pointers = [POINTER(t.data_ptr()) for t in (weight, masked, mask)]
    nan = library().nm_select(pointers[0], *sizes, *pointers[1:])
    return masked, mask, bool(nan)


def checksum(*tensors):
    """A number of 64 bits per tensor, of any dtype on the CPU: another one, in all likelihood, if any bit changes."""
    whole = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    return [_checksum()(t.data_ptr(), t.nbytes) for t in whole]


@functools.cache
def _checksum():
    function = library().nm_checksum
    function.restype, function.argtypes = LONG, [POINTER, LONG]
    return function


def decay(gradient, weight, mask, rate):
    """gradient + rate * (1 - mask) * weight, as torch rounds it. mask: bool. Three tensors of one shape and strides,
    without gaps."""
    out = _empty(gradient.shape, memory_format=memory_format(gradient))
    pointers = [POINTER(t.data_ptr()) for t in (gradient, weight, mask)]
    library().nm_decay(*pointers, ctypes.c_float(rate), LONG(out.numel()), POINTER(out.data_ptr()))
    return out
