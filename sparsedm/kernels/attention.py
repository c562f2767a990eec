"""softmax(q k^T / sqrt(D)) v of all heads: torch's kernels, or the faster C kernel on a CPU in inference.

The C kernel reads q, k and v directly from the projection's output. `cpu/rules.py` says for which fp32 sizes it is
used; SPARSEDM_BACKEND=torch or dense turns it off.

Training in bf16 on a CPU uses two products and an fp32 softmax: the backward of torch's own kernel packs no operands
there and is 6 times as slow as in fp32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import register_flop_formula

from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend, operator

# Up to so many, training in bf16 on a CPU holds all products of q and k. Whole steps of a U-ViT with 18 and 66 tokens
# were 2.3 times as quick by it (torch 2.13, Zen 5, one thread); far above, what is held is more than the rest.
PRODUCT_TOKENS = 512


def _attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    if qkv.stride(-1) != 1:  # the kernel needs the columns of a head side by side
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
    bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    by_products = not inference and bf16_on_cpu and q.shape[2] <= PRODUCT_TOKENS
    y = _attention_by_products(q, k, v) if by_products else F.scaled_dot_product_attention(q, k, v)
    return rearrange(y, "b h l d -> b l (h d)")


def _attention_by_products(q, k, v):
    """q, k, v (B, H, L, D) -> (B, H, L, D); the softmax is computed in fp32."""
    heads = q.shape[:2]
    q, k, v = (z.flatten(0, 1) for z in (q * q.shape[-1] ** -0.5, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).float().softmax(-1).to(v.dtype)  # (B H, L, L)
    return torch.bmm(weights, v).unflatten(0, heads)
