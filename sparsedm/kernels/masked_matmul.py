"""Masked matmul for N:M training: y = act(x @ (w*m)^T + b), with the straight-through gradient of the weight.

x (..., K), w (N, K), m the N:M mask of w, y (..., N). With z = x @ (w*m)^T + b, dz = dy * act'(z) and g = dz^T @ x

    dx = dz @ (w*m)      db = sum of dz over the tokens      dw = kept*m*g + dropped*(1-m)*g + decay*(1-m)*w

The rule of dw is that of straight_through.py (STE, SR-STE, sparse gradient); dw is not masked. On a GPU (sm_80 and
later; bf16, fp16, fp32) this is one operator with its backward; each of its three products runs in one of these ways:
    library  torch's matmul on the masked weight; the default until something quicker has been measured for the shape
    masked   a kernel of masked_matmul_kernels.py on the masked weight, with bias and activation in its epilogue
    bits     the same on the dense weight and the packed mask; no masked copy is needed
    choose   the same, choosing the mask tile by tile in registers; only when asked for
Anywhere else it is plain torch.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels import masked_matmul_kernels as kernels
from sparsedm.kernels.choose import choose, choose_packed
from sparsedm.kernels.launch import Autotuner, bucket, forced_backend, uses_triton
from sparsedm.kernels.pattern import Pattern, check_weight, choose_mask_ref, unpack_bits
from sparsedm.kernels.straight_through import apply_rates, straight_through

__all__ = ["choose", "masked_linear", "masked_linear_ref", "straight_through"]

_ACTIVATIONS = {  # name: (activation, its gradient from dy and z)
    None: (lambda z: z, lambda dy, z: dy),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dy, z: torch.ops.aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}
WAYS = ("library", "masked", "bits", "choose")


def masked_linear_ref(x, weight, pattern, bias=None, activation=None, **rates):
    """The specification: the mask by its definition, torch's product, the gradient of `straight_through`."""
    mask = choose_mask_ref(weight, pattern)
    masked = torch.where(mask, weight.detach(), 0)
    return _ACTIVATIONS[activation][0](F.linear(x, straight_through(weight, masked, mask, **rates), bias))


def _tuner(product, configs):
    tuned = [config for config in configs if config["way"] != "choose"]
    return Autotuner(f"masked_linear {product}", tuned, kernels.KERNELS)


_forward = _tuner("forward", kernels.FORWARD)
_input_grad = _tuner("input gradient", kernels.INPUT_GRAD)
_weight_grad = _tuner("weight gradient", kernels.WEIGHT_GRAD)


def _run_best(run, tuner, configs, way, x, weight, pattern, **key):
    """Run the first of the configs of the way that was asked for, or the best that the tuner knows."""
    if way is None and forced_backend() == "dense":
        way = "library"
    if way is not None:
        return run(next(config for config in configs if config["way"] == way))
    (N, K), dtypes = weight.shape, f"{x.dtype}<-{weight.dtype}"
    return run(tuner.best(run, x.device, dtypes=dtypes, pattern=pattern, **key, m=bucket(x.shape[0]), n=N, k=K))


@torch.library.custom_op("sparsedm::masked_linear", mutates_args=())
def _masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    masked: torch.Tensor | None,
    bits: torch.Tensor | None,
    bias: torch.Tensor | None,
    pattern: list[int],
    activation: str | None,
    want_z: bool,
    way: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = _rows(x), _rows(weight)

    def run(config):
        if config["way"] == "library":
            z = F.linear(x, masked, bias)
            y = _ACTIVATIONS[activation][0](z)
            return (y, z) if want_z else (y, z.new_empty(0))
        y = x.new_empty(x.shape[0], weight.shape[0])
        z = torch.empty_like(y) if want_z else y.new_empty(0)
        w = masked if config["way"] == "masked" else weight
        kernels.launch_forward(x, w, bits, bias, Pattern(*pattern), activation, y, z if want_z else None, config)
        return y, z

    key = {"activation": activation, "z": want_z}
    return _run_best(run, _forward, kernels.FORWARD, way, x, weight, Pattern(*pattern), **key)


@_masked_linear.register_fake
def _(x, weight, masked, bits, bias, pattern, activation, want_z, way):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if want_z else y.new_empty(0)


