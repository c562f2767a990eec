"""The straight-through estimator: the gradient of a weight w from the gradient of its masked copy.

    dw = kept*m*g + dropped*(1-m)*g + decay*(1-m)*w          g = dL/d(w*m), m: the mask of w

If kept = dropped = 1, dw is NOT masked: this is the straight-through estimator (STE). A pruned weight keeps learning
and may return. decay = 2e-4 is SR-STE (arXiv 2102.04010, eq. 6); dropped = 0 is the sparse gradient.
"""

from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend
from sparsedm.kernels.pattern import memory_format
from sparsedm.kernels.tracing import transformed


class GradientRule(NamedTuple):
    """dw = kept*m*g + dropped*(1-m)*g + decay*(1-m)*w, with the gradient g = dL/d(w*m) and the mask m of weight w."""

    decay: float = 0.0
    kept: float = 1.0
    dropped: float = 1.0


STE = GradientRule()


class _StraightThrough(torch.autograd.Function):
    """The form that torch.func and torch.compile can transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, masked, mask, rule, used):
        return masked.view_as(masked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, masked, mask, ctx.rule, ctx.used = inputs
        ctx.dtype, ctx.product_dtype = weight.dtype, masked.dtype
        if ctx.rule != STE:
            ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx, g):
        if ctx.used is not None:
            ctx.used()
        g = g.to(ctx.dtype)
        if ctx.rule != STE:
            g = apply_rule(g, *ctx.saved_tensors, ctx.rule)
        return g, None, None, None, None


class _ForwardStraightThrough(_StraightThrough):
    """The same with a forward derivative, with which dynamo cannot trace it."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _StraightThrough.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[2])

    @staticmethod
    def jvp(ctx, weight, *others):
        """Of a tangent of the weight: the transpose of `backward`, in which the decay is a constant."""
        if ctx.rule != STE:
            weight = apply_rule(weight, weight, ctx.saved_tensors[1], ctx.rule._replace(decay=0.0))
        return weight.to(ctx.product_dtype)


class _EagerStraightThrough(torch.autograd.Function):
    """The same in a form that costs a quarter per call; it matters in small layers."""

    @staticmethod
    def forward(ctx, *inputs):
        _StraightThrough.setup_context(ctx, inputs, None)
        return _StraightThrough.forward(*inputs)

    backward = _StraightThrough.backward


def apply_rule(g, weight, mask, rule):
    """dw by the formula above; all tensors of one shape, g in the weight's dtype."""
    decay, kept, dropped = rule
    if kept != 1.0 or dropped != 1.0:
        g = torch.where(mask, kept * g, dropped * g)
    if decay > 0 and _decays_in_c(g, weight, mask):
        return products.decay(g, weight, mask, decay)
    # not in one operation with alpha=decay: Inductor drops the alpha of sums that it fuses with a matmul
    return g + decay * weight.masked_fill(mask, 0) if decay else g


def _decays_in_c(g, weight, mask):
    """Whether `products.decay` can be called: on a CPU, on dense tensors in one order, without a second derivative."""
    if torch.is_grad_enabled() or forced_backend() in ("torch", "dense") or not rules.serves(g, weight):
        return False
    same = g.shape == weight.shape and g.stride() == weight.stride() == mask.stride()
    return same and mask.device == g.device and (g.is_contiguous() or memory_format(g) == torch.channels_last)


def check_masked(weight, masked, mask):
    """Raise InputError if they have different shapes, or the mask is not bool. mask: may be None."""
    given = [t for t in (weight, masked, mask) if t is not None]
    if any(t.shape != weight.shape for t in given):
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise InputError(f"weight, masked weight and mask must have one shape, not {shapes}")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"the mask must be bool, not {mask.dtype}")


def straight_through(weight, masked, mask, rule=STE, used=None):
    """The masked weight as a differentiable function of the weight, with the gradient dw above.

    weight: the dense weight, any shape. It gets the gradient, in its own dtype.
    masked: weight*mask, already computed, in any floating dtype; returned without a copy.
    mask:   bool, shape of the weight; may be None if the rule is STE, which does not read it. masked and mask get no
            gradient.
    rule:   GradientRule. The decay is added to the incoming gradient: under fp16 loss scaling multiply it by the scale.
    used:   a function that the backward calls, or None.

    Use: F.linear(x, straight_through(w, *select_mask(w, pattern)[:2]), b), or any other product with the weight.
    Raises: InputError if the shapes differ, or the mask is missing or not bool.
    """
    if mask is None and rule != STE:
        raise InputError(f"{rule} reads the mask, and mask is None: select_mask(...) gives one")
    check_masked(weight, masked, mask)
    function = _StraightThrough if transformed() else _EagerStraightThrough
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        function = _ForwardStraightThrough
    return function.apply(weight, masked, mask, rule, used)
