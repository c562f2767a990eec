"""Masked matmul for N:M training: y = act(x @ (w*m)^T + b), with the straight-through gradient of the weight.

x (..., K), w (N, K), m the N:M mask of w, y (..., N). With z = x @ (w*m)^T + b, dz = dy * act'(z) and g = dz^T @ x

    dx = dz @ (w*m)      db = sum of dz over the tokens      dw: see `straight_through.py`

On a GPU (sm_80 and later; bf16, fp16, fp32) each of the three products has these algorithms, timed once per size:
    library  torch's matmul on the masked weight; the default until another one is measured to be faster
    masked   a kernel of masked_matmul_kernels.py on the masked weight, with bias and activation in its epilogue
    bits     the same on the dense weight and the packed mask; no masked copy is needed
If `library` is best for all three products, and on other devices, plain torch computes.
"""

import functools

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels import masked_matmul_kernels as kernels
from sparsedm.kernels.launch import forced_backend, uses_triton
from sparsedm.kernels.mask import Selection, select_mask
from sparsedm.kernels.pattern import check_weight, pack_bits, select_mask_ref, unpack_bits
from sparsedm.kernels.straight_through import STE, GradientRule, apply_rule, straight_through
from sparsedm.kernels.tracing import autocast_dtype, transformed
from sparsedm.kernels.tuning import Autotuner, bucket

ACTIVATIONS = {  # name: (activation, its gradient from dy and z)
    None: (lambda z: z, lambda dy, z: dy),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dy, z: torch.ops.aten.gelu_backward(dy, z, approximate="tanh"),
    ),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}
ALGORITHMS = ("library", "masked", "bits")


def masked_linear_ref(x, weight, pattern, bias=None, activation=None, rule=STE):
    """The specification: the mask by its definition, torch's product, the gradient of `straight_through`."""
    mask = select_mask_ref(weight, pattern)
    masked = torch.where(mask, weight.detach(), 0)
    return ACTIVATIONS[activation][0](F.linear(x, straight_through(weight, masked, mask, rule), bias))


# ---- the three products, each by the algorithm that was measured to be the best --------------------------------------

_forward = Autotuner("masked_linear forward", kernels.FORWARD, kernels.KERNELS)
_input_grad = Autotuner("masked_linear input gradient", kernels.INPUT_GRAD, kernels.KERNELS)
_weight_grad = Autotuner("masked_linear weight gradient", kernels.WEIGHT_GRAD, kernels.KERNELS)


def _best(tuner, configs, run, algorithm, x, weight, **key):
    """The first config of the requested algorithm, else the tuner's best."""
    if algorithm is None and forced_backend() == "dense":
        algorithm = "library"
    if algorithm is not None:
        return next(config for config in configs if config["algorithm"] == algorithm)
    (N, K), dtypes = weight.shape, f"{'tf32' if kernels.takes_tf32(x.dtype) else x.dtype}<-{weight.dtype}"
    return tuner.best(run, x.device, dtypes=dtypes, **key, m=bucket(x.shape[0]), n=N, k=K)


def _forward_product(x, weight, masked, bits, bias, activation, want_z, algorithm):
    """(run(config) -> y, z; the config to run)"""

    def run(config):
        if config["algorithm"] == "library":
            z = F.linear(x, masked, bias)
            y = ACTIVATIONS[activation][0](z)
            return (y, z) if want_z else (y, z.new_empty(0))
        y = x.new_empty(x.shape[0], weight.shape[0])
        z = torch.empty_like(y) if want_z else y.new_empty(0)
        operands = (masked, None) if config["algorithm"] == "masked" else (weight, bits)
        kernels.launch_forward(x, *operands, bias, activation, y, z if want_z else None, config)
        return y, z

    key = {"activation": activation, "z": want_z}
    return run, _best(_forward, kernels.FORWARD, run, algorithm, x, weight, **key)


def _input_product(dz, x, weight, masked, bits, algorithm):
    """(run(config) -> dx; the config to run). dz: a function that returns it."""

    def run(config):
        if config["algorithm"] == "library":
            return dz() @ masked
        dx = torch.empty_like(x)
        operands = (masked, None) if config["algorithm"] == "masked" else (weight, bits)
        kernels.launch_input_grad(dz(), *operands, dx, config)
        return dx

    return run, _best(_input_grad, kernels.INPUT_GRAD, run, algorithm, x, weight)


