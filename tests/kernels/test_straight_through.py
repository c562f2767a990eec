"""The straight-through estimator: the gradient of every rule, and torch's transformations of it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparsedm.errors import InputError
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.straight_through import GradientRule, straight_through
from tests.tolerance import assert_as_good_as_torch

HALF = Pattern(2, 4)
RULES = [GradientRule(), GradientRule(decay=0.25), GradientRule(kept=0.5, dropped=0.0, decay=2e-4)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (4, 8, 3, 3)], ids=str)
def test_the_gradient_is_the_formula(shape, rule):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    masked, mask, *_ = select_mask(weight, HALF, torch.float32)
    out = straight_through(weight, masked, mask, rule)
    g = torch.randn(shape)
    (dw,) = torch.autograd.grad(out, weight, g)
    decay, kept, dropped = rule
    m = mask.double()
    assert torch.equal(dw, kept * m * g.double() + dropped * (1 - m) * g.double() + decay * (1 - m) * weight)
    assert dw.dtype == torch.float64


def test_the_masked_weight_is_returned_without_a_copy_and_gets_no_gradient():
    weight = torch.randn(4, 8, requires_grad=True)
    masked, mask, *_ = select_mask(weight, HALF)
    out = straight_through(weight, masked.requires_grad_(), mask)
    assert out.data_ptr() == masked.data_ptr()
    assert not out.grad_fn.saved_tensors
    out.sum().backward()
    assert masked.grad is None
    assert torch.equal(weight.grad, torch.ones(4, 8))


def test_straight_through_refuses():
    weight = torch.randn(4, 8)
    masked, mask, *_ = select_mask(weight, HALF)
    with pytest.raises(InputError, match=r"one shape, not \(4, 8\), \(4, 4\), \(4, 8\)"):
        straight_through(weight, masked[:, :4], mask)
    with pytest.raises(InputError, match=r"one shape, not \(4, 8\), \(4, 8\), \(8,\)"):
        straight_through(weight, masked, mask[0])
    with pytest.raises(InputError, match=r"the mask must be bool, not torch.float32"):
        straight_through(weight, masked, mask.float())


def straight_loss(weight, x, rule):
    return F.linear(x, straight_through(weight, *select_mask(weight, HALF)[:2], rule)).square().sum()


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_straight_through_under_torchs_transformations(rule):
    weight, x = torch.randn(16, 8, requires_grad=True), torch.randn(5, 8)
    (expected,) = torch.autograd.grad(straight_loss(weight, x, rule), weight)
    assert torch.equal(torch.func.grad(straight_loss)(weight.detach(), x, rule), expected)
    compiled = torch.compile(straight_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(weight, x, rule), weight)[0], expected)
    torch._dynamo.reset()
    fused = torch.compile(straight_loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(fused(weight, x, rule), weight)[0], expected)
    again = checkpoint(straight_loss, weight, x, rule, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, weight)[0], expected)
    one_by_one = torch.func.vmap(torch.func.grad(straight_loss), (None, 0, None))(weight.detach(), x[:, None], RULES[0])
    (sum_of_all,) = torch.autograd.grad(straight_loss(weight, x, RULES[0]), weight)
    assert_as_good_as_torch(one_by_one.sum(0), sum_of_all.double(), sum_of_all, eps=1e-4)
