"""The best dense product of a CPU, for inference: oneDNN's where `rules.py` says that `F.linear` is slower."""

import torch
import torch.nn.functional as F

from sparsedm.kernels.cpu import rules


def linear(x, weight, bias):
    """x (..., K) @ weight (N, K)^T + bias (N,) or None. oneDNN reads the weight as it is: nothing is kept of it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    if rules.onednn_serves(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
