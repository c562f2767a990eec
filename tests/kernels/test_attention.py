"""Attention as training calls it; in inference: `test_cpu.py`."""

import pytest
import torch
import torch.nn.functional as F

from sparsedm.kernels import attention
from tests.tolerance import assert_as_good_as_torch


def gradient(qkv, heads, through):
    """(y, dL/dqkv) with the gradient of y drawn by a rule."""
    qkv = qkv.clone().requires_grad_()
    y = through(qkv, heads)
    y.backward(torch.linspace(-1, 1, y.numel()).sin().view_as(y).to(y.dtype))
    return y, qkv.grad


def by_torch(qkv, heads):
    q, k, v = attention._split(qkv, heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("peaked", [1, 3, 10])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 66, 4, 128), (3, 18, 2, 24), (1, 1, 1, 8)])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_in_bf16_on_a_cpu_is_as_exact_as_torchs_attention(
    batch, tokens, heads, width, peaked, autocast, monkeypatch
):
    """peaked: the factor of q and k, so that softmax turns into a choice."""
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * width)
    qkv[..., : 2 * width] *= peaked
    qkv = qkv.bfloat16()
    called, torchs = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: called.append(qkv[0].dtype) or torchs(*qkv))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = gradient(qkv, heads, attention.self_attention)
    assert called == [torch.float32], "the backward of bf16 is slow"
    monkeypatch.undo()
    exact, usual = gradient(qkv.double(), heads, by_torch), gradient(qkv, heads, by_torch)
    for out, high, low in zip(ours, exact, usual):
        assert out.dtype == torch.bfloat16
        assert_as_good_as_torch(out, high, low)


def test_long_rows_and_other_precisions_are_left_to_torch():
    long = torch.randn(1, attention.FP32_TOKENS + 1, 24).bfloat16()
    for qkv in (long, torch.randn(1, 4, 24), torch.randn(1, 4, 24).half()):
        assert torch.equal(gradient(qkv, 2, attention.self_attention)[1], gradient(qkv, 2, by_torch)[1])