@torch.library.custom_op("sparsedm::masked_linear_grads", mutates_args=())
def _masked_linear_grads(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    masked: torch.Tensor | None,
    bits: torch.Tensor | None,
    pattern: list[int],
    rates: list[float],
    want_dx: bool,
    want_dw: bool,
    way: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    N, K = weight.shape
    dz, x, weight, pattern = _rows(dz), _rows(x), _rows(weight), Pattern(*pattern)
    plain = rates == [0.0, 1.0, 1.0]

    def input_grad(config):
        if config["way"] == "library":
            return dz @ masked
        dx = torch.empty_like(x)
        w = masked if config["way"] == "masked" else weight
        kernels.launch_input_grad(dz, w, bits, pattern, dx, config)
        return dx

    def weight_grad(config):
        if config["way"] == "library":
            g = (dz.t() @ x).to(weight.dtype)
        elif config["SPLIT"] == 1:
            dw = torch.empty_like(weight)
            kernels.launch_weight_grad(dz, x, weight, bits, pattern, None if plain else rates, dw, config)
            return dw
        else:
            partial = x.new_empty(config["SPLIT"], N, K, dtype=torch.float32)
            kernels.launch_weight_grad(dz, x, weight, bits, pattern, None, partial, config)
            g = partial.sum(0).to(weight.dtype)
        if plain:
            return g
        mask = choose_mask_ref(weight, pattern) if bits is None else unpack_bits(bits, K)
        return apply_rates(g, weight, mask, *rates)

    dx, dw = x.new_empty(0), weight.new_empty(0)
    if want_dx:
        dx = _run_best(input_grad, _input_grad, kernels.INPUT_GRAD, way, x, weight, pattern)
    if want_dw:
        way = "fused" if way in WAYS[1:] else way
        dw = _run_best(weight_grad, _weight_grad, kernels.WEIGHT_GRAD, way, x, weight, pattern, plain=plain)
    return dx, dw


@_masked_linear_grads.register_fake
def _(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way):
    dx, dw = x.new_empty(x.shape if want_dx else 0), weight.new_empty(weight.shape if want_dw else 0)
    return dx, dw


class _MaskedLinear(torch.autograd.Function):
    """The two operators joined; torch.func accepts this form, and not yet what `torch.library` registers."""

    @staticmethod
    def forward(x, weight, masked, bits, bias, pattern, activation, rates, want_z, way):
        return _masked_linear(x, weight, masked, bits, bias, pattern, activation, want_z, way)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, masked, bits, bias, ctx.pattern, ctx.activation, ctx.rates, _, ctx.way = inputs
        ctx.save_for_backward(x, weight, masked, bits, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, masked, bits, z = ctx.saved_tensors
        want_dx, want_dw, _, _, want_db, *_ = ctx.needs_input_grad
        dz = _ACTIVATIONS[ctx.activation][1](dy, z)
        dx, dw = _MaskedLinearGrads.apply(
            dz, x, weight, masked, bits, ctx.pattern, ctx.rates, want_dx, want_dw, ctx.way
        )
        db = dz.sum(0, dtype=ctx.bias_dtype) if want_db else None
        return dx if want_dx else None, dw if want_dw else None, None, None, db, *[None] * 5


class _MaskedLinearGrads(torch.autograd.Function):
    @staticmethod
    def forward(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way):
        return _masked_linear_grads(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ddx, ddw):
        raise NotImplementedError("masked_linear has no second derivative where it runs as a kernel")


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def masked_linear(
    x,
    weight,
    pattern,
    bias=None,
    activation=None,
    *,
    masked=None,
    bits=None,
    decay=0.0,
    kept=1.0,
    dropped=1.0,
    way=None,
):
    """y = act(x @ (w*m)^T + b) with the gradients of the module docstring.

    x: (..., K), fp32, fp64, bf16 or fp16; under autocast of its dtype. weight: (N, K), floating; its gradient has its
    dtype. bias: (N,) or None. activation: None, "gelu" (erf), "gelu_tanh" or "silu". Returns (..., N) of x's dtype.
    masked, bits: of `choose_packed(weight, pattern, dtype of the product)`, kept by the caller as long as the weight
    stays as it is, or of any other mask; chosen here where they are missing. decay, kept, dropped: as in
    `straight_through`. way, on a GPU: None = as measured, or one of WAYS; "bits" and "choose" make no masked copy, and
    "choose" always follows the pattern.

    Gradients: x, weight, bias, once (the operator has no second derivative; on a CPU it is plain torch, and has).
    Raises: InputError for shapes, dtypes and devices that do not belong together, or an unknown way or activation.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        bias = bias if bias is None else bias.to(x.dtype)
    _check(x, weight, pattern, bias, activation, masked, bits, way)
    rates = [float(decay), float(kept), float(dropped)]
    by_kernel = uses_triton(x, weight, bias, masked, bits) and x.dtype != torch.float64 != weight.dtype
    needed = {"choose": (), "bits": ("bits",)}.get(way if by_kernel else None, ("masked", "bits"))
    if (masked is None and "masked" in needed) or (bits is None and "bits" in needed):
        masked, bits, *_ = choose_packed(weight, pattern, x.dtype)
    if not by_kernel:
        mask = unpack_bits(bits, weight.shape[1])
        straight = straight_through(weight, masked, mask, decay=decay, kept=kept, dropped=dropped)
        return _ACTIVATIONS[activation][0](F.linear(x, straight, bias))
    want_z = activation is not None and torch.is_grad_enabled()
    rows = x.reshape(-1, x.shape[-1])
    y, _ = _MaskedLinear.apply(
        rows, weight, masked, bits, bias, [pattern.keep, pattern.group], activation, rates, want_z, way
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, weight, pattern, bias, activation, masked, bits, way):
    check_weight(weight, pattern)
    N, K = weight.shape[:2]
    words = -(-K // 32)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != K:
        raise InputError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not share their last axis")
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, not {x.dtype}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise InputError(f"the bias must be ({N},) {x.dtype} as x is, not {tuple(bias.shape)} {bias.dtype}")
    if masked is not None and (masked.shape != (N, K) or masked.dtype != x.dtype):
        raise InputError(f"the masked weight must be ({N}, {K}) {x.dtype}, not {tuple(masked.shape)} {masked.dtype}")
    if bits is not None and (bits.shape != (N, words) or bits.dtype != torch.int32):
        raise InputError(f"the mask's bits must be ({N}, {words}) torch.int32, not {tuple(bits.shape)} {bits.dtype}")
    if activation not in _ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, _ACTIVATIONS))}")
    if way not in (None, *WAYS):
        raise InputError(f"unknown way {way!r}: it must be None or one of {', '.join(WAYS)}")
