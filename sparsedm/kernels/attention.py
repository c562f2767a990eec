"""softmax(q k^T / sqrt(D)) v of all heads: torch's kernels, or on a CPU in inference the C kernel, which is quicker.

The C kernel reads q, k and v from where the projection has written them. It serves fp32 from some size on
(`cpu/rules.py`); SPARSEDM_BACKEND=torch or dense leaves everything to torch.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import register_flop_formula

from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend, operator


def _attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    if qkv.stride(-1) != 1:  # the kernel reads the columns of a head in a row
        qkv = qkv.contiguous()
    return products.attention(*_split(qkv, heads))


def _attention_fake(qkv, heads):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


_operator = operator("sparsedm::cpu_attention", _attention, _attention_fake)


@register_flop_formula(torch.ops.sparsedm.cpu_attention)
def _flops(qkv_shape, heads, *args, out_shape=None, **kwargs):
    B, L, columns = qkv_shape
    return 4 * B * L * L * (columns // 3)


def _split(qkv, heads):
    return rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=heads)


def self_attention(qkv, heads):
    """qkv (B, L, 3 H D), the rows q, k and v of all heads in turn -> (B, L, H D). heads: H."""
    q, k, v = _split(qkv, heads)
    inference = not (torch.is_grad_enabled() and qkv.requires_grad)
    if inference and forced_backend() not in ("torch", "dense") and rules.attention_serves(q):
        return _operator(qkv, heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
