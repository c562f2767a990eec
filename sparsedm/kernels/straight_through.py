"""The masked weight as a differentiable function of the weight: the straight-through estimator and its variants.

With w the dense weight, m its mask and g = dL/d(w*m)

    dw = kept*m*g + dropped*(1-m)*g + decay*(1-m)*w

dw is NOT masked when kept = dropped = 1: that is the straight-through estimator (STE), by which a pruned weight keeps
learning and may come back. decay = 2e-4 is SR-STE (arXiv 2102.04010, eq. 6); dropped = 0 is the sparse gradient.
"""

import torch

from sparsedm.errors import InputError


class _StraightThrough(torch.autograd.Function):
    """In the form that torch.func and torch.compile can transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, masked, mask, decay, kept, dropped):
        return masked.view_as(masked)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, masked, mask, *ctx.rates = inputs
        ctx.dtype = weight.dtype
        if ctx.rates != [0.0, 1.0, 1.0]:
            ctx.save_for_backward(weight, masked, mask)

    @staticmethod
    def backward(ctx, g):
        g = g.to(ctx.dtype)
        if ctx.rates != [0.0, 1.0, 1.0]:
            weight, masked, mask = ctx.saved_tensors
            g = apply_rates(g, weight, mask, *ctx.rates, masked=masked)
        return g, None, None, None, None, None


class _EagerStraightThrough(torch.autograd.Function):
    """The same in the form whose call costs a quarter of that, which counts in small layers."""

    @staticmethod
    def forward(ctx, *inputs):
        _StraightThrough.setup_context(ctx, inputs, None)
        return _StraightThrough.forward(*inputs)

    backward = _StraightThrough.backward


def apply_rates(g, weight, mask, decay, kept, dropped, masked=None):
    """dw by the formula above; all tensors of one shape, g in the weight's dtype. masked: weight*mask, if known."""
    if kept != 1.0 or dropped != 1.0:
        g = torch.where(mask, kept * g, dropped * g)
    if not decay:
        return g
    if masked is not None and masked.dtype == weight.dtype and not torch.is_grad_enabled():
        return torch.add(g, weight - masked, alpha=decay)  # half the time; exact, but its own derivative would be wrong
    return torch.addcmul(g, weight, (~mask).to(weight.dtype), value=decay)


def straight_through(weight, masked, mask, *, decay=0.0, kept=1.0, dropped=1.0):
    """The masked weight as a differentiable function of the weight, by the rule above: dL/dw = dw.

    weight: the dense master weight, any shape, gets the gradient, in its own dtype.
    masked: weight*mask, already computed and in any floating dtype; returned as it is (no copy is made).
    mask:   bool, shape of the weight. Neither masked nor mask gets a gradient.
    decay:  SR-STE rate; it is added to the gradient as it arrives, so under fp16 loss scaling multiply it by the scale.
    kept, dropped: multipliers of the gradient at kept and at pruned entries.

    Use: F.linear(x, straight_through(w, *choose(w, pattern)), b), or F.conv2d, or any other product with the weight.
    Raises: InputError if the shapes differ or the mask is not bool.
    """
    if not weight.shape == masked.shape == mask.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, masked, mask))
        raise InputError(f"weight, masked weight and mask must have one shape, not {shapes}")
    if mask.dtype != torch.bool:
        raise InputError(f"the mask must be bool, not {mask.dtype}")
    inputs = (weight, masked, mask, float(decay), float(kept), float(dropped))
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return (_StraightThrough if transformed else _EagerStraightThrough).apply(*inputs)
