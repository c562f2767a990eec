"""softmax(q k^T / sqrt(D)) v of all heads: torch's kernels, or the faster C kernel on a CPU in inference.

The C kernel reads q, k and v directly from the projection's output. `cpu/rules.py` says for which fp32 sizes it is
used; SPARSEDM_BACKEND=torch or dense turns it off.

Training in bf16 on a CPU attends in fp32: the backward of torch's own kernel packs no bf16 operands there, and is up to
6 times as slow as in fp32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import register_flop_formula

from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend
from sparsedm.kernels.tracing import operator

# Up to so many tokens. fp32 against bf16, forward and backward: 5 times as fast at 66 tokens, equal at 258, up to 1.8
# times slower at 512 (torch 2.13, a Xeon with AMX, one thread). On a Zen 5 steps at 66 tokens are 1.9 times as fast.
FP32_TOKENS = 256


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
    if not inference and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= FP32_TOKENS:
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return rearrange(y, "b h l d -> b l (h d)")
