"""Masked training in fp32 on a CPU by the C kernels: the forward product, and dx where a rule says that it is faster.

dx needs no pattern along N: its kernel takes any number of weights per row.
"""

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library, products, rules
from sparsedm.kernels.pattern import memory_format
from sparsedm.kernels.straight_through import STE, apply_rule, check_masked, straight_through


def training_product(x, weight, selection, pattern, bias, rule=STE, used=None):
    """x @ (w*m)^T + bias of masked training by the C kernel; None if a frozen mask keeps too much, see `prepack`.

    Call it where `rules.training_serves` says so. x: (..., K). weight: (N, K), the dense one, which gets the gradient
    of `straight_through`; rule and used are as there. selection: the mask and the masked weight. bias: (N,) or None.
    The gradients are those of `F.linear`. The forward, and dx where a rule takes the C kernel, differ by rounding.
    """
    check_masked(weight, selection.masked, selection.mask)
    try:
        y = _TrainingProduct.apply(x, weight, bias, selection.masked, selection.mask, pattern, rule, used)
    except InputError:
        return None
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))  # no view inside, which refuses in-place changes


class _TrainingProduct(torch.autograd.Function):
    """Product and straight-through estimator in one: a Function costs as much as a product of 100 x 64 x 64."""

    @staticmethod
    def forward(ctx, x, weight, bias, masked, mask, pattern, rule, used):
        rows = x.reshape(-1, x.shape[-1])
        y = products.masked_linear(rows, masked, mask, pattern, bias)
        ctx.save_for_backward(x, masked, *(() if rule == STE else (weight, mask)))
        ctx.weight, ctx.rule, ctx.used = weight, rule, used  # not saved: the weight may change before the backward
        ctx.by_kernel = rules.gradient_pays(len(rows), *weight.shape, pattern)
        return y

    @staticmethod
    def backward(ctx, rows):
        x, masked, *rest = ctx.saved_tensors
        weight, mask = rest or (ctx.weight, None)
        if ctx.used is not None:
            ctx.used()
        if torch.is_grad_enabled():  # a second derivative may follow; it must not pass the hooks of the weight twice
            masked = straight_through(weight.view_as(weight), masked, mask, ctx.rule._replace(decay=0.0))
        want_dx, want_dw, want_db = ctx.needs_input_grad[:3]
        dw = rows.t() @ x.reshape(-1, x.shape[-1]) if want_dw else None
        if want_dw and ctx.rule != STE:
            dw = apply_rule(dw, weight, mask, ctx.rule)
        if want_dx and ctx.by_kernel and not torch.is_grad_enabled() and rules.serves(rows):
            dx = products.masked_gradient(rows, masked).view(x.shape)
        else:
            dx = (rows @ masked).view(x.shape) if want_dx else None
        return dx, dw, rows.sum(0) if want_db else None, *[None] * 5


def training_conv2d(x, weight, mask, pattern, bias, stride, padding, dilation):
    """`F.conv2d(x, weight, bias, stride, padding, dilation)` of masked training, as `training_product`.

    x: (B, C, H, W). weight: (N, C, kh, kw), masked, its gradient attached. y is in channels_last if x or weight is.
    """
    if not rules.conv_training_serves(x, weight, bias, pattern, stride, padding, dilation):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    geometry, width = (tuple(weight.shape[2:]), stride, padding), x.shape[3]
    halo = rules.halo_serves(*geometry, width, pattern.group, library.instruction_set())
    try:
        prepacked = products.prepack("halo" if halo else "conv", weight, mask, pattern, width)
    except InputError:  # as above
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    if memory_format(weight) == torch.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return _TrainingConv2d.apply(x, weight, bias, prepacked, pattern, geometry, halo)


class _TrainingConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, prepacked, pattern, geometry, halo):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return products.conv2d(x, prepacked, pattern, len(weight), geometry, bias=bias, halo=halo)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), (_, stride, padding), wanted = ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3]
        rest = [len(weight)], stride, padding, (1, 1), False, (0, 0), 1, wanted
        return *torch.ops.aten.convolution_backward(dy, x, weight, *rest), None, None, None, None