def _weight_product(dz, x, weight, bits, rule, algorithm):
    """(run(config) -> dw; the config to run). dz: a function that returns it."""
    (N, K), plain = weight.shape, rule == STE

    def run(config):
        if config["algorithm"] == "library":
            g = (dz().t() @ x).to(weight.dtype)
        elif config["SPLIT"] == 1:
            dw = torch.empty_like(weight)
            kernels.launch_weight_grad(dz(), x, weight, None if plain else bits, rule, dw, config)
            return dw
        else:
            partial = x.new_empty(config["SPLIT"], N, K, dtype=torch.float32)
            kernels.launch_weight_grad(dz(), x, weight, None, rule, partial, config)
            g = partial.sum(0).to(weight.dtype)
        return g if plain else apply_rule(g, weight, unpack_bits(bits, K), rule)

    algorithm = "fused" if algorithm in ("masked", "bits") else algorithm
    return run, _best(_weight_grad, kernels.WEIGHT_GRAD, run, algorithm, x, weight, plain=plain)


def _is_best_in_torch(x, weight, masked, bits, bias, activation, rule):
    """Whether torch's matmul is the fastest measured algorithm in every product of this call and its backward."""
    training = torch.is_grad_enabled()
    wanted = [training and t.requires_grad for t in (x, weight)]
    with torch.no_grad(), torch.cuda.device_of(x):
        x, weight = _rows(x), _rows(weight)
        want_z = training and activation is not None
        run, config = _forward_product(x, weight, masked, bits, bias, activation, want_z, None)
        dz = functools.cache(lambda: run(kernels.FORWARD[0])[0])  # y stands for the gradient that will arrive
        configs = [config]
        if wanted[0]:
            configs.append(_input_product(dz, x, weight, masked, bits, None)[1])
        if wanted[1]:
            configs.append(_weight_product(dz, x, weight, bits, rule, None)[1])
    return all(config["algorithm"] == "library" for config in configs)


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@torch.library.custom_op("sparsedm::masked_linear", mutates_args=())
def forward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    masked: torch.Tensor,
    bits: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    want_z: bool,
    algorithm: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):  # Triton launches on the current device
        run, config = _forward_product(_rows(x), _rows(weight), masked, bits, bias, activation, want_z, algorithm)
        return run(config)


@forward_operator.register_fake
def _(x, weight, masked, bits, bias, activation, want_z, algorithm):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if want_z else y.new_empty(0)


