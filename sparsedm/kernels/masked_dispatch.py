"""Whether a masked layer runs in the kernels of masked_matmul.py, or in torch on the pre-masked weight: as measured.

torch's way is right on every GPU, compiles well and has every derivative, so the kernels must earn their place. All
that a layer needs at a size (y; with a backward also dx and dw) is done both ways, the results must agree, and the
quicker is kept in the tuned table. What a table says is checked against torch once per process, too (see tuning.py), so
that a kernel that fails or errs on a new GPU is passed over.
"""

import torch
import torch.nn.functional as F

from sparsedm.kernels import masked_matmul, masked_matmul_kernels
from sparsedm.kernels.launch import forced_backend, uses_triton
from sparsedm.kernels.masked_matmul import ACTIVATIONS, transformed
from sparsedm.kernels.straight_through import apply_rates
from sparsedm.kernels.tuning import Autotuner, bucket

WAYS = [{"by": "torch"}, {"by": "kernels"}]

_tuner = Autotuner("masked linear layer", WAYS, [masked_matmul, masked_matmul_kernels])


def kernels_serve(weight):
    """Whether the kernels may be asked for: on a GPU, in eager code; what is compiled or exported, torch fuses."""
    if transformed() or weight.dtype == torch.float64 or forced_backend() == "dense":
        return False
    return uses_triton(weight)


def kernels_win(x, weight, pattern, bias, activation, masked, mask, bits, rates):
    """Whether `masked_linear` beats torch's product with the masked weight, for this layer at this size.

    x (..., K), weight (N, K), bias (N,) or None; masked (N, K) of the dtype of the product; mask (N, K) bool and bits,
    that mask packed; rates: [decay, kept, dropped] of `straight_through`. Measured once per size, and remembered; False
    where nothing may be measured (SPARSEDM_AUTOTUNE=off, or while a CUDA graph is captured) and no table has it.
    """
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if not x.numel() or not (x.dtype == masked.dtype or autocast) or not uses_triton(x, weight, bias):
        return False
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    rows, plain, pair = x.numel() // x.shape[-1], rates == [0.0, 1.0, 1.0], [pattern.keep, pattern.group]

    @torch.no_grad()
    def run(way):
        x_ = x.detach().reshape(rows, -1).to(masked.dtype)
        b = None if bias is None else bias.to(x_.dtype)
        if way["by"] == "kernels":
            want_z = training and activation is not None
            y, z = masked_matmul.forward_operator(x_, weight, masked, bits, b, pair, activation, want_z, None)
        else:
            z = F.linear(x_, masked, b)
            y = ACTIVATIONS[activation][0](z)
        if not training:
            return y
        dz = ACTIVATIONS[activation][1](y, z)  # y stands for the gradient that will arrive: it has its shape and dtype
        if way["by"] == "kernels":
            return y, *masked_matmul.gradient_operator(dz, x_, weight, masked, bits, pair, rates, True, True, None)
        g = (dz.t() @ x_).to(weight.dtype)
        return y, dz @ masked, g if plain else apply_rates(g, weight, mask, *rates)

    key = {"dtypes": f"{masked.dtype}<-{weight.dtype}", "pattern": pattern, "activation": activation, "plain": plain}
    key |= {"training": training, "m": bucket(rows), "n": len(weight), "k": weight.shape[1]}
    return _tuner.best(run, x.device, **key)["by"] == "kernels"
