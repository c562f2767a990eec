"""Masked matmul for N:M training: y = act(x @ (w*m)^T + b), with the straight-through gradient of the weight.

x (..., K), w (N, K), m the N:M mask of w, y (..., N). With z = x @ (w*m)^T + b, dz = dy * act'(z) and g = dz^T @ x

    dx = dz @ (w*m)      db = sum of dz over the tokens      dw = kept*m*g + dropped*(1-m)*g + decay*(1-m)*w

The rule of dw is that of straight_through.py (STE, SR-STE, sparse gradient); dw is not masked. On a GPU (sm_80 and
later; bf16, fp16, fp32) this is one operator with its backward; each of its three products runs in one of these ways:
    library  torch's matmul on the masked weight; the default until something quicker has been measured for the shape
    masked   a kernel of masked_matmul_kernels.py on the masked weight, with bias and activation in its epilogue
    bits     the same on the dense weight and the packed mask; no masked copy is needed
    choose   the same, choosing the mask tile by tile in registers; only when asked for
Anywhere else it is plain torch. Whether a layer calls it at all is decided in masked_dispatch.py.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels import masked_matmul_kernels as kernels
from sparsedm.kernels.launch import autocast_dtype, forced_backend, uses_triton
from sparsedm.kernels.mask import choose, choose_packed
from sparsedm.kernels.pattern import Pattern, check_weight, choose_mask_ref, unpack_bits
from sparsedm.kernels.straight_through import apply_rates, straight_through
from sparsedm.kernels.tuning import Autotuner, bucket

__all__ = ["choose", "masked_linear", "masked_linear_ref", "straight_through"]

ACTIVATIONS = {  # name: (activation, its gradient from dy and z)
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
    return ACTIVATIONS[activation][0](F.linear(x, straight_through(weight, masked, mask, **rates), bias))


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
    (N, K), dtypes = weight.shape, f"{x.dtype}<-{weight.dtype}"
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if way is not None:
            return run(next(config for config in configs if config["way"] == way))
        return run(tuner.best(run, x.device, dtypes=dtypes, pattern=pattern, **key, m=bucket(x.shape[0]), n=N, k=K))


@torch.library.custom_op("sparsedm::masked_linear", mutates_args=())
def forward_operator(
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
            y = ACTIVATIONS[activation][0](z)
            return (y, z) if want_z else (y, z.new_empty(0))
        y = x.new_empty(x.shape[0], weight.shape[0])
        z = torch.empty_like(y) if want_z else y.new_empty(0)
        w = masked if config["way"] == "masked" else weight
        kernels.launch_forward(x, w, bits, bias, Pattern(*pattern), activation, y, z if want_z else None, config)
        return y, z

    key = {"activation": activation, "z": want_z}
    return _run_best(run, _forward, kernels.FORWARD, way, x, weight, Pattern(*pattern), **key)


@forward_operator.register_fake
def _(x, weight, masked, bits, bias, pattern, activation, want_z, way):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if want_z else y.new_empty(0)


@torch.library.custom_op("sparsedm::masked_linear_grads", mutates_args=())
def gradient_operator(
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


@gradient_operator.register_fake
def _(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way):
    dx, dw = x.new_empty(x.shape if want_dx else 0), weight.new_empty(weight.shape if want_dw else 0)
    return dx, dw


class _MaskedLinear(torch.autograd.Function):
    """The two operators joined; torch.func accepts this form, and not yet what `torch.library` registers.

    Where a second derivative may follow (create_graph=True), the first one is computed in plain torch, which has it.
    """

    @staticmethod
    def forward(x, weight, masked, bits, bias, pattern, activation, rates, want_z, way):
        return forward_operator(x, weight, masked, bits, bias, pattern, activation, want_z, way)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, masked, bits, bias, ctx.pattern, ctx.activation, ctx.rates, _, ctx.way = inputs
        ctx.save_for_backward(x, weight, masked, bits, bias, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, masked, bits, bias, z = ctx.saved_tensors
        want_dx, want_dw, _, _, want_db, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() and not transformed():
            pattern, (decay, kept, dropped) = Pattern(*ctx.pattern), ctx.rates
            y = _in_torch(x, weight, pattern, bias, ctx.activation, masked, bits, 0.0, kept, dropped)
            wanted = [t for t, want in ((x, want_dx), (weight, want_dw), (bias, want_db)) if want]
            gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            dx, dw, db = (next(gradients) if want else None for want in (want_dx, want_dw, want_db))
            if want_dw:  # the decay is added here, or the second backward would pass two places that add it
                mask = choose(weight, pattern)[1] if bits is None else unpack_bits(bits, weight.shape[1])
                dw = apply_rates(dw, weight, mask, decay, 1.0, 1.0)
            return dx, dw, None, None, db, *[None] * 5
        dz = ACTIVATIONS[ctx.activation][1](dy, z)
        dx, dw = _MaskedLinearGrads.apply(
            dz, x, weight, masked, bits, ctx.pattern, ctx.rates, want_dx, want_dw, ctx.way
        )
        db = dz.sum(0, dtype=bias.dtype) if want_db else None
        return dx if want_dx else None, dw if want_dw else None, None, None, db, *[None] * 5


class _MaskedLinearGrads(torch.autograd.Function):
    @staticmethod
    def forward(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way):
        return gradient_operator(dz, x, weight, masked, bits, pattern, rates, want_dx, want_dw, way)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ddx, ddw):
        raise NotImplementedError("masked_linear has no second derivative under torch.func where it runs as a kernel")


def transformed():
    """Whether this runs inside a graph that is being compiled or exported, or under torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _in_torch(x, weight, pattern, bias, activation, masked, bits, decay, kept, dropped):
    """The same in operations of torch, every one of which can be differentiated any number of times."""
    mask = choose(weight, pattern)[1] if bits is None else unpack_bits(bits, weight.shape[1])
    if masked is None:
        masked = torch.where(mask, weight.detach(), 0).to(x.dtype)
    straight = straight_through(weight, masked, mask, decay=decay, kept=kept, dropped=dropped)
    return ACTIVATIONS[activation][0](F.linear(x, straight, bias))


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

    Gradients: x, weight, bias, any number of times (under torch.func once, where it runs as a kernel).
    Raises: InputError for shapes, dtypes and devices that do not belong together, or an unknown way or activation.
    """
    if autocast := autocast_dtype(x.device):
        x, bias = x.to(autocast), bias if bias is None else bias.to(autocast)
    _check(x, weight, pattern, bias, activation, masked, bits, way)
    rates = [float(decay), float(kept), float(dropped)]
    by_kernel = uses_triton(x, weight, bias, masked, bits) and x.dtype != torch.float64 != weight.dtype
    needed = {"choose": (), "bits": ("bits",)}.get(way if by_kernel else None, ("masked", "bits"))
    if (masked is None and "masked" in needed) or (bits is None and "bits" in needed):
        masked, bits, *_ = choose_packed(weight, pattern, x.dtype)
    if not by_kernel:
        return _in_torch(x, weight, pattern, bias, activation, masked, bits, *rates)
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
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, ACTIVATIONS))}")
    if way not in (None, *WAYS):
        raise InputError(f"unknown way {way!r}: it must be None or one of {', '.join(WAYS)}")