@torch.library.custom_op("sparsedm::masked_linear_grads", mutates_args=())
def gradient_operator(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    masked: torch.Tensor,
    bits: torch.Tensor,
    rule: list[float],
    want_dx: bool,
    want_dw: bool,
    algorithm: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dz, x, weight = _rows(dz), _rows(x), _rows(weight)
    dx, dw = x.new_empty(0), weight.new_empty(0)
    with torch.cuda.device_of(x):
        if want_dx:
            run, config = _input_product(lambda: dz, x, weight, masked, bits, algorithm)
            dx = run(config)
        if want_dw:
            run, config = _weight_product(lambda: dz, x, weight, bits, GradientRule(*rule), algorithm)
            dw = run(config)
    return dx, dw


@gradient_operator.register_fake
def _(dz, x, weight, masked, bits, rule, want_dx, want_dw, algorithm):
    return x.new_empty(x.shape if want_dx else 0), weight.new_empty(weight.shape if want_dw else 0)


class _MaskedLinear(torch.autograd.Function):
    """The two operators as one Function: torch.func accepts this form, but not yet operators of `torch.library`.

    If a second derivative may follow (create_graph=True), plain torch computes the first one.
    """

    @staticmethod
    def forward(x, weight, masked, bits, bias, activation, rule, want_z, algorithm, used):
        return forward_operator(x, weight, masked, bits, bias, activation, want_z, algorithm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, masked, bits, bias, ctx.activation, ctx.rule, _, ctx.algorithm, ctx.used = inputs
        ctx.save_for_backward(x, weight, masked, bits, bias, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        x, weight, masked, bits, bias, z = ctx.saved_tensors
        want_dx, want_dw, _, _, want_db, *_ = ctx.needs_input_grad
        if ctx.used is not None:
            ctx.used()
        if torch.is_grad_enabled() and not transformed():
            mask = unpack_bits(bits, weight.shape[1])
            weight = weight.view_as(weight)  # hooks of the weight itself run where the caller's gradient arrives
            y = _in_torch(x, weight, masked, mask, bias, ctx.activation, ctx.rule._replace(decay=0.0))
            wanted = [t for t, want in ((x, want_dx), (weight, want_dw), (bias, want_db)) if want]
            gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            dx, dw, db = (next(gradients) if want else None for want in (want_dx, want_dw, want_db))
            if want_dw:  # the decay is added here, or the second backward would pass two places that add it
                dw = apply_rule(dw, weight, mask, GradientRule(ctx.rule.decay))
            return dx, dw, None, None, db, *[None] * 5
        dz = ACTIVATIONS[ctx.activation][1](dy, z)
        dx, dw = _MaskedLinearGrads.apply(dz, x, weight, masked, bits, ctx.rule, want_dx, want_dw, ctx.algorithm)
        db = dz.sum(0, dtype=bias.dtype) if want_db else None
        return dx if want_dx else None, dw if want_dw else None, None, None, db, *[None] * 5


class _MaskedLinearGrads(torch.autograd.Function):
    @staticmethod
    def forward(dz, x, weight, masked, bits, rule, want_dx, want_dw, algorithm):
        return gradient_operator(dz, x, weight, masked, bits, list(rule), want_dx, want_dw, algorithm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ddx, ddw):
        raise NotImplementedError("masked_linear has no second derivative under torch.func where it runs as a kernel")


def _in_torch(x, weight, masked, mask, bias, activation, rule, used=None):
    """The same in torch operations, which can be differentiated any number of times."""
    return ACTIVATIONS[activation][0](F.linear(x, straight_through(weight, masked, mask, rule, used), bias))


# ---- the public function ---------------------------------------------------------------------------------------------


def kernels_serve(weight):
    """Whether the kernels may be used: on a GPU, in eager code. torch fuses compiled and exported code."""
    if transformed() or weight.dtype == torch.float64 or forced_backend() == "dense":
        return False
    return uses_triton(weight)


def masked_linear(
    x, weight, pattern, bias=None, activation=None, *, selection=None, rule=STE, algorithm=None, used=None
):
    """y = act(x @ (w*m)^T + b) with the gradients of the module docstring.

    x: (..., K), fp32, fp64, bf16 or fp16; under autocast of its dtype. weight: (N, K), floating; its gradient has its
    dtype. bias: (N,) or None. activation: None, "gelu" (erf), "gelu_tanh" or "silu". Returns (..., N) of x's dtype.
    selection: the result of `select_mask(weight, pattern, dtype of the product)`, or another mask in this form; None:
    it is made here. rule: GradientRule. algorithm (on a GPU): None: the fastest measured one; or one of ALGORITHMS.
    used: a function that the backward calls, or None.

    Gradients: x, weight, bias, any number of times (once under torch.func if a kernel computes it).
    Raises: InputError for shapes, dtypes and devices that do not fit together, an unknown algorithm or activation.
    """
    if autocast := autocast_dtype(x.device):  # which leaves fp64 alone, as torch's does
        x, bias = (t if t is None or t.dtype == torch.float64 else t.to(autocast) for t in (x, bias))
    _check(x, weight, pattern, bias, activation, selection, algorithm)
    by_kernel = uses_triton(x, weight, bias, *(selection or ())) and x.dtype != torch.float64 != weight.dtype
    if selection is None:
        selection = select_mask(weight, pattern, x.dtype, bits=by_kernel)
    masked, mask, bits, *_ = selection
    if by_kernel and bits is None:
        bits = pack_bits(mask)
    rows = x.reshape(-1, x.shape[-1])
    if by_kernel and algorithm is None and not transformed():
        by_kernel = len(rows) > 0 and not _is_best_in_torch(rows, weight, masked, bits, bias, activation, rule)
    if not by_kernel:
        return _in_torch(x, weight, masked, mask, bias, activation, rule, used)
    want_z = activation is not None and torch.is_grad_enabled()
    y, _ = _MaskedLinear.apply(rows, weight, masked, bits, bias, activation, rule, want_z, algorithm, used)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x, weight, pattern, bias, activation, selection, algorithm):
    check_weight(weight, pattern)
    N, K = weight.shape[:2]
    words = -(-K // 32)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != K:
        raise InputError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not share their last axis")
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, not {x.dtype}")
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise InputError(f"the bias must be ({N},) {x.dtype} as x is, not {tuple(bias.shape)} {bias.dtype}")
    masked, _, bits, *_ = selection or Selection(None)
    if masked is not None and (masked.shape != (N, K) or masked.dtype != x.dtype):
        found = f"{tuple(masked.shape)} {masked.dtype}"
        raise InputError(f"the masked weight must be ({N}, {K}) in x's dtype {x.dtype}, not {found}")
    if bits is not None and (bits.shape != (N, words) or bits.dtype != torch.int32):
        raise InputError(f"the mask's bits must be ({N}, {words}) torch.int32, not {tuple(bits.shape)} {bits.dtype}")
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}: it must be one of {', '.join(map(str, ACTIVATIONS))}")
    if algorithm not in (None, *ALGORITHMS):
        raise InputError(f"unknown algorithm {algorithm!r}: it must be None or one of {', '.join(ALGORITHMS)}")
